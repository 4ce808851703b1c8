"""The last part of distillation: codes stay, scales and dense tensors learn on.

Weights near a threshold change their codes at nearly every step of training, and the rest never gets to know which code
it will live with. So codes are taken from the average of the weights, which is their majority over time, and every
latent weight is put exactly where its code is: 0, or plus or minus the scale. From then on the gradients of a group are
replaced by their common part, that of the scale: all weights that are not 0 move alike, and the tied rounding goes on
to give the same codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from linocut.formats.packed import GROUP_SIZE
from linocut.train.loop import local
from linocut.train.monitor import coded_layers, codes_of
from linocut.train.optimize import Average


@torch.no_grad()
def freeze_codes(module: nn.Module, average: Average, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put every weight where the code of its average is, the average too; optimizers forget these weights."""
    average.install()
    for layer in coded_layers(module).values():
        values, scales = codes_of(layer)
        local(layer.weight.data).copy_(values * scales.repeat_interleave(GROUP_SIZE, dim=1))
        for optimizer in optimizers:
            optimizer.state.pop(layer.weight, None)
    average.restart()


@torch.no_grad()
def keep_codes(module: nn.Module) -> None:
    """Leave of the gradients of quantized weights what changes scales only."""
    for layer in coded_layers(module).values():
        if layer.weight.grad is None:
            continue
        grad, sign = local(layer.weight.grad), local(layer.weight.data).sign()
        if not len(grad):
            continue
        groups, signs = grad.view(len(grad), -1, GROUP_SIZE), sign.view(len(grad), -1, GROUP_SIZE)
        common = (groups * signs).sum(-1, keepdim=True) / signs.abs().sum(-1, keepdim=True).clamp_min(1)
        grad.copy_((common * signs).view_as(grad))


@torch.no_grad()
def hold_signs(module: nn.Module, average: Average) -> None:
    """Put weights that a step carried to or past 0, which would turn their codes, back to where their average is."""
    coded = {f"{name}.weight" for name in coded_layers(module)}
    for (name, parameter), mean in zip(module.named_parameters(), average.shadow, strict=True):
        if name in coded:
            weight = local(parameter.data)
            weight.copy_(torch.where((weight * mean <= 0) & (mean != 0), mean, weight))
