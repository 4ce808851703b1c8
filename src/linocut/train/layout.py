"""Where the things of a scene stand: slots that do not overlap, inside the picture, obeying relation, spot and size.

Where the background has a horizon, things stand below it in one row or two, all of a row on one line; only what is
above something else hangs in the air. On plain backgrounds they may be anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from linocut.train.palette import BACKGROUNDS
from linocut.train.scenes import MAX_OBJECTS, Group, Scene
from linocut.train.vocabulary import objects

SMALLEST, LARGEST = 0.19, 0.76  # side of a thing, in units of the canvas
_MARGIN = 0.015  # between a thing and the edge of the picture
_SIZE_FACTOR = {"big": 1.0, None: 0.80, "small": 0.52}  # of what its slot has room for, where sizes are spoken of
_LONE = {"big": (0.70, 0.76), None: (0.52, 0.66), "small": (0.22, 0.32)}
_SPOT_SIDE = (0.28, 0.40)
_SINK = 0.015  # how far what stands on something reaches into it

Slots = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Placement:
    """One sprite on the canvas: centre and side in units of the canvas, y downwards.

    The centre is `lift` higher than y, in units of the canvas's shorter side as `size` is, so that what stands on a
    line at y does so on canvases of any shape.
    """

    thing: int
    colour: int | None
    x: float
    y: float
    size: float
    lift: float = 0.0


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
_ALONG = {1: (0.5,), 2: (0.28, 0.72), 3: (0.18, 0.5, 0.82)}  # places in a row of so many
# On the ground: how many stand in the back row and in the front row, or in the only one.
_RANKS = {2: ((2,),), 3: ((3,), (1, 2), (2, 1)), 4: ((2, 2),), 5: ((2, 3), (3, 2)), 6: ((3, 3),)}


def place(scene: Scene, rng: random.Random) -> list[Placement]:
    """Placements of every thing of the scene, group by group. Raises ValueError for too many things."""
    things = [group for group in scene.groups for _ in range(group.count)]
    if not 1 <= len(things) <= MAX_OBJECTS:
        raise ValueError(f"a scene holds 1 to {MAX_OBJECTS} things, found {len(things)}")
    horizon = BACKGROUNDS[scene.background].horizon
    if len(things) == 1:
        return [_lone(scene, horizon, rng)]
    if scene.relation == "on":
        if len(things) != 2:
            raise ValueError(f"only a lone thing stands on another, found {len(things)} things")
        return _stacked(scene.groups, horizon, rng)
    if horizon is not None and scene.relation not in ("above", "below") and (
            len(things) <= 3 or scene.relation is None):
        return _grounded(scene, things, horizon, rng)
    slots: Sequence[tuple[float, float]]
    if scene.relation in ("left of", "right of", "above", "below"):
        slots, size = _related_slots(scene, rng)
    else:
        row = scene.relation is not None  # next to, between
        slots, low, high = _ROW[len(things)] if row else rng.choice(_ARRANGEMENTS[len(things)])
        size = rng.uniform(low, high)
        slots = _ordered(scene, slots, rng)
    return [_inside(group.thing, group.colour, x + rng.uniform(-0.025, 0.025), y + rng.uniform(-0.025, 0.025), side)
            for group, (x, y), side in zip(things, slots, _sides(scene, things, size, rng), strict=True)]


def _sides(scene: Scene, things: Sequence[Group], size: float, rng: random.Random) -> list[float]:
    """The side of every thing, about `size` where sizes are not spoken of."""
    spoken = any(group.size for group in scene.groups)
    return [size * rng.uniform(0.95, 1.0) * (_SIZE_FACTOR[group.size] if spoken else 1.0) for group in things]


def _ordered(scene: Scene, slots: Sequence[tuple[float, float]], rng: random.Random) -> Sequence[tuple[float, float]]:
    """Slots in the order of the things; those of a group stay together. A single row's are given from left to right."""
    if scene.relation == "between":
        left, right = rng.sample((slots[0], slots[2]), 2)
        return slots[1], left, right
    if scene.relation == "right of" or (scene.relation != "left of" and len(scene.groups) > 1 and rng.random() < 0.5):
        return slots[::-1]
    return slots


def _grounded(scene: Scene, things: Sequence[Group], horizon: float, rng: random.Random) -> list[Placement]:
    """Placements in one row or two, all feet below the horizon (a height, as y)."""
    ranks = _RANKS[len(things)]
    sizes = any(group.size for group in scene.groups)  # they need room
    rank = ranks[0] if sizes or scene.relation is not None else rng.choice(ranks)
    back = horizon + rng.uniform(0.04, 0.07)
    if len(rank) == 1:
        feet = [max(back, 0.70) + rng.uniform(0.0, 0.08)]
        least, most = _ROW[len(things)][1:]
        size = most if sizes else rng.uniform(least, most)
    else:
        feet = [back, rng.uniform(0.93, 0.95)]
        size = min(rng.uniform(0.28, 0.32), feet[1] - feet[0])
    slots = [(x, y) for count, y in zip(rank, feet, strict=True) for x in _ALONG[count]]
    sides = _sides(scene, things, size, rng)
    return [_standing(group, x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.01, 0.01), side)
            for group, (x, y), side in zip(things, _ordered(scene, slots, rng), sides, strict=True)]


def _stacked(groups: Sequence[Group], horizon: float | None, rng: random.Random) -> list[Placement]:
    """The first thing stands on the second one."""
    upper, lower = (objects()[group.thing].height for group in groups)
    room = 0.88 / (upper + lower)
    top, bottom = (min(rng.uniform(0.38, 0.45), room) for _ in groups)
    height = top * upper + bottom * lower - _SINK
    foot = min(max(0.5 + height / 2 + rng.uniform(-0.03, 0.03), (horizon or 0.0) + 0.08), 0.95)
    x = 0.5 + rng.uniform(-0.06, 0.06)
    return [Placement(groups[0].thing, groups[0].colour, x + rng.uniform(-0.02, 0.02), foot, top,
                      bottom * lower - _SINK + top * upper / 2),
            Placement(groups[1].thing, groups[1].colour, x, foot, bottom, bottom * lower / 2)]


def _standing(group: Group, x: float, foot: float, side: float) -> Placement:
    """A thing whose lowest point is at the height `foot`, or lower if it would be cut off at the top."""
    side = max(side, SMALLEST)
    edge, height = side / 2 + _MARGIN, side * objects()[group.thing].height
    return Placement(group.thing, group.colour, min(max(x, edge), 1 - edge), max(foot, height + _MARGIN), side,
                     height / 2)


def _lone(scene: Scene, horizon: float | None, rng: random.Random) -> Placement:
    group = scene.groups[0]
    if scene.spot is None:
        x, side = 0.5 + rng.uniform(-0.06, 0.06), rng.uniform(*_LONE[group.size])
        if horizon is not None:
            return _standing(group, x, max(horizon + 0.08, 0.78) + rng.uniform(-0.04, 0.06), side)
        return _inside(group.thing, group.colour, x, 0.5 + rng.uniform(-0.06, 0.06), side)
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
        slots += [(across, a) if scene.relation in ("left of", "right of") else (a, across) for a in _ALONG[count]]
    return slots, size
