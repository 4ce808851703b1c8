"""What rounding activations on a GPU costs the embedded models, by GenEval's rules: paired differences with intervals.

    PYTHONPATH=src python benchmarks/gpu_loss.py --detector runs/detector --out runs/loss
    PYTHONPATH=src python benchmarks/gpu_loss.py --out runs/loss --table                   # of what is there already

Both embedded models draw prompts of the test split, four pictures each, from the same noise with float32 products
(`LINOCUT_KERNEL=reference`), then at each level of `LINOCUT_GPU_ACCURACY`. A level is good enough for a model where its
loss is under 1.0 point with 95 % confidence. One process per model and level, `--at-once` of them at a time; a run that
was cut goes on.
"""

import argparse
import contextlib
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from judging import Judging, judge

MODELS = ("embedded", "embedded-binary")
FLOAT = "float"
LEVELS = ("exact", "rows", "fast")
LIMIT = 1.0  # points


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", type=Path, nargs=2, metavar=("TERNARY", "BINARY"), help="default: embedded")
    parser.add_argument("--detector")
    parser.add_argument("-n", "--count", type=int, default=553, help="prompts")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", help="pixels, as in 320x192; default: the models'")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--table", action="store_true", help="draw nothing, only print the table")
    given = parser.parse_args()
    runs = [(model, level) for level in (FLOAT, *LEVELS) for model in MODELS]
    if not given.table:
        draw(given, runs)
    found = table(given.out)
    print("\n".join(found))
    return 0


def draw(given: argparse.Namespace, runs: list[tuple[str, str]]) -> None:
    """All pictures, judged."""
    shared = ["--split", "test", "-n", str(given.count), "--device", given.device, "--keep", "none"]
    shared += ["--detector", given.detector] if given.detector else []
    shared += ["--size", given.size] if given.size else []
    from_folder = dict(zip(MODELS, given.models or (), strict=False))
    judge([Judging(given.out / f"{model}.{level}",
                   ["-m", f"{model}={from_folder[model]}" if given.models else model, *shared],
                   {"LINOCUT_KERNEL": "reference"} if level == FLOAT else {"LINOCUT_GPU_ACCURACY": level})
           for model, level in runs], given.at_once)


def facts() -> dict[str, str]:
    """What this was measured on, if it is measured here."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = {"name": name, "torch": torch.__version__}
    with contextlib.suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return found


def table(out: Path) -> list[str]:
    """Score, difference to float products and its interval, in points, by model and level."""
    from linocut.eval.report import make_report

    lines = [f"{'model':<16} {'level':<6} {'score':>6} {'difference':>10}  {'95 % interval':<16} {'loss at most':>12}"]
    results: dict[str, object] = {"device": facts()}
    for model in MODELS:
        for level in LEVELS:
            report = make_report(out / f"{model}.{level}", out / f"{model}.{FLOAT}" / model)
            (each,) = report["comparisons"]
            low, value, high = (100 * each["difference"][key] for key in ("low", "value", "high"))
            score = 100 * report["scores"][model]["overall"]["value"]
            verdict = "under" if -low < LIMIT else "NOT under"
            lines.append(f"{model:<16} {level:<6} {score:6.2f} {value:+10.2f}  [{low:+.2f}, {high:+.2f}]   "
                         f"{max(0.0, -low):8.2f}: {verdict} {LIMIT}")
            results[f"{model} {level}"] = {"score": score, "difference": value, "low": low, "high": high,
                                           "only_first_right": each["only_first_right"],
                                           "only_second_right": each["only_second_right"],
                                           "kernel": report["arms"][model]["kernel"], "prompts": report["count"],
                                           "images": report["images"]}
        results[f"{model} {FLOAT}"] = 100 * next(iter(report["scores"].values()))["overall"]["value"]
    (out / "table.json").write_text(json.dumps(results, indent=1) + "\n")
    return lines


if __name__ == "__main__":
    sys.exit(main())
