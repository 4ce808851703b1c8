"""Matrix product with a weight that is decoded a block of rows at a time.

A whole float copy of one of klein's larger weights would take 226 MB; a block takes 16 MB at most and is thrown away.
Each column of y depends on one row of W only, so the block size changes nothing but memory. It does not depend on
the number of threads either, hence neither do the sums.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from linocut.kernels.problem import PackedWeight

SCRATCH_BYTES = 16 << 20
_ROW_MULTIPLE = 64


def block_rows(n: int, itemsize: int, scratch: int = SCRATCH_BYTES) -> int:
    """Rows of N weights of `itemsize` bytes that fit the scratch; a multiple of 64 keeps GEMM tiles even."""
    return max(_ROW_MULTIPLE, scratch // max(n * itemsize, 1) // _ROW_MULTIPLE * _ROW_MULTIPLE)


def blocked_linear(x: Tensor, weight: PackedWeight, decode: Callable[[PackedWeight, Tensor], None],
                   scratch_bytes: int = SCRATCH_BYTES) -> Tensor:
    """y[M, O] = x[M, N] @ W.T in x's dtype, where decode(rows, out) writes rows of W into out[rows, N]."""
    step = min(block_rows(weight.n, x.element_size(), scratch_bytes), weight.o)
    scratch = torch.empty((step, weight.n), dtype=x.dtype, device=x.device)
    if step == weight.o:
        decode(weight, scratch)
        return F.linear(x, scratch)
    y = torch.empty((x.shape[0], weight.o), dtype=x.dtype, device=x.device)
    for start in range(0, weight.o, step):
        stop = min(start + step, weight.o)
        block = scratch[: stop - start]
        decode(weight.rows(start, stop), block)
        y[:, start:stop] = F.linear(x, block)
    return y


def blocked_backward(grad: Tensor, weight: PackedWeight, decode: Callable[[PackedWeight, Tensor], None]) -> Tensor:
    """Gradient of `blocked_linear` with respect to x: grad[M, O] @ W, decoding the blocks once more."""
    step = min(block_rows(weight.n, grad.element_size()), max(weight.o, 1))
    scratch = torch.empty((step, weight.n), dtype=grad.dtype, device=grad.device)
    result = torch.zeros((grad.shape[0], weight.n), dtype=grad.dtype, device=grad.device)
    for start in range(0, weight.o, step):
        stop = min(start + step, weight.o)
        block = scratch[: stop - start]
        decode(weight.rows(start, stop), block)
        result.addmm_(grad[:, start:stop], block)
    return result
