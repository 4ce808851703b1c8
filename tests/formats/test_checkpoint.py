"""Reading weight files: sound ones open without a copy, broken and hostile ones never."""

import json
import os
import struct
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from malicious import Case, entry, file_of, good_packed, packed_file, structure_cases, value_cases

from linocut.errors import FormatError, ModelNotFoundError
from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.formats.header import Plan
from linocut.formats.packed import unpack


@pytest.mark.parametrize("case", structure_cases(), ids=lambda case: case.name)
def test_bad_structure_is_refused_at_open(case: Case, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    path.write_bytes(case.data)
    with pytest.raises(FormatError) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    for word in ("model.safetensors", *case.words):
        assert word in message, message
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("case", value_cases(), ids=lambda case: case.name)
def test_bad_values_are_refused_by_verify(case: Case, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(case.data)
    with Checkpoint.open(path) as checkpoint:
        unpack(checkpoint.packed_tensor("net.layer"))  # whatever the bytes, decoding is safe
        with pytest.raises(FormatError) as caught:
            checkpoint.verify()
    for word in case.words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("encoding", ["binary", "ternary", "affine4", "int8"])
def test_the_unharmed_file_is_fine(encoding, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed_file(encoding=encoding))
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.verify() == (3 if encoding == "affine4" else 2)
        assert checkpoint.native
        assert (unpack(checkpoint.packed_tensor("net.layer")) == unpack(good_packed(encoding))).all()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_crash(data, tmp_path_factory):
    """Any damage gives a FormatError or a file that is still read within its bounds."""
    good = bytearray(packed_file())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good)
    path = tmp_path_factory.mktemp("flip") / "f.safetensors"
    path.write_bytes(damaged)
    try:
        with Checkpoint.open(path) as checkpoint:
            for name in checkpoint.names:
                checkpoint.array(name).sum()
            checkpoint.verify()
    except FormatError:
        pass


def test_arrays_are_views_and_the_file_is_safe_from_them(tmp_path):
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, {"a": np.arange(1000, dtype=np.float32), "layer": good_packed()})
    before = path.read_bytes()
    with Checkpoint.open(path) as checkpoint:
        first, second = checkpoint.array("a"), checkpoint.array("a")
        assert np.shares_memory(first, second)
        assert not first.flags.owndata
        assert first.flags.writeable
        assert np.shares_memory(checkpoint.packed_tensor("layer").codes, checkpoint.array("layer.codes"))
        first[0] = 5
        checkpoint.release("a")
    assert first[1] == 1  # views outlive the checkpoint
    assert path.read_bytes() == before


def test_no_warning_from_torch(tmp_path, recwarn):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, {"a": np.arange(10, dtype=np.float32)})
    with Checkpoint.open(path) as checkpoint:
        assert torch.from_numpy(checkpoint.array("a")).sum() == 45
    assert not recwarn.list


def test_files_of_the_official_library_open(tmp_path):
    from safetensors.numpy import save_file
    rng = np.random.default_rng(0)
    tensors = {"a.weight": rng.random((3, 5)).astype(np.float16), "b": np.array(7, np.int64),
               "c": np.zeros((0, 4), "f4"), "d": rng.integers(0, 255, 7).astype(np.uint8), "e": rng.random((2, 2, 2)),
               "f": np.array([True, False])}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np", "sha256": "someone's own"})
    with Checkpoint.open(tmp_path) as checkpoint:
        assert sorted(checkpoint.names) == sorted(tensors)
        for name, array in tensors.items():
            assert (checkpoint.array(name) == array).all()
            assert checkpoint.info(name).shape == array.shape
        assert checkpoint.verify() == 0
        assert not checkpoint.native
        assert checkpoint.metadata["format"] == "np"


def test_bfloat16_and_float8_of_the_official_library(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file
    value = torch.tensor([1.0, -2.5, 3e38])
    save_file({"b": value.bfloat16(), "f": value.to(torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with Checkpoint.open(tmp_path / "x.safetensors") as checkpoint:
        assert checkpoint.info("b").dtype == "BF16"
        assert (torch.from_numpy(checkpoint.array("b")).view(torch.bfloat16) == value.bfloat16()).all()
        assert checkpoint.array("f").dtype == np.uint8


def test_our_files_open_with_the_official_library(tmp_path):
    from safetensors import safe_open
    path = tmp_path / "ours.safetensors"
    packed = good_packed("affine4")
    dense = np.random.default_rng(0).random((4, 6)).astype(np.float32)
    write_checkpoint(path, {"layer": packed, "x.weight": dense, "bf": (np.array([0x3F80], np.uint16), "BF16"),
                            "n": np.array(3, np.int64)}, {"note": "ä \" \\ line\n"})
    with safe_open(path, "np") as file:
        assert set(file.keys()) == {"layer.codes", "layer.scales", "layer.zeros", "x.weight", "bf", "n"}
        assert (file.get_tensor("x.weight") == dense).all()
        assert (file.get_tensor("layer.codes") == packed.codes).all()
        assert (file.get_tensor("layer.scales") == packed.scales).all()
        assert file.metadata()["note"] == "ä \" \\ line\n"
        assert json.loads(file.metadata()["linocut"])["packed"]["layer"] == {"encoding": "affine4", "shape": [3, 256]}


def test_unaligned_and_unsorted_foreign_files_are_read(tmp_path):
    data = b"\x01" + np.arange(4, dtype="<f4").tobytes()
    tensors = {"w": entry("F32", [4], 1, 17), "first": entry("U8", [1], 0, 1)}
    (tmp_path / "f.safetensors").write_bytes(file_of(tensors, data))
    with Checkpoint.open(tmp_path / "f.safetensors") as checkpoint:
        assert checkpoint.array("w").tolist() == [0, 1, 2, 3]
        assert checkpoint.array("w").flags.aligned


def test_layout_of_our_files(tmp_path):
    path = tmp_path / "m.safetensors"
    tensors = {"z": np.zeros(3, np.uint8), "b": np.zeros(3, np.float32), "layer": good_packed(),
               "n": np.array(1, np.int64), "a": np.zeros(5, np.float16)}
    write_checkpoint(path, tensors)
    again = tmp_path / "again.safetensors"
    write_checkpoint(again, dict(reversed(tensors.items())))
    assert path.read_bytes() == again.read_bytes()  # the order of writing leaves no trace
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.names == ["n", "b", "a", "layer.scales", "layer.codes", "z"]
        assert checkpoint.header_nbytes % 64 == 0
        infos = [checkpoint.info(name) for name in checkpoint.names]
        assert infos[0].offset == checkpoint.header_nbytes
        sizes = {"I64": 8, "F32": 4, "F16": 2, "U8": 1}
        assert all(info.offset % sizes[info.dtype] == 0 for info in infos)


def klein_tensors() -> tuple[list[tuple[str, str, tuple[int, ...]]], dict[str, tuple[int, int]]]:
    """Dense tensors and packed weights of FLUX.2 klein 4B."""
    d = 3072
    dense = [("time_guidance_embed.timestep_embedder.linear_1", (d, 256)), ("x_embedder", (d, 128)),
             ("time_guidance_embed.timestep_embedder.linear_2", (d, d)), ("context_embedder", (d, 7680)),
             ("double_stream_modulation_img.linear", (6 * d, d)), ("double_stream_modulation_txt.linear", (6 * d, d)),
             ("single_stream_modulation.linear", (3 * d, d)), ("norm_out.linear", (2 * d, d)), ("proj_out", (128, d))]
    packed: dict[str, tuple[int, int]] = {}
    for i in range(5):
        block = f"transformer_blocks.{i}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            packed[f"{block}.attn.{name}"] = (d, d)
        for name in ("ff", "ff_context"):
            packed[f"{block}.{name}.linear_in"], packed[f"{block}.{name}.linear_out"] = (6 * d, d), (d, 3 * d)
        dense += [(f"{block}.attn.{name}", (128,)) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    for i in range(20):
        block = f"single_transformer_blocks.{i}.attn"
        packed[f"{block}.to_qkv_mlp_proj"], packed[f"{block}.to_out"] = (9 * d, d), (d, 4 * d)
        dense += [(f"{block}.{name}", (128,)) for name in ("norm_q", "norm_k")]
    return [(f"{name}.weight", "BF16", shape) for name, shape in dense], packed


@pytest.mark.parametrize(("encoding", "total"), [("binary", 907_656_192), ("ternary", 1_184_259_072)])
def test_klein_sizes(encoding, total):
    dense, packed = klein_tensors()
    assert (len(dense), len(packed)) == (69, 100)
    plan = Plan(dense, {}, {name: (encoding, shape) for name, shape in packed.items()})
    assert plan.data_nbytes == total
    assert plan.header_nbytes < 100_000
    assert plan.file_nbytes == plan.header_nbytes + total


def test_opening_is_fast_and_checks_no_values(tmp_path):
    """A sparse file of 1 GB opens in milliseconds."""
    header = file_of({"w": entry("U8", [10**9], 0, 10**9)}, b"")
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + 10**9)
    start = time.perf_counter()
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.array("w")[-1] == 0
    assert time.perf_counter() - start < 0.5


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path, tmp_path / "none.safetensors.index.json"):
        with pytest.raises(ModelNotFoundError):
            Checkpoint.open(path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelNotFoundError, match="pickle"):
        Checkpoint.open(tmp_path)
    for name in ("one.safetensors", "two.safetensors"):
        write_checkpoint(tmp_path / name, {"a": np.zeros(1, np.float32)})
    with pytest.raises(FormatError, match=r"'one\.safetensors', 'two\.safetensors'"):
        Checkpoint.open(tmp_path)
    write_checkpoint(tmp_path / "model.safetensors", {"b": np.zeros(1, np.float32)})
    assert Checkpoint.open(tmp_path).names == ["b"]
    with pytest.raises(FormatError, match="no such tensor"):
        Checkpoint.open(tmp_path).array("a")


# --- indexes ---------------------------------------------------------------------------------------------------------


def make_index(folder, weight_map) -> str:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_shards_behind_an_index(tmp_path):
    write_checkpoint(tmp_path / "model-1.safetensors", {"a": np.arange(3, dtype=np.float32)})
    write_checkpoint(tmp_path / "model-2.safetensors", {"layer": good_packed()})
    path = make_index(tmp_path, {"a": "model-1.safetensors", "layer.codes": "model-2.safetensors",
                                 "layer.scales": "model-2.safetensors"})
    for place in (tmp_path, path):
        with Checkpoint.open(place) as checkpoint:
            assert checkpoint.array("a").tolist() == [0, 1, 2]
            assert list(checkpoint.packed) == ["layer"]
            assert len(checkpoint.files) == 2
            assert checkpoint.verify() == 3


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors",
                                    "C:x.safetensors", "model.bin", ".safetensors", "..", "", "a\0.safetensors"])
def test_an_index_cannot_leave_its_folder(tmp_path, target):
    folder = tmp_path / "model"
    folder.mkdir()
    write_checkpoint(tmp_path / "outside.safetensors", {"a": np.zeros(1, np.float32)})
    with pytest.raises(FormatError, match="plain name"):
        Checkpoint.open(make_index(folder, {"a": target}))


def test_an_index_that_disagrees_with_its_files(tmp_path):
    write_checkpoint(tmp_path / "m1.safetensors", {"a": np.zeros(1, np.float32)})
    write_checkpoint(tmp_path / "m2.safetensors", {"b": np.zeros(1, np.float32)})
    write_checkpoint(tmp_path / "m3.safetensors", {"a": np.zeros(1, np.float32)})
    for weight_map, words in [
        ({"a": "m1.safetensors", "ghost": "m1.safetensors"}, "ghost.*nowhere"),
        ({"a": "m2.safetensors", "b": "m1.safetensors"}, "in m2.safetensors, found in m1.safetensors"),
        ({"a": "m1.safetensors", "x": "m2.safetensors"}, "nowhere"),
        ({"a": "m1.safetensors", "b": "m2.safetensors", "c": "m3.safetensors"}, "lies in two files"),
        ({}, "weight_map"), ([], "weight_map"), ({"a": 3}, "weight_map"),
    ]:
        with pytest.raises(FormatError, match=words):
            Checkpoint.open(make_index(tmp_path, weight_map))
    write_checkpoint(tmp_path / "m4.safetensors", {"c": np.zeros(1, np.float32), "d": np.zeros(1, np.float32)})
    with pytest.raises(FormatError, match=r"d.*missing from the index"):
        Checkpoint.open(make_index(tmp_path, {"c": "m4.safetensors"}))
    with pytest.raises(ModelNotFoundError, match="m9"):
        Checkpoint.open(make_index(tmp_path, {"a": "m9.safetensors"}))


def test_names_with_control_characters_are_quoted(tmp_path):
    text = json.dumps({"a\x1b[31m\n": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"x")
    with pytest.raises(FormatError) as caught:
        Checkpoint.open(path)
    assert "\x1b" not in str(caught.value)


@pytest.fixture
def ordinary_user():
    """Root may read everything, so the test goes on as `nobody`."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions as POSIX has them")
def test_unreadable_file(ordinary_user):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        path = Path(folder) / "x.safetensors"
        path.write_bytes(packed_file())
        path.chmod(0)
        with pytest.raises(FormatError, match="cannot be read"):
            Checkpoint.open(path)


def test_fingerprint_follows_the_weights(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_checkpoint(a, {"w": np.zeros(4, np.float32)}, {"note": "one"})
    write_checkpoint(b, {"w": np.zeros(4, np.float32)}, {"note": "two"})
    first = Checkpoint.open(a).fingerprint()
    assert first == Checkpoint.open(b).fingerprint()
    write_checkpoint(b, {"w": np.ones(4, np.float32)})
    assert first != Checkpoint.open(b).fingerprint()
