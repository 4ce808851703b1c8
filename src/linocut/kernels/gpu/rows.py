"""What a transformer block does between its products, in Triton: a token is a row, and goes through memory once.

Every function ends in the form that the next product reads (`Activations`), so rounding costs no pass of its own.
Computed in float32 throughout; int8 is rounded by the rule of the CPU (docs/kernels.md), to the same bits.

Shape letters: M tokens, S tokens of the attention, D width, F MLP width, H heads, K head width.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from linocut.kernels.gpu.activations import Activations

GROUPED, ROWS, FP8, FLOAT = (tl.constexpr(each) for each in range(4))
_KIND = {"int8": GROUPED, "rows": ROWS, "fp8": FP8, "float": FLOAT}
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _size(largest_bits):
    """The largest magnitude, and whether it can be divided by: bits of floats are ordered like their magnitudes, with
    infinity and NaN above all; a largest value below 2^-120 counts as zero."""
    largest = largest_bits.to(tl.float32, bitcast=True)
    return largest, (largest_bits < 0x7F800000) & (largest >= 7.52316384526264e-37)


@triton.jit
def _steps(largest_bits, most):
    """Scale of values whose largest is given by its bits, and its inverse: NaN where one of them is not finite."""
    largest, usable = _size(largest_bits)
    safe = tl.where(usable, largest, 1.0)
    most = tl.zeros_like(safe) + most
    broken = (tl.zeros_like(largest_bits) + 0x7FC00000).to(tl.float32, bitcast=True)
    scale = tl.where(usable, tl.math.div_rn(safe, most), tl.where(largest_bits < 0x7F800000, 0.0, broken))
    return scale, tl.where(usable, tl.math.div_rn(most, safe), 0.0), usable


@triton.jit
def _nearest(x):
    """x of at most 127 in size rounded to the nearest whole number, ties to even."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23


@triton.jit
def _finish(x, out, scales, row, stride_scales, stride, n, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """Store a row x [WIDTH] float32, zero from n on, as activations; `stride` values lie between rows of `out`, and
    `stride_scales` scales between groups."""
    column = tl.arange(0, WIDTH)
    place = out + row.to(tl.int64) * stride + column
    if KIND == FLOAT:
        tl.store(place, x.to(out.dtype.element_ty), mask=column < n)
    elif KIND == ROWS:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        scale, inverse, usable = _steps(tl.max(bits, 0), 127.0)
        tl.store(place, _nearest(tl.where(usable, x * inverse, 0.0)).to(tl.int8), mask=column < n)
        tl.store(scales + row, scale)
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(tl.reshape(bits, (WIDTH // 128, 128)), 1)
        grouped = tl.reshape(x, (WIDTH // 128, 128))
        scale, inverse, usable = _steps(largest, 127.0 if KIND == GROUPED else 448.0)
        values = tl.where(usable[:, None], grouped * inverse[:, None], 0.0)
        if KIND == GROUPED:
            tl.store(place, tl.reshape(_nearest(values).to(tl.int8), (WIDTH,)), mask=column < n)
        else:
            tl.store(place, tl.reshape(values.to(tl.float8e4nv), (WIDTH,)), mask=column < n)
        group = tl.arange(0, WIDTH // 128)
        tl.store(scales + group * stride_scales + row, scale, mask=group < n // 128)


@triton.jit(do_not_specialize=("stride_scales",))
def _quantize(x, out, scales, stride_scales, n, stride_x, WIDTH: tl.constexpr, KIND: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    values = tl.load(x + row.to(tl.int64) * stride_x + column, mask=column < n, other=0.0).to(tl.float32)
    _finish(values, out, scales, row, stride_scales, n, n, WIDTH, KIND)


@triton.jit(do_not_specialize=("stride_scales",))
def _normalize(x, y, gate, factor, shift, out, scales, stride_scales, n, stride_y, eps, ADDED: tl.constexpr,
               WIDTH: tl.constexpr, KIND: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    inside = column < n
    at = row.to(tl.int64) * n + column
    values = tl.load(x + at, mask=inside, other=0.0)
    if ADDED:
        more = tl.load(y + row.to(tl.int64) * stride_y + column, mask=inside, other=0.0).to(tl.float32)
        values += tl.load(gate + column, mask=inside, other=0.0) * more
        tl.store(x + at, values, mask=inside)
    centred = tl.where(inside, values - tl.sum(values, 0) / n, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / n + eps)
    values = centred * inverse * tl.load(factor + column, mask=inside, other=0.0)
    values += tl.load(shift + column, mask=inside, other=0.0)
    _finish(values, out, scales, row, stride_scales, n, n, WIDTH, KIND)


@triton.jit(do_not_specialize=("stride_scales",))
def _gated(attended, gate, value, out, scales, stride_scales, first, hidden, stride_attended, stride,
           WIDTH: tl.constexpr, KIND: tl.constexpr):
    """[attended | silu(gate) * value], the first part of width `first`, which may be 0."""
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    before, inside = column < first, column < first + hidden
    unit = column - first
    a = tl.load(gate + row.to(tl.int64) * stride + unit, mask=inside & ~before, other=0.0).to(tl.float32)
    b = tl.load(value + row.to(tl.int64) * stride + unit, mask=inside & ~before, other=0.0).to(tl.float32)
    values = a / (1.0 + tl.exp2(-a * _LOG2_E)) * b
    other = tl.load(attended + row.to(tl.int64) * stride_attended + column, mask=before, other=0.0).to(tl.float32)
    values = tl.where(before, other, values)
    _finish(values, out, scales, row, stride_scales, first + hidden, first + hidden, WIDTH, KIND)


@triton.jit(do_not_specialize=("first",))
def _turn(qkv, norm_q, norm_k, cos, sin, stride, width, heads, first, eps, HEADS: tl.constexpr, K: tl.constexpr):
    """RMS norm per head and rotation of adjacent channels, in place; program 1 of a token does k."""
    row, part = tl.program_id(0), tl.program_id(1)
    pair = tl.arange(0, K // 2)
    weight = norm_q if part == 0 else norm_k
    head = tl.arange(0, HEADS)
    column = tl.arange(0, K)
    place = qkv + row.to(tl.int64) * stride + part * width + head[:, None] * K + column[None, :]
    x = tl.load(place, mask=(head < heads)[:, None], other=0.0).to(tl.float32)
    x *= (1.0 / tl.sqrt(tl.sum(x * x, 1) / K + eps))[:, None]
    x *= tl.load(weight + column)[None, :]
    a, b = tl.split(tl.reshape(x, (HEADS, K // 2, 2)))
    at = (first + row) * (K // 2) + pair
    c, s = tl.load(cos + at)[None, :], tl.load(sin + at)[None, :]
    turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), (HEADS, K))
    tl.store(place, turned.to(qkv.dtype.element_ty), mask=(head < heads)[:, None])


def quantize(x: Tensor, out: Activations) -> None:
    """x[M, N] (float32, bfloat16 or float16; rows may lie apart) as activations."""
    if out.m:
        _row_kernel(_quantize, out, x, out.values, _scales(out), out.scale_stride, out.n, x.stride(0), n=out.n)


def normalize(x: Tensor, factor: Tensor, shift: Tensor, eps: float, out: Activations, y: Tensor | None = None,
              gate: Tensor | None = None) -> None:
    """x[M, D] (float32, contiguous) += gate[D] * y[M, D] in place if y is given; then layer norm times factor[D] plus
    shift[D], all float32, as activations."""
    added = x if y is None else y
    _row_kernel(_normalize, out, x, added, shift if gate is None else gate, factor, shift, out.values, _scales(out),
                out.scale_stride, out.n, added.stride(0), eps, n=out.n, ADDED=y is not None)


def gated(units: Tensor, out: Activations, attended: Tensor | None = None) -> None:
    """silu(first half of units[M, 2F]) * second half, as activations [M, F]; behind attended[M, D] if it is given."""
    hidden = units.shape[1] // 2
    first = 0 if attended is None else attended.shape[1]
    gate, value = units[:, :hidden], units[:, hidden:]
    before = units if attended is None else attended
    _row_kernel(_gated, out, before, gate, value, out.values, _scales(out), out.scale_stride, first, hidden,
                before.stride(0), units.stride(0), n=out.n)


def turn(qkv: Tensor, norms: tuple[Tensor, Tensor], rope: tuple[Tensor, Tensor], heads: int, eps: float,
         first: int = 0) -> None:
    """Normalize q and k of qkv[M, 3 H K or more] per head (weights float32 [K]) and rotate them in place.

    cos and sin are float32 [S, K / 2]; the M tokens are those from number `first` on.
    """
    k = norms[0].shape[0]
    if qkv.shape[0]:
        _turn[(qkv.shape[0], 2)](qkv, *norms, *rope, qkv.stride(0), heads * k, heads, first, eps,
                                 HEADS=triton.next_power_of_2(heads), K=k)


def _scales(out: Activations) -> Tensor:
    return out.values if out.scales is None else out.scales


def _row_kernel(kernel: Any, out: Activations, *arguments: Any, n: int, **constants: Any) -> None:
    width = max(128, triton.next_power_of_2(n))
    # Fused multiply-adds would round a few values of a million to another neighbour than the CPU does.
    kernel[(out.m,)](*arguments, WIDTH=width, KIND=_KIND[out.kind], num_warps=min(16, max(1, width // 1024)),
                     enable_fp_fusion=False, **constants)
