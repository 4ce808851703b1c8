"""Limits on memory: what there is, what the user allows, and the quickest way to draw within both.

From the quickest way (`Planner.default_ways`) on, the phase that is too large is drawn in a smaller and slower way,
until all of them fit. What changes no bit of the picture may happen whenever memory is short; decoding in strips, which
may move last bits, happens only where the user set the limit.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from linocut.errors import UsageError
from linocut.formats.folder import ModelFolder
from linocut.pipeline.memory import LARGEST_SIDE, SIZE_MULTIPLE, Plan, Planner, Ways, gigabytes

ROWS = (1024, 512)
TILES = (64, 32, 16)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30,
          "tib": 2**40, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_CGROUP = Path("/sys/fs/cgroup")


def parse_bytes(text: str | int) -> int:
    """Bytes that '2GB', '1.5 GiB', '800 MB' or a plain number mean. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([a-z]*)\s*", str(text).lower())
    if isinstance(text, bool) or found is None or found[2] not in _UNITS:
        raise UsageError(f"{text!r} is no amount of memory; write it like 2GB, 1.5GiB or 800MB")
    count = int(float(found[1]) * _UNITS[found[2]])
    if count < 1:
        raise UsageError(f"{text!r} is no memory at all; write it like 2GB, 1.5GiB or 800MB")
    return count


def fit(planner: Planner, width: int, height: int, *, limit: int | None = None, free: int | None = None,
        keep_loaded: bool | None = None, tile: int | None = None, **options: Any) -> Plan:
    """The quickest plan for a picture within the user's `limit` and what is `free`, both bytes of the whole process.

    Args:
        keep_loaded: whether networks should stay in memory; they do not if that is too much.
        tile: height of the decoder's strips, where a recipe says it.
        options: those of `Planner.plan`.
    Raises UsageError that says what the smallest plan would need, and what size would fit.
    """
    if max(width, height) > LARGEST_SIDE:
        plan = planner.plan(width, height, **options)
        raise UsageError(f"{width}x{height} is out of reach: it would need {gigabytes(plan.peak)} while "
                         f"{_doing(plan)}, and sides end at {LARGEST_SIDE}; choose a smaller --size")
    ways = planner.default_ways(width, height)
    ways = replace(ways, keep_loaded=ways.keep_loaded if keep_loaded is None else keep_loaded, tile=tile or ways.tile)
    allowed = min((count for count in (limit, free) if count is not None), default=None)
    plan = _fit(planner, width, height, ways, allowed, limit is not None, options)
    if allowed is None or plan.peak <= allowed:
        return plan
    what = f"{width}x{height} with {plan.model} would need {gigabytes(plan.peak)} while {_doing(plan)}"
    have = f"--max-memory allows {gigabytes(allowed)}" if allowed == limit else f"{gigabytes(allowed)} are free"
    raise UsageError(f"{what}, and {have}; {_advice(planner, width, height, allowed, limit is not None, options)}")


def _fit(planner: Planner, width: int, height: int, ways: Ways, allowed: int | None, strips: bool,
         options: dict[str, Any]) -> Plan:
    """The first plan within `allowed`, or the smallest there is."""
    plan = planner.plan(width, height, ways=ways, **options)
    while allowed is not None and plan.peak > allowed:
        over = [phase.name for phase in plan.phases if phase.peak > allowed]
        for smaller in _smaller(plan.ways, over, strips):
            candidate = planner.plan(width, height, ways=smaller, **options)
            before = {phase.name: phase.peak for phase in plan.phases}
            if any(phase.peak < before[phase.name] for phase in candidate.phases if phase.name in over):
                plan = candidate
                break
        else:
            break
    return plan


def _smaller(ways: Ways, over: list[str], strips: bool) -> Iterator[Ways]:
    """Ways that take less memory in the phases `over`, the cheapest first."""
    if ways.keep_loaded:
        yield replace(ways, keep_loaded=False)
    if ("denoise" in over or "encode" in over) and not ways.keep_loaded and not ways.stream:
        yield replace(ways, stream=True)
    if ways.at_once > 1 and not ways.keep_loaded:
        yield replace(ways, at_once=1)
    if "denoise" in over:
        yield from (replace(ways, rows=rows) for rows in ROWS if ways.rows is None or rows < ways.rows)
    if "decode" in over and strips:
        yield from (replace(ways, tile=tile) for tile in TILES if ways.tile is None or tile < ways.tile)


def _advice(planner: Planner, width: int, height: int, allowed: int, strips: bool, options: dict[str, Any]) -> str:
    """What would fit: the largest size of nearly the same shape, and the least memory for this one."""
    advice = []
    if not strips:  # the user may choose what the planner may not
        least = _fit(planner, width, height, planner.default_ways(width, height), 1, True, options).peak
        if least <= allowed:
            advice.append(f"--max-memory {_round_up(least)} would draw it in strips")
    for side in range(height - SIZE_MULTIPLE, 0, -SIZE_MULTIPLE):
        other = max(SIZE_MULTIPLE, round(width * side / height / SIZE_MULTIPLE) * SIZE_MULTIPLE)
        if _fit(planner, other, side, planner.default_ways(other, side), allowed, strips, options).peak <= allowed:
            advice.append(f"--size {other}x{side} would fit")
            break
    else:
        advice.append("no size would fit")
    return "; ".join(advice)


def _round_up(count: int) -> str:
    return f"{-(-count // 10**7) * 10}MB"


def _doing(plan: Plan) -> str:
    return f"{plan.peak_phase[:-1]}ing"


# ---- what there is -------------------------------------------------------------------------------------------------

def planner_for(folder: ModelFolder, device: str) -> Planner:
    """What plans the memory that pictures of a model take on a device."""
    if not device.startswith("cuda"):
        return Planner(folder)
    from linocut.pipeline.memory_gpu import GpuPlanner
    return GpuPlanner(folder, device)


def available_on(device: str) -> int | None:
    """Memory of a device that this process may still take (on a GPU with what it holds there); None if unknown."""
    if not device.startswith("cuda"):
        return available_bytes() if device == "cpu" else None
    from linocut.pipeline import memory_gpu
    return memory_gpu.available_bytes(device)


def available_bytes() -> int | None:
    """Memory that this process may still take: what the system calls available, within container and process limits."""
    candidates = [*_process_limits(), *_container_limits()]
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                candidates.append(int(line.split()[1]) * 1024)
    if not candidates:
        with contextlib.suppress(ImportError):
            import psutil
            candidates.append(int(psutil.virtual_memory().available))
    return max(0, min(candidates)) if candidates else None


def _container_limits() -> list[int]:
    """Bytes left in every control group around this process that has a limit. Cached files do not count as used."""
    left = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers == "":  # version 2
                root, limit, used, cached = _CGROUP, "memory.max", "memory.current", ("inactive_file", "active_file")
            elif "memory" in controllers.split(","):
                root, limit, used = _CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
                cached = ("total_inactive_file", "total_active_file")
            else:
                continue
            group = root / place.lstrip("/")
            for folder in [group, *(parent for parent in group.parents if parent.is_relative_to(root))]:
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                    most = int((folder / limit).read_text())
                    stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                    files = sum(int(stat.get(key, 0)) for key in cached)
                    left.append(most - max(0, int((folder / used).read_text()) - files))
    return left


def _process_limits() -> list[int]:
    """Bytes left under `ulimit -d` and `-v`, as far as they are set. Some libraries do not survive a refusal."""
    left = []
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
        held = {line[0]: int(line[1]) * 1024 for line in lines if line and line[0] in ("VmData:", "VmSize:")}
        for kind, name in ((resource.RLIMIT_DATA, "VmData:"), (resource.RLIMIT_AS, "VmSize:")):
            most = resource.getrlimit(kind)[0]
            if most != resource.RLIM_INFINITY:
                left.append(most - held[name])
    return left
