"""GenEval's rules: whether what a detector found in a picture is what the prompt asked for.

Ghosh et al. 2023, "GenEval: an object-focused framework for evaluating text-to-image alignment", as their evaluation
program computes it. Loads neither torch nor numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MOST_OBJECTS = 16  # of one class, the surest ones
POSITION_SLACK = 0.1  # of the two objects' summed sides: by so much a centre may be off


@dataclass(frozen=True)
class Thresholds:
    """The least score of an object that counts; counting asks for surer ones. The defaults are GenEval's."""

    any: float = 0.3
    counting: float = 0.9

    def of(self, task: str) -> float:
        """The threshold in a task."""
        return self.counting if task == "counting" else self.any


@dataclass(frozen=True)
class Found:
    """One object in a picture. `handle` is the detector's own, for telling the colour."""

    name: str
    score: float
    box: Box
    handle: int = 0


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is right, and if not why (one reason per broken wish)."""

    correct: bool
    reasons: tuple[str, ...] = field(default=())


Colours = Callable[[Sequence[Found]], list[str]]  # the colour of each object, all of one class


def judge(metadata: Mapping[str, Any], found: Sequence[Found], colours: Colours, thresholds: Thresholds) -> Verdict:
    """Judge a picture in which `found` was found by one line of GenEval's metadata.

    Every entry of `include` must be there: `count` objects of the class (the surest ones are taken), all of them of the
    `color`, each of them in the relation `position` to each one of the entry that it names. No class in `exclude` may
    be there `count` times. `colours` is asked only where a colour is wished for.
    """
    objects = _by_class(found, thresholds.of(metadata["tag"]))
    reasons: list[str] = []
    matched: list[list[Found] | None] = []
    for wish in metadata.get("include", ()):
        name, count = wish["class"], wish["count"]
        taken = objects.get(name, [])[:count]
        problem = f"expected {count} {name}, found {len(taken)}" if len(taken) < count else None
        if problem is None and "color" in wish:
            seen = colours(taken)
            if seen.count(wish["color"]) < count:
                problem = f"expected {count} {wish['color']} {name}, found {', '.join(seen)}"
        # A wrong colour spoils the picture, and leaves the object no place that others could relate to.
        if problem is None and "position" in wish:
            problem = _misplaced(name, taken, wish["position"], matched)
        if problem is not None:
            reasons.append(problem)
        matched.append(taken if problem is None else None)
    for wish in metadata.get("exclude", ()):
        seen_count = len(objects.get(wish["class"], ()))
        if seen_count >= wish["count"]:
            reasons.append(f"expected fewer than {wish['count']} {wish['class']}, found {seen_count}")
    return Verdict(not reasons, tuple(reasons))


def _by_class(found: Sequence[Found], threshold: float) -> dict[str, list[Found]]:
    """Objects above the threshold by class, the surest first, at most MOST_OBJECTS each."""
    objects: dict[str, list[Found]] = {}
    for each in sorted(found, key=lambda each: -each.score):
        if each.score > threshold:
            objects.setdefault(each.name, []).append(each)
    return {name: each[:MOST_OBJECTS] for name, each in objects.items()}


def _misplaced(name: str, taken: Sequence[Found], position: Sequence[Any],
               matched: Sequence[Sequence[Found] | None]) -> str | None:
    relation, target = position
    others = matched[target]
    if others is None:
        return f"nothing for {name} to be {relation}"
    for one in taken:
        for other in others:
            there = relations(one.box, other.box)
            if relation not in there:
                return f"expected {name} {relation} {other.name}, found {' and '.join(sorted(there)) or 'neither'}"
    return None


def relations(a: Box, b: Box) -> set[str]:
    """How a lies to b: none, one or two of left of, right of, above, below (y grows downwards).

    The offset of the centres shrinks by POSITION_SLACK of both sides; what is left, relative to the whole offset, must
    pass 0.5 along an axis.
    """
    names = (("left of", "right of"), ("above", "below"))
    offsets = [(a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2 for axis in (0, 1)]
    sides = [abs(a[axis + 2] - a[axis]) + abs(b[axis + 2] - b[axis]) for axis in (0, 1)]
    left_over = [math.copysign(max(abs(offset) - POSITION_SLACK * side, 0.0), offset)
                 for offset, side in zip(offsets, sides, strict=True)]
    if all(abs(each) < 1e-3 for each in left_over):
        return set()
    length = math.hypot(*offsets)
    return {(before if each < 0 else after) for each, (before, after) in zip(left_over, names, strict=True)
            if abs(each) / length > 0.5}
