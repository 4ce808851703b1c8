"""The picture of what `gpu.py` measured: products under the device's roofs, and steps beside those of others."""

import json
import math
from pathlib import Path
from typing import Any

from linocut.kernels.gpu.accuracy import KIND

_BITS = {"binary": 1.125, "ternary": 1.727}
_SPAN = [10.0, 10.0**4]  # operations per byte
_GREY, _GREEN = "#9a9a9a", "#2e7d5b"


def plot(source: Path, target: Path) -> None:
    """Left: TFLOP/s of each route's best tile against operations per byte moved. Right: milliseconds of steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(source.read_text())
    facts = content["device"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 5.6), width_ratios=(1, 1.1), layout="constrained")
    _roofline(left, content["tune"], facts)
    _steps(right, content)
    figure.suptitle(f"{facts['name']}, torch {facts['torch']}, Triton {facts['triton']}; klein 4B's shapes")
    figure.savefig(target, dpi=100)


def _roofline(axes: Any, tuned: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for each in tuned:
        key = (each["route"], each["m"], each["n"], each["o"], each["encoding"])
        if 0 < (each["seconds"] or 0) < best.get(key, {"seconds": math.inf})["seconds"]:
            best[key] = each
    for name in KIND:
        points = [each for each in best.values() if each["route"] == name]
        axes.scatter([_intensity(each) for each in points], [each["tflops"] for each in points], label=name, s=18)
    bandwidth = facts["copy_bytes_per_second"]
    for peak, label, style in ((facts["bf16_flops"], "bf16 product of torch", "--"),
                               (2 * facts["bf16_flops"], "twice that (8 bits)", ":")):
        corners = [_SPAN[0], peak / bandwidth, _SPAN[1]]
        axes.plot(corners, [min(peak, each * bandwidth) / 1e12 for each in corners], style, color="black", label=label)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte moved", ylabel="TFLOP/s",
             title="Products of a step, unpacking included")
    axes.legend(fontsize=8)


def _intensity(each: dict[str, Any]) -> float:
    """Operations per byte that has to move: activations in eight bits, packed weights, results in bfloat16."""
    m, n, o = each["m"], each["n"], each["o"]
    return float(2 * m * n * o / (m * (n + 2 * o) + n * o * _BITS[each["encoding"]] / 8))


def _steps(axes: Any, content: dict[str, Any]) -> None:
    rows = [(each, "gemlite" not in each["what"] and "dense" not in each["what"])
            for section in ("dense", "compiled", "gemlite", "step") for each in content.get(section, ())
            if "product" not in each["what"] and "cuDNN" not in each["what"]]
    rows.sort(key=lambda row: (row[0]["side"], row[1], -row[0]["seconds"]))
    places = [i + (row[0]["side"] > rows[0][0]["side"]) for i, row in enumerate(rows)]
    bars = axes.barh(places, [1e3 * each["seconds"] for each, _ in rows],
                     color=[_GREEN if ours else _GREY for _, ours in rows])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_yticks(places, [f"{each['side']} px  {each['what'].removeprefix('linocut ')}" for each, _ in rows],
                    fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="milliseconds of one denoising step", title="A step: packed (green) and others")
