"""What the grammar promises: placements obey the scene, captions are English, held-out prompts stay held out."""

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_recipe import ROOT

from linocut.train.dataset import make_scenes
from linocut.train.recipe import Recipe
from linocut.train.scenes import (
    BACKGROUNDS,
    COLOURS,
    MAX_OBJECTS,
    RELATIONS,
    TASKS,
    Group,
    Placement,
    Scene,
    caption,
    normalize,
    noun_phrase,
    objects,
    place,
    pluralize,
    sample_captions,
    sample_scene,
)

SEEDS = st.integers(0, 2**32)
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "1": 1, "2": 2, "3": 3, "4": 4, "a": 1, "an": 1, "the": 1}
INDEX = {thing.name: index for index, thing in enumerate(objects())}
# GenEval's object classes that exist as sprites, under its names.
GENEVAL = """person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|stop sign|bird|cat|dog|horse
sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis|snowboard|sports ball|kite
skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli
carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|bed|toilet|tv|laptop|computer mouse|computer keyboard
cell phone|book|clock|vase|scissors|teddy bear|toothbrush""".replace("\n", "|").split("|")


def box(placement: Placement) -> tuple[float, float, float, float]:
    half = placement.size / 2
    return placement.x - half, placement.y - half, placement.x + half, placement.y + half


def geneval_relation(first: Placement, second: Placement) -> set[str]:
    """GenEval's rule: offsets between centres, shortened by a tenth of both extents; what is left gives direction."""
    offset = (first.x - second.x, first.y - second.y)
    slack = 0.1 * (first.size + second.size)
    left = [max(abs(value) - slack, 0.0) * (1 if value > 0 else -1) for value in offset]
    length = (left[0] ** 2 + left[1] ** 2) ** 0.5
    if length == 0:
        return set()
    dx, dy = left[0] / length, left[1] / length
    return {name for name, holds in (("left of", dx < -0.5), ("right of", dx > 0.5), ("above", dy < -0.5),
                                     ("below", dy > 0.5)) if holds}


def test_vocabulary_holds_genevals_classes():
    assert len(GENEVAL) == len(set(GENEVAL)) == 67
    assert [thing.name for thing in objects()][:67] == GENEVAL


def test_vocabulary_is_unambiguous():
    words = Counter(word for thing in objects() for word in {thing.name, *thing.synonyms})
    assert [word for word, count in words.items() if count > 1] == []
    assert len({thing.code for thing in objects()}) == len(objects())


@pytest.mark.parametrize(("noun", "plural"), [
    ("apple", "apples"), ("bus", "buses"), ("box", "boxes"), ("couch", "couches"), ("toothbrush", "toothbrushes"),
    ("strawberry", "strawberries"), ("key", "keys"), ("monkey", "monkeys"), ("knife", "knives"),
    ("tomato", "tomatoes"), ("slice of pizza", "slices of pizza"), ("glass of wine", "glasses of wine"),
])
def test_plurals(noun, plural):
    assert pluralize(noun) == plural


@pytest.mark.parametrize(("name", "plural"), [
    ("person", "people"), ("sheep", "sheep"), ("fish", "fish"), ("scissors", "scissors"), ("snowman", "snowmen"),
    ("corn", "ears of corn"), ("wine glass", "wine glasses"), ("computer mouse", "computer mice"),
])
def test_plurals_of_the_vocabulary(name, plural):
    assert objects()[INDEX[name]].plural == plural


@given(SEEDS, st.integers(0, len(objects()) - 1), st.integers(1, 4), st.none() | st.integers(0, len(COLOURS) - 1))
@settings(deadline=None, max_examples=300)
def test_noun_phrases(seed, thing, count, colour):
    group = Group(thing, count, colour)
    phrase = noun_phrase(group, random.Random(seed))
    assert phrase == phrase.strip()
    assert "  " not in phrase
    first, *rest = phrase.split()
    if first in ("a", "an"):
        assert count == 1 or phrase.startswith("a pair of")
        assert (first == "an") == (rest[0][0] in "aeiou" and not rest[0].startswith("unicorn"))
    elif first in NUMBERS:
        assert NUMBERS[first] == count
    else:  # no article, and so no count but one
        assert count == 1
    if colour is not None:
        assert re.search(rf"\b({COLOURS[colour]}|violet)\b", phrase)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_asked_for(task):
    rng = random.Random(0)
    for _ in range(50):
        scene = sample_scene(rng, task)
        counts = [group.count for group in scene.groups]
        assert scene.task == task
        assert 1 <= sum(counts) <= MAX_OBJECTS
        assert (scene.relation is None) or scene.relation in RELATIONS
        if task == "position":
            assert scene.relation is not None
            assert counts == [1, 1]
        if task in ("colors", "color_attr"):
            assert all(group.colour is not None for group in scene.groups)
        if task == "two_object":
            assert len(scene.groups) == 2


def test_unknown_task():
    with pytest.raises(ValueError, match="unknown task 'three_object', expected one of single_object"):
        sample_scene(random.Random(0), "three_object")


def test_everything_is_reached():
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(6000)]
    assert {scene.task for scene in scenes} == set(TASKS)
    assert {scene.relation for scene in scenes} == {None, *RELATIONS}
    assert {scene.background for scene in scenes} == {None, *BACKGROUNDS}
    groups = [group for scene in scenes for group in scene.groups]
    assert {group.thing for group in groups} == set(range(len(objects())))
    assert {group.colour for group in groups} == {None, *range(len(COLOURS))}
    assert {group.count for group in groups} == {1, 2, 3, 4}
    share = Counter(scene.task for scene in scenes)
    for task, wanted in TASKS.items():
        assert abs(share[task] / len(scenes) - wanted) < 0.03


@given(SEEDS, st.sampled_from(list(TASKS)))
@settings(deadline=None, max_examples=300)
def test_placements_obey_the_scene(seed, task):
    rng = random.Random(seed)
    scene = sample_scene(rng, task)
    placements = place(scene, rng)
    assert Counter((p.thing, p.colour) for p in placements) == Counter(
        {(group.thing, group.colour): group.count for group in scene.groups})
    boxes = [box(p) for p in placements]
    for left, top, right, bottom in boxes:
        assert min(left, top) >= -0.01
        assert max(right, bottom) <= 1.01
    for i, a in enumerate(boxes):  # things may touch, but not hide one another
        for b in boxes[:i]:
            width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            overlap = max(0.0, width) * max(0.0, height)
            assert overlap < 0.1 * min((a[2] - a[0]) ** 2, (b[2] - b[0]) ** 2)
    if scene.relation is not None:
        first = [p for p in placements if p.thing == scene.groups[0].thing]
        second = [p for p in placements if p.thing == scene.groups[1].thing]
        axis = "x" if scene.relation in ("left of", "right of") else "y"
        nearer = [getattr(p, axis) for p in first], [getattr(p, axis) for p in second]
        low, high = nearer if scene.relation in ("left of", "above") else nearer[::-1]
        assert max(low) < min(high)
        if task == "position":
            assert geneval_relation(first[0], second[0]) == {scene.relation}


def test_too_many_things():
    with pytest.raises(ValueError, match="1 to 6 things, found 8"):
        place(Scene("mixed", (Group(0, 4), Group(1, 4))), random.Random(0))


def test_same_seed_same_scene_and_captions():
    def make(seed: int) -> tuple:
        rng = random.Random(seed)
        scene = sample_scene(rng)
        return scene, place(scene, rng), sample_captions(scene, rng, 3)
    assert make(5) == make(5)
    assert make(5) != make(6)


@given(SEEDS)
@settings(deadline=None, max_examples=300)
def test_captions_name_what_is_there(seed):
    rng = random.Random(seed)
    scene = sample_scene(rng)
    text = caption(scene, rng)
    assert "  " not in text
    assert len(text) < 160
    for group in scene.groups:
        thing = objects()[group.thing]
        nouns = (thing.name, thing.plural, *thing.synonyms, *map(pluralize, thing.synonyms))
        assert any(noun.lower() in text.lower() for noun in nouns), text
        if group.count > 2:
            assert re.search(rf"\b({('three', 'four')[group.count - 3]}|{group.count})\b", text.lower()), text
    if scene.background is not None:
        assert scene.background in text


@pytest.mark.parametrize("relation", RELATIONS)
def test_captions_say_the_relation_the_right_way_round(relation):
    """Read the wording back by its keywords and compare with the scene."""
    scene = Scene("position", (Group(INDEX["snail"]), Group(INDEX["rocket"])), relation)
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    words = {"left": "left of", "right": "right of", "above": "above", "over": "above", "on top of": "above",
             "higher": "above", "at the top": "above", "below": "below", "under": "below", "beneath": "below",
             "underneath": "below", "at the bottom": "below"}
    for seed in range(400):
        text = caption(scene, random.Random(seed)).lower().replace("spaceship", "rocket")
        snail, rocket = text.index("snail"), text.index("rocket")
        found = sorted((text.index(word), -len(word), said) for word, said in words.items() if word in text)
        at, _, said = found[0]
        # "A on the left and B on the right", "on the left A, on the right B": the first place is the first thing's.
        both = "at the" in text or ("on the right" in text and "on the left" in text)
        # "left of B is A", "B with A left of it": said of the second thing.
        second = not both and (at < min(snail, rocket) or " it" in text[at:])
        of_snail = (rocket < snail) if second else (snail < rocket)
        assert relation == (said if of_snail else inverse[said]), text


def test_held_out_prompts_are_never_captions():
    recipe = Recipe.from_file(ROOT / "recipes" / "embedded" / "recipe.toml")
    assert len(recipe.held_out) == 24
    assert all("|" not in text for text in recipe.held_out)
    scene = Scene("single_object", (Group(INDEX["snail"]),))
    often = Counter(normalize(caption(scene, random.Random(seed))) for seed in range(1000)).most_common(3)
    held_out = [f"{text.upper()}!" for text, _ in often]
    captions = {normalize(text) for text in sample_captions(scene, random.Random(0), 1000, held_out)}
    assert captions
    assert not captions & {text for text, _ in often}
    made = make_scenes(replace(recipe, held_out=tuple(held_out)), 0, 200)
    assert not {normalize(text) for group in made.captions for text in group} & {text for text, _ in often}


def test_normalize_ignores_case_and_marks():
    assert normalize("A red Apple, and 2 T-Rexes!") == "a red apple and 2 t-rexes"


def test_prompts_file_covers_the_six_tasks():
    lines = Path(ROOT / "recipes" / "embedded" / "prompts.txt").read_text("utf-8").splitlines()
    tasks = Counter(line.split("|")[0].strip() for line in lines if not line.startswith("#"))
    assert tasks == dict.fromkeys(list(TASKS)[:6], 4)
