"""Optimizers, learning rates and averages of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linocut.train.loop import local

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan et al. 2024: fast, to singular values near 1


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix (Jordan et al. 2024), scaled to AdamW's typical step size.

    Computes what `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` does, but all matrices of one shape at once: a
    hundred small matrices one after another take longer to launch than to compute.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0,
                 momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure, hence no loss to return
        """One update of every matrix that has a gradient. `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            same: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same.setdefault(parameter.shape, []).append(parameter)
            for shape, matrices in same.items():
                grads = [matrix.grad for matrix in matrices if matrix.grad is not None]
                moments = [self._moment(matrix) for matrix in matrices]
                torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, moments, group["momentum"])  # Nesterov's look ahead
                updates = orthogonalize(torch.stack(list(ahead)))
                step = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(updates.to(matrices[0].dtype).unbind()), alpha=-step)

    def _moment(self, matrix: Tensor) -> Tensor:
        memory: dict[str, Tensor] = self.state[matrix]
        if "momentum" not in memory:
            memory["momentum"] = torch.zeros_like(matrix)
        return memory["momentum"]


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices [n, O, N] with their singular values brought near 1 by Newton and Schulz's iteration, in bfloat16."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.transpose(1, 2) if tall else x


def make_optimizers(module: nn.Module, lr: float, weight_decay: float, muon: bool,
                    dense_lr: float | None = None) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for everything else that learns, at `dense_lr` if given; or
    AdamW for all."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    apart = muon or dense_lr is not None
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        in_block = parameter.ndim == 2 and ("blocks." in name or "layers." in name)
        (matrices if apart and in_block else others).append(parameter)

    def adam(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, rate, betas=(0.9, 0.95), weight_decay=0.0, fused=parameters[0].is_cuda)

    optimizers = [adam(others, lr if dense_lr is None else dense_lr)]
    if matrices:
        optimizers.append(Muon(matrices, lr, weight_decay) if muon else adam(matrices, lr))
    return optimizers


def set_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Scale each group's own `base_lr`, which is its learning rate when it was made."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
            group["lr"] = group["base_lr"] * factor


class Average:
    """Exponential moving average of a module's parameters, in float32; young averages forget faster."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.steps = module, decay, 0
        self.shadow = [part.clone() for part in self._parts()]

    def restart(self) -> None:
        """Forget all but the module as it is."""
        self.steps = 0
        torch._foreach_copy_(self.shadow, self._parts())

    def _parts(self) -> list[Tensor]:
        return [local(parameter.detach()) for parameter in self.module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.shadow, self._parts(), 1 - decay)

    @torch.no_grad()
    def install(self) -> None:
        """Put the average into the module (training is over)."""
        for part, value in zip(self._parts(), self.shadow, strict=True):
            part.copy_(value)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The module holds the average inside the block and its own weights again after it."""
        own = [part.clone() for part in self._parts()]
        self.install()
        yield
        with torch.no_grad():
            for part, value in zip(self._parts(), own, strict=True):
                part.copy_(value)
