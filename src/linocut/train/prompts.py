"""Prompts to judge models by, for GenEval's six tasks, in GenEval's own metadata form.

Their wordings and, where two things meet, their pairs of things belong to split "dev" or "test": no training caption
has either (see `scenes.split_of`). A plan for choosing: look at dev as often as you like, at test once.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from linocut.train.captions import normalize, sample_captions
from linocut.train.palette import COLOURS, LIGHT
from linocut.train.scenes import STYLES, TASKS, Group, Scene, sample_scene
from linocut.train.vocabulary import objects

GENEVAL_TASKS = tuple(task for task in TASKS if task != "mixed")


def sample_prompts(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` prompts of `split` ("dev" or "test"), tasks in turn, no wording twice.

    Each is a line of GenEval's metadata: tag, include, exclude (counting only) and prompt. The classes are names of
    `vocabulary.objects()`. The same arguments give the same prompts.
    """
    rng = random.Random(f"{split}/{seed}")
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(found) < count:
        scene = plain(sample_scene(rng, GENEVAL_TASKS[len(found) % len(GENEVAL_TASKS)], split))
        text = sample_captions(scene, rng, 1, split=split)[0]
        if normalize(text) not in seen:
            seen.add(normalize(text))
            found.append(metadata(scene) | {"prompt": text})
    return found


def plain(scene: Scene) -> Scene:
    """The scene without what GenEval's rules do not check: spots, sizes, styles and backgrounds."""
    groups = tuple(replace(group, size=None) for group in scene.groups)
    if scene.task == "counting":
        groups = tuple(replace(group, colour=None, count=max(2, group.count)) for group in groups)
    if scene.task == "position":
        groups = tuple(replace(group, colour=None) for group in groups)
    relation = scene.relation if scene.task == "position" else None
    return replace(scene, groups=groups, relation=relation, spot=None, style=STYLES[0], background=LIGHT[0])


def metadata(scene: Scene) -> dict[str, Any]:
    """What must be, and must not be, in a picture of the scene, in GenEval's words."""
    include = [_entry(group) for group in scene.groups]
    if scene.relation is not None:  # GenEval says it of the second one: [relation, index of the first]
        relation = "above" if scene.relation == "on" else scene.relation
        include = [_entry(scene.groups[1]), _entry(scene.groups[0]) | {"position": [relation, 0]}]
    result: dict[str, Any] = {"tag": scene.task, "include": include}
    if scene.task == "counting":
        result["exclude"] = [{"class": objects()[group.thing].name, "count": group.count + 1} for group in scene.groups]
    return result


def _entry(group: Group) -> dict[str, Any]:
    entry: dict[str, Any] = {"class": objects()[group.thing].name, "count": group.count}
    return entry if group.colour is None else entry | {"color": COLOURS[group.colour]}
