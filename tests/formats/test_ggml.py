"""ggml's block types: golden bytes, a decoder that shares no code with ours, and the `gguf` package's."""

import struct

import gguf
import numpy as np
import pytest
from packed_samples import assert_same, sample

from linocut.errors import FormatError
from linocut.formats.ggml import TYPES, dequantize_q8, quantize_q8, read_block, row_nbytes, write_block, write_q8
from linocut.formats.packed import dequantize, pack

HOLDS = [("binary", "Q1_0"), ("ternary", "Q2_0"), ("ternary", "TQ1_0"), ("ternary", "TQ2_0"), ("affine4", "Q4_1")]


def plain_decoder(row: bytes, kind: str) -> list[float]:
    """Q1_0 and Q2_0 as their description says, one weight at a time."""
    weights, per_byte, size = [], {"Q1_0": 8, "Q2_0": 4}[kind], 18
    for start in range(0, len(row), size):
        (d,) = struct.unpack("<e", row[start : start + 2])
        for byte in row[start + 2 : start + size]:
            for j in range(per_byte):
                if kind == "Q1_0":
                    weights.append(d if byte >> j & 1 else -d)
                else:
                    weights.append(((byte >> 2 * j & 3) - 1) * d)
    return weights


def one_row(values: list[int], encoding: str, scale: float = 0.5):
    return pack(np.array([values]), np.full((1, len(values) // 128), scale, dtype=np.float16), encoding)


def test_golden_q1_0():
    packed = one_row([1, 1, 1] + [-1] * 125, "binary")
    assert write_block(packed, "Q1_0").tobytes().hex() == "0038" + "07" + "00" * 15


def test_golden_q2_0():
    """A group becomes two blocks with the same scale; +, 0, -, + are codes 2, 1, 0, 2."""
    packed = one_row([1, 0, -1, 1] + [0] * 124, "ternary")
    assert write_block(packed, "Q2_0").tobytes().hex() == "0038" + "86" + "55" * 15 + "0038" + "55" * 16


def test_golden_tq():
    """+1 at 0 and 64, -1 at 32 and 255, zeros elsewhere."""
    values = [0] * 256
    values[0] = values[64] = 1
    values[32] = values[255] = -1
    tq2 = write_block(one_row(values, "ternary"), "TQ2_0").tobytes()
    assert (tq2[0], tq2[63], set(tq2[1:63]), tq2[64:].hex()) == (0x62, 0x15, {0x55}, "0038")
    tq1 = write_block(one_row(values, "ternary"), "TQ1_0").tobytes()
    assert (tq1[0], tq1[51], tq1[52:].hex()) == (0xC2, 0x7C, "0038")


@pytest.mark.parametrize(("encoding", "kind"), HOLDS)
def test_round_trip_keeps_every_bit(encoding, kind):
    packed = sample(encoding, tied=kind.startswith("TQ"))
    rows = write_block(packed, kind)
    assert rows.shape == (6, row_nbytes(TYPES[kind], 768))
    assert_same(read_block(rows, kind, 768), packed)


@pytest.mark.parametrize(("encoding", "kind"), HOLDS[:2])
def test_an_independent_decoder_agrees(encoding, kind):
    packed = sample(encoding)
    for row, expected in zip(write_block(packed, kind), dequantize(packed), strict=True):
        assert plain_decoder(row.tobytes(), kind) == expected.tolist()


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_the_gguf_package_reads_and_writes_the_same(kind):
    packed = sample("ternary", tied=True)
    number = gguf.GGMLQuantizationType[kind]
    rows = write_block(packed, kind)
    assert np.array_equal(gguf.quants.dequantize(rows, number), dequantize(packed))
    # Its quantizer takes d = max|w|, so only blocks of zeros, where any d will do, may differ.
    theirs = gguf.quants.quantize(dequantize(packed), number)
    assert np.array_equal(theirs, rows)


def test_the_gguf_package_reads_q4_1_up_to_its_rounded_offset():
    packed = sample("affine4")
    theirs = gguf.quants.dequantize(write_block(packed, "Q4_1"), gguf.GGMLQuantizationType.Q4_1)
    largest = 15 * packed.scales.astype(np.float32).repeat(64, axis=1)
    assert (np.abs(theirs - dequantize(packed)) <= largest * 2**-11).all()


def test_q8_0_is_that_of_the_gguf_package():
    values = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    values[2] = 0
    ours = quantize_q8(values)
    assert np.array_equal(ours, gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0))
    assert np.array_equal(dequantize_q8(ours, 256), gguf.quants.dequantize(ours, gguf.GGMLQuantizationType.Q8_0))


def test_int8_is_q8_0_to_the_gguf_package():
    packed = sample("int8")
    rows = write_q8(packed)
    assert np.array_equal(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q8_0), dequantize(packed))
    assert np.array_equal(dequantize_q8(rows, 768), dequantize(packed))


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_neighbours_with_scales_of_their_own_are_refused(kind):
    with pytest.raises(FormatError, match="choose Q2_0"):
        write_block(sample("ternary"), kind)


def test_a_row_must_be_whole_blocks():
    with pytest.raises(FormatError, match="multiple of 256"):
        write_block(sample("ternary", (2, 384)), "TQ2_0")


@pytest.mark.parametrize(("kind", "width", "problem"), [
    ("Q2_0", 128, "stands for no ternary value"), ("TQ2_0", 256, "stands for no ternary value")])
def test_a_fourth_code_is_refused(kind, width, problem):
    rows = np.full((1, row_nbytes(TYPES[kind], width)), 0xFF, dtype=np.uint8)
    rows.reshape(-1, TYPES[kind].nbytes)[:, slice(0, 2) if kind == "Q2_0" else slice(64, 66)] = (0, 0x38)
    with pytest.raises(FormatError, match=problem):
        read_block(rows, kind, width)


@pytest.mark.parametrize(("encoding", "kind"), HOLDS)
def test_scales_that_are_not_finite_are_refused(encoding, kind):
    rows = write_block(sample(encoding, tied=True), kind)
    place = slice(-2, None) if kind.startswith("TQ") else slice(0, 2)
    rows.reshape(6, -1, TYPES[kind].nbytes)[3, 1, place] = (0, 0x7E)
    with pytest.raises(FormatError, match="not finite"):
        read_block(rows, kind, 768)


def test_two_halves_of_a_group_must_share_a_scale():
    rows = write_block(sample("ternary"), "Q2_0")
    rows.reshape(6, 12, 18)[0, 0, :2] = (0, 0x30)
    with pytest.raises(FormatError, match="one scale for 128 weights"):
        read_block(rows, "Q2_0", 768)


def test_a_half_of_zeros_may_have_any_scale():
    """ggml's own quantizer gives it 0."""
    packed = one_row([1] * 64 + [0] * 64, "ternary")
    rows = write_block(packed, "Q2_0")
    rows.reshape(2, 18)[1, :2] = 0
    assert_same(read_block(rows, "Q2_0", 128), packed)


def test_a_negative_scale_mirrors_its_group():
    packed = one_row([1, -1] * 64, "binary")
    rows = write_block(packed, "Q1_0")
    rows[0, 1] |= 0x80
    assert np.array_equal(dequantize(read_block(rows, "Q1_0", 128)), -dequantize(packed))
