"""Drawing with a timestep table: same pictures, smaller files, and a word when another size's noise levels serve."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_dense import TINY

from linocut import Pipeline
from linocut.cli import main
from linocut.errors import FormatError, ModelNotFoundError, UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.folder import ModelFolder
from linocut.formats.timestep_table import TABLE_FILE, WEIGHTS_FILE
from linocut.models.synthetic import write_synthetic
from linocut.pipeline import memory
from linocut.pipeline.sampler import sigmas
from linocut.pipeline.schedule import PRESET_SIZES, choose_schedule, make_timestep_table
from linocut.quantize.stream import quantize_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model without a table, with table and optional weights, and with the table alone."""
    root = tmp_path_factory.mktemp("models")
    write_synthetic(root / "dense", TINY, "bf16")
    quantize_folder(root / "dense", root / "plain", "binary")
    report = quantize_folder(root / "dense", root / "both", "binary", make_table=make_timestep_table)
    assert report.timestep_table == (root / "both/transformer" / TABLE_FILE).stat().st_size
    shutil.copytree(root / "both", root / "table")
    (root / "table/transformer" / WEIGHTS_FILE).unlink()
    return {name: root / name for name in ("plain", "both", "table")}


def draw(model: Path, **arguments: object) -> np.ndarray:
    return np.asarray(Pipeline.from_pretrained(model)("a red apple", seed=3, **arguments).images[0])


@pytest.mark.filterwarnings("error")
def test_the_same_pictures_with_and_without(models: dict[str, Path]) -> None:
    pictures = [draw(model) for model in models.values()]
    assert pictures[0].std() > 1
    for picture in pictures[1:]:
        assert np.array_equal(picture, pictures[0])


def test_rows_are_bit_for_bit_what_the_layers_give(models: dict[str, Path]) -> None:
    pipes = {name: Pipeline.from_pretrained(model) for name, model in models.items()}
    for width, height in PRESET_SIZES:
        tokens = width * height // 256
        schedules = {name: choose_schedule(pipe.folder, tokens, 4) for name, pipe in pipes.items()}
        assert [each.tabulated for each in schedules.values()] == [False, True, True]
        wanted = sigmas(tokens, 4)
        rows = {}
        for name, schedule in schedules.items():
            assert torch.equal(schedule.sigmas, wanted)
            assert schedule.note is None
            rows[name] = [torch.cat([torch.cat(vectors) for vectors in each])
                          for each in pipes[name].components.modulations(schedule)]
        for step in range(4):
            assert torch.equal(rows["table"][step], rows["plain"][step])
    assert rows["plain"][0].abs().max() > 0


def test_the_files_hold_what_they_should(models: dict[str, Path]) -> None:
    folder = ModelFolder.open(models["both"])
    with folder.checkpoint("transformer") as rest, ModelFolder.open(models["plain"]).checkpoint("transformer") as whole:
        weights = folder.timestep_weights()
        assert weights is not None
        assert not set(rest.names) & set(weights.names)
        assert set(rest.names) | set(weights.names) == set(whole.names)
        for name in weights.names:
            assert np.array_equal(weights.array(name), whole.array(name))
        weights.verify()
    assert folder.config("transformer")["timestep_table"] == {"format_version": 1}
    assert ModelFolder.open(models["table"]).hash() == folder.hash() != ModelFolder.open(models["plain"]).hash()
    assert ModelFolder.open(models["table"]).timestep_weights() is None
    disk = memory.plan(folder, 64, 64).disk
    assert disk["timestep_table"] == (models["both"] / "transformer" / TABLE_FILE).stat().st_size
    assert disk["timestep_weights"] == (models["both"] / "transformer" / WEIGHTS_FILE).stat().st_size


def test_a_size_without_a_row_takes_the_nearest_and_says_so(models: dict[str, Path], tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    pipe = Pipeline.from_pretrained(models["table"])
    with pytest.warns(UserWarning, match="noise levels for pictures of 24 tokens.* of 16 were used"):
        result = pipe("a red apple", seed=3, width=96, height=64)
    assert result.recipe.schedule_tokens == 16
    assert len(result.warnings) == 1
    # The original weights are used for anything that is not in the table.
    exact = Pipeline.from_pretrained(models["both"])("a red apple", seed=3, width=96, height=64)
    assert exact.recipe.schedule_tokens is None
    assert not exact.warnings
    assert np.array_equal(np.asarray(exact.images[0]), draw(models["plain"], width=96, height=64))
    assert not np.array_equal(np.asarray(exact.images[0]), np.asarray(result.images[0]))

    # On the command line, and again from the picture: the model with all its weights then follows the recipe.
    file = tmp_path / "a.png"
    with pytest.raises(SystemExit) as ended:
        main(["generate", "a red apple", "-m", str(models["table"]), "-s", "3", "--size", "96x64", "-o", str(file)])
    assert ended.value.code == 0
    assert "of 16 were used" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--from-image", str(file), "-m", str(models["both"]), "-o", str(tmp_path / "b.png")])
    assert ended.value.code == 0
    assert file.read_bytes().split(b"IDAT", 1)[1] == (tmp_path / "b.png").read_bytes().split(b"IDAT", 1)[1]


def test_a_number_of_steps_without_rows_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=rf"for 4 steps only \(found 6\); choose --steps 4.*{WEIGHTS_FILE}"):
        Pipeline.from_pretrained(models["table"])("a red apple", num_inference_steps=6)
    assert np.array_equal(draw(models["both"], num_inference_steps=6), draw(models["plain"], num_inference_steps=6))


def test_guided_drawing_takes_each_row_twice(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "dense", TINY, "bf16")
    index = json.loads((tmp_path / "dense/model_index.json").read_text())
    (tmp_path / "dense/model_index.json").write_text(json.dumps(index | {"is_distilled": False}))
    pictures = []
    for name, make_table in (("plain", None), ("table", make_timestep_table)):
        quantize_folder(tmp_path / "dense", tmp_path / name, "ternary", make_table=make_table)
        pictures.append(draw(tmp_path / name, guidance_scale=3.0))
    (tmp_path / "table/transformer" / WEIGHTS_FILE).unlink()
    pictures.append(draw(tmp_path / "table", guidance_scale=3.0))
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])
    assert not np.array_equal(pictures[0], draw(tmp_path / "table", guidance_scale=1.0))


def test_damage_is_found(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(models["both"], tmp_path / "model")
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--verify", str(model)])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "timestep_table: timestep_table.safetensors" in out
    assert "timestep_weights: timestep_weights.safetensors" in out
    table = model / "transformer" / TABLE_FILE
    data = bytearray(table.read_bytes())
    with Checkpoint.open(table) as checkpoint:
        data[checkpoint.info("modulations").offset + 5] ^= 1
    table.write_bytes(data)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--verify", str(model)])
    assert ended.value.code == 2
    assert "does not match its SHA-256" in capsys.readouterr().err
    table.unlink()
    with pytest.raises(ModelNotFoundError, match=f"{TABLE_FILE}: no such file"):
        Pipeline.from_pretrained(model)
    wider = replace(TINY, transformer=replace(TINY.transformer, num_attention_heads=2))
    write_synthetic(tmp_path / "wide-dense", wider, "bf16", parts=("transformer",))
    quantize_folder(tmp_path / "wide-dense", tmp_path / "wide", "binary", make_table=make_timestep_table)
    shutil.copy(tmp_path / "wide/transformer" / TABLE_FILE, table)
    with pytest.raises(FormatError, match="width of the timestep table"):
        Pipeline.from_pretrained(model)
