"""Draws scenes on any torch device: a background, soft shadows, and sprites pasted by gathering from one atlas.

Sprites lie ready in steps of a few pixels (grid sampling on the fly would alias), so a canvas pixel is one gather per
thing and the colour is put on as it is drawn. A batch of 256-px scenes takes a fraction of a millisecond per picture
on a GPU, so a training set is drawn where it is used.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from linocut.train.layout import LARGEST, SMALLEST, Placement
from linocut.train.palette import BACKGROUNDS, COLOURS, background_rgb, colour
from linocut.train.scenes import MAX_OBJECTS, STYLES, Scene
from linocut.train.sprites import load_atlas
from linocut.train.vocabulary import objects

STEP = 8  # pixels between the sizes of a sprite
BLOCK = 8  # pixels of a "pixel" in pixel art
_SHADOW = 0.30  # how dark a shadow is in its middle
_STARS = 70


class SceneRenderer:
    """Renders batches of scenes as images [B, 3, size, size] in [-1, 1], or of another shape (`reshaped`).

    `sprites` is the folder with one `<code point>.webp` per object, `things` the objects to load (all of them if left
    out; scenes may hold no others), `least` the shortest side that a canvas will have. Raises ModelNotFoundError for a
    missing sprite.
    """

    def __init__(self, sprites: Path, size: int = 256, device: torch.device | str = "cpu",
                 things: Iterable[int] | None = None, least: int | None = None) -> None:
        self.device = torch.device(device)
        smallest = max(STEP, int(min(size, least or size) * SMALLEST) // STEP * STEP)
        sizes = range(smallest, -(-int(size * LARGEST) // STEP) * STEP + 1, STEP)
        chosen = sorted(set(range(len(objects())) if things is None else things))
        self._row = {thing: row for row, thing in enumerate(chosen)}
        self.things = len(chosen)
        self.atlas = load_atlas(sprites, [objects()[thing] for thing in chosen], sizes, self.device)
        self._starts = torch.tensor(self.atlas.starts, device=self.device)
        self._ramps = _ramp_table().to(self.device)
        self._set_shape(size, size)

    def _set_shape(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        tables = _background_tables(height, width)
        self._profiles, self._stars, self._ground = (part.to(self.device) for part in tables)

    def reshaped(self, height: int, width: int) -> SceneRenderer:
        """A renderer of canvases [height, width] with the same sprites. Things are as large as on a square of the
        shorter side and at least as far apart, so that they still do not overlap."""
        other = copy.copy(self)
        other._set_shape(height, width)
        return other

    def looks(self, scenes: Sequence[Scene]) -> Tensor:
        """Background and style of each scene: int64 [B, 2]."""
        rows = [(_BACKGROUND_INDEX[scene.background], STYLES.index(scene.style)) for scene in scenes]
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def table(self, placements: Sequence[Sequence[Placement]]) -> Tensor:
        """Placements as integers [B, MAX_OBJECTS, 5]: colour (0 natural), thing, level (-1 absent), left, top.

        The thing is its row in this renderer's atlas, the level its size.
        """
        rows, sizes = np.full((len(placements), MAX_OBJECTS, 5), -1, np.int32), self.atlas.sizes
        shorter = min(self.height, self.width)
        for b, scene in enumerate(placements):
            for k, p in enumerate(scene):
                level = min(max(round((p.size * shorter - sizes[0]) / STEP), 0), len(sizes) - 1)
                half = sizes[level] / 2
                tint = 0 if p.colour is None else p.colour + 1
                rows[b, k] = (tint, self._row[p.thing], level, round(p.x * self.width - half),
                              round(p.y * self.height - p.lift * shorter - half))
        return torch.from_numpy(rows).to(self.device)

    def draw(self, table: Tensor, looks: Tensor, window: tuple[int, int, int] | None = None) -> Tensor:
        """Images [B, 3, height, width] in [-1, 1] from `table` and `looks`.

        `window` (top, left, side), all multiples of BLOCK, draws only that square of each scene.
        """
        top, left, side = window or (0, 0, 0)
        bottom, right = (top + side, left + side) if window else (self.height, self.width)
        rows = torch.arange(top, bottom, device=self.device, dtype=torch.int32)[None, :, None]
        columns = torch.arange(left, right, device=self.device, dtype=torch.int32)[None, None, :]
        background, style = looks.unbind(1)
        canvas = self._profiles[background][:, :, top:bottom, None].expand(-1, -1, -1, right - left)
        stars = self._stars[background][:, None, top:bottom, left:right]
        canvas = canvas + stars * (1 - canvas)
        things = _columns(table)
        canvas = canvas * self._shadows(things, rows, columns, self._ground[background])[:, None]
        for tint, thing, level, x0, y0 in things:
            texel, alpha = self._texels(thing, level, rows - y0, columns - x0)
            rgb = _bytes(texel)
            ramp = self._ramps[tint.clamp_min(0).long() * 256 + (texel >> 32 & 255)]
            share = torch.where(tint > 0, (texel >> 40 & 255).float() / 255, 0.0)[:, None]
            canvas = canvas + alpha[:, None] * (rgb + share * (_bytes(ramp) - rgb) - canvas)
        return self._styled(canvas, style) * 2 - 1

    def covers(self, table: Tensor, patch: int) -> Tensor:
        """Which thing is seen in most of each square of `patch` pixels: int64 [B, height / patch,
        width / patch].

        The number of its placement, or -1 where none takes a quarter of the square.
        """
        rows, columns = (torch.arange(side, device=self.device, dtype=torch.int32)
                         for side in (self.height, self.width))
        seen: list[Tensor] = []
        for _, thing, level, x0, y0 in _columns(table):
            _, alpha = self._texels(thing, level, rows[None, :, None] - y0, columns[None, None, :] - x0)
            seen = [*(below * (1 - alpha) for below in seen), alpha]
        share, owner = F.avg_pool2d(torch.stack(seen, 1), patch).max(1)
        return torch.where(share >= 0.25, owner, -1)

    def _texels(self, thing: Tensor, level: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Texels of a thing per scene at places (y, x) from its corner, and its alpha, 0 outside of it."""
        pixels = self.atlas.sizes[0] + level * STEP
        inside = (level >= 0) & (x >= 0) & (y >= 0) & (x < pixels) & (y < pixels)
        start = thing.long() * self.atlas.stride + self._starts[level.clamp_min(0).long()]
        texel = self.atlas.texels[torch.where(inside, start + y * pixels + x, 0)]
        return texel, torch.where(inside, (texel >> 24 & 255).float() / 255, 0.0)

    def _shadows(self, things: Sequence[tuple[Tensor, ...]], rows: Tensor, columns: Tensor, ground: Tensor) -> Tensor:
        """Light that reaches each pixel [B, side, side]: a soft flat ellipse lies where each thing stands."""
        light = torch.ones((), device=self.device)
        for _, thing, level, x0, y0 in things:
            pixels = self.atlas.sizes[0] + level * STEP
            width, bottom = self.atlas.extent[thing.clamp_min(0).long().flatten()].unbind(-1)
            across = (columns - x0 - pixels / 2) / (0.42 * pixels * width[:, None, None])
            down = (rows - y0 - pixels * (bottom[:, None, None] - 0.02)) / (0.055 * pixels)
            dark = _SHADOW * torch.exp(-(across.square() + down.square()))
            light = light * (1 - torch.where(level >= 0, dark, 0.0))
        return torch.where(ground[:, None, None], light, 1.0)

    def _styled(self, canvas: Tensor, style: Tensor) -> Tensor:
        style = style[:, None, None, None]
        gray = (canvas * canvas.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        blocks = F.avg_pool2d(canvas, BLOCK).repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
        canvas = torch.where(style == STYLES.index("black and white"), gray, canvas)
        return torch.where(style == STYLES.index("pixel art"), blocks, canvas)


def _columns(table: Tensor) -> list[tuple[Tensor, ...]]:
    """The numbers of each thing, [B, 1, 1] each, as far as any scene has that many: few things take less time."""
    most = int((table[..., 2] >= 0).sum(1).max())
    return [tuple(column[:, None, None] for column in table[:, k].unbind(-1)) for k in range(most)]


def _bytes(packed: Tensor) -> Tensor:
    """The three lowest bytes as planes [B, 3, ...] in 0..1."""
    return torch.stack([packed & 255, packed >> 8 & 255, packed >> 16 & 255], 1).float() / 255


def _ramp_table() -> Tensor:
    """RGB as packed bytes for each colour (the first row is unused: natural) and each of 256 shades, int64."""
    rows = torch.zeros(len(COLOURS) + 1, 256, dtype=torch.int64)
    place = np.linspace(0, 1, 256)
    for index in range(len(COLOURS)):
        ramp = np.array(colour(index).ramp)
        for channel in range(3):
            values = np.interp(place, (0.0, 0.5, 1.0), ramp[:, channel])
            rows[index + 1] |= torch.from_numpy((values * 255).round().astype(np.int64)) << 8 * channel
    return rows.flatten()


def _background_tables(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each background the colours from top to bottom [N, 3, height], its stars [N, height, width], and whether
    things throw shadows on it [N]."""
    heights = (np.arange(height) + 0.5) / height
    profiles = np.array([[background_rgb(background, place) for place in heights]
                         for background in BACKGROUNDS.values()], np.float32)
    sky = np.zeros((height, width), np.float32)
    source = np.random.default_rng(1)
    for x, y, glow in zip(source.random(_STARS), source.random(_STARS) * 0.98, source.random(_STARS), strict=True):
        distance = ((np.arange(width) - x * width)[None, :] ** 2 + (np.arange(height) - y * height)[:, None] ** 2)
        sky = np.maximum(sky, (0.35 + 0.6 * glow) * np.exp(-distance / (0.4 + 0.9 * glow * min(height, width) / 256)))
    stars = [sky * (heights < 0.62 if background.ground else True)[:, None] if background.stars and background.ground
             else sky * background.stars for background in BACKGROUNDS.values()]
    return (torch.from_numpy(profiles).transpose(1, 2).clamp(0, 1).contiguous(),
            torch.from_numpy(np.stack(stars).astype(np.float32)),
            torch.tensor([background.ground for background in BACKGROUNDS.values()]))


_BACKGROUND_INDEX = {name: index for index, name in enumerate(BACKGROUNDS)}
