"""The timestep table as a file: what it gives back, and that broken and hostile ones are refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest

from linocut.errors import FormatError, ModelNotFoundError
from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.formats.timestep_table import VECTORS, TimestepTable, has_table, table_tensors

WIDTH = 8
SIGMAS = [1.0, 0.9, 0.75, 0.5, 0.25]
SCHEDULES = {(256, 3): [1.0, 0.75, 0.25], (1024, 2): [0.9, 0.5], (16, 1): [1.0]}


def tensors() -> dict[str, np.ndarray]:
    rows = np.arange(len(SIGMAS) * VECTORS * WIDTH, dtype=np.float32).reshape(len(SIGMAS), VECTORS, WIDTH)
    return table_tensors(SCHEDULES, SIGMAS, rows)


def opened(path: Path, **changes: np.ndarray | None) -> TimestepTable:
    """The table after some of its tensors were replaced, or left out (None)."""
    arrays = {name: array for name, array in (tensors() | changes).items() if array is not None}
    write_checkpoint(path / "table.safetensors", arrays)
    return TimestepTable.open(path / "table.safetensors")


def test_schedules_give_their_rows(tmp_path: Path) -> None:
    table, whole = opened(tmp_path), tensors()["modulations"]
    assert table.width == WIDTH
    assert set(table.schedules) == set(SCHEDULES)
    for (tokens, steps), sigmas in SCHEDULES.items():
        assert table.sigmas[table.schedules[tokens, steps]].tolist() == [np.float32(sigma) for sigma in sigmas]
        assert np.array_equal(table.rows(tokens, steps), whole[[SIGMAS.index(sigma) for sigma in sigmas]])
    with Checkpoint.open(tmp_path / "table.safetensors") as checkpoint:
        assert checkpoint.verify() == 4  # every tensor has its SHA-256


def changed(name: str, index: int | tuple[int, ...], value: float) -> np.ndarray:
    array = tensors()[name].copy()
    array[index] = value
    return array


@pytest.mark.parametrize(("changes", "message"), [
    ({"sigmas": None}, "'sigmas': no such tensor"),
    ({"modulations": None}, "'modulations': no such tensor"),
    ({"other": np.zeros(1, np.float32)}, "malformed.*other"),
    ({"modulations": tensors()["modulations"][:4]}, r"modulations.*\[5, 17, 8\].*\[4, 17, 8\]"),
    ({"modulations": tensors()["modulations"][:, :16]}, r"\[5, 17, 8\].*\[5, 16, 8\]"),
    ({"modulations": tensors()["modulations"].astype(np.float16)}, "F32.*F16"),
    ({"modulations": np.float32(1)}, "malformed.*modulations"),
    ({"sigmas": tensors()["sigmas"][:, None]}, r"sigmas.*\[5\].*\[5, 1\]"),
    ({"sigmas": np.zeros(0, np.float32), "modulations": np.zeros((0, VECTORS, WIDTH), np.float32)}, "0 rows"),
    ({"schedules": np.zeros((0, 2), np.int32), "levels": np.zeros(0, np.int32)}, "rows for 0"),
    ({"schedules": tensors()["schedules"].astype(np.int64)}, "I32.*I64"),
    ({"sigmas": changed("sigmas", 2, 0.95)}, "strictly falling"),
    ({"sigmas": changed("sigmas", 1, np.nan)}, "strictly falling"),
    ({"sigmas": changed("sigmas", 0, 1.5)}, "strictly falling"),
    ({"sigmas": changed("sigmas", 4, 0)}, "strictly falling"),
    ({"levels": changed("levels", 0, 5)}, r"levels.*0\.\.4"),
    ({"levels": changed("levels", 0, -1)}, r"levels.*0\.\.4"),
    ({"levels": changed("levels", 2, 0)}, "levels.*rising"),
    ({"levels": tensors()["levels"][:-1]}, "levels.*a row number for every step"),
    ({"levels": np.append(tensors()["levels"], np.int32(1))}, "levels.*6 numbers, one for every step"),
    ({"schedules": changed("schedules", (0, 1), 0)}, r"schedules.*\[16, 0\]"),
    ({"schedules": changed("schedules", (0, 0), -1)}, r"schedules.*\[-1, 1\]"),
    ({"schedules": changed("schedules", (2, 1), 2**31 - 1)}, "schedules.*steps"),
    ({"schedules": np.array([[16, 1], [16, 1], [1024, 2]], np.int32), "levels": np.array([0, 0, 1, 3], np.int32)},
     r"each pair.*\[16, 1\]"),
])
def test_a_malformed_table_is_refused_when_it_is_opened(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        opened(tmp_path, **changes)


def test_numbers_that_are_none_are_refused_when_they_are_used_or_verified(tmp_path: Path) -> None:
    table = opened(tmp_path, modulations=changed("modulations", (1, 3, 2), np.inf))
    assert np.isfinite(table.rows(256, 3)).all()  # other rows are sound
    with pytest.raises(FormatError, match=r"modulations.*finite"):
        table.rows(1024, 2)
    with Checkpoint.open(tmp_path / "table.safetensors") as checkpoint, pytest.raises(FormatError, match="not finite"):
        checkpoint.verify()


def test_a_truncated_or_missing_file_is_refused(tmp_path: Path) -> None:
    opened(tmp_path)
    file = tmp_path / "table.safetensors"
    data = file.read_bytes()
    for length in (0, 7, 100, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(FormatError):
            TimestepTable.open(file)
    file.write_bytes(data + b"\0")
    with pytest.raises(FormatError, match="belong to no tensor"):
        TimestepTable.open(file)
    with pytest.raises(ModelNotFoundError):
        TimestepTable.open(tmp_path / "none.safetensors")


@pytest.mark.parametrize(("entry", "message"), [
    ({"format_version": 2}, "unknown version.*update linocut"), ({"format_version": 0}, "unknown version"),
    ({}, "wrong form"), (True, "wrong form"), ({"format_version": "1"}, "wrong form"), ([1] * 1000, "wrong form"),
])
def test_the_configs_entry_is_checked(entry: object, message: str) -> None:
    with pytest.raises(FormatError, match=message) as error:
        has_table(json.loads(json.dumps({"timestep_table": entry})), Path("config.json"))
    assert len(str(error.value)) < 300
    assert not has_table({}, Path("config.json"))
    assert has_table({"timestep_table": {"format_version": 1, "later": 5}}, Path("config.json"))
