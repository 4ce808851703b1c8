"""HQQ's four-bit Linears, as Bonsai's CUDA releases hold their text encoder.

A matrix [O, N] is seen as R = O N / 64 groups of 64. Byte row r holds group r in the high nibbles and group r + R / 2
in the low ones; weight = (code - zero) * scale with a real zero. A zero point that is no whole number cannot be held
by our four-bit encoding, so such a weight is read as float32. Source: HQQ 0.2.8, described in its own words here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from linocut.errors import FormatError
from linocut.formats.packed import AFFINE_GROUP_SIZE, GROUP_SIZE, pack
from linocut.formats.weight import Block, Weight

__all__ = ["hqq_weight"]


def hqq_weight(name: str, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, shape: tuple[int, int],
               facts: Mapping[str, object]) -> Weight:
    """A Linear: codes uint8 [R / 2, 64], scale and zero float [R, 1], `facts` the other entries that HQQ stores.

    Raises FormatError for another form than four bits in groups of 64 along the rows.
    """
    expected = {"nbits": 4, "group_size": AFFINE_GROUP_SIZE, "axis": 1, "packing": "4bit_u8"}
    found = {key: facts.get(key, value) for key, value in expected.items()}
    o, n = shape
    groups = o * n // AFFINE_GROUP_SIZE
    if found != expected or n % GROUP_SIZE or groups % 2 or codes.shape != (groups // 2, AFFINE_GROUP_SIZE) \
            or scale.size != groups or zero.size != groups or codes.dtype != np.uint8:
        raise FormatError("an HQQ weight of this form is not read", tensor=name,
                          expected=f"{expected} for {list(shape)}", found=f"{found}, codes {list(codes.shape)}")
    scales, zeros = (part.astype(np.float32).reshape(o, -1) for part in (scale, zero))
    half, row = groups // 2, n // AFFINE_GROUP_SIZE

    def parts(first: int, last: int) -> np.ndarray:
        """Codes [rows, N]."""
        begin, end = first * row, last * row
        high = codes[begin : min(end, half)] >> 4
        low = codes[max(begin, half) - half : max(end, half) - half] & 15
        return np.concatenate([high, low]).reshape(last - first, n)

    whole = (zeros == np.rint(zeros)) & (zeros >= 0) & (zeros <= 15)
    with np.errstate(over="ignore"):
        held = whole & (scales.astype(np.float16) == scales)
    if held.all():
        def rows(first: int, last: int) -> Block:
            return pack(parts(first, last).view(np.int8), scales[first:last], "affine4",
                        zeros[first:last].astype(np.uint8), exact=True)

        return Weight("affine4", shape, rows, _nothing)

    def values(first: int, last: int) -> Block:
        centred = parts(first, last).reshape(last - first, row, AFFINE_GROUP_SIZE) - zeros[first:last, :, None]
        weights: np.ndarray = centred * scales[first:last, :, None]
        return weights.reshape(last - first, n)

    return Weight("F32", shape, values, _nothing, requantize="affine4")


def _nothing() -> None:
    """These weights lie in memory."""
