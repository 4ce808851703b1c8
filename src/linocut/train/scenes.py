"""Scenes of the embedded world: which things are in the picture, how many, in which colours, where, and on what.

A scene is a list of groups (thing, count, colour, size), perhaps a relation between them or a spot for a lone one, a
background and a style. From the same description come the placements (`layout`), the picture (`render`) and any number
of captions (`captions`). Everything is decided by one `random.Random`, hence repeatable.

The tasks are GenEval's six (Ghosh et al. 2023: one object, two objects, counting, colours, position, colour
attribution) plus mixtures such as "two red apples and a blue cup".
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, combinations

from linocut.train.palette import (
    BACKGROUNDS,
    COLOURS,
    LIGHT,
    MIDDLE,
    PLACES,
    RGB,
    WALLS,
    background_rgb,
    colour,
    distance,
)
from linocut.train.vocabulary import COMMON_WEIGHT, objects

DIRECTIONS = ("left of", "right of", "above", "below")
RELATIONS = (*DIRECTIONS, "on")  # on, of two lone things: above, and it stands there
LOOSE_RELATIONS = ("next to", "between")  # either order; between: group 0 stands between groups 1 and 2
SPOTS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
SIZES = ("big", "small")
STYLES = ("plain", "black and white", "pixel art")
TASKS = {"single_object": 0.11, "two_object": 0.15, "counting": 0.19, "colors": 0.12, "position": 0.18,
         "color_attr": 0.14, "mixed": 0.11}
MAX_OBJECTS = 6
SPLITS = {"train": 0.90, "dev": 0.05, "test": 0.05}
_VISIBLE = 0.14  # least distance of an outline from its background
_COUNTS = (1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 6, 6, 6)
_PAIRS_OF_COUNTS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2), (1, 4), (4, 1), (3, 3), (2, 4), (4, 2),
                    (1, 5), (5, 1))
_STANDING = 0.5  # share of the things above others that stand on them
_SAID_BACKGROUND, _SAID_SPOT, _SAID_SIZE, _STYLED = 0.24, 0.10, 0.10, 0.03


@dataclass(frozen=True)
class Group:
    """`count` equal things. `thing` indexes `objects()`; `colour` indexes COLOURS, None keeps the natural colours."""

    thing: int
    count: int = 1
    colour: int | None = None
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn. `relation` says how group 0 stands to group 1 (and 2).

    `spot` says where a lone thing is. `background` is a key of BACKGROUNDS; captions speak of it if it is
    one of WALLS or PLACES.
    """

    task: str
    groups: tuple[Group, ...]
    relation: str | None = None
    background: str = LIGHT[0]
    spot: str | None = None
    style: str = STYLES[0]


def split_of(key: str) -> str:
    """The split that a key (a wording, a pair of things) belongs to, by its SHA-256: always the same one."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    for name, limit in zip(SPLITS, accumulate(SPLITS.values()), strict=True):
        if place < limit:
            return name
    return "train"


@cache
def pair_split(first: int, second: int) -> str:
    """The split of two things that stand in one picture. Pictures of split train hold pairs of split train alone."""
    return split_of(" & ".join(sorted((objects()[first].name, objects()[second].name))))


def sample_scene(rng: random.Random, task: str | None = None, split: str = "train",
                 shares: Mapping[str, float] = TASKS) -> Scene:
    """A random scene of `task`, or of a task drawn by `shares`; its pairs of things are all of `split`."""
    task = task or rng.choices(list(shares), list(shares.values()))[0]
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}, expected one of {', '.join(TASKS)}")
    while True:
        scene = _sample_groups(task, rng)
        if all(pair_split(a.thing, b.thing) == split for a, b in combinations(scene.groups, 2)):
            scene = _with_extras(scene, rng)
            background = sample_background(scene.groups, scene.style, rng)
            if background is not None:
                return replace(scene, background=background)


def _with_extras(scene: Scene, rng: random.Random) -> Scene:
    """Sometimes a size, a spot or a style."""
    first = scene.groups[0]
    if len(scene.groups) == 1 and first.count == 1:
        if rng.random() < _SAID_SIZE:
            scene = replace(scene, groups=(replace(first, size=rng.choice(SIZES)),))
        elif rng.random() < _SAID_SPOT:
            scene = replace(scene, spot=rng.choice(SPOTS))
    elif scene.task == "mixed" and sum(group.count for group in scene.groups) <= 3 and rng.random() < 4 * _SAID_SIZE:
        index = rng.randrange(len(scene.groups))
        scene = replace(scene, groups=tuple(replace(group, size=rng.choice(SIZES)) if i == index else group
                                            for i, group in enumerate(scene.groups)))
    if rng.random() < _STYLED:
        colourless = all(group.colour is None for group in scene.groups)
        scene = replace(scene, style=rng.choice(STYLES[1:]) if colourless else "pixel art")
    return scene


def _sample_groups(task: str, rng: random.Random) -> Scene:
    first, second, third = _sample_things(rng)

    def tint(thing: int, chance: float) -> int | None:
        return None if objects()[thing].natural or rng.random() >= chance else rng.randrange(len(COLOURS))

    if task == "single_object":
        return Scene(task, (Group(first),))
    if task == "two_object":
        relation = "next to" if rng.random() < 0.2 else None
        return Scene(task, (Group(first), Group(second)), relation)
    if task == "counting":
        return Scene(task, (Group(first, rng.choice(_COUNTS), tint(first, 0.25)),))
    if task == "position":
        chance = 0.4 if rng.random() < 0.4 else 0.0
        groups = Group(first, 1, tint(first, chance)), Group(second, 1, tint(second, chance))
        relation = rng.choice(DIRECTIONS)
        return Scene(task, groups, "on" if relation == "above" and rng.random() < _STANDING else relation)
    if task in ("colors", "color_attr"):
        while any(objects()[thing].natural for thing in (first, second)):
            first, second, third = _sample_things(rng)
        groups = Group(first, 1, tint(first, 1)), Group(second, 1, tint(second, 1))
        return Scene(task, groups[:1] if task == "colors" else groups)
    if rng.random() < 0.3:
        relation = "between" if rng.random() < 0.4 else None
        return Scene(task, tuple(Group(thing, 1, tint(thing, 0.4)) for thing in (first, second, third)), relation)
    counts = rng.choice(_PAIRS_OF_COUNTS)
    relation = rng.choice(DIRECTIONS) if max(counts) <= 3 and rng.random() < 0.35 else None
    return Scene(task, (Group(first, counts[0], tint(first, 0.55)), Group(second, counts[1], tint(second, 0.55))),
                 relation)


@cache
def _weights() -> list[float]:
    """Cumulative weights of the things: common ones are drawn more often."""
    return list(accumulate(COMMON_WEIGHT if thing.common else 1.0 for thing in objects()))


def _sample_things(rng: random.Random) -> list[int]:
    """Three different things."""
    found: list[int] = []
    while len(found) < 3:
        found += [thing for thing in rng.choices(range(len(objects())), cum_weights=_weights()) if thing not in found]
    return found


# Backgrounds ----------------------------------------------------------------------------------------------------------

def sample_background(groups: Sequence[Group], style: str, rng: random.Random) -> str | None:
    """A background on which every group can be seen: sometimes one to speak of, else a quiet tone. None: none is."""
    if rng.random() < _SAID_BACKGROUND:
        for _ in range(4):
            name = rng.choice(WALLS if rng.random() < 0.55 else PLACES)
            if contrast(groups, name, style) >= _VISIBLE:
                return name
    tones = (rng.sample(LIGHT, len(LIGHT)), rng.sample(MIDDLE, len(MIDDLE)))
    for name in (*tones[0], *tones[1]) if rng.random() < 0.85 else (*tones[1], *tones[0]):
        if contrast(groups, name, style) >= _VISIBLE:
            return name
    return None


def contrast(groups: Sequence[Group], background: str, style: str = STYLES[0]) -> float:
    """Distance of the least visible outline from the background, 0..1."""
    return min(_outline_distance(group.thing, group.colour, background, style == "black and white")
               for group in groups)


@cache
def _outline_distance(thing: int, tint: int | None, background: str, gray: bool) -> float:
    outline = outline_rgb(thing, tint)
    behind = [background_rgb(BACKGROUNDS[background], height) for height in (0.2, 0.4, 0.6, 0.8)]
    if gray:
        outline, behind = _gray(outline), [_gray(rgb) for rgb in behind]
    return min(distance(outline, rgb) for rgb in behind)


def outline_rgb(thing: int, tint: int | None) -> RGB:
    """Colour of a thing's outline, in its natural colours or in COLOURS[tint]."""
    return objects()[thing].outline if tint is None else colour(tint).ramp[1]


def _gray(rgb: RGB) -> RGB:
    light = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    return light, light, light
