"""What each part of the recipe is worth: the arms of a study, judged by GenEval's rules against their teacher.

    python -m linocut.train.study recipes/embedded/quality.toml --run runs/embedded --out runs/quality   # trains arms
    python benchmarks/quality.py recipes/embedded/quality.toml --run runs/embedded --out runs/quality    # judges them
    python benchmarks/quality.py ... --table --plot docs/quality.png                                     # tells again

Every arm that is trained (or each `--arm` of each `--encoding`) draws prompts of the test split, four pictures each,
from the same noise as the teacher, in `--shards` processes, of which `--at-once` run side by side. The table, Markdown,
is of all arms that are judged. It has for each encoding

- steps: of training, up to the last one that was logged;
- score: mean of the six tasks' means in percent, with its standard error;
- keeps: its ratio to the teacher's, in percent;
- from usual: the difference to the arm `usual`, in points, and McNemar's p;
- gap closed: the share of the way from `usual` to the teacher;
- from ours: the difference to the arm `ours`, in points: what the arm's one change brings;
- PSNR and edges: likeness to the teacher's pictures, and their sharpness beside it (`linocut.train.study.measure`).

Intervals are of 95 %, by bootstrap over prompts. `quality.json`, beside the results in `OUT/judged-COUNT`, has it all,
with the device and versions.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gpu_loss import facts
from judging import Judging, judge, outcomes

from linocut.eval.rules import GENEVAL_TASKS
from linocut.eval.statistics import compare, gap_closed, scores
from linocut.train.export import export_teacher
from linocut.train.study import ENCODINGS, MODEL, REPORT, Study

TEACHER, USUAL, OURS, IMAGES = "teacher", "usual", "ours", 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="run folder with the autoencoder and the teacher")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study's arms")
    parser.add_argument("--arm", action="append", help="repeatable; default: all that are trained")
    parser.add_argument("--encoding", action="append", choices=ENCODINGS, help="repeatable; default: both")
    parser.add_argument("-n", "--count", type=int, default=553, help="prompts")
    parser.add_argument("--steps", type=int, help="default: the models'")
    parser.add_argument("--size", help="pixels, as in 320x192; default: the models'")
    parser.add_argument("--detector")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="draw nothing, only tell what is there")
    parser.add_argument("--plot", type=Path, help="write the scores as a picture, too")
    given = parser.parse_args()
    study = Study.from_file(given.study)
    if unknown := set(given.arm or ()) - set(study.arms):
        raise SystemExit(f"unknown arms {sorted(unknown)}; the study has {', '.join(study.arms)}")
    trained = [(arm, encoding) for encoding in ENCODINGS for arm in study.arms
               if (given.out / arm / REPORT.format(encoding)).is_file()]
    arms = [(arm, encoding) for arm, encoding in trained
            if arm in (given.arm or study.arms) and encoding in (given.encoding or ENCODINGS)]
    missing = set(given.arm or study.arms) - {arm for arm, _ in arms}
    if missing and (given.arm or not arms):
        raise SystemExit(f"{given.out}: not trained yet: {', '.join(sorted(missing))}; run linocut.train.study first")
    judged = given.out / "-".join(["judged", str(given.count), *([given.size] if given.size else []),
                                   *([f"{given.steps}-steps"] if given.steps else [])])
    if not given.table:
        draw(given, study, arms, judged)
    there = [(arm, encoding) for arm, encoding in trained if (judged / f"{arm}.{encoding}").is_dir()]
    found = compared(given.out, there, judged)
    (judged / "quality.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(table(found)))
    if given.plot:
        plot(found, given.plot)
    return 0


def draw(given: argparse.Namespace, study: Study, arms: list[tuple[str, str]], judged: Path) -> None:
    """Judge the pictures of what was trained, and the teacher's."""
    teacher = given.out / "teacher-model"
    if not teacher.exists():
        partial = teacher.with_suffix(".partial")
        export_teacher(study.base, given.run, partial)
        partial.rename(teacher)
    models = {f"{arm}.{encoding}": given.out / arm / MODEL.format(encoding) for arm, encoding in arms}
    complete(given.out, list(models.values()))
    models = {TEACHER: teacher} | models
    shared = ["--split", "test", "-n", str(given.count), "--images", str(IMAGES), "--device", given.device,
              "--keep", "none"]
    for name in ("steps", "size", "detector"):
        shared += [f"--{name}", str(getattr(given, name))] if getattr(given, name) else []
    judge([Judging(judged / label, ["-m", f"{label}={model}", *shared], shard=f"{shard}/{given.shards}")
           for label, model in models.items() for shard in range(given.shards)], given.at_once)


def complete(out: Path, models: list[Path]) -> None:
    """Arms may come home from a lent machine as transformers alone; the rest is the same for all arms in `out`."""
    whole = [index.parent for index in sorted(out.glob("*/model-*/model_index.json"))]
    for model in models:
        if whole and model not in whole:
            shutil.copytree(whole[0], model, ignore=shutil.ignore_patterns("transformer"), dirs_exist_ok=True)


def compared(out: Path, arms: list[tuple[str, str]], judged: Path) -> dict[str, Any]:
    """All figures by encoding and arm."""
    right = {}
    for label in [TEACHER, *(f"{arm}.{encoding}" for arm, encoding in arms)]:
        right[label], tasks = outcomes(judged / label, label, IMAGES)
    estimates = dict(zip(right, scores(np.stack([each.mean(1) for each in right.values()], 1), tasks), strict=True))
    found: dict[str, Any] = {"device": facts(), "prompts": len(tasks), "images": IMAGES,
                             TEACHER: {"score": estimates[TEACHER].to_dict(), "tasks": by_task(right[TEACHER], tasks)}}
    for arm, encoding in arms:
        label = f"{arm}.{encoding}"
        usual, ours = (right.get(f"{other}.{encoding}") for other in (USUAL, OURS))
        row: dict[str, Any] = {"score": estimates[label].to_dict(),
                               "keeps": compare(right[TEACHER], right[label], tasks).ratio.to_dict(),
                               "tasks": by_task(right[label], tasks),
                               "training": json.loads((out / arm / REPORT.format(encoding)).read_text())}
        if usual is not None and arm != USUAL:
            against = compare(usual, right[label], tasks)
            row |= {"difference": against.difference.to_dict(), "mcnemar_p": against.p,
                    "gap_closed": gap_closed(right[TEACHER], usual, right[label], tasks).to_dict()}
        if ours is not None and arm != OURS:
            row["from_ours"] = compare(ours, right[label], tasks).difference.to_dict()
        found.setdefault(encoding, {})[arm] = row
    return found


def by_task(right: np.ndarray, tasks: np.ndarray) -> dict[str, float]:
    """The share of right pictures in each task."""
    return {name: float(right[tasks == index].mean()) for index, name in enumerate(GENEVAL_TASKS)}


def plain(each: dict[str, Any]) -> str:
    """Value and standard error in percent."""
    return f"{100 * each['value']:.2f} +- {100 * each['standard_error']:.2f}"


def interval(each: dict[str, Any], digits: int = 1, sign: str = "") -> str:
    """Value and interval in percent; nothing for a ratio to nothing."""
    if None in each.values():
        return "none"
    value, low, high = (f"{round(100 * each[key], digits) + 0.0:{sign}.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def table(found: dict[str, Any]) -> list[str]:
    """The comparison in Markdown."""
    lines = [f"{found['prompts']} prompts x {found['images']}, {found['device']['name']}; teacher "
             f"{plain(found[TEACHER]['score'])}", "",
             "| encoding | arm | steps | score | keeps | from usual | gap closed | from ours | PSNR | edges |",
             "|---|---|" + "---:|" * 8]
    for encoding in ENCODINGS:
        for arm, row in sorted(found.get(encoding, {}).items(), key=lambda each: -each[1]["score"]["value"]):
            trained = row["training"]
            beside = ["", "", interval(row["from_ours"], sign="+") if "from_ours" in row else ""]
            if "difference" in row:
                beside[:2] = [f"{interval(row['difference'], sign='+')}, p {row['mcnemar_p']:.1g}",
                              interval(row["gap_closed"], 0)]
            lines.append("| " + " | ".join([
                encoding, arm, f"{trained['steps']:,}", plain(row["score"]), interval(row["keeps"]), *beside,
                f"{trained['psnr_default']:.2f}", f"{trained['edges_default']:.3f}"]) + " |")
    return lines


def plot(found: dict[str, Any], file: Path) -> None:
    """Scores with their intervals, an axis for each encoding, the teacher as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    encodings = [encoding for encoding in ENCODINGS if encoding in found]
    figure, axes = pyplot.subplots(1, len(encodings), figsize=(5 * len(encodings), 3.2), squeeze=False,
                                   layout="constrained")
    for axis, encoding in zip(axes[0], encodings, strict=True):
        arms = sorted(found[encoding].items(), key=lambda each: each[1]["score"]["value"])
        for place, (_, row) in enumerate(arms):
            score = row["score"]
            axis.plot([100 * score["low"], 100 * score["high"]], [place, place], color="#7a1f3d", linewidth=2)
            axis.plot(100 * score["value"], place, "o", color="#7a1f3d")
        axis.axvline(100 * found[TEACHER]["score"]["value"], color="#444", linestyle="--", linewidth=1)
        axis.set(yticks=range(len(arms)), yticklabels=[arm for arm, _ in arms], title=encoding,
                 xlabel="mean of six tasks, % (dashed: teacher)")
        axis.locator_params("x", nbins=6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
