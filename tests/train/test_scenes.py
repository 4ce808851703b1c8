"""What the sampler of scenes promises: every task, things that can be seen, pairs that stay held out."""

import random
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linocut.train.palette import COLOURS, LIGHT, MIDDLE, PLACES, WALLS
from linocut.train.scenes import (
    LOOSE_RELATIONS,
    MAX_OBJECTS,
    RELATIONS,
    SIZES,
    SPLITS,
    SPOTS,
    STYLES,
    TASKS,
    Group,
    contrast,
    pair_split,
    sample_background,
    sample_scene,
    split_of,
)
from linocut.train.vocabulary import objects

SEEDS = st.integers(0, 2**32)
INDEX = {thing.name: index for index, thing in enumerate(objects())}
WHITE, BLACK = COLOURS.index("white"), COLOURS.index("black")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_asked_for(task):
    rng = random.Random(0)
    for _ in range(50):
        scene = sample_scene(rng, task)
        counts = [group.count for group in scene.groups]
        assert scene.task == task
        assert 1 <= sum(counts) <= MAX_OBJECTS
        assert len({group.thing for group in scene.groups}) == len(scene.groups)
        if task == "position":
            assert scene.relation in RELATIONS
            assert counts == [1, 1]
        if task in ("colors", "color_attr"):
            assert all(group.colour is not None for group in scene.groups)
        if task == "two_object":
            assert len(scene.groups) == 2
        for group in scene.groups:
            assert group.colour is None or not objects()[group.thing].natural


def test_unknown_task():
    with pytest.raises(ValueError, match="unknown task 'three_object', expected one of single_object"):
        sample_scene(random.Random(0), "three_object")


def test_everything_is_reached():
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(25000)]
    assert {scene.task for scene in scenes} == set(TASKS)
    assert {scene.relation for scene in scenes} == {None, *RELATIONS, *LOOSE_RELATIONS}
    assert {scene.background for scene in scenes} == {*WALLS, *PLACES, *LIGHT, *MIDDLE}
    assert {scene.style for scene in scenes} == set(STYLES)
    assert {scene.spot for scene in scenes} == {None, *SPOTS}
    groups = [group for scene in scenes for group in scene.groups]
    often = Counter(group.thing for group in groups)
    assert set(often) == set(range(len(objects())))
    assert {group.colour for group in groups} == {None, *range(len(COLOURS))}
    assert {group.count for group in groups} == {1, 2, 3, 4, 5, 6}
    assert {group.size for group in groups} == {None, *SIZES}
    common, rare = ([often[i] for i, thing in enumerate(objects()) if thing.common == wanted and not thing.natural]
                    for wanted in (True, False))
    assert 2.2 < (sum(common) / len(common)) / (sum(rare) / len(rare)) < 3.8
    share = Counter(scene.task for scene in scenes)
    for task, wanted in TASKS.items():
        assert abs(share[task] / len(scenes) - wanted) < 0.03


def test_same_seed_same_scene():
    assert sample_scene(random.Random(5)) == sample_scene(random.Random(5)) != sample_scene(random.Random(6))


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_belong_to_one_split(split):
    rng = random.Random(1)
    for _ in range(100):
        scene = sample_scene(rng, rng.choice(("two_object", "position", "color_attr", "mixed")), split)
        for a, b in combinations(scene.groups, 2):
            assert pair_split(a.thing, b.thing) == pair_split(b.thing, a.thing) == split


def test_splits_have_their_shares():
    shares = Counter(split_of(f"key {i}") for i in range(20000))
    for name, wanted in SPLITS.items():
        assert abs(shares[name] / 20000 - wanted) < 0.01
    assert split_of("a fixed key") == "train"  # does not depend on the process


@given(SEEDS)
@settings(deadline=None, max_examples=200)
def test_things_can_be_seen(seed):
    scene = sample_scene(random.Random(seed))
    assert contrast(scene.groups, scene.background, scene.style) >= 0.14


def test_white_things_never_lie_on_white():
    rng = random.Random(0)
    white = [Group(INDEX["rabbit"], 1, WHITE)]
    drawn = {sample_background(white, "plain", rng) for _ in range(500)}
    assert not drawn & {"white", "snow", *LIGHT}
    assert drawn & set(MIDDLE)
    assert contrast(white, "white") < 0.05 < 0.5 < contrast(white, "black")
    both = [Group(INDEX["rabbit"], 1, WHITE), Group(INDEX["cat"], 1, BLACK)]
    assert {sample_background(both, "plain", rng) for _ in range(300)}.isdisjoint({"white", "black", *LIGHT})


def test_contrast_of_a_gray_picture_is_in_its_grays():
    red = [Group(INDEX["apple"], 1, COLOURS.index("red"))]
    assert contrast(red, "green", "plain") > 2 * contrast(red, "brown", "black and white")
