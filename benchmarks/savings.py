"""What giving memory back costs: a picture drawn as it is by default, and with all networks kept in memory.

    python benchmarks/savings.py MODEL [--size 512x512] [--steps 2] [--rounds 3] [-o benchmarks/results/savings.json]

By default a large model's networks live one after another, layers of the text encoder leave memory as they are done,
and freed memory goes back to the system. Kept, nothing is given back before the process ends. Each run is a process of
its own, waits for its threads as the command line does, and finds the files in the system's cache; the two take turns,
and change places from round to round. Seconds are those of the whole process, of drawing without start, and of the
processors at work on that, which other programs disturb least. A round that is in the file already is not run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from linocut.cli.bench import report
from linocut.cli.bench.rounds import Rounds
from linocut.formats.folder import ModelFolder

ARMS = ("given back", "kept")
_DRAW = """
import json, sys, time
from linocut.pipeline.generate import Pipeline

model, width, height, steps, threads, keep = sys.argv[1], *map(int, sys.argv[2:])
start, busy = time.monotonic(), time.process_time()
pipe = Pipeline.from_pretrained(model, threads=threads, keep_loaded=bool(keep), prompt_cache=False)
timings = pipe("a red apple and two blue cups on a wooden table", width=width, height=height, seed=0,
               num_inference_steps=steps).timings
print(json.dumps({"draw": time.monotonic() - start, "busy": time.process_time() - busy,
                  "peak_rss": max(each["peak_rss"] for each in timings.values())}))
"""


def run(arm: str, model: Path, size: tuple[int, int], steps: int, threads: int) -> dict[str, float]:
    """Seconds of the process, of drawing, and of the processors while it draws; its peak of resident bytes."""
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _DRAW, str(model), *map(str, (*size, steps, threads)),
                           str(int(arm == "kept"))], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return {"seconds": time.monotonic() - start, **json.loads(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    width, height = map(int, given.size.split("x"))
    threads = len(os.sched_getaffinity(0))
    folder = ModelFolder.open(given.model)
    for checkpoint in folder.weight_files().values():  # into the system's cache
        with checkpoint:
            for file in checkpoint.files:
                with open(file, "rb", buffering=0) as data:
                    while data.read(1 << 24):
                        pass
    settings = {"size": [width, height], "steps": given.steps, "encoding": report.encoding(folder)}
    done = Rounds("savings", threads, settings, given.output)
    run("given back", given.model, (64, 64), 1, threads)  # libraries into the cache, too
    for number in range(given.rounds):
        for arm in done.missing(list(ARMS[:: -1 if number % 2 else 1]), number):
            found = run(arm, given.model, (width, height), given.steps, threads)
            done.add(f"{arm}/peak_rss", number, found["peak_rss"])
            done.add(f"{arm}/draw", number, found["draw"])
            done.add(f"{arm}/busy", number, found["busy"])
            done.add(arm, number, found["seconds"])
            print(f"round {number + 1}, {arm:<10} {found['seconds']:7.2f} s, drawing {found['draw']:7.2f} s, busy "
                  f"{found['busy']:7.2f} s, peak {found['peak_rss'] / 1e6:6.0f} MB", flush=True)
    results = done.content()["results"]
    for what, name in (("", "process"), ("/draw", "drawing"), ("/busy", "processors")):
        back, kept = (results[arm + what]["samples"] for arm in ARMS)
        ratios = [a / b for a, b in zip(back, kept, strict=True)]
        print(f"{name}: given back takes {100 * (statistics.median(ratios) - 1):+.2f} % of "
              f"the time of kept (rounds {', '.join(f'{100 * (ratio - 1):+.2f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
