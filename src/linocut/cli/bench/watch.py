"""The memory of another process over time, as Linux counts it, sampled from outside.

Resident memory (RSS, mapped files included) is read every 20 ms, which costs the process nothing. Its proportional
share (PSS: a page that several processes map counts in parts) makes the system walk all pages, so that is read as often
as it takes less than a fiftieth of the time. Times are of the system's monotonic clock, which processes share.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 0.02
_SHARE = 0.02


@dataclass(frozen=True)
class Series:
    """Samples in the order of their times."""

    times: list[float] = field(default_factory=list)
    values: list[int] = field(default_factory=list)

    def add(self, value: int | None) -> None:
        if value is not None:
            self.times.append(time.monotonic())
            self.values.append(value)

    def between(self, start: float, end: float) -> Series:
        """The samples of some seconds."""
        first, last = bisect_left(self.times, start), bisect_left(self.times, end)
        return Series(self.times[first:last], self.values[first:last])

    def at(self, when: float) -> Series:
        """The last sample before `when`, or the first of all."""
        place = max(0, bisect_left(self.times, when) - 1)
        return Series(self.times[place : place + 1], self.values[place : place + 1])

    @property
    def peak(self) -> int:
        return max(self.values, default=0)

    @property
    def mean(self) -> int:
        """Mean over time; samples lie unevenly on a busy machine. A single sample is its own mean."""
        if len(self.times) < 2:
            return self.peak
        steps = [after - before for before, after in zip(self.times, self.times[1:], strict=False)]
        return round(sum(value * step for value, step in zip(self.values, steps, strict=False)) / sum(steps))

    def thinned(self, count: int) -> list[tuple[float, int]]:
        """At most `count` points (seconds from the first sample, highest value until the next point)."""
        if not self.times:
            return []
        start, width = self.times[0], (self.times[-1] - self.times[0]) / count or 1.0
        highest: dict[int, int] = {}
        for when, value in zip(self.times, self.values, strict=True):
            place = min(count - 1, int((when - start) / width))
            highest[place] = max(highest.get(place, 0), value)
        return [(round(place * width, 3), value) for place, value in sorted(highest.items())]


class Watch:
    """Samples a process from `with Watch(pid) as watch` on until the block ends or the process does."""

    def __init__(self, pid: int) -> None:
        self.pid, self.rss, self.pss = pid, Series(), Series()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._sample_rss, daemon=True),
                         threading.Thread(target=self._sample_pss, daemon=True)]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _sample_rss(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            self.rss.add(rss_of(self.pid))
            due = max(due + SECONDS, time.monotonic())

    def _sample_pss(self) -> None:
        pause = SECONDS
        while not self._stop.wait(pause):
            start = time.monotonic()
            self.pss.add(pss_of(self.pid))
            pause = max(SECONDS, (time.monotonic() - start) / _SHARE)


def rss_of(pid: int) -> int | None:
    """Resident bytes of a process, None once it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") if pages else None


def pss_of(pid: int) -> int | None:
    """Proportional share of the resident bytes of a process, None once it has ended."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024 or None
    except (OSError, ValueError, IndexError):
        return None
    return None
