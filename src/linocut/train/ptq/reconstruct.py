"""Training the rounded weights of one block towards what the block gives in full precision (BRECQ, Li et al. 2021).

The latent weights start where GPTQ left them (`calibrate.latent_weights`) and are rounded in every pass, with gradients
straight through; inputs are those of the rounded model, targets those of the full-precision one, so that a block also
makes up for the blocks before it. What is not better over all calibration states is thrown away.

Shape letters: B batch, S text and then image tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from linocut.formats.packed import GROUP_SIZE
from linocut.models.linear import FakeQuantLinear
from linocut.quantize.rounding import fake_quantize
from linocut.train.calibrate import latent_weights
from linocut.train.ptq.ladder import CalibrationSettings

Codes = Mapping[str, tuple[Tensor, Tensor]]
"""Values [O, N] and scales [O, G] by layer."""
Pair = Callable[[int], tuple[Callable[[nn.Module], Tensor], Tensor]]
"""From the number of a batch of states to: what a block makes of it [B, S, D], and what it should [B, S, D]."""


def reconstruct(block: nn.Module, weights: Mapping[str, Tensor], codes: Codes, encodings: Mapping[str, str],
                pair: Pair, batches: Sequence[int], text_length: int, last: bool,
                settings: CalibrationSettings) -> dict[str, tuple[Tensor, Tensor]]:
    """Better values and scales of the layers in `codes`, or the same.

    `block` has the rounded weights, `weights` are those that were rounded. In the `last` block text does not count, for
    nothing reads it.
    """
    layers: dict[str, FakeQuantLinear] = {}
    for name, (values, scales) in codes.items():
        plain = block.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        latent = latent_weights(weights[name], values.float(), scales, encodings[name])
        layers[name] = FakeQuantLinear.from_linear(_linear(latent), encodings[name])
        parent, _, child = name.rpartition(".")
        setattr(block.get_submodule(parent), child, layers[name])
    before = _errors(block, pair, batches, text_length)
    scale = before.clamp_min(1e-12).reciprocal()
    if last:
        scale[0] = 0.0
    optimizer = torch.optim.AdamW(
        [{"params": [layer.weight], "lr": settings.rate * float(layer.weight.detach().abs().mean())}
         for layer in layers.values()], betas=(0.9, 0.95), weight_decay=0.0,
        fused=next(iter(layers.values())).weight.is_cuda)
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.enable_grad():
        for step in range(settings.iterations):
            factor = 0.5 * (1 + math.cos(math.pi * step / settings.iterations))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            run, wanted = pair(batches[int(torch.randint(len(batches), (1,), generator=generator))])
            (_split(run(block) - wanted, text_length) * scale).sum().backward()
            nn.utils.clip_grad_norm_([layer.weight for layer in layers.values()], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    after = _errors(block, pair, batches, text_length)
    if not float((after * scale).sum()) < float((before * scale).sum()):
        return dict(codes)
    return {name: _codes(layer.weight.detach(), layer.encoding) for name, layer in layers.items()}


@torch.no_grad()
def _errors(block: nn.Module, pair: Pair, batches: Sequence[int], text_length: int) -> Tensor:
    """Mean squared error of the text's and the image's states: float32 [2]."""
    sums = []
    for index in batches:
        run, wanted = pair(index)
        sums.append(_split(run(block) - wanted, text_length))
    return torch.stack(sums).mean(0)


def _split(difference: Tensor, text_length: int) -> Tensor:
    square = difference.square().mean(-1)
    return torch.stack([square[:, :text_length].mean(), square[:, text_length:].mean()])


def _codes(latent: Tensor, encoding: str) -> tuple[Tensor, Tensor]:
    """What the tied rounding makes of latent weights."""
    decoded = fake_quantize(latent, encoding).view(len(latent), -1, GROUP_SIZE)
    scales = decoded.abs().amax(-1)
    return decoded.sign().flatten(1).to(torch.int8), scales.clamp_min(2.0**-24)


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return layer
