"""The picture of what `gpu.py` measured."""

import json
import math
from pathlib import Path
from typing import Any

from linocut.kernels.gpu.accuracy import KIND


def plot(source: Path, target: Path) -> None:
    """TFLOP/s of each route's best tile against operations per byte moved, under the roofs of the device."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(source.read_text())
    facts = content["device"]
    figure, axes = plt.subplots(figsize=(9, 6))
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each in content["tune"]:
        key = (each["route"], each["m"], each["n"], each["o"], each["encoding"])
        if 0 < (each["seconds"] or 0) < best.get(key, {"seconds": math.inf})["seconds"]:
            best[key] = each
    for name in KIND:
        points = [each for each in best.values() if each["route"] == name]
        bits = {"binary": 1.125, "ternary": 1.727}
        x = [2 * e["m"] * e["n"] * e["o"] / (e["m"] * (e["n"] + 2 * e["o"]) + e["n"] * e["o"] * bits[e["encoding"]] / 8)
             for e in points]
        axes.scatter(x, [each["tflops"] for each in points], label=name, s=18)
    span = [10, 10**4]
    for peak, label in ((facts["bf16_flops"], "bf16 product of torch"), (2 * facts["bf16_flops"], "twice that")):
        axes.plot(span, [min(peak, each * facts["copy_bytes_per_second"]) / 1e12 for each in span], "--", label=label)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s",
             title=f"{facts['name']}, torch {facts['torch']}, Triton {facts['triton']}")
    axes.legend()
    figure.savefig(target, dpi=120, bbox_inches="tight")
