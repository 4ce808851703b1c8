"""ggml's tensor types as far as they hold our weights, block by block, written and read without any fitting.

| type | weights, bytes of a block | layout |
|---|---|---|
| Q1_0 | 128, 18 | d, then 16 bytes of bits, lowest first: +d or -d |
| Q2_0 | 64, 18 | d, then 16 bytes, four codes a byte, lowest first: (code - 1) d |
| TQ1_0 | 256, 54 | 48 + 4 bytes of five and four codes each in fixed point, then d |
| TQ2_0 | 256, 66 | 64 bytes, weights i, 32 + i, 64 + i, 96 + i of each half in byte i, then d |
| Q4_1 | 32, 20 | d, m, then 16 bytes: weight i in the low, 16 + i in the high nibble: code d + m |
| Q8_0 | 32, 34 | d, then 32 signed bytes: code d |

d and m are float16. A group of 128 is one block of Q1_0 or two of Q2_0 with the same d; TQ1_0 and TQ2_0 hold it where
two neighbours share a scale (a group of zeros shares any). A Q4_1 offset is -zero d rounded to float16, from which
zero comes back exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from linocut.errors import FormatError
from linocut.formats.packed import (
    AFFINE_GROUP_SIZE,
    GROUP_SIZE,
    MIN_SCALE,
    PackedTensor,
    pack,
    unpack,
    unpack_zeros,
)
from linocut.formats.slots import from_slots, split_pairs, to_slots

__all__ = ["FLOATS", "TYPES", "BlockType", "dequantize_q8", "quantize_q8", "read_block", "row_nbytes", "write_block",
           "write_q8"]


@dataclass(frozen=True)
class BlockType:
    """A type of ggml: its number, the weights and the bytes of a block, and the encoding that it holds here."""

    name: str
    number: int
    weights: int
    nbytes: int
    encoding: str = ""


TYPES = {kind.name: kind for kind in (
    BlockType("F32", 0, 1, 4), BlockType("F16", 1, 1, 2), BlockType("BF16", 30, 1, 2), BlockType("F64", 28, 1, 8),
    BlockType("I32", 26, 1, 4), BlockType("Q8_0", 8, 32, 34), BlockType("Q4_1", 3, 32, 20, "affine4"),
    BlockType("Q1_0", 41, 128, 18, "binary"), BlockType("Q2_0", 42, 64, 18, "ternary"),
    BlockType("TQ1_0", 34, 256, 54, "ternary"), BlockType("TQ2_0", 35, 256, 66, "ternary"),
    # Layouts of forks, told apart from Q1_0 and Q2_0 by their length: their numbers are in use twice.
    BlockType("Q1_0/32", 40, 32, 6, "binary"), BlockType("PQ2_0", 142, 128, 34, "ternary"))}
FLOATS = ("F32", "F16", "BF16", "F64", "I32")


def row_nbytes(kind: BlockType, width: int) -> int:
    """Bytes of a row of `width` weights. Raises FormatError if that is no whole number of blocks."""
    if width % kind.weights:
        raise FormatError(f"a row does not fit {kind.name}", expected=f"a multiple of {kind.weights} weights",
                          found=width)
    return width // kind.weights * kind.nbytes


def write_block(packed: PackedTensor, kind: str) -> np.ndarray:
    """Rows of a packed weight in a type of ggml: uint8 [O, row bytes]. Raises FormatError where it cannot hold them."""
    o, n = packed.shape
    blocks = np.empty((o, n // TYPES[kind].weights, TYPES[kind].nbytes), dtype=np.uint8)
    row_nbytes(TYPES[kind], n)
    _WRITERS[kind](packed, blocks)
    return blocks.reshape(o, -1)


def read_block(rows: np.ndarray, kind: str, width: int, exact: bool = True) -> PackedTensor:
    """Inverse of `write_block`, for files of any program. Raises FormatError for values that are none of ours."""
    blocks = rows.reshape(rows.shape[0], width // TYPES[kind].weights, TYPES[kind].nbytes)
    return _READERS[kind](blocks, width, exact)


def _bytes(scales: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(scales, dtype="<f2").view(np.uint8).reshape(*scales.shape, 2)


def _floats(data: np.ndarray) -> np.ndarray:
    numbers: np.ndarray = np.ascontiguousarray(data).view("<f2")[..., 0].astype(np.float16)
    if not np.isfinite(numbers).all():
        row, block = np.argwhere(~np.isfinite(numbers))[0]
        raise FormatError(f"the scale of row {row}, block {block} is not finite", expected="a finite number",
                          found=float(numbers[row, block]))
    return numbers


def _write_q1(packed: PackedTensor, blocks: np.ndarray) -> None:
    blocks[:, :, :2] = _bytes(packed.scales)
    blocks[:, :, 2:] = packed.codes.reshape(*packed.scales.shape, 16)


def _read_q1(blocks: np.ndarray, width: int, exact: bool) -> PackedTensor:
    bits = np.ascontiguousarray(blocks[:, :, 2:]).reshape(len(blocks), -1)
    return from_slots(bits, "binary", _shared(_floats(blocks[:, :, :2]), width), exact)


def _write_q2(packed: PackedTensor, blocks: np.ndarray) -> None:
    blocks[:, :, :2] = _bytes(np.repeat(packed.scales, 2, axis=1))
    blocks[:, :, 2:] = to_slots(packed).reshape(len(blocks), -1, 16)


def _read_q2(blocks: np.ndarray, width: int, exact: bool) -> PackedTensor:
    slots = np.ascontiguousarray(blocks[:, :, 2:]).reshape(len(blocks), -1)
    return _ternary(split_pairs(slots), _floats(blocks[:, :, :2]), exact)


def _write_tq2(packed: PackedTensor, blocks: np.ndarray) -> None:
    values = unpack(packed)
    codes = (values + np.int8(1)).view(np.uint8).reshape(len(blocks), -1, 2, 4, 32)
    np.bitwise_or(codes[:, :, :, 0] | codes[:, :, :, 1] << 2, codes[:, :, :, 2] << 4 | codes[:, :, :, 3] << 6,
                  out=blocks[:, :, :64].reshape(len(blocks), -1, 2, 32))
    blocks[:, :, 64:] = _bytes(_pairs(packed, values))


def _read_tq2(blocks: np.ndarray, width: int, exact: bool) -> PackedTensor:
    codes = np.empty((len(blocks), blocks.shape[1], 2, 4, 32), dtype=np.uint8)
    halves = blocks[:, :, :64].reshape(len(blocks), -1, 2, 32)
    for plane in range(4):
        codes[:, :, :, plane] = halves >> (2 * plane) & 3
    return _ternary(codes.reshape(len(blocks), width), _floats(blocks[:, :, 64:]), exact)


# Of TQ1_0: first weight, bytes and codes a byte of each of the three stretches of a block.
_STRETCHES = ((0, 0, 32, 5), (160, 32, 16, 5), (240, 48, 4, 4))


def _write_tq1(packed: PackedTensor, blocks: np.ndarray) -> None:
    values = unpack(packed)
    codes = (values + np.int8(1)).view(np.uint8).reshape(len(blocks), -1, 256)
    for first, byte, size, digits in _STRETCHES:
        planes = codes[:, :, first : first + size * digits].reshape(len(blocks), -1, digits, size)
        number = np.zeros((len(blocks), codes.shape[1], size), dtype=np.uint16)
        for digit in range(5):
            number = number * np.uint16(3) + (planes[:, :, digit] if digit < digits else np.uint16(0))
        blocks[:, :, byte : byte + size] = (number * np.uint16(256) + np.uint16(242)) // np.uint16(243)
    blocks[:, :, 52:] = _bytes(_pairs(packed, values))


def _read_tq1(blocks: np.ndarray, width: int, exact: bool) -> PackedTensor:
    codes = np.empty((len(blocks), blocks.shape[1], 256), dtype=np.uint8)
    for first, byte, size, digits in _STRETCHES:
        number = blocks[:, :, byte : byte + size].copy()
        for digit in range(digits):
            begin = first + digit * size
            codes[:, :, begin : begin + size] = (number >= 86).view(np.uint8) + (number >= 171).view(np.uint8)
            number *= np.uint8(3)  # wraps by design
    return _ternary(codes.reshape(len(blocks), width), _floats(blocks[:, :, 52:]), exact)


def _pairs(packed: PackedTensor, values: np.ndarray) -> np.ndarray:
    """One scale for each two groups, those of zeros sharing their neighbour's."""
    used = values.reshape(*packed.scales.shape, GROUP_SIZE).any(axis=2).reshape(len(values), -1, 2)
    scales = packed.scales.reshape(len(values), -1, 2)
    differ = used.all(axis=2) & (scales[:, :, 0] != scales[:, :, 1])
    if differ.any():
        row, pair = np.argwhere(differ)[0]
        raise FormatError(f"groups {2 * pair} and {2 * pair + 1} of row {row} have scales of their own, and TQ1_0 and "
                          "TQ2_0 hold one for both", expected=float(scales[row, pair, 0]),
                          found=float(scales[row, pair, 1]), advice="choose Q2_0, or 'linocut quantize --tie-scales'")
    return np.where(used[:, :, 0], scales[:, :, 0], scales[:, :, 1])


def _ternary(codes: np.ndarray, d: np.ndarray, exact: bool) -> PackedTensor:
    """Codes [o, N] and one d for each of some blocks of the row as a packed weight."""
    if (codes == 3).any():
        row, column = np.argwhere(codes == 3)[0]
        raise FormatError(f"weight {column} of row {row} has a code that stands for no ternary value",
                          expected="0, 1 or 2", found=3)
    values = codes.view(np.int8) - np.int8(1)
    o, n = values.shape
    if d.shape[1] < n // GROUP_SIZE:
        d = np.repeat(d, n // GROUP_SIZE // d.shape[1], axis=1)
    elif d.shape[1] > n // GROUP_SIZE:
        used = values.reshape(o, d.shape[1], -1).any(axis=2)
        d = _shared(np.where(used, d, np.float16(np.nan)), n)
    return pack(values, d, "ternary", exact=exact)


def _shared(d: np.ndarray, width: int) -> np.ndarray:
    """The scale of each group of 128 from those of its blocks, which must agree; NaN stands for any."""
    parts = d.reshape(len(d), width // GROUP_SIZE, -1)
    if parts.shape[2] == 1:
        return d
    low, high = np.fmin.reduce(parts, axis=2), np.fmax.reduce(parts, axis=2)
    if (low < high).any():
        row, group = np.argwhere(low < high)[0]
        raise FormatError(f"blocks inside group {group} of row {row} have scales of their own",
                          expected=f"one scale for {GROUP_SIZE} weights", found=[float(x) for x in parts[row, group]])
    return np.where(np.isnan(low), np.float16(MIN_SCALE), low)


def _write_q4(packed: PackedTensor, blocks: np.ndarray) -> None:
    o, n = packed.shape
    zeros = unpack_zeros(packed)
    repeats = AFFINE_GROUP_SIZE // 32
    blocks[:, :, :2] = _bytes(np.repeat(packed.scales, repeats, axis=1))
    blocks[:, :, 2:4] = _bytes(np.repeat(_offsets(packed.scales, zeros), repeats, axis=1))
    codes = unpack(packed).view(np.uint8).reshape(o, n // 32, 2, 16)
    blocks[:, :, 4:] = codes[:, :, 0] | codes[:, :, 1] << 4


def _offsets(scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        offsets: np.ndarray = (-scales.astype(np.float32) * zeros).astype(np.float16)
    if not np.isfinite(offsets).all():
        raise FormatError("an offset is too large for Q4_1", expected="at most 65504", found="more")
    return offsets


def _read_q4(blocks: np.ndarray, width: int, exact: bool) -> PackedTensor:
    d, m = _floats(blocks[:, :, :2]), _floats(blocks[:, :, 2:4])
    agree = np.array_equal(d[:, 0::2], d[:, 1::2]) and np.array_equal(m[:, 0::2], m[:, 1::2])
    scales, offsets = d[:, 0::2], m[:, 0::2].astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        zeros = np.where(scales != 0, np.rint(-offsets / scales.astype(np.float32)), 0)
    if not agree or (zeros < 0).any() or (zeros > 15).any() or (_offsets(scales, zeros) != m[:, 0::2]).any():
        raise FormatError("these four-bit weights are not (code - zero) scale with groups of 64",
                          expected="whole zero points of 0..15", found="others")
    nibbles = blocks[:, :, 4:]
    codes = np.stack([nibbles & 15, nibbles >> 4], axis=2).reshape(len(blocks), width)
    return pack(codes, scales, "affine4", zeros.astype(np.uint8), exact=exact)


_WRITERS: dict[str, Callable[[PackedTensor, np.ndarray], None]] = {
    "Q1_0": _write_q1, "Q2_0": _write_q2, "TQ1_0": _write_tq1, "TQ2_0": _write_tq2, "Q4_1": _write_q4}
_READERS: dict[str, Callable[[np.ndarray, int, bool], PackedTensor]] = {
    "Q1_0": _read_q1, "Q1_0/32": _read_q1, "Q2_0": _read_q2, "PQ2_0": _read_q2, "TQ1_0": _read_tq1,
    "TQ2_0": _read_tq2, "Q4_1": _read_q4}


def write_q8(packed: PackedTensor) -> np.ndarray:
    """Rows of an int8 weight in Q8_0: the same codes, each scale four times, since a block of ggml's is 32 weights."""
    o, n = packed.shape
    blocks = np.empty((o, n // 32, 34), dtype=np.uint8)
    blocks[:, :, :2] = _bytes(np.repeat(packed.scales, GROUP_SIZE // 32, axis=1))
    blocks[:, :, 2:] = packed.codes.reshape(o, -1, 32)
    return blocks.reshape(o, -1)


def quantize_q8(values: np.ndarray) -> np.ndarray:
    """float32 [o, N] rounded to Q8_0 as ggml does it: d = max|w| / 127, codes round(w / d)."""
    o, n = values.shape
    row_nbytes(TYPES["Q8_0"], n)
    grouped = values.reshape(o, n // 32, 32)
    d = np.abs(grouped).max(axis=2, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    scaled = grouped * inverse
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)  # half away from zero, as roundf
    blocks = np.empty((o, n // 32, 34), dtype=np.uint8)
    blocks[:, :, :2] = _bytes(d[:, :, 0].astype(np.float16))
    blocks[:, :, 2:] = codes.view(np.uint8)
    return blocks.reshape(o, -1)


def dequantize_q8(rows: np.ndarray, width: int) -> np.ndarray:
    """Rows in Q8_0 as float32 [o, N], exactly."""
    blocks = rows.reshape(rows.shape[0], width // 32, 34)
    codes = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8).astype(np.float32)
    return (codes * _floats(blocks[:, :, :2]).astype(np.float32)[:, :, None]).reshape(rows.shape[0], width)

