"""A teacher with classifier-free guidance (Ho and Salimans 2022), which its students learn to do without.

Guidance moves a velocity away from what the teacher would do without a prompt: what a prompt asks for becomes clearer
and sharper, for twice the work. A student that learns from guided velocities draws so in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linocut.models.text_encoder import PromptTokenizer
from linocut.train.dataset import Captions
from linocut.train.journeys import Network
from linocut.train.loop import autocast
from linocut.train.model_parts import Drawer
from linocut.train.painter import Painter, euler
from linocut.train.recipe import Recipe


class Guided:
    """A network that its prompts move `scale` times as far as they would (`journeys.Network`).

    `empty` [1, T, E] are the features of the empty prompt; with a scale of 1 the network is as it was.
    """

    def __init__(self, network: Network, scale: float, empty: Tensor) -> None:
        self.network, self.scale, self.empty = network, scale, empty

    def velocity(self, latents: Tensor, text: Tensor, sigma: Tensor) -> Tensor:
        """Velocity, float32 [B, I, 4C]."""
        if self.scale == 1:
            return self.network.velocity(latents, text, sigma)
        both = torch.cat([text, self.empty.to(text.dtype).expand_as(text)])
        v, unprompted = self.network.velocity(latents.repeat(2, 1, 1), both, sigma.repeat(2)).chunk(2)
        return unprompted + self.scale * (v - unprompted)

    def walk(self, x: Tensor, text: Tensor, levels: Sequence[float]) -> Tensor:
        """Euler's steps from x at levels[0] to levels[-1]."""
        return euler(self.velocity, x, text, levels)

    def features(self, latents: Tensor, text: Tensor, sigma: Tensor) -> list[Tensor]:
        """The image tokens [B, I, width] that leave each block, by the prompt alone."""
        return self.network.features(latents, text, sigma)


class Teacher(Guided):
    """A painter as its students see it: with the guidance of the recipe's path."""

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # one row is not worth compiling for
    def __init__(self, recipe: Recipe, painter: Painter, tokenizer: PromptTokenizer) -> None:
        self.painter, self.recipe, self.read = painter, recipe, painter.read
        captions = Captions.build(tokenizer, [""], painter.image_ids.device)
        with autocast(painter.image_ids.device):
            empty = painter.read(*captions.pick(torch.zeros_like(captions.lengths, dtype=torch.int64)))
        super().__init__(painter, recipe.path.guidance, empty.float())

    def at(self, grid: tuple[int, int]) -> Guided:
        """The same for pictures of other rows and columns of tokens."""
        drawer = Drawer(self.painter.transformer, grid, self.recipe.data.text_length, self.empty.device)
        return Guided(drawer, self.scale, self.empty)
