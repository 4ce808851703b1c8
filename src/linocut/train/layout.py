"""Where the things of a scene stand: slots that do not overlap, inside the picture, obeying relation, spot and size."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from linocut.train.scenes import MAX_OBJECTS, Scene

SMALLEST, LARGEST = 0.19, 0.76  # side of a thing, in units of the canvas
_MARGIN = 0.015  # between a thing and the edge of the picture
_SIZE_FACTOR = {"big": 1.0, None: 0.80, "small": 0.52}  # of what its slot has room for, where sizes are spoken of
_LONE = {"big": (0.70, 0.76), None: (0.52, 0.66), "small": (0.22, 0.32)}
_SPOT_SIDE = (0.28, 0.40)

Slots = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Placement:
    """One sprite on the canvas: centre and side in units of the canvas, y downwards."""

    thing: int
    colour: int | None
    x: float
    y: float
    size: float


# Slots (x, y) and the range of the side, by the number of things; several arrangements each.
_ARRANGEMENTS: dict[int, tuple[tuple[Slots, float, float], ...]] = {
    2: ((((0.27, 0.5), (0.73, 0.5)), 0.37, 0.45), (((0.27, 0.5), (0.73, 0.5)), 0.37, 0.45),
        (((0.5, 0.27), (0.5, 0.73)), 0.36, 0.44), (((0.29, 0.3), (0.71, 0.7)), 0.36, 0.42),
        (((0.29, 0.7), (0.71, 0.3)), 0.36, 0.42)),
    3: ((((0.18, 0.5), (0.5, 0.5), (0.82, 0.5)), 0.27, 0.31), (((0.5, 0.28), (0.26, 0.72), (0.74, 0.72)), 0.34, 0.4),
        (((0.26, 0.28), (0.74, 0.28), (0.5, 0.72)), 0.34, 0.4)),
    4: ((((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)), 0.34, 0.41),),
    5: ((((0.2, 0.2), (0.8, 0.2), (0.5, 0.5), (0.2, 0.8), (0.8, 0.8)), 0.27, 0.31),
        (((0.18, 0.3), (0.5, 0.3), (0.82, 0.3), (0.32, 0.7), (0.68, 0.7)), 0.27, 0.3)),
    6: ((((0.18, 0.3), (0.5, 0.3), (0.82, 0.3), (0.18, 0.7), (0.5, 0.7), (0.82, 0.7)), 0.27, 0.3),),
}
_ROW = {2: _ARRANGEMENTS[2][0], 3: _ARRANGEMENTS[3][0]}


def place(scene: Scene, rng: random.Random) -> list[Placement]:
    """Placements of every thing of the scene, group by group."""
    things = [group for group in scene.groups for _ in range(group.count)]
    if not 1 <= len(things) <= MAX_OBJECTS:
        raise ValueError(f"a scene holds 1 to {MAX_OBJECTS} things, found {len(things)}")
    if len(things) == 1:
        return [_lone(scene, rng)]
    slots: Sequence[tuple[float, float]]
    if scene.relation in ("left of", "right of", "above", "below"):
        slots, size = _related_slots(scene, rng)
    else:
        row = scene.relation is not None  # next to, between
        slots, low, high = _ROW[len(things)] if row else rng.choice(_ARRANGEMENTS[len(things)])
        size = rng.uniform(low, high)
        if scene.relation == "between":
            left, right = rng.sample((slots[0], slots[2]), 2)
            slots = slots[1], left, right
        elif len(scene.groups) > 1 and rng.random() < 0.5:
            slots = slots[::-1]  # things of a group stay together
    spoken = any(group.size for group in scene.groups)
    placements = []
    for group, (x, y) in zip(things, slots, strict=True):
        side = size * rng.uniform(0.95, 1.0) * (_SIZE_FACTOR[group.size] if spoken else 1.0)
        placements.append(_inside(group.thing, group.colour, x + rng.uniform(-0.025, 0.025),
                                  y + rng.uniform(-0.025, 0.025), side))
    return placements


def _lone(scene: Scene, rng: random.Random) -> Placement:
    group = scene.groups[0]
    if scene.spot is None:
        return _inside(group.thing, group.colour, 0.5 + rng.uniform(-0.06, 0.06), 0.5 + rng.uniform(-0.06, 0.06),
                       rng.uniform(*_LONE[group.size]))
    side = rng.uniform(*_SPOT_SIDE)
    near = 0.03 + side / 2 + rng.uniform(0, 0.04)
    x = near if "left" in scene.spot else 1 - near if "right" in scene.spot else 0.5
    y = near if "top" in scene.spot else 1 - near if "bottom" in scene.spot else 0.5
    return _inside(group.thing, group.colour, x, y, side)


def _inside(thing: int, colour: int | None, x: float, y: float, side: float) -> Placement:
    """A placement moved so far inwards that nothing is cut off."""
    side = max(side, SMALLEST)
    low, high = side / 2 + _MARGIN, 1 - side / 2 - _MARGIN
    return Placement(thing, colour, min(max(x, low), high), min(max(y, low), high), side)


def _related_slots(scene: Scene, rng: random.Random) -> tuple[list[tuple[float, float]], float]:
    """One line of slots per group, the two lines on opposite sides of the canvas."""
    counts = [group.count for group in scene.groups]
    size = (0.46, 0.42, 0.31)[max(counts) - 1] * rng.uniform(0.9, 1.0)
    near = rng.uniform(0.25, 0.28)
    slots = []
    for index, count in enumerate(counts):
        across = near if (index == 0) == (scene.relation in ("left of", "above")) else 1 - near
        along = {1: (0.5,), 2: (0.28, 0.72), 3: (0.18, 0.5, 0.82)}[count]
        slots += [(across, a) if scene.relation in ("left of", "right of") else (a, across) for a in along]
    return slots, size
