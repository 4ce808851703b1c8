"""Pictures to train the embedded world's detector with, made on the training device as they are used.

Layouts come from the world's own scenes; the things in them, their colours, sizes and backgrounds are drawn anew for
every picture. Then a picture is moved, zoomed, stretched and bent, so that sizes and shapes vary as generated ones do,
and spoilt as generated ones are: by the model's autoencoder with disturbed latents, blur, low resolution, noise, and
shifts of brightness and colour.

Shape letters: B batch, K = MAX_OBJECTS things, H and W the picture's height and width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from linocut.models.autoencoder import Autoencoder
from linocut.train.layout import LARGEST, SMALLEST, place
from linocut.train.loop import autocast
from linocut.train.palette import BACKGROUNDS, COLOURS, PLACES, WALLS
from linocut.train.render import STEP, SceneRenderer
from linocut.train.scenes import MAX_OBJECTS, STYLES, Group, contrast, sample_scene
from linocut.train.vocabulary import objects

_VISIBLE = 0.10  # least distance of an outline from its background: a little less than scenes keep
_NATURAL, _STYLED, _SPOKEN = 0.45, 0.04, 0.35  # shares: natural colours, styles, backgrounds other than quiet tones
ZOOM, STRETCH, SHIFT = (0.62, 1.25), 0.14, 0.10  # of the warp; SHIFT of what there is room for, at least
_REDRAWN = 0.3  # share of the pictures that go through the autoencoder
BEND = ((4, 0.020), (12, 0.010))  # cells of a displacement field, and how far it goes in shares of the picture


@dataclass(frozen=True)
class Labelled:
    """Pictures [B, 3, H, W] in [-1, 1] with what is in them: `classes` [B, K] (-1: nothing), `colours` [B, K]
    (-1: natural or unknown), `boxes` [B, K, 4] as left, top, right, bottom in pixels."""

    image: Tensor
    classes: Tensor
    colours: Tensor
    boxes: Tensor

    def part(self, rows: slice) -> Labelled:
        """Some of the pictures."""
        return Labelled(self.image[rows], self.classes[rows], self.colours[rows], self.boxes[rows])


class WorldScenes:
    """An endless source of labelled pictures. `things` limits the classes (all of the vocabulary if left out)."""

    def __init__(self, sprites: Path, size: int, device: torch.device, vae: Autoencoder | None, seed: int = 0,
                 things: Sequence[int] | None = None, layouts: int = 8192) -> None:
        self.things = list(range(len(objects()))) if things is None else sorted(things)
        self.size, self.device, self.vae = size, device, vae
        self.renderer = SceneRenderer(sprites, size, device, self.things)
        self._spots, self._group = (part.to(device) for part in _layouts(layouts, seed))
        self._visible = _visible_table(self.things).to(device)
        self._natural = torch.tensor([objects()[thing].natural for thing in self.things], device=device)
        spoken = torch.tensor([name in WALLS or name in PLACES for name in BACKGROUNDS], device=device)
        self._background = torch.where(spoken, _SPOKEN / spoken.sum(), (1 - _SPOKEN) / (~spoken).sum())

    @torch.no_grad()
    def draw(self, batch: int, shape: tuple[int, int] | None = None) -> Labelled:
        """A batch of fresh pictures, `shape` (H, W) or else square, bent but not spoilt."""
        spots, classes, tint = self._compose(batch)
        table, boxes = self._table(spots, classes, tint)
        image = self.renderer.draw(table, self._looks(classes, tint))
        colours = torch.where(classes >= 0, tint - 1, -1)
        return warp(Labelled(image, classes, colours, boxes), shape or (self.size, self.size))

    @torch.no_grad()
    def spoilt(self, batch: int, shape: tuple[int, int] | None = None) -> Labelled:
        """As `draw`, and spoilt in the ways that generated pictures are."""
        fresh = self.draw(batch, shape)
        return Labelled(spoil(fresh.image, self.vae), fresh.classes, fresh.colours, fresh.boxes)

    def _compose(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Spots [B, K, 3] (x, y, side), rows of things [B, K] (-1: none) and tints [B, K] (0: natural)."""
        device, count = self.device, len(self.things)
        rows = torch.randint(len(self._spots), (batch,), device=device)
        group, spots = self._group[rows], self._spots[rows]
        scale = _between(0.85, 1.12, (batch, 1), device) * _between(0.94, 1.04, (batch, MAX_OBJECTS), device)
        side = (spots[..., 2] * scale).clamp(SMALLEST, LARGEST)
        centre = spots[..., :2] + 0.02 * torch.randn(batch, MAX_OBJECTS, 2, device=device)
        room = side[..., None] / 2
        spots = torch.cat([torch.minimum(torch.maximum(centre, room), 1 - room), side[..., None]], -1)
        of_group = torch.rand(batch, count, device=device).topk(min(3, count))[1]  # different things
        if count < 3:
            of_group = F.pad(of_group, (0, 3 - count), value=0)
        classes = of_group.gather(1, group.clamp_min(0))
        tints = torch.randint(1, len(COLOURS) + 1, (batch, MAX_OBJECTS), device=device)
        alike = torch.rand(batch, 1, device=device) < 0.9  # else every thing has a colour of its own
        tint = torch.where(alike, tints[:, :3].gather(1, group.clamp_min(0)), tints)
        plain = (torch.rand(batch, 3, device=device) < _NATURAL).gather(1, group.clamp_min(0))
        tint = torch.where(plain | self._natural[classes], 0, tint)
        return spots, torch.where(group >= 0, classes, -1), tint

    def _table(self, spots: Tensor, classes: Tensor, tint: Tensor) -> tuple[Tensor, Tensor]:
        """What the renderer draws, and where the things then are: boxes [B, K, 4]."""
        sizes = self.renderer.atlas.sizes
        level = ((spots[..., 2] * self.size - sizes[0]) / STEP).round().clamp(0, len(sizes) - 1)
        side = sizes[0] + STEP * level
        corner = (spots[..., :2] * self.size - side[..., None] / 2).round()
        level = torch.where(classes >= 0, level, -1)
        table = torch.stack([tint, classes.clamp_min(0), level, corner[..., 0], corner[..., 1]], -1).int()
        return table, sprite_boxes(self.renderer, classes, corner, side)

    def _looks(self, classes: Tensor, tint: Tensor) -> Tensor:
        """Backgrounds on which all things can be seen, and styles: int64 [B, 2]."""
        seen = self._visible[classes.clamp_min(0), tint] | (classes < 0)[..., None]
        weight = torch.where(seen.all(1), self._background, 1e-9)
        background = torch.multinomial(weight, 1)
        style = torch.randint(1, len(STYLES), (len(classes), 1), device=self.device)
        gray = (style == STYLES.index("black and white")) & (tint > 0).any(1, keepdim=True)  # would hide the colours
        styled = (torch.rand(len(classes), 1, device=self.device) < _STYLED) & ~gray
        return torch.cat([background, torch.where(styled, style, 0)], 1)


def sprite_boxes(renderer: SceneRenderer, rows: Tensor, corner: Tensor, side: Tensor) -> Tensor:
    """Boxes [..., 4] around things (`rows` of the atlas) whose square sprites begin at `corner` [..., 2] in pixels.

    A sprite is cropped to its content and centred in a square, so one of its sides is full; the atlas knows the other.
    """
    width, bottom = renderer.atlas.extent[rows.clamp_min(0)].unbind(-1)
    across, down = (1 - width) / 2 * side, (1 - bottom) * side
    x, y = corner.unbind(-1)
    return torch.stack([x + across, y + down, x + side - across, y + side - down], -1)


@cache
def _layouts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Where the things of `count` scenes stand: spots [count, K, 3] and the group of each thing [count, K]."""
    rng = random.Random(f"detector/{seed}")
    spots, groups = torch.zeros(count, MAX_OBJECTS, 3), torch.full((count, MAX_OBJECTS), -1)
    for row in range(count):
        scene = sample_scene(rng)
        while scene.relation == "on":  # things of another height would not touch
            scene = sample_scene(rng)
        owners = [index for index, group in enumerate(scene.groups) for _ in range(group.count)]
        for k, (placement, owner) in enumerate(zip(place(scene, rng), owners, strict=True)):
            spots[row, k] = torch.tensor([placement.x, placement.y - placement.lift, placement.size])
            groups[row, k] = owner
    return spots, groups


def _visible_table(things: Sequence[int]) -> Tensor:
    """Whether a thing in a tint (0: natural) can be seen on a background: bool [things, tints, backgrounds]."""
    return torch.tensor([[[contrast([Group(thing, 1, None if tint == 0 else tint - 1)], name) >= _VISIBLE
                           for name in BACKGROUNDS] for tint in range(len(COLOURS) + 1)] for thing in things])


# ---- moving and bending ----------------------------------------------------------------------------------------------

def warp(given: Labelled, shape: tuple[int, int]) -> Labelled:
    """Zoom, stretch, move and bend pictures into `shape` (H, W); every thing stays inside.

    Boxes follow all but the bending. What comes in from beyond the edge repeats it: backgrounds are horizontal bands.
    """
    image, (height, width) = given.image, shape
    batch, device, side = len(image), image.device, image.shape[-1]
    there = (given.classes >= 0)[..., None]
    low = torch.where(there, given.boxes[..., :2], side).amin(1)  # of all things together, [B, 2] as x, y
    high = torch.where(there, given.boxes[..., 2:], 0).amax(1)
    target = image.new_tensor([width, height])
    zoom = _between(*ZOOM, (batch, 1), device) * min(shape) / side
    zoom = zoom * (_between(-STRETCH, STRETCH, (batch, 1), device) * zoom.new_tensor([1.0, -1.0])).exp()
    zoom = torch.minimum(zoom, 0.96 * target / (high - low).clamp_min(1.0))  # all of it has to fit
    least, most = -zoom * low, target - zoom * high  # the shift that puts things at the near, the far edge
    middle, reach = (least + most) / 2, (most - least) / 2 * 0.96
    shift = middle + reach * _between(-1, 1, (batch, 2), device)
    y, x = torch.meshgrid(torch.arange(height, device=device) + 0.5, torch.arange(width, device=device) + 0.5,
                          indexing="ij")
    source = (torch.stack([x, y], -1) - shift[:, None, None]) / zoom[:, None, None]  # [B, H, W, 2] in pixels
    grid = source / side * 2 - 1
    for cells, reach_of in BEND:
        field = torch.randn(batch, 2, cells, cells, device=device) * reach_of * _share(batch, 0.5, device)
        grid = grid + F.interpolate(field, shape, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    bent = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
    moved = given.boxes * zoom.repeat(1, 2)[:, None] + shift.repeat(1, 2)[:, None]
    return Labelled(bent, given.classes, given.colours, moved)


def square_to(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Square pictures [B, 3, S, S] in the middle of `shape` (H, W): scaled to its shorter side, edges repeated."""
    if shape == tuple(image.shape[-2:]):
        return image
    side, (height, width) = min(shape), shape
    image = F.interpolate(image, (side, side), mode="bilinear", antialias=True, align_corners=False)
    left, top = (width - side) // 2, (height - side) // 2
    return F.pad(image, (left, width - side - left, top, height - side - top), mode="replicate")


# ---- spoiling --------------------------------------------------------------------------------------------------------

def spoil(image: Tensor, vae: Autoencoder | None) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] as a generator might have drawn them. `vae` redraws the first of a batch."""
    batch, device = len(image), image.device
    if vae is not None and (count := round(_REDRAWN * batch)):
        image = torch.cat([redraw(image[:count], vae), image[count:]])
    low = image[batch // 5:batch // 5 + max(1, batch // 4)]  # some of the redrawn ones and some others
    factor = random.choice((2, 3, 4))
    small = F.interpolate(low, (image.shape[-2] // factor, image.shape[-1] // factor), mode="area")
    coarse = F.interpolate(small, image.shape[-2:], mode="bilinear", align_corners=False)
    image = image.clone()
    image[batch // 5:batch // 5 + len(low)] = torch.lerp(low, coarse, _between(0.3, 1, (len(low), 1, 1, 1), device))
    image = torch.lerp(image, _blurred(image), _share(batch, 0.4, device))
    patches = torch.randn(batch, 3, image.shape[-2] // 8, image.shape[-1] // 8, device=device)
    patches = F.interpolate(patches, image.shape[-2:], mode="bilinear", align_corners=False)
    image = image + 0.08 * _share(batch, 0.4, device) * patches
    image = image + 0.10 * _share(batch, 0.4, device) * torch.randn_like(image)
    gain = 1 + 0.12 * torch.randn(batch, 1, 1, 1, device=device) + 0.03 * torch.randn(batch, 3, 1, 1, device=device)
    gray = image.mean(1, keepdim=True)
    image = torch.lerp(gray, image, _between(0.75, 1.2, (batch, 1, 1, 1), device))
    return (image * gain + 0.06 * torch.randn(batch, 1, 1, 1, device=device)).clamp(-1, 1)


@torch.no_grad()
def redraw(image: Tensor, vae: Autoencoder, disturb: bool = True) -> Tensor:
    """Through the autoencoder; `disturb` adds noise to the latents and smooths them, by an amount of its own each."""
    with autocast(image.device):
        z = vae.latents_from_image(image.contiguous(memory_format=torch.channels_last)).float()
        if disturb:
            z = torch.lerp(z, _blurred(z), _share(len(z), 0.5, z.device))
            z = z + 0.5 * _share(len(z), 0.7, z.device) * torch.randn_like(z)
        return vae.image_from_latents(z).float().clamp(-1, 1)


def _blurred(image: Tensor) -> Tensor:
    """A 5x5 binomial blur."""
    taps = image.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (taps[:, None] * taps).expand(image.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(image, (2, 2, 2, 2), mode="replicate"), kernel, groups=image.shape[1]).to(image.dtype)


def _between(low: float, high: float, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return low + (high - low) * torch.rand(shape, device=device)


def _share(batch: int, chance: float, device: torch.device) -> Tensor:
    """[B, 1, 1, 1]: 0 for most of the pictures, for a share `chance` of them anything up to 1."""
    there = torch.rand(batch, 1, 1, 1, device=device) < chance
    return torch.where(there, torch.rand(batch, 1, 1, 1, device=device), 0.0)
