"""Model folders of klein 4B's shapes with random weights: those of `linocut bench synthetic`, by several processes."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from linocut.models.synthetic import PARTS, SyntheticModel, share_parts, write_synthetic
from on_gpu.bench import Bench, say


def folder(bench: Bench, encoding: str) -> Path:
    """The folder of an encoding; all encodings that are measured are made the first time, and found again."""
    places = {name: bench.work / name for name in bench.encodings}
    done = bench.work / "done"
    if not (done.exists() and set(places) <= set(done.read_text().split())):
        start = time.perf_counter()
        first, *others = places.values()
        rest = tuple(part for part in PARTS if part != "transformer")
        jobs = [(place, bench.model, name, ("transformer",)) for name, place in places.items()]
        jobs += [(first, bench.model, bench.encodings[0], (part,)) for part in rest]
        if bench.toy:
            for job in jobs:
                _write(*job)
        else:
            with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
                for each in [pool.submit(_write, *job) for job in jobs]:
                    each.result()
        for other in others:
            share_parts(first, other, rest)
        done.write_text(" ".join(places))
        say(f"made {', '.join(map(str, places.values()))} in {time.perf_counter() - start:.1f} s")
    return places[encoding]


def _write(place: Path, model: SyntheticModel, encoding: str, parts: tuple[str, ...]) -> None:
    write_synthetic(place, model, encoding, parts)
