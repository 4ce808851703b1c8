"""Operations of torch whose bits depend on the number of CPU threads, so that they do not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALL_MAP = 1024
"""Pixels; with fewer a convolution may share out its sums instead of its pixels."""


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int | tuple[int, int] = 0) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=padding)`; a small map on a CPU takes one thread."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or x.shape[2] * x.shape[3] >= _SMALL_MAP:
        return F.conv2d(x, weight, bias, padding=padding)
    with torch_threads(1):
        return F.conv2d(x, weight, bias, padding=padding)
