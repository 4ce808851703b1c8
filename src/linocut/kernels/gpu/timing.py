"""Seconds of a product by a route on this GPU, with random weights and activations: what `tuning.measure` asks for."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from linocut.kernels.gpu import graphs, routes, rows
from linocut.kernels.gpu.activations import Activations
from linocut.kernels.gpu.routes import Route, Scratch, Shape
from linocut.kernels.problem import PackedWeight
from linocut.kernels.selfcheck import random_weight

LEAST_SECONDS = 0.004
ROUNDS = 5
_IN_GRAPH = 20
"""Most calls that a graph holds: enough to hide what starting one costs."""


class Products:
    """Products of one shape at a time; unpacking is part of a product, rounding of activations is not."""

    def __init__(self, device: str, dtype: torch.dtype = torch.bfloat16, rounds: int = ROUNDS,
                 least: float = LEAST_SECONDS) -> None:
        self.device, self.dtype, self.rounds, self.least = device, dtype, rounds, least
        self._scratch = Scratch(device)
        self._shape: Shape | None = None
        self._weight: PackedWeight | None = None
        self._x: torch.Tensor | None = None

    def prepare(self, route: Route, shape: Shape) -> Callable[[], None]:
        """What runs one product."""
        if shape != self._shape:
            weight = random_weight(shape.encoding, min(shape.o, 512), shape.n)
            repeats = -(-shape.o // weight.o)
            self._weight = PackedWeight(weight.codes.to(self.device).repeat(repeats, 1)[: shape.o].contiguous(),
                                        weight.scales.to(self.device).repeat(repeats, 1)[: shape.o].contiguous(), None,
                                        shape.encoding, shape.n)
            self._x, self._shape = torch.randn(shape.m, shape.n, device=self.device), shape
        assert self._x is not None
        act = Activations.empty(route.kind, shape.m, shape.n, self.device, self.dtype)
        rows.quantize(self._x, act)
        out = torch.empty(shape.m, shape.o, dtype=self.dtype, device=self.device)
        given = self._weight
        assert given is not None
        return lambda: routes.run(route, act, given, out, self._scratch)

    def __call__(self, route: Route, shape: Shape) -> float:
        """Median seconds of one product; the first call compiles what has to be."""
        return seconds(self.prepare(route, shape), self.device, self.rounds, self.least, graph=True)


def seconds(work: Callable[[], object], device: str, rounds: int = ROUNDS, least: float = LEAST_SECONDS,
            graph: bool = False) -> float:
    """Median over rounds of the seconds of work(), run back to back until a round takes `least` seconds.

    With `graph` a CUDA device runs it out of a graph, as a step does. Otherwise what is counted for work of some ten
    microseconds is the time that Python takes to start it. What no graph can hold runs without one.
    """
    work()
    once = _timed(work, device, 1)
    repeats = max(1, min(200, int(least / max(once, 1e-6))))
    if graph and device.startswith("cuda"):
        together = min(repeats, _IN_GRAPH)
        recorded = _recorded(work, device, together)
        if recorded is not None:
            recorded.replay()
            once = _timed(recorded.replay, device, 1)
            repeats = max(1, min(200, int(least / max(once, 1e-6))))
            return sorted(_timed(recorded.replay, device, repeats) for _ in range(rounds))[rounds // 2] / together
    return sorted(_timed(work, device, repeats) for _ in range(rounds))[rounds // 2]


def _recorded(work: Callable[[], object], device: str, count: int) -> torch.cuda.CUDAGraph | None:
    """A graph of `count` calls, or None if there can be none."""
    try:
        with graphs.recorded(device) as graph:
            for _ in range(count):
                work()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    return graph


def _timed(work: Callable[[], object], device: str, repeats: int) -> float:
    if not device.startswith("cuda"):
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - start) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3 / repeats
