"""The packed layout: golden bytes, exhaustive trits, round trips, refusals."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linocut.errors import FormatError
from linocut.formats import packed as P
from linocut.formats.packed import (
    ENCODINGS,
    PackedTensor,
    bits_per_weight,
    decode_rows,
    dequantize,
    group_size,
    groups,
    pack,
    row_bytes,
    ternary_blocks,
    unpack,
    unpack_rows,
    unpack_zeros,
    validate_values,
)


def random_values(rng: np.random.Generator, encoding: str, o: int, n: int) -> tuple[np.ndarray, np.ndarray | None]:
    if encoding == "affine4":
        return rng.integers(0, 16, (o, n)).astype(np.uint8), rng.integers(0, 16, (o, n // 64)).astype(np.uint8)
    if encoding == "binary":
        return (rng.integers(0, 2, (o, n)) * 2 - 1).astype(np.int8), None
    if encoding == "int8":
        return rng.integers(-127, 128, (o, n)).astype(np.int8), None
    return rng.integers(-1, 2, (o, n)).astype(np.int8), None


def ternary_row_by_the_book(row: np.ndarray) -> bytes:
    """docs/format.md, spelled out weight by weight in Python integers."""
    out = []
    for first in range(0, len(row), 640):
        block = [int(v) + 1 for v in row[first : first + 640]]
        size = -(-len(block) // 5)
        block += [1] * (5 * size - len(block))
        for j in range(size):
            v = sum(block[n * size + j] * 3 ** (4 - n) for n in range(5))
            out.append(-(-256 * v // 243))
    return bytes(out)


def test_row_bytes():
    assert [row_bytes("ternary", n) for n in (128, 256, 640, 768, 3072, 9216, 12288)] == [
        26, 52, 128, 154, 615, 1844, 2458]
    assert [row_bytes("binary", n) for n in (128, 3072)] == [16, 384]
    assert [row_bytes("affine4", n) for n in (128, 2560)] == [64, 1280]
    assert [row_bytes("int8", n) for n in (128, 7680)] == [128, 7680]
    assert groups("ternary", 3072) == groups("int8", 3072) == 24
    assert groups("affine4", 3072) == 48
    assert bits_per_weight("binary", 3072) == 1.125
    assert bits_per_weight("affine4", 2560) == 4.3125
    assert bits_per_weight("int8", 7680) == 8.125
    assert bits_per_weight("ternary", 3072) == pytest.approx(1.7266, abs=1e-4)
    for n in range(128, 2000, 128):
        blocks = ternary_blocks(n)
        assert sum(count for _, count, _, _ in blocks) == n
        assert blocks[-1][2] + blocks[-1][3] == row_bytes("ternary", n)


def test_golden_binary():
    """+ + + - - - - - is 0x07: least significant bit first, as in GGUF Q1_0."""
    values = -np.ones((2, 128), np.int8)
    values[0, :3] = 1
    values[0, 9] = 1
    values[1, 127] = 0  # becomes +1
    packed = pack(values, np.array([[0.5], [2.0]]), "binary")
    assert packed.codes.tobytes().hex() == "0702" + "00" * 14 + "00" * 15 + "80"
    assert packed.scales.tobytes().hex() == "0038" + "0040"
    assert unpack(packed)[1, 127] == 1


def test_golden_affine4():
    values = np.zeros((1, 128), np.uint8)
    values[0, :5] = [1, 2, 15, 0, 7]
    values[0, 127] = 9
    packed = pack(values, np.array([[0.5, 0.25]]), "affine4", np.array([[3, 12]]))
    assert packed.codes.tobytes().hex() == "210f07" + "00" * 60 + "90"
    assert packed.zeros.tobytes().hex() == "c3"
    weights = dequantize(packed)
    assert weights[0, :4].tolist() == [-1.0, -0.5, 6.0, -1.5]
    assert weights[0, 127] == (9 - 12) * 0.25


def test_golden_int8():
    values = np.zeros((1, 256), np.int8)
    values[0, :4] = [1, -1, 127, -127]
    values[0, 127] = -2
    packed = pack(values, np.array([[0.5, 3.0]]), "int8")
    assert packed.codes.tobytes().hex() == "01ff7f81" + "00" * 123 + "fe" + "00" * 128
    assert packed.scales.tobytes().hex() == "0038" + "0100"  # a group of zeros: 2^-24
    assert dequantize(packed)[0, [0, 1, 2, 3, 127, 128]].tolist() == [0.5, -0.5, 63.5, -63.5, -1.0, 0.0]


def test_golden_ternary():
    """A row of 128: one block of 26 bytes; byte j holds weights j, 26+j, 52+j, 78+j, 104+j."""
    values = np.zeros((1, 128), np.int8)
    packed = pack(values, np.array([[3.0]]), "ternary")
    assert packed.codes.tobytes() == b"\x80" * 26  # v = 121: ceil(256 * 121 / 243) = 128
    assert packed.scales.view(np.uint16).tolist() == [[1]]  # an empty group: 2^-24
    values[0, 0] = 1  # v = 121 + 81
    values[0, 27] = -1  # byte 1, plane 1: v = 121 - 27
    values[0, 127] = 1  # byte 23, plane 4: v = 121 + 1
    packed = pack(values, np.array([[3.0]]), "ternary")
    expected = bytearray(b"\x80" * 26)
    expected[0] = -(-256 * 202 // 243)
    expected[1] = -(-256 * 94 // 243)
    expected[23] = -(-256 * 122 // 243)
    assert packed.codes.tobytes() == bytes(expected)
    assert packed.codes[0, [0, 1, 23]].tolist() == [0xD5, 0x64, 0x81]
    assert packed.scales.tobytes().hex() == "0042"
    assert dequantize(packed)[0, [0, 27, 127, 5]].tolist() == [3.0, -3.0, 3.0, 0.0]


GOLDEN_SHA = {  # SHA-256 of codes + scales + zeros of the patterns below; a change here is a change of the format
    ("binary", 128): "434dead2690553ee",
    ("binary", 256): "2630b6e3f8ffdb5f",
    ("binary", 640): "4020633a7d459747",
    ("binary", 768): "84ed5ac9c934dab0",
    ("binary", 3072): "283577e4bb6772d9",
    ("binary", 9216): "acdd0b361b16f8fc",
    ("binary", 12288): "72427c1a4021df56",
    ("ternary", 128): "cab9425937f86c44",
    ("ternary", 256): "44d3a85b16cd8079",
    ("ternary", 640): "d938b227b8d6fb61",
    ("ternary", 768): "17c3d8d0c6efcc82",
    ("ternary", 3072): "21e9f4a94d4cd754",
    ("ternary", 9216): "4c18d9ac78f73b8f",
    ("ternary", 12288): "e9b14c161d4ff387",
    ("affine4", 128): "3d6b8365b0baad92",
    ("affine4", 256): "40fb90740f9160f7",
    ("affine4", 640): "d3c0fdaa5b865439",
    ("affine4", 768): "de1186d99afd21fb",
    ("affine4", 3072): "624f3fcc4879bacd",
    ("affine4", 9216): "f57e156744a8042b",
    ("affine4", 12288): "ac0e855da6a8c6b9",
    ("int8", 128): "7cff21b4d58c2a53",
    ("int8", 256): "a607921046e1a7f3",
    ("int8", 640): "c5b9bca72cdb013a",
    ("int8", 768): "7168baa8fa22ad09",
    ("int8", 3072): "0381002b7cba3bff",
    ("int8", 9216): "5763dc7d48cb88c6",
    ("int8", 12288): "5805572b63bd97a6",
}


def pattern(encoding: str, n: int) -> PackedTensor:
    """Three rows from a multiplicative sequence, so that any language can make the same ones."""
    i = np.arange(3 * n, dtype=np.int64).reshape(3, n) * 7919 % 104729
    g = np.arange(3 * groups(encoding, n), dtype=np.int64).reshape(3, -1)
    scales = (g % 11 + 1) / 8
    if encoding == "affine4":
        return pack(i % 16, scales, encoding, g * 5 % 16)
    if encoding == "int8":
        return pack(i % 255 - 127, scales, encoding)
    return pack(i % 3 - 1 if encoding == "ternary" else i % 2 * 2 - 1, scales, encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("n", [128, 256, 640, 768, 3072, 9216, 12288])
def test_golden_hashes(encoding, n):
    import hashlib
    digest = hashlib.sha256(b"".join(part.tobytes() for part in pattern(encoding, n).parts().values())).hexdigest()
    assert digest[:16] == GOLDEN_SHA[encoding, n]


@pytest.mark.parametrize("n", [128, 256, 384, 512, 640, 768, 1152, 3072, 9216, 12288])
def test_ternary_equals_the_definition(n):
    values = np.random.default_rng(n).integers(-1, 2, (2, n)).astype(np.int8)
    packed = pack(values, np.ones((2, n // 128)), "ternary")
    assert [row.tobytes() for row in packed.codes] == [ternary_row_by_the_book(row) for row in values]
    assert (unpack(packed) == values).all()


def test_all_243_bytes_decode_exhaustively():
    for v in range(243):
        digits = [v // 3 ** (4 - n) % 3 for n in range(5)]
        byte = -(-256 * v // 243)
        assert [((byte * 3**n % 256) * 3) >> 8 for n in range(5)] == digits
        row = np.full((1, 128), byte, np.uint8)[:, :26]
        assert (unpack_rows(row, "ternary", 128)[0, :104].reshape(4, 26) == np.array(digits[:4])[:, None] - 1).all()
        assert (unpack_rows(row, "ternary", 128)[0, 104:] == digits[4] - 1).all()


def test_thirteen_bytes_are_invalid_and_decode_safely():
    valid = {-(-256 * v // 243) for v in range(243)}
    invalid = sorted(set(range(256)) - valid)
    assert len(invalid) == 13
    assert {b for b in range(256) if P._TRIT_VALID[b]} == valid
    for byte in invalid:
        packed = pack(np.ones((2, 640), np.int8), np.ones((2, 5)), "ternary")
        packed.codes[1, 77] = byte
        values = unpack(packed)
        assert values.min() >= -1
        assert values.max() <= 1
        with pytest.raises(FormatError, match=rf"layer\.codes.*row 1, byte 77.*0x{byte:02x}"):
            validate_values(packed, "layer")


def test_minus_128_is_invalid_and_decodes_safely():
    packed = pack(np.ones((3, 256), np.int8), np.ones((3, 2)), "int8")
    packed.codes[2, 200] = 0x80
    assert unpack(packed)[2, 200] == -128
    assert dequantize(packed)[2, 200] == -128
    with pytest.raises(FormatError, match=r"layer\.codes.*row 2, byte 200.*-127\.\.127.*0x80"):
        validate_values(packed, "layer")


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip(encoding, data):
    n = 128 * data.draw(st.integers(1, 12))
    o = data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values, zeros = random_values(rng, encoding, o, n)
    scales = (rng.random((o, groups(encoding, n))) * 10.0 ** rng.integers(-8, 6)).astype(np.float32)
    packed = pack(values, scales, encoding, zeros)
    validate_values(packed, "w")
    live = np.ones_like(values, bool)
    if encoding in ("ternary", "int8"):  # a zero scale empties its group
        live = np.repeat(scales != 0, 128, axis=1)
    assert (unpack(packed) == np.where(live, values, 0)).all()
    if zeros is not None:
        assert (unpack_zeros(packed) == zeros).all()
    weights = dequantize(packed)
    factors = np.repeat(packed.scales.astype(np.float64), group_size(encoding), axis=1)
    offset = 0 if zeros is None else np.repeat(zeros.astype(int), 64, axis=1)
    assert (weights == (unpack(packed).astype(int) - offset) * factors).all()
    again = pack(unpack(packed), packed.scales, encoding, None if zeros is None else unpack_zeros(packed), exact=True)
    assert all((a == b).all() for a, b in zip(again.parts().values(), packed.parts().values(), strict=True))


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), blocks=st.integers(1, 7))
def test_any_bytes_decode_within_range(encoding, seed, blocks):
    n = 128 * blocks
    rng = np.random.default_rng(seed)
    values = unpack_rows(rng.integers(0, 256, (3, row_bytes(encoding, n))).astype(np.uint8), encoding, n)
    low, high = {"binary": (-1, 1), "ternary": (-1, 1), "affine4": (0, 15), "int8": (-128, 127)}[encoding]
    assert values.shape == (3, n)
    assert low <= values.min() <= values.max() <= high


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_ranges_of_rows_and_raw_rows(encoding):
    values, zeros = random_values(np.random.default_rng(1), encoding, 9, 768)
    packed = pack(values, np.random.default_rng(2).random((9, groups(encoding, 768))) + 0.1, encoding, zeros)
    whole = dequantize(packed)
    assert (dequantize(packed, slice(3, 7)) == whole[3:7]).all()
    zeros_bytes = None if packed.zeros is None else packed.zeros[8:]
    assert (decode_rows(packed.codes[8:], packed.scales[8:], zeros_bytes, encoding, 768) == whole[8:]).all()
    assert dequantize(packed, slice(4, 4)).shape == (0, 768)


def test_scales_are_clamped_and_rounded():
    scales = np.array([[1e-12, 1e9, 0.1, 65519.0, 2.0**-25]])
    packed = pack(np.ones((1, 640), np.int8), scales, "ternary")
    assert packed.scales.tolist() == [[2.0**-24, 65504.0, float(np.float16(0.1)), 65504.0, 2.0**-24]]


def test_negative_scales_mirror_their_group():
    rng = np.random.default_rng(3)
    for encoding in ENCODINGS:
        values, zeros = random_values(rng, encoding, 4, 256)
        scales = rng.choice([-1.5, 0.5], (4, groups(encoding, 256)))
        packed = pack(values, scales, encoding, zeros)
        assert (packed.scales > 0).all()
        factors = np.repeat(scales, group_size(encoding), axis=1)
        offset = 0 if zeros is None else np.repeat(zeros.astype(int), 64, axis=1)
        assert (dequantize(packed) == (values.astype(int) - offset) * factors).all()


@pytest.mark.parametrize("encoding", ["ternary", "int8"])
def test_zero_scale_and_empty_groups(encoding):
    values = np.ones((1, 256), np.int8)
    values[0, 128:] = 0
    packed = pack(values, np.array([[0.0, 7.0]]), encoding)
    assert packed.scales.tolist() == [[2.0**-24, 2.0**-24]]
    assert not unpack(packed).any()
    assert (values[0, :128] == 1).all()  # the caller's array is left alone


def test_exact_refuses_what_float16_cannot_hold():
    values = np.ones((1, 256), np.int8)
    pack(values, np.array([[0.5, 65504.0]]), "binary", exact=True)
    for bad in (0.1, 65536.0, 2.0**-26):
        with pytest.raises(FormatError, match=r"row 0, group 1.*exact=True"):
            pack(values, np.array([[0.5, bad]]), "binary", exact=True)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_refusals(encoding):
    zeros = np.zeros((2, 2), int) if encoding == "affine4" else None
    g = groups(encoding, 128)
    values, scales = np.ones((2, 128), int), np.ones((2, g))
    for n in (0, 1, 64, 127, 130, 200):
        with pytest.raises(FormatError, match="multiple of 128"):
            pack(np.ones((2, n), int), np.ones((2, 1)), encoding, zeros)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(FormatError, match="row 1, group 0 is not finite"):
            pack(values, np.array([[1.0] * g, [bad] * g]), encoding, zeros)
    for wrong in (128, -128) if encoding == "int8" else (16, -2):
        with pytest.raises(FormatError, match="out of range"):
            pack(values * wrong, scales, encoding, zeros)
    with pytest.raises(FormatError, match="integers"):
        pack(values * 1.0, scales, encoding, zeros)
    with pytest.raises(FormatError, match="scales"):
        pack(values, np.ones((2, g + 1)), encoding, zeros)
    with pytest.raises(FormatError, match="zero points"):
        pack(values, scales, encoding, None if encoding == "affine4" else np.zeros((2, 2), int))
    with pytest.raises(FormatError, match=r"binary \| ternary \| affine4 \| int8"):
        pack(values, scales, "int4", zeros)
    with pytest.raises(FormatError, match="codes"):
        PackedTensor(encoding, (2, 128), np.zeros((2, 5), np.uint8), np.ones((2, g), np.float16))
    with pytest.raises(FormatError, match="codes"):
        unpack_rows(np.zeros((2, 5), np.uint8), encoding, 128)


def test_decoding_is_fast():
    """Numpy decodes at least 100 M weights a second; the bar is lower here since test machines are busy."""
    values = np.random.default_rng(0).integers(-1, 2, (1024, 3072)).astype(np.int8)
    packed = pack(values, np.ones((1024, 24)), "ternary")
    best = min(_seconds(packed) for _ in range(5))
    assert values.size / best > 40e6


def _seconds(packed: PackedTensor) -> float:
    start = time.perf_counter()
    dequantize(packed)
    return time.perf_counter() - start


def test_the_text_of_the_format_says_the_same():
    """Numbers in docs/format.md that code can check."""
    import re
    from pathlib import Path
    text = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text()
    listed = re.search(r"the 13 others\s+\(([0-9a-f ]+)\)", text)
    assert listed is not None
    assert [int(byte, 16) for byte in listed[1].split()] == [b for b in range(256) if not P._TRIT_VALID[b]]
    rows = re.findall(r"^\| (\d+) \| ([\d x+]+) \| (\d+) \| (1\.\d{4}) \|$", text, re.MULTILINE)
    assert len(rows) == 6
    for n, _, size, bits in rows:
        assert row_bytes("ternary", int(n)) == int(size)
        assert f"{bits_per_weight('ternary', int(n)):.4f}" == bits
