"""Rounds a FLUX.2 transformer block by block against the inputs that its layers really see.

Data-free but for prompts: calibration states come from the teacher's own path. Each block's layers are rounded in the
order in which they run, with inputs that went through everything rounded before, so that later layers make up for
earlier ones (`quantize.gptq`). The result are latent weights that round to what GPTQ found and otherwise stay as
near as they can to the weights they come from: where quantization-aware training starts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linocut.formats.packed import GROUP_SIZE
from linocut.kernels.columns import columns_for
from linocut.models.flux2 import Flux2Transformer, rope_tables
from linocut.quantize.gptq import gptq, outer_sum, output_error
from linocut.quantize.policy import Policy
from linocut.quantize.rounding import TERNARY_THRESHOLD, fake_quantize
from linocut.train.loop import autocast

MARGIN = 0.1  # of a latent weight's distance from the threshold it was moved across, in units of the threshold

# Layers that run side by side, in the order in which the sets run.
_DOUBLE = (("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
           ("attn.to_out.0", "attn.to_add_out"), ("ff.linear_in", "ff_context.linear_in"),
           ("ff.linear_out", "ff_context.linear_out"))
_SINGLE = (("attn.to_qkv_mlp_proj",), ("attn.to_out",))
_TIME = (("double_stream_modulation_img.linear", "double_stream_modulation_txt.linear",
          "single_stream_modulation.linear", "norm_out.linear"),)
_LEVELS = 256  # of noise, at which the modulations are rounded: they see nothing else


@dataclass
class Batch:
    """Calibration inputs: latents [B, I, C], text features [B, T, E], sigma [B]."""

    latents: Tensor
    text: Tensor
    sigma: Tensor


@torch.no_grad()
def calibrate(transformer: Flux2Transformer, batches: Sequence[Batch], image_ids: Tensor, text_ids: Tensor,
              policy: Policy, on_layer: Callable[[str, float], None] | None = None) -> None:
    """Replace, in place, the weights that `policy` makes binary or ternary by `latent_weights` of GPTQ's result.

    `on_layer(name, error)` hears the relative squared output error of each layer.
    """
    config, device = transformer.config, batches[0].latents.device
    rope = rope_tables(torch.cat([text_ids, image_ids]), config.axes_dims_rope, config.rope_theta)
    image, text, single, runs = [], [], [], []
    latent: dict[nn.Linear, Tensor] = {}
    levels = torch.linspace(0, 1, _LEVELS + 1, device=device)[1:]
    _round_block(transformer, "", _TIME, lambda _: transformer.modulations(levels), 1, policy, latent, on_layer)
    for batch in batches:
        with autocast(device):
            mod = transformer.modulations(batch.sigma)
            runs.append((mod.image, mod.text))
            single.append(mod.single)
            image.append(transformer.x_embedder(batch.latents))
            text.append(transformer.context_embedder(batch.text))
    for index, block in enumerate(transformer.transformer_blocks):
        def run_double(i: int, block: nn.Module = block) -> tuple[Tensor, Tensor]:
            return block(image[i], text[i], *runs[i], rope)

        _round_block(block, f"transformer_blocks.{index}.", _DOUBLE, run_double, len(batches), policy, latent,
                     on_layer)
        for i in range(len(batches)):
            with autocast(device):
                image[i], text[i] = run_double(i)
    x = [torch.cat([t, i], dim=1) for t, i in zip(text, image, strict=True)]
    for index, block in enumerate(transformer.single_transformer_blocks):
        def run_single(i: int, block: nn.Module = block) -> Tensor:
            return block(x[i], single[i], rope)

        _round_block(block, f"single_transformer_blocks.{index}.", _SINGLE, run_single, len(batches), policy, latent,
                     on_layer)
        for i in range(len(batches)):
            with autocast(device):
                x[i] = run_single(i)
    for layer, weight in latent.items():
        layer.weight.copy_(weight)


class _Stop(Exception):
    """Ends a block's forward pass once the inputs of a set of layers are seen."""


def _round_block(block: nn.Module, prefix: str, sets: Sequence[Sequence[str]], run: Callable[[int], object], count: int,
                 policy: Policy, latent: dict[nn.Linear, Tensor],
                 on_layer: Callable[[str, float], None] | None) -> None:
    for names in sets:
        layers = {name: module for name in names if isinstance(module := block.get_submodule(name), nn.Linear)}
        chosen = {name: policy.decide(prefix + name, tuple(layer.weight.shape))[0] for name, layer in layers.items()}
        layers = {name: layer for name, layer in layers.items() if chosen[name] in ("binary", "ternary")}
        if not layers:
            continue
        hessians = _watch(layers, run, count)
        for name, layer in layers.items():
            values, scales = gptq(layer.weight, hessians[name], chosen[name],
                                  columns=columns_for(layer.weight.device))
            rounded = values.float() * scales.repeat_interleave(GROUP_SIZE, dim=1)
            if on_layer is not None:
                on_layer(prefix + name, output_error(layer.weight, rounded, hessians[name]))
            latent[layer] = latent_weights(layer.weight, values.float(), scales, chosen[name])
            layer.weight.copy_(rounded)  # what the layers after it will see


def latent_weights(weight: Tensor, values: Tensor, scales: Tensor, encoding: str, margin: float = MARGIN) -> Tensor:
    """Weights [O, N] near `weight` that the tied rounding turns into values [O, N] times scales [O, G].

    A weight that GPTQ rounded as its neighbours are rounded keeps its distance from the threshold, so that training
    can still move those that were in doubt; one that GPTQ moved elsewhere lies just beyond the threshold. None
    lies nearer to it than `margin` of it.
    """
    shape = (weight.shape[0], -1, GROUP_SIZE)
    values, wanted = values.view(shape), weight.float().view(shape)
    sign = torch.where(values == 0, torch.where(wanted < 0, -1.0, 1.0), values)
    start = (wanted * sign).clamp_min(0.0)  # 0 where GPTQ turned the sign
    if encoding == "binary":
        size = start.clamp_min(margin * wanted.abs().mean(-1, keepdim=True))
        kept = size
    else:
        size = start
        for _ in range(12):  # the threshold follows the sizes, which follow the threshold
            threshold = TERNARY_THRESHOLD * size.mean(-1, keepdim=True)
            size = torch.where(values == 0, start.minimum((1 - margin) * threshold),
                               start.maximum((1 + margin) * threshold))
        kept = size * values.abs()
    mean = kept.sum(-1, keepdim=True) / (kept > 0).sum(-1, keepdim=True).clamp_min(1)
    latent = (sign * size * (scales[..., None] / mean.clamp_min(1e-30))).view(weight.shape)
    same = (fake_quantize(latent, encoding).view(shape) == values * scales[..., None]).all(-1, keepdim=True)
    return torch.where(same, latent.view(shape), values * scales[..., None]).view(weight.shape)


def _watch(layers: Mapping[str, nn.Linear], run: Callable[[int], object], count: int) -> dict[str, Tensor]:
    """Sum x x^T [N, N] over the inputs x that each layer sees in `count` runs."""
    hessians: dict[str, Tensor] = {}
    seen: set[str] = set()

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            with torch.autocast(inputs[0].device.type, enabled=False):  # sums need float32's digits
                rows = inputs[0].flatten(0, -2)
                hessians[name] = hessians.get(name, 0) + outer_sum(rows, rows)
            seen.add(name)
            if len(seen) == len(layers):
                raise _Stop
        return hook

    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    for i in range(count):
        seen.clear()
        with contextlib.suppress(_Stop), autocast(next(iter(layers.values())).weight.device):
            run(i)
    for hook in hooks:
        hook.remove()
    return hessians
