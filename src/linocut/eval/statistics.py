"""How sure a comparison is: bootstrap over prompts, which keeps pictures of a prompt together, and McNemar's test.

An outcome table is float64 [P, n]: of each of P prompts the share of right pictures, per arm; `tasks` int [P] says
which task a prompt belongs to. The score of an arm is the mean of its task means, as GenEval defines it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap standard error and 95 % interval."""

    value: float
    error: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """For JSON, which knows no NaN: None where there is no value, as for a ratio to nothing."""
        found = {"value": self.value, "standard_error": self.error, "low": self.low, "high": self.high}
        return {name: value if math.isfinite(value) else None for name, value in found.items()}


@dataclass(frozen=True)
class Comparison:
    """A second arm against a first: difference of their scores, ratio (what is retained), differences by task.

    `lost` and `won` are the pictures that only the first or only the second got right; `p` is McNemar's.
    """

    difference: Estimate
    ratio: Estimate
    tasks: dict[int, Estimate]
    lost: int
    won: int
    p: float


def score(outcomes: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """Mean of the task means, per arm: [n]."""
    return np.mean([outcomes[tasks == task].mean(0) for task in np.unique(tasks)], axis=0)


def bootstrap(outcomes: np.ndarray, tasks: np.ndarray, resamples: int = RESAMPLES,
              seed: int = SEED) -> dict[int, np.ndarray]:
    """Task means of resampled prompts (drawn within each task, the same ones for every arm): {task: [resamples, n]}."""
    rng = np.random.default_rng(seed)
    means = {}
    for task in np.unique(tasks).tolist():
        rows = outcomes[tasks == task]
        drawn = np.empty((resamples, rows.shape[1]))
        for start in range(0, resamples, 500):  # bounds the memory of many prompts
            count = min(500, resamples - start)
            weights = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=count)
            drawn[start:start + count] = weights @ rows / len(rows)
        means[task] = drawn
    return means


def scores(outcomes: np.ndarray, tasks: np.ndarray, resamples: int = RESAMPLES) -> list[Estimate]:
    """The score of each arm."""
    drawn = _mean(bootstrap(outcomes, tasks, resamples))
    return [_estimate(value, column) for value, column in zip(score(outcomes, tasks), drawn.T, strict=True)]


def compare(first: np.ndarray, second: np.ndarray, tasks: np.ndarray, resamples: int = RESAMPLES) -> Comparison:
    """Compare two arms. `first` and `second` are bool [P, k]: whether picture k of each prompt is right."""
    both = np.stack([first.mean(1), second.mean(1)], axis=1)
    by_task = bootstrap(both, tasks, resamples)
    drawn, value = _mean(by_task), score(both, tasks)
    lost, won = int((first & ~second).sum()), int((second & ~first).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = _estimate(value[1] / value[0], drawn[:, 1] / drawn[:, 0])
    differences = {task: _estimate(float(np.diff(both[tasks == task].mean(0))[0]), means[:, 1] - means[:, 0])
                   for task, means in by_task.items()}
    return Comparison(_estimate(value[1] - value[0], drawn[:, 1] - drawn[:, 0]), ratio, differences, lost, won,
                      mcnemar(lost, won))


def gap_closed(top: np.ndarray, baseline: np.ndarray, arm: np.ndarray, tasks: np.ndarray,
               resamples: int = RESAMPLES) -> Estimate:
    """The share of the way from a baseline's score to the top's that an arm goes: (arm - baseline) / (top - baseline),
    1 at the top, negative for an arm worse than the baseline. All are bool [P, k], as for `compare`."""
    three = np.stack([each.mean(1) for each in (top, baseline, arm)], axis=1)
    drawn, value = _mean(bootstrap(three, tasks, resamples)), score(three, tasks)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _estimate((value[2] - value[1]) / (value[0] - value[1]),
                         (drawn[:, 2] - drawn[:, 1]) / (drawn[:, 0] - drawn[:, 1]))


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p of McNemar's test: whether `lost` and `won` of the discordant pairs fit a fair coin.

    Pictures count as independent here, which those of one prompt are not; the bootstrap does not suppose that.
    """
    n, k = lost + won, min(lost, won)
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    top = max(logs)
    return min(1.0, 2 * math.exp(top) * sum(math.exp(each - top) for each in logs))


def _mean(by_task: dict[int, np.ndarray]) -> np.ndarray:
    return np.mean(list(by_task.values()), axis=0)


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    finite = drawn[np.isfinite(drawn)]
    if not len(finite):
        return Estimate(float(value), math.nan, math.nan, math.nan)
    low, high = np.percentile(finite, [2.5, 97.5])
    return Estimate(float(value), float(finite.std(ddof=1)), float(low), float(high))
