"""Group normalization and SiLU of feature maps, with bits that do not depend on the number of CPU threads.

torch's own do, in two places. It cuts the sums of a channels-last map by the number of threads: here they are taken on
one thread, a tenth of the time of the convolution beside them at most. And it computes the last few values of each
thread's share by another exponential: here shares end where vectors do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linocut.kernels.gpu import runtime
from linocut.models.threads import torch_threads

_VECTOR = 128
"""Values that torch takes at a time, or a multiple of them, on any processor."""
_GRAIN = 32768
"""torch starts no thread for fewer values than this (at::internal::GRAIN_SIZE)."""


class Moments:
    """Mean and variance of each channel of one picture's map, gathered strip by strip and merged in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor
        self.squares: Tensor  # sum of squared distances from the mean

    def add(self, strip: Tensor) -> None:
        """Take in some rows of the map: [1, C, rows, W]."""
        mean, variance = (value.double() for value in _mean_and_variance(strip))
        count = strip.shape[2] * strip.shape[3]
        if self.count == 0:
            self.mean, self.squares = torch.zeros_like(mean), torch.zeros_like(mean)
        total, distance = self.count + count, mean - self.mean
        self.squares = self.squares + variance * count + distance**2 * (self.count * count / total)
        self.mean = self.mean + distance * (count / total)
        self.count = total

    def normalization(self, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
        """norm(x) for strips x of the map that was gathered."""
        mean = self.mean.unflatten(0, (norm.num_groups, -1))
        variance = (self.squares / self.count).unflatten(0, (norm.num_groups, -1))
        centre = mean.mean(1, keepdim=True)
        variance = (variance + (mean - centre) ** 2).mean(1, keepdim=True)
        scale = norm.weight.double() * (variance + norm.eps).rsqrt().expand_as(mean).flatten()
        shift = norm.bias.double() - centre.expand_as(mean).flatten() * scale
        zero, one = torch.zeros_like(scale).float(), torch.ones_like(scale).float()
        # x * scale + shift with float32 factors whatever x is, in one pass (1 + eps is 1; torch 2.11 wants an eps)
        return lambda x: F.batch_norm(x, zero, one, scale.float(), shift.float(), training=False, eps=1e-30)


def _mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of x [1, C, H, W], float32 or float64."""
    if _on_nvidia(x):  # torch's takes half a gigabyte there for a strip of 64 rows
        from linocut.kernels.gpu.group_norm import moments

        with runtime.on_device(x):
            mean, variance = moments(x)
        return mean[0], variance[0]
    if x.device.type != "cpu":
        variance, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        return mean, variance
    # The running statistics tell torch to answer in float32.
    running = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    with torch_threads(1):
        mean, variance = torch.batch_norm_update_stats(x, *running, 1.0)
    return mean, variance


def silu_(x: Tensor) -> Tensor:
    """silu(x), in place."""
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.silu(x, inplace=True)
    pieces, rest = divmod(x.numel(), _VECTOR)
    most = 1 if rest else min(torch.get_num_threads(), -(-x.numel() // _GRAIN))
    with torch_threads(next(count for count in range(most, 0, -1) if pieces % count == 0)):
        return F.silu(x, inplace=True)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)), in one pass where a kernel for both is."""
    if isinstance(norm, GroupNorm) and _on_nvidia(x):
        return norm.by_triton(x, silu=True)
    return silu_(norm(x))


def _on_nvidia(x: Tensor) -> bool:
    """Whether Triton's kernel takes this map, and nobody asks for what only torch's operations have."""
    if x.device.type != "cuda" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return runtime.why_not(str(x.device)) is None


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, with the sums above when a CPU decodes, and Triton's kernel on NVIDIA GPUs."""

    def by_triton(self, x: Tensor, silu: bool = False) -> Tensor:
        """The norm of x by `kernels.gpu.group_norm`, followed by SiLU if asked for."""
        from linocut.kernels.gpu.group_norm import group_norm

        with runtime.on_device(x):
            return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, silu)

    def forward(self, x: Tensor) -> Tensor:
        if _on_nvidia(x):
            return self.by_triton(x)
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        pictures = []
        for picture in x.split(1):
            moments = Moments()
            moments.add(picture)
            pictures.append(moments.normalization(self)(picture))
        return pictures[0] if len(pictures) == 1 else torch.cat(pictures)
