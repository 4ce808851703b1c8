"""Scenes as training tensors: token ids of captions, and latents of the pictures, made where they are used.

Captions and placements come from worker processes (`corpus`); pictures are drawn and encoded on the training device in
batches and only their latents are kept (a 256-px scene is 32 kB).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from linocut.models.autoencoder import Autoencoder, patchify
from linocut.models.text_encoder import PromptTokenizer
from linocut.train.corpus import Scenes, chunks, make_scenes
from linocut.train.loop import autocast
from linocut.train.naming import names_of
from linocut.train.recipe import Recipe
from linocut.train.render import SceneRenderer
from linocut.train.scenes import TASKS
from linocut.train.tokenizer import save_tokenizer, train_tokenizer
from linocut.train.vocabulary import every_name, objects

_NAMED = 10  # times that the tokenizer reads every name alone, so that rare ones too become whole tokens


def make_tokenizer(recipe: Recipe, folder: Path) -> PromptTokenizer:
    """The tokenizer of the recipe: learned from captions once, then read from `folder`."""
    if not (folder / "tokenizer.json").is_file():
        count = min(15_000, 8 * recipe.data.scenes)  # enough to meet every word many times; less in a small trial
        captions = [text for group in make_scenes(recipe, -1, count).captions for text in group]
        captions += [f" {name}" for thing in objects() for name in every_name(thing)] * _NAMED
        save_tokenizer(train_tokenizer(captions, recipe.data.vocab_size), folder)
    return PromptTokenizer.from_folder(folder, recipe.data.text_length)


@dataclass
class Captions:
    """Token ids of captions, int16 [M, T], and the number of real tokens of each, on one device."""

    ids: Tensor
    lengths: Tensor

    @classmethod
    def build(cls, tokenizer: PromptTokenizer, texts: Iterable[str], device: torch.device) -> Captions:
        """Tokens of `texts`, which may be a generator: they are read in parts, so that others can work meanwhile."""
        rows, lengths = [], []
        source = iter(texts)
        while part := list(islice(source, 8192)):
            ids, mask = tokenizer.encode(part)
            rows.append(ids.to(torch.int16))
            lengths.append(mask.sum(1).to(torch.int16))
        return cls(torch.cat(rows).to(device), torch.cat(lengths).to(device))

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """(ids, mask) of captions drawn at random."""
        return self.pick(torch.randint(len(self.ids), (count,), device=self.ids.device))

    def pick(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(ids, mask), int64 [B, T], of captions."""
        ids, lengths = self.ids[index].long(), self.lengths[index].long()
        return ids, (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()


def caption_bank(recipe: Recipe, tokenizer: PromptTokenizer, rank: int, scenes: int, device: torch.device,
                 shares: Mapping[str, float] = TASKS) -> Captions:
    """Captions alone, for stages that learn from a teacher and need no pictures. `shares` are those of tasks."""
    texts = (text for part in chunks(recipe, rank, scenes, shares) for group in part.captions for text in group)
    return Captions.build(tokenizer, texts, device)


@dataclass
class LatentBank:
    """Latents bf16 [M, I, 4C] of pictures, what covers each of their tokens (`names_of`), and the captions of each
    (`per_scene` wordings, consecutive). `draw` makes the first two of scenes; row `oldest` has been here longest."""

    latents: Tensor
    names: Tensor
    captions: Captions
    per_scene: int
    draw: Callable[[Scenes], tuple[Tensor, Tensor]]
    oldest: int = 0

    @classmethod
    def build(cls, recipe: Recipe, tokenizer: PromptTokenizer, vae: Autoencoder, renderer: SceneRenderer, rank: int,
              device: torch.device, count: int | None = None) -> LatentBank:
        """Make `count` scenes (`recipe.data.scenes`) of the renderer's shape: draw, encode, keep. Another `rank` makes
        other scenes."""
        count, side = count or recipe.data.scenes, recipe.token_side
        tokens = renderer.height // side * (renderer.width // side)

        def draw(part: Scenes) -> tuple[Tensor, Tensor]:
            table, looks, size = renderer.table(part.placements), renderer.looks(part.scenes), len(part.scenes)
            latents = torch.empty(size, tokens, recipe.transformer.in_channels, dtype=torch.bfloat16, device=device)
            names = torch.empty(size, tokens, 2, dtype=torch.int16, device=device)
            alike = sorted(range(size), key=lambda index: len(part.placements[index]))
            for rows in torch.tensor(alike, device=device).split(256):
                image = renderer.draw(table[rows], looks[rows])
                with torch.no_grad(), autocast(device):
                    z = vae.latents_from_image(image.to(memory_format=torch.channels_last))
                latents[rows] = z.flatten(2).transpose(1, 2).to(latents.dtype)
                names[rows] = names_of(renderer, table[rows], side)
            return latents, names

        drawn: list[tuple[Tensor, Tensor]] = []

        def texts() -> Iterator[str]:  # the device draws and encodes while the captions of a chunk are cut into tokens
            for part in chunks(recipe, rank, count):
                drawn.append(draw(part))
                yield from (text for group in part.captions for text in group)

        captions = Captions.build(tokenizer, texts(), device)
        latents, names = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return cls(latents, names, captions, recipe.data.captions, draw)

    def renew(self, part: Scenes, tokenizer: PromptTokenizer) -> None:
        """Put scenes, no more than there are, in the place of the oldest."""
        device = self.latents.device
        rows = (self.oldest + torch.arange(len(part.scenes), device=device)) % len(self.latents)
        self.latents[rows], self.names[rows] = self.draw(part)
        fresh = Captions.build(tokenizer, (text for group in part.captions for text in group), device)
        wordings = (rows[:, None] * self.per_scene + torch.arange(self.per_scene, device=device)).flatten()
        self.captions.ids[wordings], self.captions.lengths[wordings] = fresh.ids, fresh.lengths
        self.oldest = (self.oldest + len(rows)) % len(self.latents)

    def sample(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A random batch: latents float32 [B, I, 4C], names [B, I, 2], ids and mask of one wording each."""
        index = torch.randint(len(self.latents), (batch,), device=self.latents.device)
        wording = torch.randint(self.per_scene, (batch,), device=index.device)
        ids, mask = self.captions.pick(index * self.per_scene + wording)
        return self.latents[index].float(), self.names[index], ids, mask


@torch.no_grad()
def measure_latents(vae: Autoencoder, images: Iterator[Tensor]) -> None:
    """Set the VAE's latent statistics (per patchified channel) from pictures."""
    mean, variance = vae.bn.running_mean, vae.bn.running_var
    assert mean is not None
    assert variance is not None
    sums, squares, count = torch.zeros_like(mean).double(), torch.zeros_like(mean).double(), 0
    for image in images:
        z = patchify(vae.encode(image)[0].float()).double()
        sums += z.sum((0, 2, 3))
        squares += z.square().sum((0, 2, 3))
        count += z.shape[0] * z.shape[2] * z.shape[3]
    mean.copy_(sums / count)
    variance.copy_(squares / count - (sums / count).square() - vae.config.batch_norm_eps)


def scene_images(recipe: Recipe, renderer: SceneRenderer, seed: int, count: int) -> Tensor:
    """Pictures [count, 3, size, size] in [-1, 1] of fresh scenes, for the autoencoder and for measuring."""
    part = make_scenes(recipe, seed, count)
    return renderer.draw(renderer.table(part.placements), renderer.looks(part.scenes))


def edges(image: Tensor) -> float:
    """Mean difference between neighbouring pixels of images [B, 3, H, W]: what a blur takes away."""
    return float(image.diff(dim=-1).abs().mean() + image.diff(dim=-2).abs().mean())


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, averaged over pictures [B, 3, H, W] in [-1, 1] (peak 2)."""
    error = (image.clamp(-1, 1) - reference).square().flatten(1).mean(1)
    return float(np.mean(10 * np.log10(4.0 / error.float().cpu().numpy().clip(1e-12))))
