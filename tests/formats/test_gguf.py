"""The GGUF container: read by the `gguf` package, told apart by length where a number is not unique, never trusted."""

import struct

import gguf
import numpy as np
import pytest
from packed_samples import assert_same, sample

from linocut.errors import FormatError
from linocut.formats.ggml import TYPES, row_nbytes, write_block
from linocut.formats.gguf import GGUFFile, GGUFPlan
from linocut.formats.gguf_weights import gguf_output, gguf_weights
from linocut.formats.packed import dequantize
from linocut.formats.weight import Weight
from linocut.formats.writer import TensorWriter


def write(path, arrays, metadata=None):
    """arrays: {name: (type, shape, bytes)}."""
    with TensorWriter(path, GGUFPlan([(n, kind, shape) for n, (kind, shape, _) in arrays.items()],
                                     metadata or {"general.architecture": "flux"})) as writer:
        for name, (_, _, data) in arrays.items():
            writer.write_chunks(name, [np.frombuffer(data, dtype=np.uint8)])
    return path


def handmade(tensors, alignment=32):
    """A file as any program could write it: tensors are (name, type number, shape, data)."""
    header, offset = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 0), 0
    for name, number, shape, data in tensors:
        header += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}QIQ", *reversed(shape), number, offset)
        offset += -(-len(data) // alignment) * alignment
    body = b"".join(data + b"\0" * (-len(data) % alignment) for *_, data in tensors)
    return header + b"\0" * (-len(header) % alignment) + body


def test_the_gguf_package_reads_our_files(tmp_path):
    packed, dense = sample("ternary", tied=True), np.arange(24, dtype=np.float16)
    write(tmp_path / "x.gguf", {"a.weight": ("TQ2_0", (6, 768), write_block(packed, "TQ2_0").tobytes()),
                                "b.scale": ("F16", (24,), dense.tobytes())},
          {"general.architecture": "flux", "general.quantization_version": 2, "x": 0.5, "y": True})
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    first, second = reader.tensors
    assert (first.name, first.tensor_type.name, list(first.shape)) == ("a.weight", "TQ2_0", [768, 6])
    assert np.array_equal(gguf.quants.dequantize(first.data, first.tensor_type), dequantize(packed))
    assert np.array_equal(second.data, dense)
    assert reader.get_field("general.architecture").contents() == "flux"
    assert reader.get_field("general.quantization_version").contents() == 2
    assert reader.get_field("x").contents() == 0.5
    assert reader.get_field("y").contents() is True


def test_we_read_files_of_the_gguf_package(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "flux")
    writer.add_array("tokens", ["a", "bc"])
    writer.add_array("numbers", [1, 2, 3])
    packed = sample("ternary", tied=True)
    writer.add_tensor("a.weight", write_block(packed, "TQ1_0"), raw_dtype=gguf.GGMLQuantizationType.TQ1_0)
    writer.add_tensor("b.scale", np.arange(7, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with GGUFFile(tmp_path / "x.gguf") as file:
        weights = gguf_weights(file)
        assert (file.metadata["tokens"], file.metadata["numbers"]) == (2, 3)
        assert_same(weights["a"].rows(0, 6), packed)
        assert weights["b.scale"].rows(2, 4).tolist() == [2, 3]


@pytest.mark.parametrize(("number", "kind"), [(41, "Q1_0"), (41, "Q1_0/32"), (40, "Q1_0/32"), (42, "Q2_0"),
                                              (42, "PQ2_0"), (42, "Q1_0"), (142, "PQ2_0")])
def test_clashing_type_numbers_are_told_apart_by_length(tmp_path, number, kind):
    """Q2_0 with 64-blocks, Q2_0 with 128-blocks and a binary type have all been number 42."""
    encoding = TYPES[kind].encoding
    packed = sample(encoding)
    if encoding == "binary":
        blocks = packed.codes.reshape(6, 6 if kind == "Q1_0" else 24, -1)
    else:
        data = write_block(packed, "Q2_0").reshape(6, 6, 2, 18)
        blocks = data[..., 2:].reshape(6, 6, 32) if kind == "PQ2_0" else data[..., 2:].reshape(6, 12, 16)
    scales = packed.scales.repeat(blocks.shape[1] // 6, axis=1).view(np.uint8).reshape(6, -1, 2)
    data = np.concatenate([scales, blocks], axis=2)
    (tmp_path / "x.gguf").write_bytes(handmade([("a.weight", number, (6, 768), data.tobytes())]))
    with GGUFFile(tmp_path / "x.gguf") as file:
        assert file.tensors["a.weight"].kind.name == kind
        assert_same(gguf_weights(file)["a"].rows(0, 6), packed)


def test_four_scales_in_a_group_are_no_binary_weight_of_ours(tmp_path):
    data = np.zeros((2, 4, 6), dtype=np.uint8)
    data[:, :, 1] = (0x30, 0x34, 0x38, 0x3C)
    (tmp_path / "x.gguf").write_bytes(handmade([("a.weight", 40, (2, 128), data.tobytes())]))
    with GGUFFile(tmp_path / "x.gguf") as file, pytest.raises(FormatError, match="one scale for 128 weights"):
        gguf_weights(file)["a"].rows(0, 2)


@pytest.mark.parametrize("dense", ["keep", "F16", "F32", "Q8_0"])
def test_dense_tensors_take_the_type_asked_for(dense):
    values = (np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    weight = Weight("BF16", (4, 64), lambda first, last: values[first:last], lambda: None)
    output = gguf_output("a.weight", weight, dense=dense)
    ((_, kind, _),) = output.parts
    assert kind == ("BF16" if dense == "keep" else dense)
    assert bool(output.loss) == (dense in ("F16", "Q8_0"))
    assert output.encode(values)[0].nbytes == 4 * row_nbytes(TYPES[kind], 64)


GOOD = [("a.weight", 41, (2, 128), bytes(36)), ("b", 0, (8,), bytes(32))]


def damaged():
    whole = handmade(GOOD)
    yield "magic", b"GGML" + whole[4:], "not a GGUF file"
    yield "version", whole[:4] + struct.pack("<I", 9) + whole[8:], "unknown version"
    yield "big endian", whole[:4] + struct.pack(">I", 3) + whole[8:], "unknown version"
    yield "count of tensors", whole[:8] + struct.pack("<Q", 1 << 60) + whole[16:], "names too much"
    yield "count of values", whole[:16] + struct.pack("<Q", 1 << 60) + whole[24:], "names too much"
    yield "cut in the header", whole[:40], "cut off"
    yield "cut in the data", whole[:-40], "does not fit its data"
    yield "longer", whole + bytes(64), "does not fit its data"
    yield "name too long", whole[:24] + struct.pack("<Q", 1 << 62) + whole[32:], "cut off"
    yield "empty", b"", "too short"
    yield "same name", handmade([GOOD[0], ("a.weight", 0, (8,), bytes(32))]), "there twice"
    yield "unknown type", handmade([("a", 12, (2, 256), bytes(288))]), "type that is not read"
    yield "no whole blocks", handmade([("a.weight", 41, (2, 100), bytes(32))]), "does not fit"
    yield "empty shape", handmade([("a", 0, (0,), b"")]), "impossible shape"
    yield "huge shape", handmade([("a", 0, (1 << 39, 1 << 39), bytes(32))]), "does not fit its data"
    yield "no UTF-8", whole.replace(b"a.weight", b"\xff.weight"), "not UTF-8"
    yield "quantized vector", handmade([("a.weight", 41, (128,), bytes(18))]), "linear layers only"


@pytest.mark.parametrize(("data", "problem"), [case[1:] for case in damaged()], ids=[case[0] for case in damaged()])
def test_damage_is_named(tmp_path, data, problem):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(FormatError, match=problem):
        gguf_weights(GGUFFile(tmp_path / "x.gguf"))


def test_offsets_must_follow_each_other(tmp_path):
    data = bytearray(handmade(GOOD))
    place = data.index(b"b" + struct.pack("<I", 1)) + 1 + 4 + 8 + 4
    for offset, problem in ((0, "overlaps|fit"), (128, "overlaps|fit"), (33, "multiple of 32")):
        data[place : place + 8] = struct.pack("<Q", offset)
        (tmp_path / "x.gguf").write_bytes(data)
        with pytest.raises(FormatError, match=problem):
            GGUFFile(tmp_path / "x.gguf")


def test_hashes_find_a_changed_byte(tmp_path):
    path = write(tmp_path / "x.gguf", {"b": ("F32", (8,), bytes(range(32)))})
    GGUFFile(path).verify()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="does not match its SHA-256"):
        GGUFFile(path).verify()
