"""Section `budget`: the same picture under ever smaller `--max-memory`, each in a process of its own.

For every way to draw with less (networks one after another, the text encoder layer by layer, the decoder in strips) the
limit is what the planner says that the way needs. A way holds what it promises if the process stays within its limit
and the pixels are those of a picture without one; strips may move last bits.
"""

import contextlib
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from linocut.errors import UsageError
from linocut.formats.folder import ModelFolder
from linocut.pipeline.budget import fit, planner_for
from linocut.pipeline.memory import Plan
from on_gpu import folders
from on_gpu.bench import Bench, line, release, say
from on_gpu.cold import CACHES, process
from on_gpu.networks import DEVICE

SLACK = 0 if DEVICE == "cuda" else 10**8  # a plan for a CPU begins with what its own process holds


def budget(bench: Bench) -> list[dict[str, Any]]:
    """A row for each way, from no limit to the least memory, with planned and found bytes by phase."""
    found = []
    for encoding in bench.encodings[: 1 if bench.toy else None]:
        place = folders.folder(bench, encoding)
        release()
        with tempfile.TemporaryDirectory(prefix="linocut-budget-") as made:
            caches = {name: str(Path(made) / folder) for name, folder in CACHES.items()}
            process(bench, place, Path(made) / "first.png", caches)  # compiles, tunes
            wanted: np.ndarray | None = None
            for plan in plans(place, bench.sides[-1]):
                limit = None if wanted is None else plan.peak + SLACK
                picture = Path(made) / f"{len(found)}.png"
                ran = process(bench, place, picture, caches, limit)
                pixels = np.asarray(Image.open(picture)).astype(float)
                wanted = pixels if wanted is None else wanted
                off = float(((pixels - wanted) ** 2).mean())
                row = {"what": f"linocut {encoding}", "ways": plan.ways.__dict__, "limit": limit, "planned": plan.peak,
                       "planned_phases": {phase.name: phase.peak for phase in plan.phases},
                       "found": ran["peak_gpu_process"], "found_torch": ran["peak_gpu_torch"],
                       "seconds": ran["seconds"], "psnr": 10 * math.log10(255**2 / off) if off else None}
                row["ok"] = (DEVICE == "cpu" or row["found"] <= (limit or plan.peak)) and (
                    off == 0 or (plan.ways.tile is not None and row["psnr"] > 45))
                bench.ok &= row["ok"]
                found.append(row)
                say(line({key: value for key, value in row.items() if key != "planned_phases"}))
    return found


def plans(place: Path, side: int) -> list[Plan]:
    """The quickest plan, then the quickest below each one before, down to the smallest."""
    planner = planner_for(ModelFolder.open(place), DEVICE)
    found = [planner.plan(side, side)]
    with contextlib.suppress(UsageError):  # nothing is smaller
        while True:
            found.append(fit(planner, side, side, limit=found[-1].peak - 1))
    return found
