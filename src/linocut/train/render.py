"""Draws scenes on any torch device: sprites at exact pixel sizes, tinted, pasted by gathering from one texture table.

Each sprite is resized once per size step with Pillow's Lanczos filter (grid sampling on the fly would alias), tinted in
every colour, and kept as packed RGBA integers; a canvas pixel is then one gather per thing. A batch of 256-px scenes
takes a fraction of a millisecond per picture on a GPU, so a training set is drawn where it is used.

Sprites: Microsoft Fluent Emoji 3D (MIT), fetched by `recipes/embedded/fetch_sprites.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from linocut.errors import ModelNotFoundError
from linocut.train.scenes import BACKGROUNDS, COLOURS, MAX_OBJECTS, Placement, Scene, objects

# Each colour as a ramp over the sprite's own brightness: (shadow, middle, light), sRGB in [0, 1].
_RAMPS = {
    "red": ((0.42, 0.02, 0.05), (0.88, 0.11, 0.14), (1.0, 0.55, 0.52)),
    "orange": ((0.60, 0.22, 0.0), (0.98, 0.52, 0.06), (1.0, 0.78, 0.45)),
    "yellow": ((0.68, 0.48, 0.0), (0.99, 0.83, 0.10), (1.0, 0.96, 0.60)),
    "green": ((0.02, 0.28, 0.08), (0.13, 0.66, 0.24), (0.60, 0.92, 0.60)),
    "blue": ((0.03, 0.10, 0.42), (0.12, 0.37, 0.90), (0.58, 0.78, 1.0)),
    "purple": ((0.22, 0.04, 0.38), (0.53, 0.20, 0.76), (0.82, 0.63, 0.98)),
    "pink": ((0.70, 0.18, 0.42), (0.98, 0.47, 0.70), (1.0, 0.82, 0.90)),
    "brown": ((0.18, 0.08, 0.03), (0.46, 0.26, 0.13), (0.76, 0.58, 0.42)),
    "black": ((0.01, 0.01, 0.02), (0.11, 0.11, 0.12), (0.42, 0.42, 0.45)),
    "white": ((0.62, 0.63, 0.68), (0.92, 0.92, 0.94), (1.0, 1.0, 1.0)),
}
_BACKGROUND_RGB = {
    "white": (0.98, 0.98, 0.98), "gray": (0.62, 0.63, 0.65), "pink": (0.98, 0.76, 0.84), "blue": (0.62, 0.78, 0.97),
    "green": (0.66, 0.88, 0.68), "yellow": (0.98, 0.91, 0.60), "purple": (0.80, 0.70, 0.94),
    "orange": (0.99, 0.76, 0.52), "black": (0.13, 0.13, 0.15),
}
# Without a wish the background is one of these quiet tones.
_QUIET_RGB = ((0.94, 0.94, 0.95), (0.96, 0.94, 0.90), (0.90, 0.94, 0.97), (0.91, 0.96, 0.92), (0.95, 0.92, 0.97))


class SceneRenderer:
    """Renders batches of scenes as images [B, 3, size, size] in [-1, 1].

    `sprites` is the folder with one `<code point>.webp` per object, `things` the objects to load (all of them if left
    out; scenes may hold no others). Raises ModelNotFoundError for a missing sprite.
    """

    def __init__(self, sprites: Path, size: int = 256, device: torch.device | str = "cpu", step: int = 8,
                 things: Iterable[int] | None = None) -> None:
        self.size, self.device, self.step = size, torch.device(device), step
        self.smallest = max(step, int(size * 0.22) // step * step)
        self.largest = -(-int(size * 0.73) // step) * step
        self.levels = (self.largest - self.smallest) // step + 1
        chosen = sorted(set(range(len(objects())) if things is None else things))
        self._row = {thing: row for row, thing in enumerate(chosen)}
        files = _sprite_files(sprites, chosen)
        natural = torch.stack([self._levels_of(path) for path in files])  # [objects, levels, L, L, 4]
        self.texture = torch.stack([self._pack(natural.to(self.device), None)]
                                   + [self._pack(natural.to(self.device), ramp) for ramp in _RAMPS.values()]).flatten()
        self.things = natural.shape[0]

    def _levels_of(self, path: Path) -> Tensor:
        """One sprite, cropped to its content and resized to each size step, in a corner of an L x L tile."""
        sprite = Image.open(path).convert("RGBA")
        sprite = sprite.crop(sprite.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
        side = max(sprite.size)
        square = Image.new("RGBA", (side, side))
        square.paste(sprite, ((side - sprite.width) // 2, (side - sprite.height) // 2))
        tiles = np.zeros((self.levels, self.largest, self.largest, 4), np.uint8)
        for level in range(self.levels):
            pixels = self.smallest + level * self.step
            tiles[level, :pixels, :pixels] = np.asarray(square.resize((pixels, pixels), Image.Resampling.LANCZOS))
        return torch.from_numpy(tiles)

    def _pack(self, natural: Tensor, ramp: tuple[tuple[float, float, float], ...] | None) -> Tensor:
        """RGBA as one int32 per texel, tinted along `ramp` by the sprite's own brightness if given."""
        packed = torch.empty(natural.shape[:-1], dtype=torch.int32, device=natural.device)
        for index, sprite in enumerate(natural):
            rgb, alpha = sprite[..., :3].float() / 255, sprite[..., 3].int()
            if ramp is not None:
                rgb = _tint(rgb, alpha > 128, ramp)
            red, green, blue = (rgb * 255).round().int().unbind(-1)
            packed[index] = red | green << 8 | blue << 16 | alpha << 24
        return packed

    def backgrounds(self, scenes: Sequence[Scene], seed: int) -> Tensor:
        """RGB per scene [B, 3]: the wished background, else a quiet tone chosen by the seed."""
        choice = np.random.default_rng(seed).integers(len(_QUIET_RGB), size=len(scenes))
        rows = [_QUIET_RGB[c] if scene.background is None else _BACKGROUND_RGB[scene.background]
                for scene, c in zip(scenes, choice, strict=True)]
        return torch.tensor(rows, device=self.device)

    def table(self, placements: Sequence[Sequence[Placement]]) -> Tensor:
        """Placements as integers [B, MAX_OBJECTS, 5]: colour (0 natural), thing, level (-1 absent), left, top.

        The thing is its row in this renderer's texture.
        """
        rows = np.full((len(placements), MAX_OBJECTS, 5), -1, np.int32)
        for b, scene in enumerate(placements):
            for k, p in enumerate(scene):
                level = round((p.size * self.size - self.smallest) / self.step)
                level = min(max(level, 0), self.levels - 1)
                half = (self.smallest + level * self.step) / 2
                colour = 0 if p.colour is None else p.colour + 1
                left, top = round(p.x * self.size - half), round(p.y * self.size - half)
                rows[b, k] = colour, self._row[p.thing], level, left, top
        return torch.from_numpy(rows).to(self.device)

    def draw(self, table: Tensor, backgrounds: Tensor, window: tuple[int, int, int] | None = None) -> Tensor:
        """Images [B, 3, size, size] in [-1, 1] from `table` and background colours [B, 3].

        `window` (top, left, side) draws only that square of each scene.
        """
        top, left, side = window or (0, 0, self.size)
        rows = torch.arange(top, top + side, device=self.device, dtype=torch.int32)
        columns = torch.arange(left, left + side, device=self.device, dtype=torch.int32)
        shade = 1.03 - 0.09 * rows[:, None].float() / self.size  # lighter above, as lit from the top
        canvas = (backgrounds[:, :, None, None] * shade).clamp(0, 1).expand(-1, -1, -1, side).clone()
        for k in range(MAX_OBJECTS):
            colour, thing, level, x0, y0 = (column[:, None, None] for column in table[:, k].unbind(-1))
            x, y = columns[None, None, :] - x0, rows[None, :, None] - y0
            pixels = self.smallest + level * self.step
            inside = (level >= 0) & (x >= 0) & (y >= 0) & (x < pixels) & (y < pixels)
            tile = (colour * self.things + thing) * self.levels + level
            index = (tile.long() * self.largest + y) * self.largest + x
            texel = self.texture[torch.where(inside, index, 0)]
            alpha = torch.where(inside, (texel >> 24 & 255).float() / 255, 0.0)[:, None]
            rgb = torch.stack([texel & 255, texel >> 8 & 255, texel >> 16 & 255], 1).float() / 255
            canvas = canvas + alpha * (rgb - canvas)
        return canvas * 2 - 1


def _sprite_files(folder: Path, things: Iterable[int]) -> list[Path]:
    paths = []
    for thing in (objects()[index] for index in things):
        found = [p for p in (folder / f"{thing.code}.webp", folder / f"{thing.code}-fe0f.webp") if p.is_file()]
        if not found:
            raise ModelNotFoundError(f"{folder}: no sprite for {thing.name} (expected {thing.code}.webp); "
                                     "run recipes/embedded/fetch_sprites.py")
        paths.append(found[0])
    return paths


def _tint(rgb: Tensor, opaque: Tensor, ramp: tuple[tuple[float, float, float], ...]) -> Tensor:
    """Recolours by brightness: the sprite's 5th..95th percentile spans the ramp, its median sits in the middle."""
    light = rgb @ rgb.new_tensor([0.299, 0.587, 0.114])
    values = light[opaque]
    some = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))[:100_000].to(values.device)
    low, middle, high = torch.quantile(values[some], values.new_tensor([0.05, 0.5, 0.95])).tolist()
    middle = min(max(middle, low + 0.3 * (high - low)), low + 0.7 * (high - low))
    below = ((light - low) / max(middle - low, 1e-3)).clamp(0, 1)[..., None]
    above = ((light - middle) / max(high - middle, 1e-3)).clamp(0, 1)[..., None]
    shadow, centre, bright = (rgb.new_tensor(stop) for stop in ramp)
    return torch.where(above > 0, centre + above * (bright - centre), shadow + below * (centre - shadow))


assert tuple(_RAMPS) == COLOURS
assert tuple(_BACKGROUND_RGB) == BACKGROUNDS
