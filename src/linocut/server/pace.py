"""How far a job is and how long it will take yet, from what its phases took before."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linocut.pipeline.run import Progress

Seconds = dict[str, float]
GUESS: Seconds = {"encode": 0.05, "denoise": 1.0, "decode": 0.3}
"""Seconds of a picture's phases before any was drawn; only their proportions matter."""
SURE = 0.05
"""Share of a job that must be done before the time left is told without earlier jobs to go by."""


class Pace:
    """Turns the pipeline's progress into shares and seconds. One per job.

    `known`: what phases of such a picture took last time, or None. `together`: pictures go through a phase together,
    each network opened once; otherwise each picture goes through all phases before the next one begins.
    """

    def __init__(self, known: Seconds | None, pictures: int, together: bool) -> None:
        self.sure, self.seconds = known is not None, known or GUESS
        self.pictures, self.together = pictures, together
        self.began = time.monotonic()

    def describe(self, progress: Progress) -> dict[str, Any]:
        """The progress as JSON-ready values, with `fraction` and `seconds_left` of the whole job."""
        done = self._seconds_done(progress)
        total = self.seconds["encode"] + self.pictures * (self.seconds["denoise"] + self.seconds["decode"])
        fraction = min(1.0, done / total)
        elapsed = time.monotonic() - self.began
        left = elapsed / fraction - elapsed if fraction > SURE else total - done if self.sure else None
        return {"phase": progress.phase, "done": progress.done, "total": progress.total, "picture": progress.picture,
                "pictures": progress.pictures, "step": progress.step, "steps": progress.steps,
                "fraction": round(fraction, 4), "seconds_left": None if left is None else round(left, 2)}

    def _seconds_done(self, progress: Progress) -> float:
        part = progress.done / max(1, progress.total)
        encode, denoise, decode = (self.seconds[name] for name in ("encode", "denoise", "decode"))
        if progress.phase == "encode":
            return part * encode
        if progress.phase == "denoise":
            before = progress.picture * (denoise if self.together else denoise + decode)
            return encode + before + part * denoise
        before = progress.picture * (decode if self.together else denoise + decode)
        return encode + before + (self.pictures if self.together else 1) * denoise + part * decode


def seconds_of(timings: dict[str, dict[str, Any]], pictures: int) -> Seconds:
    """What the phases of one picture took, by the timings of a job of so many."""
    return {name: max(1e-3, timings.get(name, {}).get("seconds", GUESS[name]) / (1 if name == "encode" else pictures))
            for name in GUESS}
