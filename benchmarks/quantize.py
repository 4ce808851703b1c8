"""Seconds and peak memory of `linocut quantize` on a dense model of FLUX.2 klein's size, with random BF16 weights.

    python benchmarks/quantize.py --work DIR [--encoding ternary] [--threads N]
    python benchmarks/quantize.py --source MODEL --work DIR

Without --source the model is made once in DIR/source (its transformer weighs 7.8 GB); the result is removed again.
Peak memory is the kernel's count for the whole child process, mapped pages of the source included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LINOCUT = [sys.executable, "-m", "linocut"]


def run(command: list[str]) -> tuple[dict[str, Any], float, int]:
    """Run a command that prints JSON: what it printed, wall seconds, and its peak resident bytes."""
    with tempfile.TemporaryFile() as out:
        start = time.monotonic()
        child = subprocess.Popen(command, stdout=out)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}")
        out.seek(0)
        return json.load(out), seconds, usage.ru_maxrss * 1024  # Linux counts in KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with room for source and result")
    parser.add_argument("--source", type=Path, help="model to quantize instead of one that is made")
    parser.add_argument("--encoding", choices=["ternary", "binary"], default="ternary")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    source = arguments.source
    if source is None:
        source = arguments.work / "source"
        subprocess.run([*LINOCUT, "bench", "synthetic", "klein-4b", "--source", "bf16", "--out", str(source)],
                       check=True)
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="quantized-") as folder:
        result = Path(folder) / arguments.encoding
        threads = ["--threads", str(arguments.threads)] if arguments.threads else []
        report, seconds, peak = run([*LINOCUT, "quantize", str(source), str(result), "--encoding", arguments.encoding,
                                     "--json", *threads])
        shutil.rmtree(result)
    print(f"{source} -> {arguments.encoding}, {arguments.threads or os.cpu_count()} threads")
    for component, totals in report["totals"].items():
        print(f"{component:<14}{totals['source_bytes']:>16,} bytes -> {totals['tensor_bytes']:>14,} bytes, "
              f"{totals['bits_per_weight']:.3f} bits per weight")
    print(f"{seconds:.1f} s from the shell ({report['seconds']:.1f} s of it at work), peak RSS {peak / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
