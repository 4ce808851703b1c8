"""How long a fresh process takes from the shell to a picture: the median of several runs, page cache warm.

    python benchmarks/startup.py [--model embedded] [--runs 5]

Each run is a new `linocut generate`. The process is timed from the outside; when the first denoising step began is
reckoned back from the time of the PNG by what --json says that the steps and the decoder took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(model: str, picture: Path) -> dict[str, float]:
    """Seconds after the start of one `linocut generate` at which it reached each milestone."""
    command = [sys.executable, "-m", "linocut", "generate", "two red apples and a blue cup", "--seed", "1",
               "--model", model, "--output", str(picture), "--force", "--json"]
    start = time.time()  # the clock of file times
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    end = time.time()
    timings = json.loads(done.stdout)["timings"]
    written = picture.stat().st_mtime
    # Encoding the PNG, some milliseconds, is counted as if it came before the first step.
    first = written - timings["decode"]["seconds"] - sum(timings["denoise"]["steps"])
    return {"first step begins": first - start, "first step done": first + timings["denoise"]["steps"][0] - start,
            "PNG written": written - start, "process ended": end - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error("--runs must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        measure(arguments.model, picture)  # brings files into the page cache and compiles Python's bytecode
        runs = [measure(arguments.model, picture) for _ in range(arguments.runs)]
    print(f"{arguments.model}, {arguments.runs} runs, {os.cpu_count()} CPUs")
    print(f"{'seconds until':<20}{'median':>8}{'min':>8}{'max':>8}")
    for milestone in runs[0]:
        values = [run[milestone] for run in runs]
        print(f"{milestone:<20}{statistics.median(values):>8.2f}{min(values):>8.2f}{max(values):>8.2f}")


if __name__ == "__main__":
    main()
