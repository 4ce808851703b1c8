"""Scenes with their placements and captions, made ahead by worker processes from seeds. Loads no torch."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

from linocut.train.captions import normalize, sample_captions
from linocut.train.layout import Placement, place
from linocut.train.recipe import Recipe
from linocut.train.scenes import TASKS, Scene, sample_scene

CHUNK = 2048  # scenes made by one job
_ENDLESS = 10_000  # beyond the ranks of all `chunks`
_AHEAD = 2  # processes that make endless chunks


@dataclass(frozen=True)
class Scenes:
    """Scenes, their placements, and some wordings of each."""

    scenes: list[Scene]
    placements: list[list[Placement]]
    captions: list[list[str]]


def make_scenes(recipe: Recipe, seed: int, count: int, shares: Mapping[str, float] = TASKS) -> Scenes:
    """Deterministic scenes for a seed, of tasks by `shares`; no caption equals a held-out prompt word for word."""
    rng = random.Random(f"{recipe.data.seed}/{seed}")
    forbidden = frozenset(normalize(text) for text in recipe.held_out)
    scenes = [sample_scene(rng, shares=shares) for _ in range(count)]
    return Scenes(scenes, [place(scene, rng) for scene in scenes],
                  [sample_captions(scene, rng, recipe.data.captions, forbidden) for scene in scenes])


def chunks(recipe: Recipe, rank: int, scenes: int, shares: Mapping[str, float] = TASKS) -> Iterator[Scenes]:
    """Scenes of a process in chunks, made ahead by workers; the order does not depend on their number."""
    jobs = [(recipe, rank * 1_000_000 + i, min(CHUNK, scenes - i * CHUNK), shares)
            for i in range(-(-scenes // CHUNK))]
    workers = min(len(jobs), max(1, (os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", "1")) - 1))
    if workers == 1:
        yield from (make_scenes(*job) for job in jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_make, jobs)


def endless(recipe: Recipe, rank: int, size: int, start: int = 0) -> Iterator[Scenes]:
    """Chunks of `size` scenes without end, a few made ahead; number `start` of them is the first. The scenes are not
    those of `chunks` of any process."""
    jobs = ((recipe, (_ENDLESS + rank) * 1_000_000 + number, size, TASKS) for number in count(start))
    with multiprocessing.get_context("spawn").Pool(_AHEAD) as pool:
        made = deque(pool.apply_async(_make, (next(jobs),)) for _ in range(2 * _AHEAD))
        while True:
            made.append(pool.apply_async(_make, (next(jobs),)))
            yield made.popleft().get()


def _make(job: tuple[Recipe, int, int, Mapping[str, float]]) -> Scenes:
    return make_scenes(*job)
