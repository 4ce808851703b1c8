"""The inner loops of GPTQ in Triton: a group's columns one after another in one launch (`quantize.columns`).

Rows know nothing of each other, so a program takes some of them through all columns of a group and keeps them in
registers. Bit for bit what torch's loops give: the same operations in the same order, none of them fused.

Shape letters: O rows, g = 128 columns of a group.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linocut.formats.packed import GROUP_SIZE
from linocut.kernels.gpu.runtime import on_device

_ROWS = 16


@triton.jit
def _nearest(x, BINARY: tl.constexpr):
    """The nearest of -1, (0) and 1; halves to even, as torch rounds."""
    if BINARY:
        found = tl.where(x >= 0, 1.0, -1.0)
    else:
        found = (tl.minimum(tl.maximum(x, -1.0), 1.0) + 12582912.0) - 12582912.0  # 1.5 * 2^23
    return found


@triton.jit
def _column(tile, columns, j):
    """Column j of a tile: adding zeros changes no bit but the sign of a zero, which decides nothing."""
    return tl.sum(tl.where(columns[None, :] == j, tile, 0.0), 1)


@triton.jit
def _propagate(x, scale, upper, codes, errors, o, stride_x, stride_scale, stride_upper, ROWS: tl.constexpr,
               GROUP: tl.constexpr, BINARY: tl.constexpr):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, GROUP)
    inside = rows < o
    rows = rows.to(tl.int64)
    tile = tl.load(x + rows[:, None] * stride_x + columns[None, :], mask=inside[:, None], other=0.0)
    step = tl.load(scale + rows * stride_scale, mask=inside, other=1.0)
    found, wrong = tl.zeros_like(tile), tl.zeros_like(tile)
    for j in range(GROUP):
        value, here = _column(tile, columns, j), columns[None, :] == j
        code = _nearest(tl.math.div_rn(value, step), BINARY)
        error = tl.math.div_rn(value - code * step, tl.load(upper + j * stride_upper + j) + tl.zeros_like(step))
        follow = tl.load(upper + j * stride_upper + columns, mask=columns > j, other=0.0)
        tile -= error[:, None] * follow[None, :]
        found = tl.where(here, code[:, None], found)
        wrong = tl.where(here, error[:, None], wrong)
    place = rows[:, None] * GROUP + columns[None, :]
    tl.store(codes + place, found, mask=inside[:, None])
    tl.store(errors + place, wrong, mask=inside[:, None])


@triton.jit
def _descend(x, before, scale, square, codes, moved, o, stride_x, stride_before, stride_scale, stride_square,
             ROWS: tl.constexpr, GROUP: tl.constexpr, BINARY: tl.constexpr):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, GROUP)
    inside = rows < o
    rows = rows.to(tl.int64)
    tile = tl.load(x + rows[:, None] * stride_x + columns[None, :], mask=inside[:, None], other=0.0)
    found = tl.load(before + rows[:, None] * stride_before + columns[None, :], mask=inside[:, None], other=0.0)
    step = tl.load(scale + rows * stride_scale, mask=inside, other=1.0)
    shift = tl.zeros_like(tile)
    for j in range(GROUP):
        value, old, here = _column(tile, columns, j), _column(found, columns, j), columns[None, :] == j
        curve = tl.load(square + j * stride_square + j) * step
        code = _nearest(old + tl.math.div_rn(value, curve), BINARY)
        move = (code - old) * step
        tile -= move[:, None] * tl.load(square + j * stride_square + columns)[None, :]
        found = tl.where(here, code[:, None], found)
        shift = tl.where(here, move[:, None], shift)
    place = rows[:, None] * GROUP + columns[None, :]
    tl.store(codes + place, found, mask=inside[:, None])
    tl.store(moved + place, shift, mask=inside[:, None])


class TritonColumns:
    """All columns of a group in one launch, on float32 tensors."""

    def propagate(self, block: Tensor, scale: Tensor, upper: Tensor, encoding: str) -> tuple[Tensor, Tensor]:
        """See `quantize.columns.Columns`."""
        block, upper = _by_rows(block), _by_rows(upper)
        codes, errors = (torch.empty(block.shape, device=block.device) for _ in range(2))
        with on_device(block):
            _propagate[(triton.cdiv(len(block), _ROWS),)](
                block, scale, upper, codes, errors, len(block), block.stride(0), scale.stride(0), upper.stride(0),
                ROWS=_ROWS, GROUP=GROUP_SIZE, BINARY=encoding == "binary", enable_fp_fusion=False)
        return codes, errors

    def descend(self, residual: Tensor, codes: Tensor, scale: Tensor, square: Tensor,
                encoding: str) -> tuple[Tensor, Tensor]:
        """See `quantize.columns.Columns`."""
        residual, codes, square = _by_rows(residual), _by_rows(codes), _by_rows(square)
        found, moved = (torch.empty(codes.shape, device=codes.device) for _ in range(2))
        with on_device(residual):
            _descend[(triton.cdiv(len(codes), _ROWS),)](
                residual, codes, scale, square, found, moved, len(codes), residual.stride(0), codes.stride(0),
                scale.stride(0), square.stride(0), ROWS=_ROWS, GROUP=GROUP_SIZE, BINARY=encoding == "binary",
                enable_fp_fusion=False)
        return found, moved


def _by_rows(x: Tensor) -> Tensor:
    """The tensor with each row in one piece: factors come by columns."""
    return x if x.stride(1) == 1 else x.contiguous()
