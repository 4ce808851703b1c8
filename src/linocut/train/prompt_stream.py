"""Prompts without end for distillation: lines of text files, each once before any comes again, and composed ones."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from linocut.errors import UsageError
from linocut.models.text_encoder import PromptTokenizer
from linocut.train.captions import normalize, sample_captions
from linocut.train.loop import Ranks, autocast
from linocut.train.scenes import sample_scene


class PromptStream:
    """Prompt number i of process r is always the same, so a position is all there is to remember.

    A share `composed` is made by the grammar of scenes (counts, colours, places of things), everything if there are no
    lines. Lines that are in `forbidden`, apart from case and punctuation, are left out.
    """

    def __init__(self, files: Iterable[Path], composed: float, seed: int, ranks: Ranks,
                 forbidden: Sequence[str] = ()) -> None:
        refused = {normalize(text) for text in forbidden}
        self.lines: list[str] = []
        for file in files:
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(f"{file}: not a readable text file of prompts: {error}") from error
            self.lines += [line.strip() for line in lines if line.strip() and normalize(line) not in refused]
        self.refused, self.composed, self.seed, self.ranks = frozenset(refused), composed, seed, ranks
        count = max(1, len(self.lines))
        rng = random.Random(seed)
        self.step = next(step for step in iter(lambda: rng.randrange(1, count + 1), 0) if math.gcd(step, count) == 1)
        self.start = rng.randrange(count)

    def __getitem__(self, position: int) -> str:
        place = position * self.ranks.world + self.ranks.rank
        rng = random.Random(f"{self.seed}/{place}")
        if not self.lines or rng.random() < self.composed:
            return sample_captions(sample_scene(rng), rng, 1, self.refused)[0]
        return self.lines[(self.start + place * self.step) % len(self.lines)]


class PromptReader:
    """Text features of the next prompts, as teacher and student read them (`journeys.Reader`)."""

    def __init__(self, stream: PromptStream, tokenizer: PromptTokenizer, teacher: nn.Module, student: nn.Module,
                 device: torch.device) -> None:
        self.stream, self.tokenizer, self.teacher, self.student = stream, tokenizer, teacher, student
        self.device, self.position = device, 0

    @torch.no_grad()
    def empty(self) -> Tensor:
        """Features [1, T, E] of the empty prompt as the teacher reads it."""
        ids, mask = (tensor.to(self.device) for tensor in self.tokenizer.encode([""]))
        with autocast(self.device):
            features: Tensor = self.teacher(ids, mask)
        return features.float()

    @torch.no_grad()
    def read(self, count: int) -> tuple[Tensor, Tensor]:
        """Features [B, T, E] for both."""
        texts = [self.stream[self.position + index] for index in range(count)]
        self.position += count
        ids, mask = (tensor.to(self.device) for tensor in self.tokenizer.encode(texts))
        with autocast(self.device):
            return self.teacher(ids, mask).float(), self.student(ids, mask).float()
