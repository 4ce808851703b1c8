"""Packed weights decoded on a GPU by Triton, from the bytes of the file: to floats, or to the operands of a product.

`decode` writes W itself. `unpack` and `fold` write what tensor cores multiply in eight bits, into scratch that all
layers share:

    unpack   values -1, 0, +1 (int8 or FP8) [O, N], exact, and their scales float32 [G, O]
    fold     int8 values r * (-1, 0, +1), where r = round(127 * scale / largest scale of the row), and one float32
             scale per row: an approximation, after which the product needs no scale between groups

Memory traffic decides: some 1 to 2 bits are read for each byte that is written. A ternary block of 640 weights is five
groups in the same 128 bytes, so its bytes are read once and its five digit planes are whole groups.

Shape letters: O out-features, N in-features, G = N / 128 groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linocut.formats.packed import AFFINE_GROUP_SIZE, BLOCK, GROUP_SIZE
from linocut.kernels.problem import PackedWeight

FLOATS, VALUES, FOLDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_ROWS = 32
_BLOCK_BYTES = BLOCK // 5


@triton.jit
def _put(out, values, scales, factors, rows, columns, o, n, KIND: tl.constexpr):
    """Store values [R, 128] of int32 -1, 0, +1 at rows and columns of `out`; scales and factors are [R, 1]."""
    place = rows[:, None].to(tl.int64) * n + columns[None, :]
    inside = (rows < o)[:, None]
    if KIND == FLOATS:
        tl.store(out + place, (values.to(tl.float32) * scales).to(out.dtype.element_ty), mask=inside)
    elif KIND == VALUES:
        if out.dtype.element_ty == tl.int8:
            tl.store(out + place, values.to(tl.int8), mask=inside)
        else:
            tl.store(out + place, values.to(tl.float32).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + place, (values * factors).to(tl.int8), mask=inside)


@triton.jit
def _rounded(x):
    """x >= 0 rounded to the nearest whole number, ties to even, as int32."""
    shifted = x + 12582912.0  # 1.5 * 2^23
    return (shifted - 12582912.0).to(tl.int32)


@triton.jit
def _largest(scales, rows, o, groups, GROUPS: tl.constexpr):
    """Largest scale of each row [R], and what makes it 127."""
    each = tl.arange(0, GROUPS)
    inside = (rows < o)[:, None] & (each < groups)[None, :]
    largest = tl.max(tl.load(scales + rows[:, None] * groups + each[None, :], mask=inside, other=0.0).to(tl.float32), 1)
    return largest, tl.where(largest > 0, 127.0 / tl.maximum(largest, 1e-30), 0.0)


@triton.jit
def _group_scale(scales, row_scales, rows, group, o, groups, inverse, KIND: tl.constexpr):
    """Scale [R, 1] of one group and, where it is wanted, its factor; leaves the scale where products read it."""
    scale = tl.load(scales + rows * groups + group, mask=rows < o, other=0.0).to(tl.float32)
    factor = scale
    if KIND == VALUES:
        tl.store(row_scales + group.to(tl.int64) * o + rows, scale, mask=rows < o)
    if KIND == FOLDED:
        factor = scale * inverse
    return scale[:, None], _rounded(factor)[:, None]


@triton.jit
def _binary(codes, scales, out, row_scales, o, n, groups, ROWS: tl.constexpr, GROUPS: tl.constexpr,
            KIND: tl.constexpr):
    rows, group = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    inverse = tl.zeros((ROWS,), tl.float32)
    if KIND == FOLDED:
        largest, inverse = _largest(scales, rows, o, groups, GROUPS)
        if group == 0:
            tl.store(row_scales + rows, largest / 127.0, mask=rows < o)
    scale, factor = _group_scale(scales, row_scales, rows, group, o, groups, inverse, KIND)
    byte = group * 16 + tl.arange(0, 16)
    b = tl.load(codes + rows[:, None].to(tl.int64) * (n // 8) + byte[None, :], mask=(rows < o)[:, None], other=0)
    values = tl.interleave(tl.interleave(tl.interleave(b & 1, (b >> 4) & 1), tl.interleave((b >> 2) & 1, (b >> 6) & 1)),
                           tl.interleave(tl.interleave((b >> 1) & 1, (b >> 5) & 1),
                                         tl.interleave((b >> 3) & 1, (b >> 7) & 1)))
    _put(out, values.to(tl.int32) * 2 - 1, scale, factor, rows, group * 128 + tl.arange(0, 128), o, n, KIND)


@triton.jit
def _ternary(codes, scales, out, row_scales, o, n, groups, row_bytes, ROWS: tl.constexpr, GROUPS: tl.constexpr,
             LAST_GROUPS: tl.constexpr, LAST_BYTES: tl.constexpr, KIND: tl.constexpr):
    """One block of 640 weights, or the last, shorter one."""
    rows, block = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    inverse = tl.zeros((ROWS,), tl.float32)
    if KIND == FOLDED:
        largest, inverse = _largest(scales, rows, o, groups, GROUPS)
        if block == 0:
            tl.store(row_scales + rows, largest / 127.0, mask=rows < o)
    line = codes + rows[:, None].to(tl.int64) * row_bytes + block * 128
    column = tl.arange(0, 128)
    if block * 640 + 640 <= n:
        b = tl.load(line + column[None, :], mask=(rows < o)[:, None], other=0).to(tl.int32)
        for plane in tl.static_range(5):
            group = block * 5 + plane
            scale, factor = _group_scale(scales, row_scales, rows, group, o, groups, inverse, KIND)
            _put(out, ((b * 3) >> 8) - 1, scale, factor, rows, group * 128 + column, o, n, KIND)
            b = (b * 3) & 255
    else:
        for part in tl.static_range(LAST_GROUPS):
            group = block * 5 + part
            scale, factor = _group_scale(scales, row_scales, rows, group, o, groups, inverse, KIND)
            index = part * 128 + column
            plane = index // LAST_BYTES
            power = tl.where(plane < 2, tl.where(plane == 0, 1, 3),
                             tl.where(plane == 2, 9, tl.where(plane == 3, 27, 81)))
            b = tl.load(line + (index - plane * LAST_BYTES)[None, :], mask=(rows < o)[:, None], other=0).to(tl.int32)
            digit = (((b * power[None, :]) & 255) * 3) >> 8
            _put(out, digit - 1, scale, factor, rows, group * 128 + column, o, n, KIND)


@triton.jit
def _affine4(codes, scales, zeros, out, o, n, ROWS: tl.constexpr):
    """Two groups of 64 weights, which share a byte of zero points."""
    rows, pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    groups = n // 64
    byte = pair * 64 + tl.arange(0, 64)
    b = tl.load(codes + rows[:, None].to(tl.int64) * (n // 2) + byte[None, :], mask=(rows < o)[:, None], other=0)
    b = b.to(tl.int32)
    both = tl.load(zeros + rows * (groups // 2) + pair, mask=rows < o, other=0).to(tl.int32)
    column = tl.arange(0, 128)
    second = (column >= 64)[None, :]
    zero = tl.where(second, (both >> 4)[:, None], (both & 15)[:, None])
    place = rows * groups + pair * 2
    first_scale = tl.load(scales + place, mask=rows < o, other=0.0).to(tl.float32)
    second_scale = tl.load(scales + place + 1, mask=rows < o, other=0.0).to(tl.float32)
    values = (tl.interleave(b & 15, b >> 4) - zero).to(tl.float32)
    values *= tl.where(second, second_scale[:, None], first_scale[:, None])
    columns = pair * 128 + column
    tl.store(out + rows[:, None].to(tl.int64) * n + columns[None, :], values.to(out.dtype.element_ty),
             mask=(rows < o)[:, None])


@triton.jit
def _int8(codes, scales, out, o, n, ROWS: tl.constexpr):
    rows, group = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    columns = group * 128 + tl.arange(0, 128)
    place = rows[:, None].to(tl.int64) * n + columns[None, :]
    b = tl.load(codes + place, mask=(rows < o)[:, None], other=0).to(tl.int8, bitcast=True)
    scale = tl.load(scales + rows * (n // 128) + group, mask=rows < o, other=0.0).to(tl.float32)
    tl.store(out + place, (b.to(tl.float32) * scale[:, None]).to(out.dtype.element_ty), mask=(rows < o)[:, None])


def decode(weight: PackedWeight, out: Tensor) -> None:
    """Write W[O, N] into the contiguous `out` (float32, bfloat16 or float16), the reference's bits."""
    o, n = weight.o, weight.n
    rows = triton.cdiv(o, _ROWS)
    if weight.encoding == "affine4":
        _affine4[(rows, triton.cdiv(n, 2 * AFFINE_GROUP_SIZE))](weight.codes, weight.scales, weight.zeros, out, o, n,
                                                                 ROWS=_ROWS)
    elif weight.encoding == "int8":
        _int8[(rows, n // GROUP_SIZE)](weight.codes, weight.scales, out, o, n, ROWS=_ROWS)
    else:
        _run(weight, out, out, FLOATS)


def unpack(weight: PackedWeight, values: Tensor, scales: Tensor) -> None:
    """A binary or ternary weight as values [O, N] (int8 or float8_e4m3fn) and scales float32 [G, O], exactly."""
    _run(weight, values, scales, VALUES)


def fold(weight: PackedWeight, values: Tensor, row_scales: Tensor) -> None:
    """A binary or ternary weight as int8 values [O, N] and row scales float32 [O].

    A group's scale is rounded to a 127th of the row's largest, so by 0.4 % of that at most.
    """
    _run(weight, values, row_scales, FOLDED)


def _run(weight: PackedWeight, out: Tensor, scales: Tensor, kind: tl.constexpr) -> None:
    o, n, groups = weight.o, weight.n, weight.n // GROUP_SIZE
    rows, padded = triton.cdiv(o, _ROWS), triton.next_power_of_2(groups)
    if weight.encoding == "binary":
        _binary[(rows, groups)](weight.codes, weight.scales, out, scales, o, n, groups, ROWS=_ROWS, GROUPS=padded,
                                KIND=kind)
        return
    rest = n % BLOCK
    _ternary[(rows, triton.cdiv(n, BLOCK))](weight.codes, weight.scales, out, scales, o, n, groups,
                                            weight.codes.shape[1], ROWS=_ROWS, GROUPS=padded,
                                            LAST_GROUPS=rest // GROUP_SIZE, LAST_BYTES=max(1, -(-rest // 5)),
                                            KIND=kind)


def values_of(folded: Tensor, row_scales: Tensor) -> Tensor:
    """What `fold` made of a weight, float32 [O, N]."""
    return folded.float() * row_scales[:, None].to(torch.float32)
