"""The packed layout, version 1: binary, ternary, affine4 and int8 weights as bytes (normative text: docs/format.md).

A weight W[O, N] (O out-features, N in-features, N a multiple of 128) is held as `codes` (uint8 [O, row bytes]),
`scales` (float16 [O, G]) and, for affine4, `zeros` (uint8 [O, G/2]). Rows are independent: any range decodes alone.

    binary   w = (2b - 1) * scale     b one bit, least significant first              group 128
    ternary  w = (code - 1) * scale   five codes 0..2 a byte, planar, fixed point     group 128
    affine4  w = (code - zero) * scale  two codes 0..15 a byte, low nibble first      group 64
    int8     w = code * scale         one code -127..127 a byte, two's complement    group 128

Everything here is numpy; the torch and C++ decoders are checked against it. Decoders are safe for any byte value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from linocut.errors import FormatError

__all__ = [
    "AFFINE_GROUP_SIZE", "BLOCK", "ENCODINGS", "GROUP_SIZE", "MAX_SCALE", "MIN_SCALE", "PackedTensor",
    "bits_per_weight", "check_encoding", "decode_rows", "dequantize", "group_size", "groups", "layout", "pack",
    "packed_nbytes", "round_scales", "row_bytes", "ternary_blocks", "unpack", "unpack_rows", "unpack_zeros",
    "validate_values",
]

GROUP_SIZE = 128
AFFINE_GROUP_SIZE = 64
ENCODINGS = ("binary", "ternary", "affine4", "int8")
BLOCK = 640  # weights in a full ternary block: 5 planes of 128
MIN_SCALE = 2.0**-24  # the smallest positive float16
MAX_SCALE = 65504.0  # the largest finite float16

_RANGES = {"binary": (-1, 1), "ternary": (-1, 1), "affine4": (0, 15), "int8": (-127, 127)}
_INT8_INVALID = 0x80  # -128 has no mirror image, so no writer makes it
_CHUNK = 1 << 19  # weights handled at a time, so that temporaries stay in the cache
_TRIT_BYTES = np.array([-(-256 * v // 243) for v in range(243)], dtype=np.uint8)  # v -> ceil(256 v / 243)
_TRIT_VALID = np.zeros(256, dtype=bool)
_TRIT_VALID[_TRIT_BYTES] = True

Bytes = npt.NDArray[np.uint8]


def check_encoding(encoding: str) -> None:
    """Raise FormatError unless `encoding` is one of ENCODINGS."""
    if encoding not in ENCODINGS:
        raise FormatError("unknown encoding", expected=" | ".join(ENCODINGS), found=repr(encoding))


def group_size(encoding: str) -> int:
    """Weights that share one scale."""
    check_encoding(encoding)
    return AFFINE_GROUP_SIZE if encoding == "affine4" else GROUP_SIZE


def _check_width(n: int) -> None:
    if n <= 0 or n % GROUP_SIZE:
        raise FormatError("in-features cannot be packed", expected=f"a positive multiple of {GROUP_SIZE}", found=n,
                          advice="leave this layer dense")


def groups(encoding: str, n: int) -> int:
    """Scales per row of N = `n` weights."""
    _check_width(n)
    return n // group_size(encoding)


def ternary_blocks(n: int) -> list[tuple[int, int, int, int]]:
    """The blocks of a ternary row: (first weight, weights R, first byte, bytes S), S = ceil(R / 5)."""
    _check_width(n)
    blocks, byte = [], 0
    for first in range(0, n, BLOCK):
        count = min(BLOCK, n - first)
        size = -(-count // 5)
        blocks.append((first, count, byte, size))
        byte += size
    return blocks


def row_bytes(encoding: str, n: int) -> int:
    """Bytes of codes in one row of N = `n` weights."""
    check_encoding(encoding)
    _check_width(n)
    if encoding == "binary":
        return n // 8
    if encoding == "affine4":
        return n // 2
    if encoding == "int8":
        return n
    full, rest = divmod(n, BLOCK)
    return full * (BLOCK // 5) + -(-rest // 5)


def bits_per_weight(encoding: str, n: int) -> float:
    """Stored bits per weight of a row of N = `n` weights, scales and zero points included."""
    g = groups(encoding, n)
    extra = -(-g // 2) if encoding == "affine4" else 0
    return 8.0 * (row_bytes(encoding, n) + 2 * g + extra) / n


def layout(encoding: str, shape: tuple[int, int]) -> list[tuple[str, str, tuple[int, int]]]:
    """The tensors of one packed weight: (suffix, safetensors dtype, shape), e.g. ("codes", "U8", (O, row bytes))."""
    o, n = shape
    g = groups(encoding, n)
    parts = [("codes", "U8", (o, row_bytes(encoding, n))), ("scales", "F16", (o, g))]
    if encoding == "affine4":
        parts.append(("zeros", "U8", (o, -(-g // 2))))
    return parts


def packed_nbytes(encoding: str, shape: tuple[int, int]) -> int:
    """Stored bytes of one packed weight: codes, scales and zeros."""
    return sum(rows * columns * (2 if dtype == "F16" else 1) for _, dtype, (rows, columns) in layout(encoding, shape))


@dataclass(frozen=True)
class PackedTensor:
    """One packed weight. Arrays may be views of a memory map. The constructor checks dtypes and shapes, not values."""

    encoding: str
    shape: tuple[int, int]
    codes: Bytes
    scales: npt.NDArray[np.float16]
    zeros: Bytes | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        expected = {suffix: (np.float16 if dtype == "F16" else np.uint8, shape)
                    for suffix, dtype, shape in layout(self.encoding, self.shape)}
        for suffix, (dtype, shape) in expected.items():
            array = getattr(self, suffix)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
                found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
                raise FormatError(f"wrong {suffix} for a {self.encoding} weight of shape {list(self.shape)}",
                                  expected=f"{np.dtype(dtype)} {list(shape)}", found=found)
        if "zeros" not in expected and self.zeros is not None:
            raise FormatError(f"a {self.encoding} weight has no zero points", expected=None, found="zeros")

    def parts(self) -> dict[str, np.ndarray]:
        """Suffix -> array, in the order of `layout`."""
        return {suffix: getattr(self, suffix) for suffix, _, _ in layout(self.encoding, self.shape)}

    @property
    def nbytes(self) -> int:
        """Stored bytes: codes, scales and zeros."""
        return packed_nbytes(self.encoding, self.shape)


def _row_chunks(o: int, n: int) -> Iterator[slice]:
    step = max(1, _CHUNK // n)
    for first in range(0, o, step):
        yield slice(first, min(o, first + step))


# --- packing ---------------------------------------------------------------------------------------------------------


def round_scales(scales: npt.ArrayLike) -> npt.NDArray[np.float16]:
    """Clamp positive scales to [2^-24, 65504] and round them to float16 (nearest, ties to even)."""
    clamped: np.ndarray = np.clip(np.asarray(scales), MIN_SCALE, MAX_SCALE)
    return clamped.astype(np.float16)


def pack(values: np.ndarray, scales: np.ndarray, encoding: str, zeros: np.ndarray | None = None, *,
         exact: bool = False) -> PackedTensor:
    """Pack integer values [O, N] and scales [O, G] into the layout of `encoding`.

    values are -1/0/+1 (binary: a 0 becomes +1; ternary), 0..15 (affine4, with `zeros` [O, G], 0..15) or -127..127
    (int8). A negative scale is made positive by mirroring its group. A zero scale, and the scale of a ternary or int8
    group of zeros, becomes 2^-24. With `exact` a scale that float16 cannot hold exactly is refused instead of rounded
    (for foreign files).
    Raises FormatError for wrong shapes, values out of range, and scales that are not finite.
    """
    check_encoding(encoding)
    values = np.asarray(values)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise FormatError("values to pack have the wrong form", expected="integers of shape [O, N]",
                          found=f"{values.dtype} {list(values.shape)}")
    o, n = values.shape
    g, size = groups(encoding, n), group_size(encoding)
    scales = np.asarray(scales)
    if not np.issubdtype(scales.dtype, np.floating) or scales.shape != (o, g):
        raise FormatError("scales to pack have the wrong form", expected=f"floats of shape {[o, g]}",
                          found=f"{scales.dtype} {list(scales.shape)}")
    finite = np.isfinite(scales)
    if not finite.all():
        row, group = np.argwhere(~finite)[0]
        raise FormatError(f"scale of row {row}, group {group} is not finite", expected="a finite number",
                          found=scales[row, group], advice="the source weights hold NaN or infinity")
    if exact:
        _check_exact(scales)
    if (encoding == "affine4") != (zeros is not None):
        raise FormatError("zero points do not fit the encoding", expected="zeros for affine4 and only for affine4",
                          found=f"{encoding} with{'out' if zeros is None else ''} zeros")
    low, high = _RANGES[encoding]
    if values.size and (int(values.min()) < low or int(values.max()) > high):
        raise FormatError(f"{encoding} values are out of range", expected=f"{low}..{high}",
                          found=f"{values.min()}..{values.max()}")
    values = values.astype(np.int8, copy=False)
    if zeros is not None:
        zeros = np.asarray(zeros)
        if zeros.shape != (o, g) or (zeros.size and (int(zeros.min()) < 0 or int(zeros.max()) > 15)):
            raise FormatError("zero points have the wrong form", expected=f"0..15 of shape {[o, g]}",
                              found=f"{zeros.dtype} {list(zeros.shape)}")
        zeros = zeros.astype(np.uint8)

    negative = scales < 0
    if negative.any():
        grouped = values.reshape(o, g, size).copy()
        if zeros is not None:  # (c - z) * s == ((15 - c) - (15 - z)) * -s
            grouped[negative] = 15 - grouped[negative]
            zeros[negative] = 15 - zeros[negative]
        else:
            grouped[negative] = -grouped[negative]
        values, scales = grouped.reshape(o, n), np.abs(scales)
    stored = round_scales(scales)
    if encoding in ("ternary", "int8"):
        dead = scales == 0
        if dead.any():  # zero times anything is zero: keep that with codes, since the stored scale cannot be zero
            values = values.copy()
            values.reshape(o, g, size)[dead] = 0
        stored[~values.reshape(o, g, size).any(axis=2)] = MIN_SCALE

    codes = np.empty((o, row_bytes(encoding, n)), dtype=np.uint8)
    for rows in _row_chunks(o, n):
        _PACKERS[encoding](values[rows], codes[rows])
    return PackedTensor(encoding, (o, n), codes, stored, None if zeros is None else _pack_nibbles(zeros))


def _check_exact(scales: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        lossy = scales.astype(np.float16).astype(scales.dtype) != scales
    if lossy.any():
        row, group = np.argwhere(lossy)[0]
        raise FormatError(f"scale of row {row}, group {group} does not fit float16", expected="an exact float16 value",
                          found=repr(float(scales[row, group])), advice="without exact=True it is rounded")


def _pack_binary(values: np.ndarray, codes: Bytes) -> None:
    codes[:] = np.packbits(values >= 0, axis=1, bitorder="little")


def _pack_ternary(values: np.ndarray, codes: Bytes) -> None:
    o, n = values.shape
    digits = (values + 1).view(np.uint8)
    full = n // BLOCK
    if full:
        planes = digits[:, : full * BLOCK].reshape(o, full, 5, BLOCK // 5)
        codes[:, : full * (BLOCK // 5)] = _trit_bytes(planes).reshape(o, -1)
    rest = n - full * BLOCK
    if rest:
        size = -(-rest // 5)
        padded = np.ones((o, 5 * size), dtype=np.uint8)  # positions past the row hold code 1, weight 0
        padded[:, :rest] = digits[:, full * BLOCK :]
        codes[:, full * (BLOCK // 5) :] = _trit_bytes(padded.reshape(o, 1, 5, size)).reshape(o, size)


def _trit_bytes(planes: Bytes) -> Bytes:
    v = planes[:, :, 0].copy()
    for plane in range(1, 5):  # Horner's rule; at most 242, so uint8 never wraps
        v *= np.uint8(3)
        v += planes[:, :, plane]
    return _TRIT_BYTES[v]


def _pack_affine4(values: np.ndarray, codes: Bytes) -> None:
    codes[:] = _pack_nibbles(values.view(np.uint8))


def _pack_nibbles(values: Bytes) -> Bytes:
    """[O, K] of 0..15 -> [O, ceil(K/2)], low nibble first; an odd last high nibble is 0."""
    if values.shape[1] % 2:
        values = np.concatenate([values, np.zeros((values.shape[0], 1), dtype=np.uint8)], axis=1)
    return values[:, 0::2] | (values[:, 1::2] << np.uint8(4))


def _pack_int8(values: np.ndarray, codes: Bytes) -> None:
    codes[:] = values.view(np.uint8)


_PACKERS = {"binary": _pack_binary, "ternary": _pack_ternary, "affine4": _pack_affine4, "int8": _pack_int8}


# --- unpacking -------------------------------------------------------------------------------------------------------


def unpack_rows(codes: Bytes, encoding: str, n: int) -> npt.NDArray[np.int8]:
    """Codes [o, row bytes] -> values int8 [o, N]: -1/+1, -1/0/+1, 0..15 or, for int8, -128..127. Any byte decodes."""
    if codes.ndim != 2 or codes.dtype != np.uint8 or codes.shape[1] != row_bytes(encoding, n):
        raise FormatError(f"wrong codes for {encoding} rows of {n} weights",
                          expected=f"uint8 [*, {row_bytes(encoding, n)}]", found=f"{codes.dtype} {list(codes.shape)}")
    values = np.empty((codes.shape[0], n), dtype=np.int8)
    for rows in _row_chunks(codes.shape[0], n):
        _UNPACKERS[encoding](codes[rows], values[rows])
    return values


def _unpack_binary(codes: Bytes, values: np.ndarray) -> None:
    values[:] = np.unpackbits(codes, axis=1, bitorder="little").view(np.int8)
    values *= np.int8(2)
    values -= np.int8(1)


def _unpack_ternary(codes: Bytes, values: np.ndarray) -> None:
    o, n = values.shape
    full = n // BLOCK
    if full:
        size = BLOCK // 5
        _trits(codes[:, : full * size].reshape(o, full, size), values[:, : full * BLOCK].reshape(o, full, 5, size))
    rest = n - full * BLOCK
    if rest:
        size = -(-rest // 5)
        planes = np.empty((o, 1, 5, size), dtype=np.int8)
        _trits(codes[:, full * (BLOCK // 5) :].reshape(o, 1, size), planes)
        values[:, full * BLOCK :] = planes.reshape(o, 5 * size)[:, :rest]


def _trits(codes: Bytes, planes: np.ndarray) -> None:
    """codes [o, blocks, S] -> planes [o, blocks, 5, S]: digit n = ((b * 3^n mod 256) * 3) >> 8, less 1.

    For a byte x, (3 x) >> 8 is (x >= 86) + (x >= 171), which needs no wider integer.
    """
    x = codes.copy()
    for plane in range(5):
        target = planes[:, :, plane]
        np.subtract((x >= 86).view(np.int8), (x < 171).view(np.int8), out=target)
        x *= np.uint8(3)  # wraps modulo 256 by design


def _unpack_affine4(codes: Bytes, values: np.ndarray) -> None:
    values[:] = _unpack_nibbles(codes, values.shape[1]).view(np.int8)


def _unpack_nibbles(codes: Bytes, count: int) -> Bytes:
    pairs = np.empty((codes.shape[0], codes.shape[1], 2), dtype=np.uint8)
    np.bitwise_and(codes, 15, out=pairs[:, :, 0])
    np.right_shift(codes, 4, out=pairs[:, :, 1])
    return pairs.reshape(codes.shape[0], -1)[:, :count]


def _unpack_int8(codes: Bytes, values: np.ndarray) -> None:
    values[:] = codes.view(np.int8)


_UNPACKERS = {"binary": _unpack_binary, "ternary": _unpack_ternary, "affine4": _unpack_affine4, "int8": _unpack_int8}


def unpack(packed: PackedTensor) -> npt.NDArray[np.int8]:
    """Values int8 [O, N]: -1/+1 (binary), -1/0/+1 (ternary), 0..15 (affine4), -127..127 (int8)."""
    return unpack_rows(packed.codes, packed.encoding, packed.shape[1])


def unpack_zeros(packed: PackedTensor) -> Bytes:
    """Zero points uint8 [O, G] of an affine4 weight."""
    if packed.zeros is None:
        raise FormatError(f"a {packed.encoding} weight has no zero points", expected="affine4", found=packed.encoding)
    return _unpack_nibbles(packed.zeros, groups(packed.encoding, packed.shape[1]))


def decode_rows(codes: Bytes, scales: npt.NDArray[np.float16], zeros: Bytes | None, encoding: str, n: int,
                ) -> npt.NDArray[np.float32]:
    """Rows of codes [o, row bytes], scales [o, G] and zeros [o, G/2] -> weights float32 [o, N], exactly."""
    g, size = groups(encoding, n), group_size(encoding)
    o = codes.shape[0]
    if scales.shape != (o, g):
        raise FormatError(f"wrong scales for {encoding} rows of {n} weights", expected=[o, g],
                          found=list(scales.shape))
    if encoding == "affine4" and (zeros is None or zeros.shape != (o, -(-g // 2))):
        raise FormatError(f"wrong zeros for affine4 rows of {n} weights", expected=[o, -(-g // 2)],
                          found=None if zeros is None else list(zeros.shape))
    weights = np.empty((o, n), dtype=np.float32)
    factors = scales.astype(np.float32)[:, :, None]
    for rows in _row_chunks(o, n):
        values = unpack_rows(codes[rows], encoding, n).reshape(-1, g, size)
        if zeros is not None and encoding == "affine4":
            values = values - _unpack_nibbles(zeros[rows], g).view(np.int8)[:, :, None]
        np.multiply(values, factors[rows], out=weights[rows].reshape(-1, g, size))
    return weights


def dequantize(packed: PackedTensor, rows: slice | None = None) -> npt.NDArray[np.float32]:
    """Weights float32 [o, N] of all rows, or of the rows in a slice."""
    rows = slice(None) if rows is None else rows
    zeros = None if packed.zeros is None else packed.zeros[rows]
    return decode_rows(packed.codes[rows], packed.scales[rows], zeros, packed.encoding, packed.shape[1])


# --- checking values -------------------------------------------------------------------------------------------------


def validate_values(packed: PackedTensor, name: str) -> None:
    """Check what opening a file does not: scales finite and positive, trit and int8 bytes valid, padding as written.

    Raises FormatError that names `name`'s tensor, the first bad place, what was expected and what was found.
    """
    bits = packed.scales.view(np.uint16)
    bad = (bits == 0) | (bits >= 0x7C00)  # +0, then +inf, NaN and everything negative: positive finite is 1..0x7BFF
    if bad.any():
        row, group = np.argwhere(bad)[0]
        raise FormatError(f"bad scale in row {row}, group {group} ({int(bad.sum())} bad in all)",
                          tensor=f"{name}.scales", expected="a finite number above 0",
                          found=float(packed.scales[row, group]))
    n = packed.shape[1]
    if packed.encoding == "int8":
        for rows in _row_chunks(packed.shape[0], n):
            lowest = packed.codes[rows] == _INT8_INVALID
            if lowest.any():
                row, byte = np.argwhere(lowest)[0]
                raise FormatError(f"invalid int8 byte in row {rows.start + row}, byte {byte}", tensor=f"{name}.codes",
                                  expected="-127..127", found="0x80, which is -128")
    if packed.encoding != "ternary":
        return
    _, count, start, size = ternary_blocks(n)[-1]
    missing = 5 * size - count
    for rows in _row_chunks(packed.shape[0], n):
        valid = _TRIT_VALID[packed.codes[rows]]
        if not valid.all():
            row, byte = np.argwhere(~valid)[0]
            raise FormatError(f"invalid trit byte in row {rows.start + row}, byte {byte}", tensor=f"{name}.codes",
                              expected="ceil(256 v / 243) for v in 0..242",
                              found=f"0x{packed.codes[rows.start + row, byte]:02x}")
        if missing:
            tail = np.ascontiguousarray(packed.codes[rows, start + size - missing : start + size])
            planes = np.empty((tail.shape[0], 1, 5, missing), dtype=np.int8)
            _trits(tail[:, None, :], planes)
            if planes[:, 0, 4].any():
                row, position = np.argwhere(planes[:, 0, 4] != 0)[0]
                raise FormatError(f"padding after the last weight of row {rows.start + row} is not empty",
                                  tensor=f"{name}.codes", expected="code 1",
                                  found=f"code {int(planes[row, 0, 4, position]) + 1}")
