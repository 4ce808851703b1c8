"""Seconds and memory that it takes to read the packed weights of a transformer into mlx, layer by layer.

    python benchmarks/mlx_load.py MODEL_FOLDER
"""

import resource
import sys
import time
from pathlib import Path

import mlx.core as mx

from linocut.formats.checkpoint import Checkpoint
from linocut.mlx.layers import Linear, Source


def main() -> None:
    with Checkpoint.open(Path(sys.argv[1]) / "transformer") as checkpoint:
        source, held, start = Source(checkpoint, mx.float32), [], time.perf_counter()
        for name, entry in checkpoint.packed.items():
            held.append(Linear(source, name, entry.shape[1], entry.shape[0]).read())
        seconds = time.perf_counter() - start
        stored = sum(checkpoint.packed_tensor(name).nbytes for name in checkpoint.packed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{len(held)} layers, {stored / 1e6:.0f} MB in the file: {seconds:.1f} s, "
          f"{mx.get_active_memory() / 1e6:.0f} MB in mlx, peak of the process {peak / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
