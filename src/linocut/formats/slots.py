"""Weights in slots of one, two, four or eight bits, least significant first: what MLX, gemlite and GGUF share.

A row of N codes of b bits takes N b / 8 bytes. Binary codes 0, 1 stand for -s, +s; ternary codes 0, 1, 2 for -s, 0, +s
and 3 for nothing; four-bit codes c for (c - zero) s, eight-bit ones for (c - 128) s. Binary and four-bit slots are our
own bytes; ternary is repacked.
"""

from __future__ import annotations

import numpy as np

from linocut.errors import FormatError
from linocut.formats.packed import GROUP_SIZE, PackedTensor, groups, pack, unpack

__all__ = ["BITS", "affine_parts", "from_affine", "from_slots", "to_slots"]

BITS = {"binary": 1, "ternary": 2, "affine4": 4, "int8": 8}
_MIDDLE = np.uint8(128)  # the eight-bit code of a zero weight
# the four codes of a byte, as four bytes
_PAIRS = np.array([[byte >> shift & 3 for shift in (0, 2, 4, 6)] for byte in range(256)], dtype=np.uint8)
_QUADS = _PAIRS.view(np.uint32).reshape(-1)


def to_slots(packed: PackedTensor) -> np.ndarray:
    """The slots of a packed weight: uint8 [O, N b / 8], one, two, four or eight bits a weight."""
    if packed.encoding == "int8":
        return packed.codes ^ _MIDDLE
    if packed.encoding != "ternary":
        return packed.codes
    return join_pairs((unpack(packed) + np.int8(1)).view(np.uint8))


def join_pairs(codes: np.ndarray) -> np.ndarray:
    """Codes 0..3 [..., 4 n] -> bytes [..., n], four a byte, the first lowest."""
    four = np.ascontiguousarray(codes).view("<u4")
    joined: np.ndarray = (four | (four >> 6) | (four >> 12) | (four >> 18)).astype(np.uint8)
    return joined


def split_pairs(slots: np.ndarray) -> np.ndarray:
    """Inverse of `join_pairs`."""
    codes: np.ndarray = _QUADS[slots].view(np.uint8)
    return codes


def from_slots(slots: np.ndarray, encoding: str, scales: np.ndarray, exact: bool = True,
               zeros: np.ndarray | None = None) -> PackedTensor:
    """Slots uint8 [O, N b / 8] and scales [O, G] (float; for affine4 also zeros 0..15) as a packed weight.

    With `exact` a scale that float16 does not hold is refused, else it is rounded. Raises FormatError for code 3 of a
    ternary weight, code 0 of an eight-bit one, and for scales that are not finite.
    """
    slots = np.ascontiguousarray(slots)
    if encoding == "ternary":
        codes = split_pairs(slots)
        if (codes == 3).any():
            row, column = np.argwhere(codes == 3)[0]
            raise FormatError(f"weight {column} of row {row} has a code that stands for no ternary value",
                              expected="0, 1 or 2", found=3)
        return pack(codes.view(np.int8) - np.int8(1), scales, "ternary", exact=exact)
    if encoding == "binary":
        if _plain(scales):
            return PackedTensor("binary", (slots.shape[0], slots.shape[1] * 8), slots, scales.astype(np.float16))
        bits = np.unpackbits(slots, axis=1, bitorder="little").view(np.int8)
        return pack(bits * np.int8(2) - np.int8(1), scales, "binary", exact=exact)
    if encoding == "int8":
        return pack((slots ^ _MIDDLE).view(np.int8), scales, "int8", exact=exact)
    nibbles = np.stack([slots & 15, slots >> 4], axis=2).reshape(slots.shape[0], -1)
    return pack(nibbles, scales, "affine4", zeros, exact=exact)


def _plain(scales: np.ndarray) -> bool:
    """True if all scales are float16 values as they are stored here: positive and finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(((scales > 0) & (scales.astype(np.float16) == scales) & np.isfinite(scales)).all())


def affine_parts(packed: PackedTensor, zeros: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(factors, offsets) float32 [O, G] such that a weight is code * factor + offset, exactly."""
    scales = packed.scales.astype(np.float32)
    if packed.encoding == "binary":
        return scales * np.float32(2), -scales
    if packed.encoding == "ternary":
        return scales, -scales
    if packed.encoding == "int8":
        return scales, scales * np.float32(-128)
    if zeros is None:
        raise FormatError("a four-bit weight has no zero points", expected="zeros", found=None)
    return scales, -(zeros.astype(np.float32) * scales)


def from_affine(slots: np.ndarray, encoding: str, factors: np.ndarray, offsets: np.ndarray,
                exact: bool = True) -> PackedTensor:
    """Inverse of `affine_parts` for slots of any program: weights code * factor + offset as a packed weight.

    Raises FormatError where that is no +-s, -s/0/+s, (code - 128) s or (code - zero) s with an integer zero of 0..15.
    """
    _check(np.isfinite(factors) & np.isfinite(offsets), "a factor and an offset", "finite numbers", factors)
    if encoding == "affine4":
        with np.errstate(divide="ignore", invalid="ignore"):
            zeros = np.where(factors != 0, np.rint(-offsets / factors), 0)
        fits = (zeros >= 0) & (zeros <= 15) & (zeros * factors == -offsets)
        _check(fits, "a zero point", "a whole number of 0..15", offsets)
        return from_slots(slots, encoding, factors, exact, zeros.astype(np.uint8))
    if encoding == "int8":
        _check(offsets == factors * np.float32(-128), "an offset", "-128 times the factor, as for int8", offsets)
        return from_slots(slots, encoding, factors, exact)
    expected = offsets * np.float32(-2 if encoding == "binary" else -1)
    what = "-2" if encoding == "binary" else "-1"
    _check(factors == expected, "a factor", f"{what} times the offset, as {encoding} weights have", factors)
    return from_slots(slots, encoding, -offsets, exact)


def _check(holds: np.ndarray, what: str, expected: str, found: np.ndarray) -> None:
    if not holds.all():
        row, group = np.argwhere(~holds)[0]
        raise FormatError(f"{what} of row {row}, group {group} does not fit", expected=expected,
                          found=float(found[row, group]))


def check_groups(encoding: str, shape: tuple[int, int], scales: tuple[int, ...]) -> None:
    """Raise FormatError unless there is a scale for each of our groups."""
    expected = (shape[0], groups(encoding, shape[1]))
    if scales != expected:
        raise FormatError("groups have another size than here", expected=f"{list(expected)} scales for {list(shape)}",
                          found=list(scales), advice=f"only groups of {GROUP_SIZE} weights (64 for four bits) are read")
