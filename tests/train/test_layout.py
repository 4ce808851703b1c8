"""Placements obey the scene: inside the picture, apart from one another, in the places that are asked for."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linocut.train.layout import LARGEST, SMALLEST, Placement, place
from linocut.train.palette import BACKGROUNDS
from linocut.train.scenes import RELATIONS, SPOTS, TASKS, Group, Scene, sample_scene
from linocut.train.vocabulary import objects

SEEDS = st.integers(0, 2**32)


def box(placement: Placement) -> tuple[float, float, float, float]:
    """Around what is seen of a thing on a square canvas."""
    thing, y = objects()[placement.thing], placement.y - placement.lift
    across, down = placement.size * thing.width / 2, placement.size * thing.height / 2
    return placement.x - across, y - down, placement.x + across, y + down


def geneval_relation(first: Placement, second: Placement) -> set[str]:
    """GenEval's rule: offsets between centres, shortened by a tenth of both extents; what is left gives direction."""
    a, b = box(first), box(second)
    offset = ((a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2)
    slack = [0.1 * (a[axis + 2] - a[axis] + b[axis + 2] - b[axis]) for axis in (0, 1)]
    left = [max(abs(value) - less, 0.0) * (1 if value > 0 else -1) for value, less in zip(offset, slack, strict=True)]
    length = (left[0] ** 2 + left[1] ** 2) ** 0.5
    if length == 0:
        return set()
    dx, dy = left[0] / length, left[1] / length
    return {name for name, holds in (("left of", dx < -0.5), ("right of", dx > 0.5), ("above", dy < -0.5),
                                     ("below", dy > 0.5)) if holds}


@given(SEEDS, st.sampled_from(list(TASKS)))
@settings(deadline=None, max_examples=400)
def test_placements_obey_the_scene(seed, task):
    rng = random.Random(seed)
    scene = sample_scene(rng, task)
    placements = place(scene, rng)
    assert Counter((p.thing, p.colour) for p in placements) == Counter(
        {(group.thing, group.colour): group.count for group in scene.groups})
    boxes = [box(p) for p in placements]
    for p, (left, top, right, bottom) in zip(placements, boxes, strict=True):  # nothing is cut off
        assert min(left, top) > 0
        assert max(right, bottom) < 1
        assert SMALLEST - 1e-9 <= p.size <= LARGEST + 1e-9
    for i, a in enumerate(boxes):  # things may touch, but not hide one another
        for b in boxes[:i]:
            width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            overlap = max(0.0, width) * max(0.0, height)
            assert overlap < 0.1 * min(p.size for p in placements) ** 2
    if scene.relation in RELATIONS:
        first = [p for p in placements if p.thing == scene.groups[0].thing]
        second = [p for p in placements if p.thing == scene.groups[1].thing]
        axis = "x" if scene.relation in ("left of", "right of") else "y"
        nearer = [getattr(p, axis) - p.lift * (axis == "y") for p in first], \
            [getattr(p, axis) - p.lift * (axis == "y") for p in second]
        low, high = nearer if scene.relation in ("left of", "above", "on") else nearer[::-1]
        assert max(low) < min(high)
        if task == "position":
            assert geneval_relation(first[0], second[0]) == {scene.relation.replace("on", "above")}
    if scene.relation == "next to":
        assert abs(placements[0].y - placements[1].y) < 0.06
        assert abs(placements[0].x - placements[1].x) > 0.3
    if scene.relation == "between":
        middle, *ends = (p.x for p in placements)
        assert min(ends) < middle < max(ends)


@given(SEEDS, st.sampled_from([name for name, each in BACKGROUNDS.items() if each.horizon is not None]))
@settings(deadline=None, max_examples=300)
def test_things_stand_on_the_ground(seed, background):
    rng = random.Random(seed)
    scene = replace(sample_scene(rng), background=background)
    placements = place(scene, rng)
    feet = sorted(box(p)[3] for p in placements)
    assert feet[-1] > BACKGROUNDS[background].horizon or scene.spot is not None
    if scene.spot is None and (scene.relation not in RELATIONS or (
            scene.relation in ("left of", "right of") and len(feet) <= 3)):
        assert feet[0] > BACKGROUNDS[background].horizon
        assert sum(after - before > 0.03 for before, after in pairwise(feet)) <= 1  # no more than two lines


@pytest.mark.parametrize("background", [name for name, each in BACKGROUNDS.items() if each.horizon is not None])
def test_sizes_differ_on_the_ground_too_and_nothing_is_cut_off(background):
    tall = max(range(len(objects())), key=lambda index: objects()[index].height)
    for seed in range(100):
        rng = random.Random(seed)
        (big,) = place(Scene("single_object", (Group(tall, 1, None, "big"),), background=background), rng)
        assert box(big)[1] > 0
        groups = Group(3, 1, None, "small"), Group(4, 2)
        small, *others = place(Scene("mixed", groups, background=background), rng)
        assert small.size < 0.85 * min(other.size for other in others)


def test_what_stands_on_something_touches_it():
    for seed in range(100):
        rng = random.Random(seed)
        upper, lower = rng.sample(range(len(objects())), 2)
        background = rng.choice(list(BACKGROUNDS))
        first, second = place(Scene("position", (Group(upper), Group(lower)), "on", background), rng)
        gap = box(second)[1] - box(first)[3]
        assert -0.02 < gap <= 0
        assert abs(first.x - second.x) < 0.03


@pytest.mark.parametrize("spot", SPOTS)
def test_spots(spot):
    for seed in range(50):
        (thing,) = place(Scene("single_object", (Group(3),), spot=spot), random.Random(seed))
        assert (thing.x < 0.36) == ("left" in spot)
        assert (thing.x > 0.64) == ("right" in spot)
        assert (thing.y < 0.36) == ("top" in spot)
        assert (thing.y > 0.64) == ("bottom" in spot)


def test_sizes_differ():
    def side(size: str | None) -> list[float]:
        return [place(Scene("single_object", (Group(3, 1, None, size),)), random.Random(seed))[0].size
                for seed in range(50)]
    assert max(side("small")) < min(side(None)) - 0.1
    assert max(side(None)) < min(side("big"))
    for seed in range(50):
        big, small = place(Scene("mixed", (Group(3, 1, None, "big"), Group(4, 1, None, "small"))), random.Random(seed))
        assert small.size < 0.65 * big.size


def test_things_of_a_group_stay_together():
    for seed in range(50):
        placements = place(Scene("mixed", (Group(3, 4), Group(4, 2))), random.Random(seed))
        assert [p.thing for p in placements] == [3, 3, 3, 3, 4, 4]
        order = sorted(placements, key=lambda p: (p.y > 0.5, p.x))
        changes = sum(a.thing != b.thing for a, b in pairwise(order))
        assert changes == 1


def test_only_a_lone_thing_stands_on_another():
    with pytest.raises(ValueError, match="lone thing stands on another, found 4"):
        place(Scene("mixed", (Group(0, 3), Group(1)), "on"), random.Random(0))


def test_too_many_things():
    with pytest.raises(ValueError, match="1 to 6 things, found 8"):
        place(Scene("mixed", (Group(0, 4), Group(1, 4))), random.Random(0))
