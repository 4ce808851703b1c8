"""Scenes of known content, to measure a detector with: pictures, what was asked for, and what was not.

The scenes are of the test split: no caption that a model trains on has their pairs of things.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from linocut.eval.detector import Sight
from linocut.eval.rules import GENEVAL_TASKS, Thresholds, judge
from linocut.train.layout import Placement, place
from linocut.train.palette import COLOURS
from linocut.train.prompts import metadata, plain
from linocut.train.render import SceneRenderer
from linocut.train.scenes import Scene, sample_background, sample_scene
from linocut.train.vocabulary import objects
from linocut.train.wording import OPPOSITE

SEED = 20_000


@dataclass(frozen=True)
class Case:
    """A scene with its placements, the wish that it grants (GenEval metadata), and one that it does not grant."""

    scene: Scene
    placements: list[Placement]
    granted: dict[str, Any]
    refused: dict[str, Any]


def make_cases(per_task: int, things: Sequence[int] | None = None, seed: int = SEED) -> list[Case]:
    """`per_task` cases of each of the six tasks; `things` limits what is in them."""
    rng = random.Random(f"ground truth/{seed}")
    allowed = None if things is None else sorted(things)
    cases: list[Case] = []
    for task in GENEVAL_TASKS:
        while len(cases) < per_task * (GENEVAL_TASKS.index(task) + 1):
            scene = plain(sample_scene(rng, task, "test"))
            if allowed is not None:
                scene = _renamed(scene, rng.sample(allowed, len(scene.groups)))
            background = sample_background(scene.groups, scene.style, rng)
            if background is None:
                continue
            scene = replace(scene, background=background)
            wish = metadata(scene) | {"prompt": ""}
            cases.append(Case(scene, place(scene, rng), wish, other_wish(wish, rng, allowed)))
    return cases


def other_wish(wish: Mapping[str, Any], rng: random.Random, things: Sequence[int] | None = None) -> dict[str, Any]:
    """A wish that differs in the one point that the task is about: a class, the count, a colour or the relation."""
    other = copy.deepcopy(dict(wish))
    task, entry = wish["tag"], other["include"][-1]
    if task in ("single_object", "two_object"):
        there = {each["class"] for each in wish["include"]}
        pool = range(len(objects())) if things is None else things
        entry["class"] = rng.choice([name for thing in pool if (name := objects()[thing].name) not in there])
    elif task == "counting":
        count = entry["count"] + (1 if entry["count"] == 1 else rng.choice((-1, 1)))
        entry["count"], other["exclude"][-1]["count"] = count, count + 1
    elif task == "position":
        entry["position"][0] = OPPOSITE[entry["position"][0]]
    else:
        entry["color"] = rng.choice([name for name in COLOURS if name != entry["color"]])
    return other


def measure(cases: Sequence[Case], draw: Callable[[Sequence[Case]], Tensor], look: Callable[[Tensor], list[Sight]],
            thresholds: Thresholds, batch: int = 32) -> dict[str, dict[str, float]]:
    """Per task, which share of the cases is judged rightly: of granted wishes, of others, and the mean of both."""
    right: dict[str, list[list[bool]]] = {task: [[], []] for task in GENEVAL_TASKS}
    for start in range(0, len(cases), batch):
        part = cases[start:start + batch]
        for case, sight in zip(part, look(draw(part)), strict=True):
            for column, (wish, wanted) in enumerate(((case.granted, True), (case.refused, False))):
                verdict = judge(wish, sight.found, sight.colours, thresholds)
                right[wish["tag"]][column].append(verdict.correct == wanted)
    table = {}
    for task, (granted, refused) in right.items():
        if granted:
            shares = sum(granted) / len(granted), sum(refused) / len(refused)
            table[task] = {"granted": shares[0], "refused": shares[1], "accuracy": sum(shares) / 2, "n": len(granted)}
    return table


def renderer_of(renderer: SceneRenderer) -> Callable[[Sequence[Case]], Tensor]:
    """Draws cases as they are: images [B, 3, S, S] in [-1, 1]."""
    return lambda cases: renderer.draw(renderer.table([case.placements for case in cases]),
                                       renderer.looks([case.scene for case in cases]))


def _renamed(scene: Scene, things: Sequence[int]) -> Scene:
    return replace(scene, groups=tuple(replace(group, thing=thing, colour=group.colour)
                                       for group, thing in zip(scene.groups, things, strict=True)))
