"""Seconds and peak memory of each phase of a run.

Linux lets a process reset its own high-water mark, which gives an exact peak per phase at no cost; elsewhere a thread
samples resident memory every few milliseconds.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linocut.pipeline.memory import resident_bytes

if TYPE_CHECKING:
    import torch

_SAMPLE_SECONDS = 0.005


@dataclass
class PhaseTiming:
    """What one phase took: wall seconds (`load_seconds` of them to open weights), and its peak of resident bytes.

    `peak_gpu` are the most bytes of a CUDA device that torch held meanwhile, kept networks and reserves included; the
    device's context comes on top. 0 elsewhere.
    `cached` counts the prompts whose features came from the prompt cache. `spans` are the times of its beginning and
    end, in seconds of the system's monotonic clock, for each time the phase ran.
    """

    seconds: float = 0.0
    load_seconds: float = 0.0
    peak_rss: int = 0
    peak_gpu: int = 0
    steps: list[float] = field(default_factory=list)
    cached: int = 0
    spans: list[tuple[float, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"seconds": round(self.seconds, 4), "load_seconds": round(self.load_seconds, 4),
                                  "peak_rss": self.peak_rss,
                                  "spans": [[round(when, 4) for when in span] for span in self.spans]}
        if self.steps:
            values["steps"] = [round(step, 4) for step in self.steps]
        if self.cached:
            values["cached"] = self.cached
        if self.peak_gpu:
            values["peak_gpu"] = self.peak_gpu
        return values


class Meter:
    """Collects a `PhaseTiming` per phase; a phase entered again adds its seconds and keeps the larger peak."""

    def __init__(self, device: "torch.device") -> None:
        self.phases: dict[str, PhaseTiming] = {}
        self._device = device

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[PhaseTiming]:
        timing = self.phases.setdefault(name, PhaseTiming())
        start, began = time.perf_counter(), time.monotonic()
        with _peak() as peak, _peak_gpu(self._device) as peak_gpu:
            try:
                yield timing
            finally:
                timing.seconds += time.perf_counter() - start
                timing.spans.append((began, time.monotonic()))
        timing.peak_rss = max(timing.peak_rss, peak[0])
        timing.peak_gpu = max(timing.peak_gpu, peak_gpu[0])


@contextlib.contextmanager
def _peak() -> Iterator[list[int]]:
    """Yield a list that holds the peak of resident bytes once the block has ended without an error."""
    peak = [0]
    if _reset_high_water():
        yield peak
        peak[0] = _high_water()
        return
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            peak[0] = max(peak[0], resident_bytes())

    sampler = threading.Thread(target=sample, name="linocut-memory", daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()
        peak[0] = max(peak[0], resident_bytes())


@contextlib.contextmanager
def _peak_gpu(device: "torch.device") -> Iterator[list[int]]:
    """The same of memory that torch holds on a CUDA device."""
    peak = [0]
    if device.type != "cuda":
        yield peak
        return
    import torch

    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats(device)
    yield peak
    peak[0] = int(torch.cuda.max_memory_reserved(device))


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resident_bytes()
