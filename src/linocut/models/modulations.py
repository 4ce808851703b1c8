"""What the FLUX.2 transformer computes from the noise level alone: the vectors that shift, scale and gate its streams.

For klein these layers are 341 of the 390 MB of dense weights, and a picture asks them for four rows. So they are a
network of their own inside the transformer: training and `Flux2Transformer.forward` run them at every step, while
drawing evaluates them first (`tabulate`) and lets them go before the blocks come into memory.

Shape letters: B batch, D width, N and O in- and out-features of a layer, R noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linocut.formats.names import is_timestep
from linocut.formats.timestep_table import VECTORS
from linocut.kernels import dispatch
from linocut.kernels.blocked import block_rows
from linocut.models.configs import Flux2Config
from linocut.models.linear import PackedLinear
from linocut.models.threads import torch_threads


class Modulations(NamedTuple):
    """Vectors [B, 1, D] of one noise level, shared by all blocks of a kind."""

    image: tuple[Tensor, ...]
    """(shift, scale, gate) of the attention, then of the MLP; `text` likewise."""
    text: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    """(shift, scale, gate)."""
    out: tuple[Tensor, Tensor]
    """(shift, scale) of the last norm."""

    def to(self, dtype: torch.dtype) -> Modulations:
        """The same vectors in another dtype."""
        image, text, single, (shift, scale) = (tuple(vector.to(dtype) for vector in vectors) for vectors in self)
        return Modulations(image, text, single, (shift, scale))

    @classmethod
    def from_rows(cls, rows: Tensor) -> Modulations:
        """From rows [B, 17, D] in the order of the fields."""
        vectors = rows[:, :, None].unbind(1)
        return cls(vectors[:6], vectors[6:12], vectors[12:15], (vectors[15], vectors[16]))


def time_features(sigma: Tensor, channels: int) -> Tensor:
    """Sinusoidal features of sigma [B] in [0, 1]: cosines first, then sines. float32 [B, channels]."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=sigma.device) / half)
    angle = (sigma.float() * 1000)[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Modulation(nn.Module):
    """One Linear from the activated time embedding to `sets` triples (shift, scale, gate) of width D."""

    def __init__(self, width: int, sets: int) -> None:
        super().__init__()
        self.sets = sets
        self.linear = nn.Linear(width, 3 * sets * width, bias=False)

    def forward(self, activated: Tensor) -> tuple[Tensor, ...]:
        return self.linear(activated)[:, None].chunk(3 * self.sets, dim=-1)


class TimestepEmbedder(nn.Module):
    """The two-layer MLP on the time features; its output is not activated."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width, bias=False)
        self.linear_2 = nn.Linear(width, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class TimestepNetwork(nn.Module):
    """The layers of the transformer that see the noise level alone, under diffusers' names."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.time_guidance_embed = nn.ModuleDict(
            {"timestep_embedder": TimestepEmbedder(config.timestep_guidance_channels, width)})
        self.double_stream_modulation_img = Modulation(width, sets=2)
        self.double_stream_modulation_txt = Modulation(width, sets=2)
        self.single_stream_modulation = Modulation(width, sets=1)
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(width, 2 * width, bias=False)})

    def rename_key(self, name: str) -> str | None:
        """The name of a checkpoint's tensor in this network, or None for the rest of the transformer."""
        return name if is_timestep(name) else None

    def modulations(self, sigma: Tensor, dtype: torch.dtype = torch.float32) -> Modulations:
        """All that depends on the noise levels sigma [B] alone, computed in `dtype`."""
        features = time_features(sigma, self.config.timestep_guidance_channels).to(dtype)
        activated = F.silu(self.time_guidance_embed["timestep_embedder"](features))
        scale, shift = self.norm_out["linear"](activated)[:, None].chunk(2, dim=-1)
        return Modulations(self.double_stream_modulation_img(activated), self.double_stream_modulation_txt(activated),
                           self.single_stream_modulation(activated), (shift, scale))


@torch.no_grad()
def tabulate(network: TimestepNetwork, sigmas: Sequence[float] | Tensor,
             after_layer: Callable[[], None] = lambda: None) -> Tensor:
    """The rows of `Modulations.from_rows` for noise levels in [0, 1]: float32 [R, 17, D].

    `after_layer` runs when a layer's weights are not needed any more.

    Always float32, from weights in their stored precision, whatever dtype and kernel the network runs with. Each level
    is computed on its own, so a row is the same bits in any company and with any number of threads.
    """
    embedder: TimestepEmbedder = network.time_guidance_embed["timestep_embedder"]  # type: ignore[assignment]
    device = next(tensor.device for tensor in network.state_dict().values())
    levels = torch.as_tensor(sigmas, dtype=torch.float32, device=device)
    features = [time_features(level[None], network.config.timestep_guidance_channels)[0] for level in levels]
    embedded = _products(embedder.linear_2, [F.silu(x) for x in _products(embedder.linear_1, features)])
    activated = [F.silu(x) for x in embedded]
    layers: list[nn.Module] = [network.double_stream_modulation_img.linear, network.double_stream_modulation_txt.linear,
                               network.single_stream_modulation.linear, network.norm_out["linear"]]
    parts = []
    for layer in layers:
        parts.append(_products(layer, activated).unflatten(1, (-1, network.config.width)))
        after_layer()
    parts[-1] = parts[-1].flip(1)  # the last norm's weight holds scale before shift
    rows = torch.cat(parts, dim=1)
    assert rows.shape[1] == VECTORS
    return rows


def _products(layer: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """W @ x for each x [N] of `inputs`: float32 [R, O]."""
    outputs: int = layer.out_features  # type: ignore[assignment]
    y = inputs[0].new_empty((len(inputs), outputs))
    first = 0
    for rows in _float_rows(layer):
        with torch_threads(1):  # several share out a sum, but on some processors only
            for number, x in enumerate(inputs):
                torch.mv(rows, x, out=y[number, first : first + len(rows)])
        first += len(rows)
    return y


def _float_rows(layer: nn.Module) -> Iterator[Tensor]:
    """The weight in float32 blocks of rows, each in the memory of the one before it: room for all costs far more."""
    inputs: int = layer.in_features  # type: ignore[assignment]
    step = block_rows(inputs, 4)
    if isinstance(layer, PackedLinear):
        for first in range(0, layer.out_features, step):
            yield dispatch.dequantize(layer.codes, layer.scales, layer.zeros, layer.encoding, inputs,
                                      rows=slice(first, first + step))
        return
    weight: Tensor = layer.weight  # type: ignore[assignment]
    buffer = torch.empty(min(step, len(weight)), inputs, device=weight.device)
    for rows in weight.split(step):
        yield buffer[: len(rows)].copy_(rows)
