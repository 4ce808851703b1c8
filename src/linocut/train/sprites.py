"""Sprites as tensors: cropped, in every size that scenes use, with the share of each texel that a colour takes over.

A sprite is recoloured by its own brightness, so that shading survives. Where most of a thing is colourful, only its
colourful parts change (a green fire engine keeps its gray tyres and white highlights); a thing of grays changes as a
whole, but for small dark or colourful details (the eyes and the pink ears of a white rabbit).

Sprites: Microsoft Fluent Emoji 3D (MIT), fetched by `recipes/embedded/fetch_sprites.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from linocut.errors import ModelNotFoundError
from linocut.train.vocabulary import ObjectName

CHANNELS = 6  # red, green, blue, alpha, shade (place on a colour's ramp), tinted (share that takes the colour)
_COLOURFUL = 0.45  # from this share of colourful texels on, the others keep their own colours
_LEAST_SPAN = 0.35  # of brightness that a colour's ramp is spread over
# On a thing of grays, what is darker than this share of its median brightness or more colourful than that is a detail,
# such as an eye or a bill, if it takes no larger share of the thing. Details begin softly, over the last two.
_DARK, _VIVID, _DETAIL, _DARK_RAMP, _VIVID_RAMP = 0.62, 0.22, 0.12, 0.15, 0.18


@dataclass(frozen=True)
class Atlas:
    """Every sprite in every size: `texels` int64, one byte per channel, sprite by sprite, size by size, row by row.

    `sizes` are the sides in pixels, `starts` where each size begins within a sprite, `extent` [sprites, 2] which share
    of the side the thing is wide and how far down it reaches.
    """

    texels: Tensor
    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    extent: Tensor

    @property
    def stride(self) -> int:
        """Texels of one sprite."""
        return self.starts[-1] + self.sizes[-1] ** 2


def load_atlas(folder: Path, things: Sequence[ObjectName], sizes: Sequence[int], device: torch.device) -> Atlas:
    """Load the sprites of `things`. Raises ModelNotFoundError for a missing one."""
    starts = [0]
    for side in sizes:
        starts.append(starts[-1] + side * side)
    texels = torch.empty(len(things), starts[-1], dtype=torch.int64, device=device)
    extent = torch.empty(len(things), 2)
    with ThreadPoolExecutor(8) as readers:
        for row, sprite in enumerate(readers.map(open_sprite, sprite_files(folder, things))):
            opaque = sprite[3] > 0.5
            extent[row, 0] = opaque.any(0).float().mean()
            extent[row, 1] = (opaque.any(1).nonzero().max() + 1) / len(opaque)
            planes = split_colour(sprite.to(device))
            for start, pixels in zip(starts, sizes, strict=False):
                texels[row, start:start + pixels * pixels] = _pack(_resize(planes, pixels)).flatten()
    return Atlas(texels.flatten(), tuple(sizes), tuple(starts[:len(sizes)]), extent.to(device))


def sprite_files(folder: Path, things: Iterable[ObjectName]) -> list[Path]:
    """The file of each thing's sprite: `<code point>.webp`, or with the variation selector that some carry."""
    paths = []
    for thing in things:
        found = [p for p in (folder / f"{thing.code}.webp", folder / f"{thing.code}-fe0f.webp") if p.is_file()]
        if not found:
            raise ModelNotFoundError(f"{folder}: no sprite for {thing.name} (expected {thing.code}.webp); "
                                     "run recipes/embedded/fetch_sprites.py")
        paths.append(found[0])
    return paths


def open_sprite(path: Path) -> Tensor:
    """RGBA [4, S, S] in 0..1 of a sprite, cropped to its content and centred in a square."""
    sprite = Image.open(path).convert("RGBA")
    sprite = sprite.crop(sprite.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    side = max(sprite.size)
    square = Image.new("RGBA", (side, side))
    square.paste(sprite, ((side - sprite.width) // 2, (side - sprite.height) // 2))
    return torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255


def split_colour(rgba: Tensor) -> Tensor:
    """RGBA [4, S, S] to CHANNELS planes in 0..1.

    Shade: the 5th..95th percentile of the brightness spans the ramp of a colour, the median sits in its middle.
    """
    rgb, opaque = rgba[:3], rgba[3] > 0.5
    light = (rgb * rgb.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    spread = rgb.amax(0) - rgb.amin(0)
    chroma = ((spread - 0.10) / 0.18).clamp(0, 1)
    chroma = chroma * chroma * (3 - 2 * chroma)
    partly = float(chroma[opaque].mean()) >= _COLOURFUL
    tinted = chroma if partly else 1 - _details(light, spread, opaque)
    low, middle, high = torch.quantile(light[opaque & (tinted > 0.5)], light.new_tensor([0.05, 0.5, 0.95])).tolist()
    flat = max(0.0, _LEAST_SPAN - (high - low)) / 2  # stretching a flat sprite would show its compression
    low, high = low - flat, high + flat
    middle = min(max(middle, low + 0.3 * (high - low)), low + 0.7 * (high - low))
    below, above = (light - low) / max(middle - low, 1e-3), (light - middle) / max(high - middle, 1e-3)
    shade = 0.5 * (below.clamp(0, 1) + above.clamp(0, 1))
    return torch.cat([rgba, shade[None], tinted[None]])


def _details(light: Tensor, spread: Tensor, opaque: Tensor) -> Tensor:
    """How far each texel of a sprite of grays belongs to dark or colourful details, 0..1."""
    dark, vivid = (_DARK - light / light[opaque].median()) / _DARK_RAMP, (spread - _VIVID) / _VIVID_RAMP
    small = [part for part in (dark.clamp(0, 1), vivid.clamp(0, 1)) if float(part[opaque].mean()) <= _DETAIL]
    return torch.stack([*small, torch.zeros_like(light)]).amax(0)


def edge_rgb(rgba: Tensor) -> tuple[float, float, float]:
    """Mean red, green and blue (0..1) of a sprite's outline, a twentieth of its side wide. `rgba` [4 or more, S, S]."""
    opaque = (rgba[3] > 0.5).float()[None, None]
    width = max(1, round(opaque.shape[-1] / 20))
    outside, span = F.pad(1 - opaque, [width] * 4, value=1.0), 2 * width + 1
    near_outside = F.max_pool2d(F.max_pool2d(outside, (span, 1), stride=1), (1, span), stride=1)
    red, green, blue = rgba[:3, (opaque * near_outside)[0, 0] > 0.5].mean(1).tolist()
    return red, green, blue


def _resize(planes: Tensor, pixels: int) -> Tensor:
    """To [CHANNELS, pixels, pixels], without bleeding what hides under transparent texels into the edge."""
    alpha = planes[3:4]
    weighted = torch.cat([planes[:3] * alpha, alpha, planes[4:] * alpha])[None]
    small = F.interpolate(weighted, (pixels, pixels), mode="bicubic", antialias=True, align_corners=False)[0]
    alpha = small[3:4].clamp(0, 1)
    rest = torch.cat([small[:3], small[4:]]) / alpha.clamp_min(1e-3)
    return torch.cat([rest[:3], alpha, rest[3:]]).clamp(0, 1)


def _pack(planes: Tensor) -> Tensor:
    """One int64 per texel, a byte per channel, the first in the lowest."""
    packed = torch.zeros(planes.shape[1:], dtype=torch.int64, device=planes.device)
    for place, plane in enumerate((planes * 255).round().long()):
        packed |= plane << 8 * place
    return packed
