"""What came of a run: scores per task, comparisons of the arms, how good the detector is, and failures to look at."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from linocut.errors import UsageError
from linocut.eval.prompts import Metadata, read_prompts
from linocut.eval.rules import GENEVAL_TASKS
from linocut.eval.run import KEPT, PROMPTS, read_description, read_results, results
from linocut.eval.statistics import Comparison, Estimate, compare, scores

if TYPE_CHECKING:
    from PIL.Image import Image

REPORT, SHEET = "report", "failures.png"
_COLUMNS = ("single", "two", "count", "colors", "position", "attr")  # GENEVAL_TASKS as headings


@dataclass(frozen=True)
class Outcomes:
    """Which pictures of an arm are right: bool [prompts, images]."""

    label: str
    correct: np.ndarray


def gather(lines: Sequence[dict[str, Any]], prompts: Sequence[Metadata], images: int, label: str) -> Outcomes:
    """The verdicts in order of the prompts. Raises UsageError if some are missing."""
    index = {metadata["prompt"]: number for number, metadata in enumerate(prompts)}
    correct = np.full((len(prompts), images), -1)
    for line in lines:
        if line["prompt"] in index and line["image"] < images:
            correct[index[line["prompt"]], line["image"]] = line["correct"]
    missing = int((correct < 0).sum())
    if missing:
        raise UsageError(f"{label}: {missing} of {correct.size} pictures are not judged yet; run the missing shards "
                         "(the same command goes on where it stopped)")
    return Outcomes(label, correct == 1)


def make_report(root: Path, baseline: Path | None = None) -> dict[str, Any]:
    """Everything about a run as one JSON document. The first arm, or the arm whose results `baseline` holds (a file, or
    a folder of files, for the same prompts), is what the others are compared with."""
    description = read_description(root)
    prompts = read_prompts(root / PROMPTS)
    images = int(description["images"])
    arms = [gather(results(root, label), prompts, images, label) for label in description["arms"]]
    if baseline is not None:
        files = sorted(baseline.glob("*.jsonl")) if baseline.is_dir() else [baseline]
        lines = [line for file in files for line in read_results(file)]
        label = baseline.stem if baseline.is_file() else baseline.name
        label += " before" if label in description["arms"] else ""
        arms.insert(0, gather(lines, prompts, images, label))
    tasks = np.array([GENEVAL_TASKS.index(metadata["tag"]) for metadata in prompts])
    estimates = scores(np.stack([arm.correct.mean(1) for arm in arms], axis=1), tasks)
    return description | {
        "scores": {arm.label: _scores(arm, estimate, tasks) for arm, estimate in zip(arms, estimates, strict=True)},
        "comparisons": [{"first": arms[0].label, "second": arm.label}
                        | _comparison(compare(arms[0].correct, arm.correct, tasks)) for arm in arms[1:]]}


def _scores(arm: Outcomes, estimate: Estimate, tasks: np.ndarray) -> dict[str, Any]:
    by_task = {GENEVAL_TASKS[task]: {"mean": float(arm.correct[tasks == task].mean()),
                                     "pictures": int(arm.correct[tasks == task].size)}
               for task in sorted(set(tasks.tolist()))}
    return {"overall": estimate.to_dict(), "tasks": by_task, "single_image": float(arm.correct[:, 0].mean())}


def _comparison(found: Comparison) -> dict[str, Any]:
    return {"difference": found.difference.to_dict(), "retained": found.ratio.to_dict(),
            "tasks": {GENEVAL_TASKS[task]: each.to_dict() for task, each in found.tasks.items()},
            "only_first_right": found.lost, "only_second_right": found.won, "mcnemar_p": found.p}


def as_text(report: dict[str, Any]) -> str:
    """The report as a table for people: percent, with standard errors and 95 % intervals."""
    lines = [f"{report['count']} prompts x {report['images']} images, detector {report['detector']}", "",
             f"{'model':<22}" + "".join(f"{name:>10}" for name in _COLUMNS) + f"{'mean':>10}  standard error"]
    for label, row in report["scores"].items():
        means = [row["tasks"].get(task, {}).get("mean", math.nan) for task in GENEVAL_TASKS]
        overall = row["overall"]
        lines.append(f"{label:<22}" + "".join(f"{100 * mean:10.2f}" for mean in means)
                     + f"{100 * overall['value']:10.2f}  {100 * overall['standard_error']:.2f}")
    for each in report["comparisons"]:
        difference, retained = each["difference"], each["retained"]
        kept = "nothing to retain" if retained["value"] is None else (
            f"retained {100 * retained['value']:.2f} % [{100 * retained['low']:.2f}, {100 * retained['high']:.2f}]")
        lines += ["", f"{each['second']} against {each['first']}: {100 * difference['value']:+.2f} points "
                      f"[{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}], {kept}",
                  f"  right in {each['first']} alone {each['only_first_right']}, in {each['second']} alone "
                  f"{each['only_second_right']} pictures, McNemar p = {each['mcnemar_p']:.2g}",
                  "  by task " + "  ".join(f"{task} {100 * row['value']:+.2f} +- {100 * row['standard_error']:.2f}"
                                           for task, row in each["tasks"].items())]
    lines += ["", *accuracy_lines(report.get("detector_accuracy", {}))]
    return "\n".join(lines) + "\n"


def accuracy_lines(accuracy: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """How well the detector judges scenes of known content."""
    if not accuracy:
        return ["The detector's accuracy on scenes of known content was not measured."]
    lines = ["Detector on held-out scenes of known content, share of right judgements:"]
    for way, table in accuracy.items():
        lines.append(f"{way:<22}" + "".join(f"{100 * table[task]['accuracy']:10.2f}" if task in table else f"{'':>10}"
                                            for task in GENEVAL_TASKS)
                     + f"{100 * sum(row['accuracy'] for row in table.values()) / len(table):10.2f}")
    return lines


def write_report(root: Path, report: dict[str, Any]) -> str:
    """Write `report.json` and `report.txt`; returns the text."""
    from linocut.formats.writer import atomic_write_bytes

    text = as_text(report)
    atomic_write_bytes(root / f"{REPORT}.json", (json.dumps(report, indent=1) + "\n").encode())
    atomic_write_bytes(root / f"{REPORT}.txt", text.encode())
    return text


def failure_sheet(root: Path, most: int = 48, columns: int = 8) -> Path | None:
    """Write a sheet of pictures that were judged wrong, tasks and arms in turn, with prompt and reason; None if none
    were kept."""
    from linocut.formats.writer import atomic_write_bytes
    from linocut.train.sheet import Entry, compose, sheet_png

    description, prompts = read_description(root), read_prompts(root / PROMPTS)
    index = {metadata["prompt"]: number for number, metadata in enumerate(prompts)}
    by_kind: dict[tuple[str, str], list[Entry]] = {}
    for label in description["arms"]:
        for line in results(root, label):
            path = root / label / KEPT / f"{index.get(line['prompt'], 0):05d}-{line['image']}.webp"
            if not line["correct"] and path.is_file():
                entries = by_kind.setdefault((line["tag"], label), [])
                if len(entries) < most:
                    entries.append(Entry((_square(path),), line["prompt"], f"{label}: {line['reason']}"[:60]))
    chosen: list[Entry] = []
    for turn in range(most):
        chosen += [entries[turn] for _, entries in sorted(by_kind.items()) if turn < len(entries)]
    if not chosen:
        return None
    atomic_write_bytes(root / SHEET, sheet_png(compose(chosen[:most], (), columns, 1920)))
    return root / SHEET


def _square(path: Path) -> Image:
    """A kept picture in the middle of a white square."""
    from PIL import Image

    picture = Image.open(path).convert("RGB")
    side = max(picture.size)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square
