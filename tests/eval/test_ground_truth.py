"""Scenes of known content: who sees everything judges all of them rightly, who sees nothing judges half."""

import random

import pytest
import torch

from linocut.eval.detector import Sight
from linocut.eval.ground_truth import make_cases, measure, other_wish
from linocut.eval.rules import GENEVAL_TASKS, Found, Thresholds
from linocut.train.palette import COLOURS
from linocut.train.prompts import metadata
from linocut.train.scenes import pair_split
from linocut.train.vocabulary import objects

CASES = make_cases(60)


def box(placement):
    """Around what is seen of a thing, in percent of the picture."""
    thing, y = objects()[placement.thing], placement.y - placement.lift
    across, down = placement.size * thing.width / 2, placement.size * thing.height / 2
    return 100 * (placement.x - across), 100 * (y - down), 100 * (placement.x + across), 100 * (y + down)


def look(cases, see):
    """A detector that reads the scene: `see` gives the objects that it reports."""
    sights = []
    for case in cases:
        found = [Found(objects()[p.thing].name, 0.99, box(p), index) for index, p in enumerate(case.placements)]
        tints = [None if p.colour is None else COLOURS[p.colour] for p in case.placements]
        sights.append(Sight(see(found), lambda taken, tints=tints: [tints[each.handle] for each in taken]))
    return sights


def accuracy(see):
    shown: list = []
    table = measure(CASES, lambda part: shown.append(part) or torch.zeros(len(part)),
                    lambda image: look(shown[-1], see), Thresholds(), batch=50)
    return {task: (row["granted"], row["refused"], row["accuracy"], row["n"]) for task, row in table.items()}


def test_who_sees_everything_judges_rightly():
    assert accuracy(lambda found: found) == dict.fromkeys(GENEVAL_TASKS, (1.0, 1.0, 1.0, 60))


def test_who_sees_nothing_judges_half():
    assert accuracy(lambda found: []) == dict.fromkeys(GENEVAL_TASKS, (0.0, 1.0, 0.5, 60))


def test_who_misses_one_thing_fails_where_it_matters():
    table = accuracy(lambda found: found[:-1])
    assert table["position"][0] == table["two_object"][0] == table["counting"][0] == 0.0


def test_cases_are_of_the_test_split_and_repeatable():
    pairs = [(case.scene.groups[0].thing, case.scene.groups[1].thing) for case in CASES if len(case.scene.groups) == 2]
    assert len(pairs) >= 180
    assert all(pair_split(*pair) == "test" for pair in pairs)
    assert make_cases(60) == CASES
    assert make_cases(60, seed=1) != CASES


@pytest.mark.parametrize("task", GENEVAL_TASKS)
def test_the_other_wish_differs_in_the_point_of_the_task(task):
    rng = random.Random(0)
    for case in (case for case in CASES if case.scene.task == task):
        before = metadata(case.scene) | {"prompt": ""}
        other = other_wish(before, rng)
        assert before == metadata(case.scene) | {"prompt": ""}, "the wish itself was changed"
        entries = zip(before["include"], other["include"], strict=True)
        changed = {key for a, b in entries for key in a if a[key] != b[key]}
        assert changed == {"single_object": {"class"}, "two_object": {"class"}, "counting": {"count"},
                           "position": {"position"}}.get(task, {"color"})
        if task == "counting":
            assert other["exclude"][0]["count"] == other["include"][0]["count"] + 1


def test_limited_to_some_things():
    chosen = range(5)
    assert {group.thing for case in make_cases(5, chosen) for group in case.scene.groups} <= set(chosen)
