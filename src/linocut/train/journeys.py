"""Rows of a batch on their way from noise to a picture, one step of the sampler's grid per training step."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from linocut.train.loop import autocast
from linocut.train.painter import jittered
from linocut.train.recipe import PathSettings
from linocut.train.snapshot import from_json, to_json

Texts = tuple[Tensor, Tensor]
"""Features [B, T, E] that the teacher reads, and those that the student reads."""


class Network(Protocol):
    """What draws: a teacher or a student."""

    def velocity(self, latents: Tensor, text: Tensor, sigma: Tensor) -> Tensor:
        """Velocity, float32 [B, I, 4C]."""

    def walk(self, x: Tensor, text: Tensor, levels: Sequence[float]) -> Tensor:
        """Euler's steps from x at levels[0] to levels[-1]."""

    def features(self, latents: Tensor, text: Tensor, sigma: Tensor) -> list[Tensor]:
        """The image tokens [B, I, width] that leave each block."""


class Reader(Protocol):
    """Where prompts come from. `position` is how many were read, of one that can go on from any."""

    def read(self, count: int) -> Texts:
        """Features of the next prompts."""


class Journeys:
    """States x [B, I, 4C] in blocks of equal size, block j at stage (step + j) mod K.

    K is the number of steps of the grid and must divide B. `own` marks rows that move as the student says. Each block
    has a route of its own, K + 1 noise levels. With `pairs`, neighbouring rows set out from the same noise. `shape` is
    that of one row's state, `text_shape` that of its text features. `student` is the network that learns here, where it
    depends on the size of the pictures.
    """

    def __init__(self, path: PathSettings, levels: list[float], teacher: Network, reader: Reader, batch: int,
                 shape: tuple[int, int], text_shape: tuple[int, int], device: torch.device, seed: int,
                 pairs: bool = False, saved: Mapping[str, Tensor] | None = None,
                 student: Network | None = None) -> None:
        self.student = student
        self.teacher, self.reader, self.path, self.levels, self.pairs = teacher, reader, path, levels, pairs
        self.rng, self.grid = random.Random(seed), path.grid
        self.block = batch // self.grid
        self.routes = [self.levels] * self.grid
        self.x = torch.empty(self.block * self.grid, *shape, device=device)
        self.teacher_text = torch.empty(len(self.x), *text_shape, device=device)
        self.student_text = torch.empty(len(self.x), *text_shape, device=device)
        self.own = torch.zeros(len(self.x), 1, 1, dtype=torch.bool, device=device)
        self.weight = torch.tensor(path.weights or [1.0] * self.grid, device=device)
        if saved:
            self._restore(saved)
            return
        for block in range(self.grid):  # each starts where it has to be at step 0
            self._set_out(block, 0.0)
            part = self._part(block)
            for ends in pairwise(self.routes[block][:block + 1]):
                self.x[part] = teacher.walk(self.x[part], self.teacher_text[part], ends)

    def saved(self) -> dict[str, Tensor]:
        """All that is needed to go on: what `saved` takes."""
        return {"x": self.x, "teacher_text": self.teacher_text, "student_text": self.student_text, "own": self.own,
                "plans": to_json({"routes": self.routes, "random": self.rng.getstate(),
                                  "prompts": getattr(self.reader, "position", None)})}

    def _restore(self, saved: Mapping[str, Tensor]) -> None:
        for name in ("x", "teacher_text", "student_text", "own"):
            getattr(self, name).copy_(saved[name])
        plans = from_json(saved["plans"])
        self.routes = plans["routes"]
        version, state, gauss = plans["random"]
        self.rng.setstate((version, tuple(state), gauss))
        if plans["prompts"] is not None:
            self.reader.position = plans["prompts"]  # type: ignore[attr-defined]

    def stage(self, step: int) -> Tensor:
        """The step of the grid that each row is at: int64 [B]."""
        return (torch.arange(len(self.x), device=self.x.device) // self.block + step) % self.grid

    def last(self, step: int) -> slice:
        """The rows that are at the last step of the grid."""
        return self._part((self.grid - 1 - step) % self.grid)

    def sigma(self, step: int) -> Tensor:
        """The noise level of each row: float32 [B]."""
        return self._each([route[(block + step) % self.grid] for block, route in enumerate(self.routes)])

    def depart(self, step: int, own: float) -> None:
        """Rows that are through begin anew, with another prompt; a share `own` of them will go the student's way."""
        if step:
            self._set_out(-step % self.grid, own)

    @torch.no_grad()
    def target(self, step: int) -> Tensor:
        """The velocity that leads from each row's state to where the teacher gets to at the step's end: the mean over
        its substeps, which are equally long. Substeps of one number are taken side by side, whatever the stage."""
        stages = [(block + step) % self.grid for block in range(self.grid)]
        counts = [self.path.substeps[stage] for stage in stages]
        lengths = [(route[stage + 1] - route[stage]) / count
                   for route, stage, count in zip(self.routes, stages, counts, strict=True)]
        x, text = list(self.x.split(self.block)), self.teacher_text.split(self.block)
        with autocast(self.x.device):
            v = list(self.teacher.velocity(self.x, self.teacher_text, self.sigma(step)).split(self.block))
        sums = list(v)
        for number in range(1, max(counts)):
            going = [block for block, count in enumerate(counts) if count > number]
            for block in going:
                x[block] = x[block] + lengths[block] * v[block]
            levels = self._each([self.routes[block][stages[block]] + number * lengths[block] for block in going])
            with autocast(self.x.device):
                found = self.teacher.velocity(torch.cat([x[block] for block in going]),
                                              torch.cat([text[block] for block in going]), levels)
            for block, each in zip(going, found.split(self.block), strict=True):
                v[block], sums[block] = each, sums[block] + each
        return torch.cat([total / count for total, count in zip(sums, counts, strict=True)])

    def move(self, step: int, student: Tensor, teacher: Tensor) -> None:
        """Every row makes its step, the student's or the teacher's."""
        stages = [(block + step) % self.grid for block in range(self.grid)]
        length = self._each([route[stage + 1] - route[stage] for route, stage in zip(self.routes, stages, strict=True)])
        self.x = self.x + length[:, None, None] * torch.where(self.own, student, teacher)

    def _each(self, of_blocks: list[float]) -> Tensor:
        """A number per block as one per row of these blocks, float32."""
        # A copy that nobody waits for: a GPU has work ahead.
        return torch.tensor(of_blocks).to(self.x.device, non_blocking=True).repeat_interleave(self.block)

    def _part(self, block: int) -> slice:
        return slice(block * self.block, (block + 1) * self.block)

    @torch.no_grad()
    def _set_out(self, block: int, own: float) -> None:
        part, device = self._part(block), self.x.device
        self.teacher_text[part], self.student_text[part] = self.reader.read(self.block)
        self.x[part] = torch.randn_like(self.x[part])
        self.own[part] = torch.rand(self.block, 1, 1, device=device) < own
        if self.pairs:
            self.x[part][1::2] = self.x[part][0::2]
            self.own[part][1::2] = self.own[part][0::2]
        self.routes[block] = jittered(self.levels, self.rng) if self.rng.random() < self.path.jitter else self.levels
