"""Arms of a comparison, run in turn so that a machine's moods meet them all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleave(arms: Mapping[str, Callable[[], object]], rounds: int,
               least_seconds: float = 0.0) -> dict[str, list[float]]:
    """Seconds per call of each arm, one number a round, after one call each that does not count.

    An arm quicker than `least_seconds` is called several times in a row for one number.
    """
    calls = {}
    for name, run in arms.items():
        run()  # memory is claimed, libraries prepare themselves
        calls[name] = max(1, min(1000, round(least_seconds / max(_seconds(run, 1), 1e-6)))) if least_seconds else 1
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            seconds[name].append(_seconds(run, calls[name]))
    return seconds


def _seconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def summary(samples: list[float]) -> dict[str, Any]:
    """The numbers with five digits, their median, the least and the most."""
    rounded = [float(f"{value:.5g}") for value in samples]
    return {"median": float(f"{statistics.median(rounded):.5g}"), "min": min(rounded), "max": max(rounded),
            "samples": rounded}
