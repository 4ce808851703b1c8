"""The text encoder and the transformer as one trainable network, and the ways a trainer draws with it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from linocut.models.flux2 import (
    DoubleBlock,
    Flux2Transformer,
    SingleBlock,
    image_position_ids,
    text_position_ids,
)
from linocut.models.text_encoder import Layer, Qwen3Encoder
from linocut.pipeline.sampler import empirical_mu, sigmas
from linocut.train.loop import autocast, compile_blocks
from linocut.train.recipe import Recipe
from linocut.train.weights import load_weights, save_weights


class Painter(nn.Module):
    """Prompt ids and noisy latents to velocity. Shapes: latents [B, I, 4C], ids and mask [B, T], sigma [B]."""

    image_ids: Tensor
    text_ids: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.text_encoder = Qwen3Encoder(recipe.text_encoder, recipe.text_taps)
        self.transformer = Flux2Transformer(recipe.transformer)
        self.transformer.init_weights()
        # The features are read raw, so the embedding starts at the scale that the transformer's stream expects.
        nn.init.normal_(self.text_encoder.embed_tokens.weight, std=0.5)
        self.register_buffer("image_ids", image_position_ids(*recipe.tokens), persistent=False)
        self.register_buffer("text_ids", text_position_ids(recipe.data.text_length), persistent=False)

    def compile_blocks(self, device: torch.device) -> None:
        """Compile the repeated blocks on a GPU."""
        compile_blocks(self, device, (DoubleBlock, SingleBlock, Layer))

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text features [B, T, taps * width]."""
        return self.text_encoder(ids, mask)

    def velocity(self, latents: Tensor, text: Tensor, sigma: Tensor, image_ids: Tensor | None = None) -> Tensor:
        """Velocity, float32 [B, I, 4C]; `image_ids` are those of a square unless given."""
        ids = self.image_ids if image_ids is None else image_ids
        return self.transformer(latents, text, sigma, ids, self.text_ids).float()

    def features(self, latents: Tensor, text: Tensor, sigma: Tensor) -> list[Tensor]:
        """The image tokens [B, I, width] that leave each block."""
        taps: list[Tensor] = []
        self.transformer(latents, text, sigma, self.image_ids, self.text_ids, taps=taps)
        return taps

    def walk(self, x: Tensor, text: Tensor, levels: Sequence[float]) -> Tensor:
        """Euler's steps from x at levels[0] to levels[-1]."""
        return euler(self.velocity, x, text, levels)

    def save(self, folder: Path) -> None:
        save_weights(folder, self.state_dict())

    @classmethod
    def load(cls, recipe: Recipe, folder: Path, device: torch.device) -> Painter:
        """A trained painter, frozen and in eval mode."""
        painter = cls(recipe)
        load_weights(painter, folder)
        return painter.to(device).eval().requires_grad_(False)


@torch.no_grad()
def euler(velocity: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, text: Tensor,
          levels: Sequence[float]) -> Tensor:
    """Euler's steps along `velocity(x, text, sigma)` from x at levels[0] to levels[-1]."""
    for here, there in pairwise(levels):
        with autocast(x.device):
            v = velocity(x, text, torch.full((len(x),), here, device=x.device))
        x = x + (there - here) * v
    return x


def grid_levels(recipe: Recipe, tokens: tuple[int, int] | None = None) -> list[float]:
    """The noise levels of the sampler's grid, from 1 to 0, for a square picture or one of other rows and columns."""
    rows, columns = tokens or recipe.tokens
    levels: list[float] = sigmas(rows * columns, recipe.path.grid).tolist()
    return levels


def jittered(levels: Sequence[float], rng: random.Random) -> list[float]:
    """The levels with each inner one anywhere between the middles of the gaps beside it."""
    inner = [rng.uniform((before + here) / 2, (here + after) / 2)
             for before, here, after in zip(levels, levels[1:], levels[2:], strict=False)]
    return [levels[0], *inner, levels[-1]]


def training_sigmas(recipe: Recipe, batch: int, device: torch.device) -> Tensor:
    """Noise levels for flow matching: 85 % spread as the sampler visits them, the rest flatter. float32 [B]."""
    rows, columns = recipe.tokens
    steep = torch.tensor(empirical_mu(rows * columns, recipe.path.grid)).exp()
    shift = torch.where(torch.rand(batch, device=device) < 0.85, steep.to(device), 1.5)
    u = torch.rand(batch, device=device)
    return shift * u / (1 + (shift - 1) * u)
