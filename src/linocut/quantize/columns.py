"""The inner loops of GPTQ: one column of a group after another, all rows at once.

`kernels/gpu/columns.py` has the same on NVIDIA GPUs, where a column here costs about ten launches; both give the same
bits.

Shape letters: O out-features, g weights in a group.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Columns(Protocol):
    """Whoever computes these loops: on float32 tensors, g = 128."""

    def propagate(self, block: Tensor, scale: Tensor, upper: Tensor, encoding: str) -> tuple[Tensor, Tensor]:
        """Round the columns of `block` [O, g] in order, each one's error passed on to those that follow.

        `scale` [O, 1] is the group's, `upper` [g, g] its diagonal block of the upper Cholesky factor of the inverse
        hessian. Returns codes and errors to pass on to other groups, [O, g] each, float32.
        """

    def descend(self, residual: Tensor, codes: Tensor, scale: Tensor, square: Tensor,
                encoding: str) -> tuple[Tensor, Tensor]:
        """Set each code of a group to its best value, given all the others.

        `residual` [O, g] is what is left of the weights, times the hessian; `square` [g, g] the group's diagonal block
        of the hessian. Returns codes and by how much decoded weights moved, [O, g] each, float32.
        """


class TorchColumns:
    """Column by column in torch, on any device."""

    def propagate(self, block: Tensor, scale: Tensor, upper: Tensor, encoding: str) -> tuple[Tensor, Tensor]:
        """See `Columns`."""
        block, codes, errors = block.clone(), torch.empty_like(block), torch.empty_like(block)
        for j in range(block.shape[1]):
            code = _nearest(block[:, j:j + 1] / scale, encoding)
            error = (block[:, j:j + 1] - code * scale) / upper[j, j]
            block[:, j + 1:] -= error * upper[j, j + 1:]
            codes[:, j:j + 1], errors[:, j:j + 1] = code, error
        return codes, errors

    def descend(self, residual: Tensor, codes: Tensor, scale: Tensor, square: Tensor,
                encoding: str) -> tuple[Tensor, Tensor]:
        """See `Columns`."""
        residual, codes, moved = residual.clone(), codes.clone(), torch.empty_like(codes)
        for j in range(codes.shape[1]):
            old = codes[:, j:j + 1].clone()
            fresh = _nearest(old + residual[:, j:j + 1] / (square[j, j] * scale), encoding)
            moved[:, j:j + 1] = (fresh - old) * scale
            codes[:, j:j + 1] = fresh
            residual -= moved[:, j:j + 1] * square[j]
        return codes, moved


def _nearest(x: Tensor, encoding: str) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0) if encoding == "binary" else x.clamp(-1, 1).round()
