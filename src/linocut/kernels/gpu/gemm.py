"""y[M, O] = x[M, N] @ W[O, N].T in Triton, from rounded activations and eight-bit or packed weights.

A group of 128 is one step of the loop over N: its products are added in the tensor cores' int32 (or, for FP8, float32),
become a float32 once, and are scaled and added. That one conversion per 128 products is what exact group scales cost;
weights that were folded (`decode.fold`) are added as int32 over all of N instead.

`product` reads unpacked weights from scratch; `packed_product` reads the bytes of the file and decodes them for every
block of tokens anew, which pays where there are few tokens. It also takes activations that were not rounded, which the
tensor cores add in float32.

Shape letters: M tokens, N in-features, O out-features, G = N / 128.
"""

from dataclasses import asdict, dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from linocut.formats.packed import BLOCK, GROUP_SIZE
from linocut.kernels.gpu import runtime
from linocut.kernels.gpu.activations import Activations
from linocut.kernels.problem import PackedWeight

GROUPED, ROWS, FOLDED = (tl.constexpr(each) for each in range(3))


@dataclass(frozen=True)
class Tile:
    """How a product is cut: tokens and rows of W of a program, its warps, and the loads that are in flight."""

    block_m: int = 128
    block_o: int = 128
    warps: int = 8
    stages: int = 3
    together: int = 8
    """Blocks of tokens that share their weights while those are in the second-level cache."""
    bulk: bool = False
    """Tiles come by the copy engine of compute capability 9.0 and later, which takes fewer registers."""
    registers: int | None = None
    """Most registers of a thread, so that several programs share a multiprocessor and hide each other's waits."""

    @property
    def shared_bytes(self) -> int:
        """Shared memory for the loads in flight: 128 values of eight bits of each token and each row of W."""
        return (self.block_m + self.block_o) * 128 * self.stages

    def to_dict(self) -> dict[str, int | bool | None]:
        """The fields, for a file."""
        return asdict(self)


@triton.jit
def _place(m, o, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, TOGETHER: tl.constexpr):
    """Which tile this program computes: down TOGETHER blocks of tokens, then on to the next rows of W."""
    program = tl.program_id(0)
    blocks_m, blocks_o = tl.cdiv(m, BLOCK_M), tl.cdiv(o, BLOCK_O)
    first = program // (TOGETHER * blocks_o) * TOGETHER
    size = tl.minimum(blocks_m - first, TOGETHER)
    within = program % (TOGETHER * blocks_o)
    return (first + within % size) * BLOCK_M, within // size * BLOCK_O


# Any number of tokens and any width runs what was compiled once: a step has three widths, and a compilation takes as
# long as hundreds of products. GROUPS is 0 there; the interpreter cannot loop as often as an argument says.
@triton.jit(do_not_specialize=("m", "stride_scales"))
def _product(x, x_scales, w, w_scales, y, m, o, n, stride_y, stride_scales, SCALES: tl.constexpr, FP8: tl.constexpr,
             BULK: tl.constexpr, STAGES: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr,
             BLOCK_O: tl.constexpr, TOGETHER: tl.constexpr):
    """x and w are descriptors of [BLOCK_M, 128] and [BLOCK_O, 128] if BULK, else pointers."""
    first_m, first_o = _place(m, o, BLOCK_M, BLOCK_O, TOGETHER)
    row, column = first_m + tl.arange(0, BLOCK_M), first_o + tl.arange(0, BLOCK_O)
    inside_m, inside_o = row < m, column < o
    if not BULK:
        # Past the end the first rows are read again; what comes of them is not stored.
        row_in, column_in, k = tl.where(inside_m, row, 0), tl.where(inside_o, column, 0), tl.arange(0, 128)
        x_at = x + row_in[:, None].to(tl.int64) * n + k[None, :]
        w_at = w + column_in[None, :].to(tl.int64) * n + k[:, None]
    if SCALES == FOLDED:
        total = tl.zeros((BLOCK_M, BLOCK_O), tl.int32)
        for group in range(n // 128 if GROUPS == 0 else GROUPS):
            if BULK:
                a, b = x.load([first_m, group * 128]), w.load([first_o, group * 128]).T
            else:
                a, b = tl.load(x_at + group * 128), tl.load(w_at + group * 128)
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        result = total.to(tl.float32) * tl.load(w_scales + column, mask=inside_o, other=0.0)[None, :]
    else:
        result = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        # The number of stages, said here, has scales loaded ahead as well, not a and b alone.
        for group in tl.range(n // 128 if GROUPS == 0 else GROUPS, num_stages=STAGES):
            # Masks keep neighbours neighbours: a thread then has one address for all its scales, not one for each.
            scale = tl.load(w_scales + group * o + column, mask=inside_o, other=0.0)[None, :]
            if SCALES == GROUPED:
                scale = scale * tl.load(x_scales + group * stride_scales + row, mask=inside_m, other=0.0)[:, None]
            if BULK:
                a, b = x.load([first_m, group * 128]), w.load([first_o, group * 128]).T
            else:
                a, b = tl.load(x_at + group * 128), tl.load(w_at + group * 128)
            if FP8:
                part = tl.dot(a, b)
            else:
                part = tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)
            result += part * scale
    if SCALES != GROUPED:
        result *= tl.load(x_scales + row, mask=inside_m, other=0.0)[:, None]
    tl.store(y + row[:, None].to(tl.int64) * stride_y + column[None, :], result.to(y.dtype.element_ty),
             mask=inside_m[:, None] & inside_o[None, :])


@triton.jit(do_not_specialize=("m", "stride_scales"))
def _packed_product(x, x_scales, codes, w_scales, y, m, o, stride_y, stride_scales, row_bytes, n, last_bytes,
                    TERNARY: tl.constexpr, FLOATS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_O: tl.constexpr, TOGETHER: tl.constexpr):
    """The tile is computed transposed, [O, M]: then what is decoded goes to the tensor cores out of registers."""
    first_m, first_o = _place(m, o, BLOCK_M, BLOCK_O, TOGETHER)
    row, column = first_m + tl.arange(0, BLOCK_M), first_o + tl.arange(0, BLOCK_O)
    row_in, column_in = tl.where(row < m, row, 0), tl.where(column < o, column, 0)
    k = tl.arange(0, 128)
    x_at = x + row_in[None, :].to(tl.int64) * n + k[:, None]
    line = codes + column_in[:, None].to(tl.int64) * row_bytes
    byte = tl.arange(0, 16)
    result = tl.zeros((BLOCK_O, BLOCK_M), tl.float32)
    for group in range(n // 128 if GROUPS == 0 else GROUPS):
        scale = tl.load(w_scales + column_in * (n // 128) + group).to(tl.float32)
        if TERNARY:
            block = group // 5
            plane_bytes = tl.where(block < n // 640, 128, last_bytes)
            index = (group - block * 5) * 128 + k
            plane = index // plane_bytes
            power = tl.where(plane < 2, tl.where(plane == 0, 1, 3),
                             tl.where(plane == 2, 9, tl.where(plane == 3, 27, 81)))
            b = tl.load(line + (block * 128 + index - plane * plane_bytes)[None, :]).to(tl.int32)
            w = ((((b * power[None, :]) & 255) * 3) >> 8).to(tl.int8) - 1
        else:
            b = tl.load(line + (group * 16 + byte)[None, :]).to(tl.int8, bitcast=True)
            w = tl.interleave(
                tl.interleave(tl.interleave(b & 1, (b >> 4) & 1), tl.interleave((b >> 2) & 1, (b >> 6) & 1)),
                tl.interleave(tl.interleave((b >> 1) & 1, (b >> 5) & 1),
                              tl.interleave((b >> 3) & 1, (b >> 7) & 1))) * 2 - 1
        a = tl.load(x_at)
        if FLOATS:
            if GROUPS != 0:  # the interpreter multiplies the bits of bfloat16
                a = a.to(tl.float32)
            result += tl.dot(w.to(tl.int8).to(a.dtype), a) * scale[:, None]
        else:
            part = tl.dot(w.to(tl.int8), a, out_dtype=tl.int32).to(tl.float32)
            result += part * (scale[:, None] * tl.load(x_scales + group * stride_scales + row_in)[None, :])
        x_at += 128
    tl.store(y + row[None, :].to(tl.int64) * stride_y + column[:, None], result.to(y.dtype.element_ty),
             mask=(row < m)[None, :] & (column < o)[:, None])


def product(act: Activations, values: Tensor, scales: Tensor, out: Tensor, tile: Tile) -> None:
    """out[M, O] = act @ W.T with W as `decode.unpack` leaves it, or, for activations of the kind rows and one scale per
    row, as `decode.fold` does. `out` is float32, bfloat16 or float16; its rows may lie apart."""
    x: Any = act.values
    w: Any = values
    if tile.bulk:
        x = TensorDescriptor.from_tensor(x, [tile.block_m, GROUP_SIZE])
        w = TensorDescriptor.from_tensor(w, [tile.block_o, GROUP_SIZE])
    folded = scales.ndim == 1
    kind = FOLDED if folded else ROWS if act.kind == "rows" else GROUPED
    o = values.shape[0]
    _product[_grid(act.m, o, tile)](x, act.scales, w, scales, out, act.m, o, act.n, out.stride(0), act.scale_stride,
                                    SCALES=kind, FP8=act.kind == "fp8", BULK=tile.bulk, STAGES=tile.stages,
                                    **_options(tile, act.n))


def packed_product(act: Activations, weight: PackedWeight, out: Tensor, tile: Tile) -> None:
    """The same from a packed binary or ternary weight and activations of the kind int8 or float."""
    last = max(1, -(-(weight.n % BLOCK) // 5))
    _packed_product[_grid(act.m, weight.o, tile)](
        act.values, act.scales, weight.codes, weight.scales, out, act.m, weight.o, out.stride(0),
        act.scale_stride, weight.codes.shape[1], weight.n, last, TERNARY=weight.encoding == "ternary",
        FLOATS=act.kind == "float", **_options(tile, weight.n))


def _grid(m: int, o: int, tile: Tile) -> tuple[int]:
    return (triton.cdiv(m, tile.block_m) * triton.cdiv(o, tile.block_o),)


def _options(tile: Tile, n: int) -> dict[str, int]:
    limit = {} if tile.registers is None else {"maxnreg": tile.registers}
    return {"GROUPS": n // GROUP_SIZE if runtime.interpreted() else 0, "BLOCK_M": tile.block_m,
            "BLOCK_O": tile.block_o, "TOGETHER": tile.together, "num_warps": tile.warps, "num_stages": tile.stages,
            **limit}


assert GROUP_SIZE == 128  # what the kernels are written for
