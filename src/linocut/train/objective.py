"""What a student is told of its velocity v_S, given the teacher's v_T at the same states.

- *velocity*: the mean squared error.
- *normalized*: the same, divided at each step of the grid by the variance over prompts of x0 / sigma, with
  x0 = x - sigma v_T the clean picture that the teacher foresees. Near sigma 1 most of the velocity is a copy of the
  noise in x; an error relative to all of it hides that a student no longer reads its prompt.
- *balanced*: the mean squared error divided at each step of the grid by what it was lately, times the mean of that over
  all steps. Every step then counts by how much its error changes in proportion, however large it is, as in the sum of
  the errors' logarithms (the fixed point of Kendall et al. 2018).
- *contrast*, beside any: rows i and j with the same noise and other prompts,
  |(v_S,i - v_S,j) - (v_T,i - v_T,j)|^2 / |v_T,i - v_T,j|^2, at the first half of the grid, where states are noise still
  and what is decided is the composition.

Shape letters: B batch, I image tokens, C channels, K steps of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linocut.train.loop import Ranks

_MEMORY = 0.99  # of the running mean of units


class Objective:
    """A loss that remembers the `unit` [K] of errors at each step of the grid, which count by `weights` [K].

    `channels` [C], mean 1, says how much an error in each channel counts.
    """

    def __init__(self, loss: str, contrast: float, grid: int, ranks: Ranks, channels: Tensor | float = 1.0) -> None:
        self.loss, self.contrast, self.grid, self.ranks, self.channels = loss, contrast, grid, ranks, channels
        self.unit = torch.zeros(grid, device=ranks.device)
        self.errors = torch.zeros(grid, device=ranks.device)  # of the last batch, mean by step of the grid
        self.sensitivity: Tensor | None = None

    def __call__(self, v: Tensor, target: Tensor, x: Tensor, sigma: Tensor, stage: Tensor, weights: Tensor) -> Tensor:
        """The loss of velocities v and target [B, I, C] at states x, noise levels sigma [B] and steps stage [B]."""
        squares = (v - target).square()
        plain = squares.detach().flatten(1).mean(1)
        self.errors = self._by_step(plain, stage)
        errors = (squares * self.channels).flatten(1).mean(1)
        if self.loss == "normalized":
            foreseen = (x - sigma[:, None, None] * target) / sigma[:, None, None]
            self._remember(torch.stack([foreseen[stage == each].var(0).mean() for each in range(self.grid)]))
        elif self.loss == "balanced":
            self._remember(self._by_step(errors.detach(), stage))
        loss = (errors * self.counts(weights)[stage]).mean()
        if self.contrast:
            loss = loss + self.contrast * self._contrast(v, target, stage)
        return loss

    def counts(self, weights: Tensor) -> Tensor:
        """What the mean squared error of a row counts at each step of the grid [K]."""
        if self.loss == "velocity":
            return weights
        return weights / self.unit * (self.unit.mean() if self.loss == "balanced" else 1)

    def last_counts(self, weights: Tensor) -> Tensor:
        """What the mean squared error of all rows at the last step counts in the loss, by channel: [C] or []."""
        return self.counts(weights)[-1] / self.grid * self.channels

    def _by_step(self, errors: Tensor, stage: Tensor) -> Tensor:
        """Means [K] of the errors of rows at each step of the grid, where there are equally many."""
        return torch.zeros_like(self.unit).index_add_(0, stage, errors) / (len(stage) / self.grid)

    @torch.no_grad()
    def _remember(self, now: Tensor) -> None:
        self.ranks.average([now])
        fresh = self.unit == 0
        self.unit = torch.where(fresh, now, _MEMORY * self.unit + (1 - _MEMORY) * now).clamp_min(1e-8)

    def _contrast(self, v: Tensor, target: Tensor, stage: Tensor) -> Tensor:
        early = (stage < (self.grid + 1) // 2)[::2]
        own, wanted = (v[::2] - v[1::2])[early], (target[::2] - target[1::2])[early]
        energy = wanted.square().mean().clamp_min(1e-12)
        self.sensitivity = (own.detach().square().mean() / energy).sqrt()
        return (own - wanted).square().mean() / energy
