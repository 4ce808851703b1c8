"""The text encoder and the transformer as one trainable network, and the ways a trainer draws with it."""

from __future__ import annotations

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
from linocut.train.loop import autocast, compile_blocks, load_weights, save_weights
from linocut.train.recipe import Recipe


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

    def velocity(self, latents: Tensor, text: Tensor, sigma: Tensor) -> Tensor:
        """Velocity, float32 [B, I, 4C]."""
        return self.transformer(latents, text, sigma, self.image_ids, self.text_ids).float()

    @torch.no_grad()
    def draw(self, text: Tensor, noise: Tensor, levels: Tensor, empty: Tensor | None = None, guidance: float = 1.0,
             guidance_until: float = 0.0) -> list[Tensor]:
        """Euler's states at every level (the first is the noise), with guidance while sigma > guidance_until."""
        states, x, batch = [noise], noise, len(noise)
        for here, there in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
            sigma = torch.full((batch,), here, device=noise.device)
            guided = empty is not None and guidance != 1.0 and here > guidance_until
            with autocast(noise.device):
                if guided:
                    both = self.velocity(torch.cat([x, x]), torch.cat([text, empty]), torch.cat([sigma, sigma]))
                    wanted, plain = both.chunk(2)
                    v = plain + guidance * (wanted - plain)
                else:
                    v = self.velocity(x, text, sigma)
            x = x + (there - here) * v
            states.append(x)
        return states

    def save(self, folder: Path, part_bytes: int | None = None) -> None:
        save_weights(folder, self.state_dict(), "BF16" if part_bytes else "F32", part_bytes)

    @classmethod
    def load(cls, recipe: Recipe, folder: Path, device: torch.device) -> Painter:
        """A trained painter, frozen and in eval mode."""
        painter = cls(recipe)
        load_weights(painter, folder)
        return painter.to(device).eval().requires_grad_(False)


def student_levels(recipe: Recipe) -> Tensor:
    """The sampler's own noise levels for the grid that the student learns: float32 [grid + 1], last 0."""
    rows, columns = recipe.tokens
    return sigmas(rows * columns, recipe.distill.grid)


def teacher_levels(recipe: Recipe) -> tuple[Tensor, list[int]]:
    """Fine levels that contain the student's, and the index of each of the student's among them."""
    coarse, fine, marks = student_levels(recipe), [], [0]
    for high, low, count in zip(coarse[:-1].tolist(), coarse[1:].tolist(), recipe.distill.substeps, strict=True):
        fine += [high + (low - high) * i / count for i in range(count)]
        marks.append(len(fine))
    return torch.tensor([*fine, 0.0]), marks


def training_sigmas(recipe: Recipe, batch: int, device: torch.device) -> Tensor:
    """Noise levels for flow matching: 70 % spread as the sampler visits them, the rest flatter. float32 [B]."""
    rows, columns = recipe.tokens
    steep = torch.tensor(empirical_mu(rows * columns, recipe.distill.grid)).exp()
    shift = torch.where(torch.rand(batch, device=device) < 0.7, steep.to(device), 1.5)
    u = torch.rand(batch, device=device)
    return shift * u / (1 + (shift - 1) * u)
