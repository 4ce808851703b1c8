"""Which route a product takes on this GPU, and why: measured on it once and kept, or a table of what is likely.

Results are kept per GPU and version in `LINOCUT_CACHE`/gpu. Measuring goes through a short list of routes and tiles for
the shapes of one network and stops after some seconds; a route that it did not come to is measured when it is next
asked for, and one that failed is not tried again. Nothing is measured unless `measure` is called: drawing reads what is
there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from linocut.formats.checkpoint import atomic_write_bytes
from linocut.kernels.gpu import routes, runtime
from linocut.kernels.gpu.accuracy import EXACT, KIND
from linocut.kernels.gpu.gemm import Tile
from linocut.kernels.gpu.routes import FEW_TOKENS, Route, Shape

VERSION = 2
MOST_PACKED = 1024
"""Tokens beyond which decoding a weight for every block of them anew is not worth a measurement."""


@dataclass(frozen=True)
class Choice:
    """A route, its reason, and seconds of the product where they were measured."""

    route: Route
    reason: str
    seconds: float | None = None


def bucket(m: int) -> int:
    """Token counts that share a choice: the next power of two from 16 on."""
    return max(16, 1 << (m - 1).bit_length())


def likely(shape: Shape, device: str, allowed: Iterable[str] = EXACT) -> Choice:
    """What is likely best where nothing was measured."""
    few = shape.m <= FEW_TOKENS
    order = ("packed", "library") if few else ("folded", "rows", "blocks", "unpacked", "library")
    for name in order:
        if name in allowed and routes.why_not(name, shape, device) is None:
            why = (f"{shape.m} tokens: weights are read packed" if few and name == "packed" else
                   f"more than {FEW_TOKENS} tokens: unpacking pays" if not few and name != "library" else
                   "products on eight bits are not for this GPU or shape")
            return Choice(Route(name, routes.tiles(name, shape, device)[0]), f"not measured here; {why}")
    return Choice(Route("library"), "no other route can run here")


@dataclass
class Table:
    """Measured seconds of routes by shape, on one GPU."""

    path: Path | None
    entries: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, device: str) -> Table:
        """What was measured on this GPU before; empty where there is nothing, or nothing of these versions."""
        path = place(device)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["version"] == VERSION and found["entries"]:
                return cls(path, {key: [_entry(each) for each in value] for key, value in found["entries"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # it can be made again
        return cls(path)

    def choose(self, shape: Shape, device: str, allowed: Iterable[str]) -> Choice:
        """The quickest measured route among those allowed, else the likely one."""
        allowed = tuple(allowed)
        found = [each for each in self.entries.get(_key(shape), []) if each["route"] in allowed and each["seconds"]
                 and routes.why_not(each["route"], shape, device) is None]  # M is one of many that share a measurement
        if not found:
            return likely(shape, device, allowed)
        best = min(found, key=lambda each: float(each["seconds"]))
        tile = None if best["tile"] is None else Tile(**best["tile"])
        return Choice(Route(best["route"], tile), f"the quickest of {len(found)} that were measured here",
                      best["seconds"])

    def quickest(self, allowed: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Route and seconds of the quickest measurement among the routes allowed, by shape; M there is the most tokens
        that share it."""
        allowed = tuple(allowed)
        found = {key: [each for each in entry if each["route"] in allowed and each["seconds"]]
                 for key, entry in self.entries.items()}
        best = {key: min(entry, key=lambda each: float(each["seconds"])) for key, entry in found.items() if entry}
        return {key: {"route": each["route"], "seconds": each["seconds"]} for key, each in best.items()}

    def knows(self, shape: Shape, name: str) -> bool:
        """Whether the route `name` was measured at this shape, or failed."""
        return any(each["route"] == name for each in self.entries.get(_key(shape), []))

    def add(self, shape: Shape, route: Route, seconds: float | None) -> None:
        """Keep a measurement, or that the route failed."""
        tile = None if route.tile is None else route.tile.to_dict()
        self.entries.setdefault(_key(shape), []).append({"route": route.name, "tile": tile, "seconds": seconds})

    def save(self) -> None:
        """Write the file, if the folder can be written to."""
        if self.path is not None:
            content = {"version": VERSION, "entries": self.entries}
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                atomic_write_bytes(self.path, json.dumps(content, indent=1).encode())


def measure(shapes: Iterable[Shape], device: str, seconds_of: Callable[[Route, Shape], float], *,
            names: Iterable[str] = tuple(KIND), budget: float = 30.0,
            on_result: Callable[[Shape, Route, float], None] | None = None, save: bool = True) -> Table:
    """Measure routes for `shapes`, each route's likely best tile for all shapes first, until `budget` seconds are over.

    seconds_of(route, shape) runs a product some times and returns seconds of one; what it raises rules the route out.
    """
    table, stop, names = Table.of(device), time.monotonic() + budget, tuple(names)
    ways = {shape: [(name, routes.tiles(name, shape, device)) for name in names
                    if routes.why_not(name, shape, device) is None and not table.knows(shape, name)
                    and (name not in routes.DECODING or shape.m <= MOST_PACKED)]
            for shape in {_key(shape): shape for shape in shapes}.values()}
    deepest = max((len(tiles) for each in ways.values() for _, tiles in each), default=0)
    for depth in range(deepest):
        for shape, each in ways.items():
            for name, tiles in each:
                if depth >= len(tiles) or time.monotonic() > stop:
                    continue
                route = Route(name, tiles[depth])
                try:
                    seconds = _seconds(seconds_of, route, shape, device)
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    continue  # memory may be free another time
                except RuntimeError:  # the GPU has given up: no process shall try this route again
                    for other in ways:
                        table.add(other, Route(name), None)
                    table.save()
                    raise
                table.add(shape, route, seconds)
                if on_result is not None:
                    on_result(shape, route, float("nan") if seconds is None else seconds)
    if save and deepest:
        table.save()
    return table


def _seconds(seconds_of: Callable[[Route, Shape], float], route: Route, shape: Shape, device: str) -> float | None:
    """What seconds_of says; None if the route takes too much shared memory or does not compile."""
    try:
        return seconds_of(route, shape)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TritonError):
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)  # raises if nothing can run on the GPU any more
        return None


def place(device: str) -> Path:
    """The file of this GPU and these versions in the user's cache folder."""
    own, shared = os.environ.get("LINOCUT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(own).expanduser() if own else Path(shared or "~/.cache").expanduser() / "linocut"
    name = "interpreter" if runtime.interpreted() else torch.cuda.get_device_name(device)
    versions = f"{name} torch {torch.__version__} triton {runtime.triton_version()}"
    return root / "gpu" / (re.sub(r"[^A-Za-z0-9.]+", "-", versions).strip("-").lower() + ".json")


def _key(shape: Shape) -> str:
    return f"{shape.encoding} M{bucket(shape.m)} N{shape.n} O{shape.o}"


def _entry(value: Any) -> dict[str, Any]:
    """A measurement out of a file, checked."""
    tile = None if value["tile"] is None else Tile(**value["tile"])
    seconds = None if value["seconds"] is None else float(value["seconds"])
    if value["route"] not in KIND or (seconds is not None and not seconds > 0):
        raise ValueError(f"not a measurement: {value}")
    return {"route": value["route"], "tile": None if tile is None else tile.to_dict(), "seconds": seconds}
