"""`linocut eval`: benchmarks. A group of commands; what they do is in `linocut.eval`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from linocut.cli._progress import Bar
from linocut.cli._signals import sigterm_interrupts
from linocut.cli.generate import Size
from linocut.cli.train import SPRITES

if TYPE_CHECKING:
    from linocut.eval.detector import Detector

HELP = {"help_option_names": ["-h", "--help"]}
MODELS = ("embedded", "embedded-binary")
DETECTOR_HELP = ("Folder of a detector of the embedded world, as 'linocut eval detector' makes it; default: the one "
                 "that is part of the package. For photographs: coco, or coco:MASK2FORMER,CLIP (folders or hub ids).")


@click.group(context_settings=HELP)
def command() -> None:
    """Judge models by GenEval's rules, and compare them picture by picture.

    \b
    linocut eval geneval --out runs/eval
    linocut eval geneval --prompts evaluation_metadata.jsonl --detector coco -m ./klein-ternary --out runs/klein
    linocut eval fidelity ./teacher embedded
    """


@command.command("prompts", context_settings=HELP)
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--split", type=click.Choice(["dev", "test"]), default="dev", show_default=True,
              help="dev to choose by, test to report; neither's wordings and pairs of things are trained on.")
@click.option("-n", "--count", type=click.IntRange(6), default=553, show_default=True, help="Prompts, tasks in turn.")
@click.option("--images", type=click.IntRange(1), default=4, show_default=True, help="Pictures per prompt, for the "
              "standard error to expect.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed gives other prompts.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
def prompts_command(file: Path, split: str, count: int, images: int, seed: int, force: bool) -> None:
    """Write prompts of the embedded world for GenEval's six tasks to FILE (GenEval's metadata, JSON lines)."""
    from linocut.errors import UsageError
    from linocut.eval.prompts import write_prompts
    from linocut.train.prompts import sample_prompts

    if file.exists() and not force:
        raise UsageError(f"{file}: exists already; choose another name, or add --force")
    write_prompts(file, sample_prompts(split, count, seed))
    click.echo(f"{count} prompts ({split}) in {file}")
    click.echo(_expected(count, images))


def _expected(count: int, images: int) -> str:
    from linocut.eval.prompts import expected_difference_error, expected_error

    lone, paired = 100 * expected_error(count, images), 100 * expected_difference_error(count, images)
    return (f"standard error to expect with {images} pictures each: {lone:.2f} points of a score of 90 %, {paired:.2f} "
            "of a difference between two models")


@command.command("geneval", context_settings=HELP)
@click.option("--out", "root", type=click.Path(path_type=Path), metavar="DIR", required=True,
              help="The folder of the run. The same command goes on where a run was cut.")
@click.option("-m", "--model", "models", multiple=True, metavar="[LABEL=]MODEL",
              help=f"Repeatable; the first is what the others are compared with. Default: {' and '.join(MODELS)}.")
@click.option("--detector", metavar="DETECTOR", help=DETECTOR_HELP)
@click.option("--prompts", "file", type=click.Path(path_type=Path), metavar="FILE",
              help="Prompts in GenEval's metadata form. Default: 553 of the embedded world's split.")
@click.option("--split", type=click.Choice(["dev", "test"]), default="dev", show_default=True,
              help="Of the prompts that are made where no FILE is given.")
@click.option("-n", "--count", type=click.IntRange(6), default=553, show_default=True, help="How many are made.")
@click.option("--images", type=click.IntRange(1, 64), default=4, show_default=True, help="Pictures per prompt.")
@click.option("--size", type=Size(), help="Pixels, as in 320x192; default: the model's.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Default: the model's.")
@click.option("--shard", default="0/1", show_default=True, metavar="I/N", help="Only prompts I, I + N, I + 2N, ...; "
              "'linocut eval report' puts shards together.")
@click.option("--keep", type=click.Choice(["none", "failures", "all"]), default="failures", show_default=True,
              help="Pictures to keep (small), for the sheet of failures.")
@click.option("--against", type=click.Path(path_type=Path), metavar="RESULTS",
              help="Compare with these results (a file or an arm's folder of an earlier run on the same prompts).")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="Such as cpu or cuda:0.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def geneval_command(root: Path, models: tuple[str, ...], detector: str | None, file: Path | None, split: str,
                    count: int, images: int, size: tuple[int, int] | None, steps: int | None, shard: str, keep: str,
                    against: Path | None, device: str, as_json: bool) -> None:
    """Draw and judge every prompt with every model, from the same noise, and report.

    DIR then holds results per picture (JSON lines), report.txt, report.json and failures.png.
    """
    from linocut.eval.arms import Arm, label_of
    from linocut.eval.prompts import read_prompts, refuse_unknown
    from linocut.eval.run import Shard, describe, evaluate
    from linocut.train.prompts import sample_prompts

    part = Shard.parse(shard)
    width, height = size or (None, None)
    labels: list[tuple[str, str]] = []
    for model in models or MODELS:
        labels.append(label_of(model, [label for label, _ in labels]))
    judge = _detector(detector, device)
    prompts = sample_prompts(split, count) if file is None else read_prompts(file)
    refuse_unknown(prompts, judge.classes, judge.colours)
    arms = [Arm(label, model, device, width, height, steps) for label, model in labels]
    describe(root, prompts, {"detector": judge.identity, "images": images, "detector_accuracy": judge.accuracy,
                             "arms": {arm.label: arm.facts for arm in arms}})
    with sigterm_interrupts():
        for arm in arms:
            with Bar(f"{arm.label}") as bar:
                evaluate(arm, judge, prompts, images, root, part, keep, bar.update)
    if part.count > 1:
        click.echo(f"shard {shard} is judged; when all are, 'linocut eval report {root}' puts them together")
        return
    _report(root, against, as_json)


@command.command("report", context_settings=HELP)
@click.argument("root", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--against", type=click.Path(path_type=Path), metavar="RESULTS", help="As in 'linocut eval geneval'.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def report_command(root: Path, against: Path | None, as_json: bool) -> None:
    """Put the results in DIR together: report.txt, report.json, failures.png."""
    _report(root, against, as_json)


def _report(root: Path, against: Path | None, as_json: bool) -> None:
    import json

    from linocut.eval.report import failure_sheet, make_report, write_report

    report = make_report(root, against)
    text = write_report(root, report)
    failure_sheet(root)
    click.echo(json.dumps(report, indent=2) if as_json else text, nl=as_json)


@command.command("detector", context_settings=HELP)
@click.argument("recipe", type=click.Path(path_type=Path), metavar="RECIPE")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", required=True, help="Folder of the detector.")
@click.option("--sprites", type=click.Path(path_type=Path), default=SPRITES, show_default=True, metavar="DIR",
              help="Folder of the sprites that scenes are drawn with.")
@click.option("--device", metavar="NAME", help="Such as cpu or cuda:1. Default: this process's GPU, else the CPU.")
@click.option("--until", type=float, default=math.inf, help="Steps end by then, in seconds since 1970.")
@click.option("--measure", is_flag=True, help="Do not train: measure the detector in DIR again.")
def detector_command(recipe: Path, out: Path, sprites: Path, device: str | None, until: float, measure: bool) -> None:
    """Train the detector of the embedded world by RECIPE (recipes/embedded/detector.toml), and measure it."""
    from linocut.eval.world_training import DetectorRecipe, measure_again, train_detector
    from linocut.train.loop import leave_group

    if measure:
        measure_again(DetectorRecipe.from_file(recipe), out, sprites, device)
        return
    train_detector(DetectorRecipe.from_file(recipe), out, sprites, device, until)
    leave_group()


@command.command("fidelity", context_settings=HELP)
@click.argument("teacher", metavar="TEACHER")
@click.argument("students", nargs=-1, required=True, metavar="STUDENT...")
@click.option("--prompts", "file", type=click.Path(path_type=Path), metavar="FILE",
              help="Prompts in GenEval's metadata form. Default: the embedded world's split dev.")
@click.option("-n", "--count", type=click.IntRange(2), default=64, show_default=True, help="Prompts to draw.")
@click.option("--size", type=Size(), help="Pixels; default: the teacher's.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Default: the teacher's.")
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="Such as cpu or cuda:0.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fidelity_command(teacher: str, students: tuple[str, ...], file: Path | None, count: int,
                     size: tuple[int, int] | None, steps: int | None, device: str, as_json: bool) -> None:
    """How closely STUDENTs follow TEACHER from the same noise: pictures, velocities, and sensitivity to the prompt."""
    import json

    from linocut.eval.arms import Arm, label_of
    from linocut.eval.fidelity import as_text, measure_fidelity
    from linocut.eval.prompts import read_prompts
    from linocut.train.prompts import sample_prompts

    metadata = sample_prompts("dev", count) if file is None else read_prompts(file)[:count]
    width, height = size or (None, None)
    first = Arm("teacher", label_of(teacher)[1], device, width, height, steps)
    same = first.request
    measured: dict[str, Any] = {}
    for student in students:
        label, model = label_of(student, list(measured))
        arm = Arm(label, model, device, same.width, same.height, same.steps)
        with sigterm_interrupts(), Bar(label) as bar:
            measured[label] = measure_fidelity(first, arm, [each["prompt"] for each in metadata], bar.update)
    click.echo(json.dumps(measured, indent=2) if as_json else as_text(measured))


def _detector(name: str | None, device: str) -> Detector:
    """The detector that an argument names, or without one that of the package."""
    from linocut.errors import UsageError
    from linocut.eval.world_detector import SHIPPED, WorldDetector

    if name is None:
        if not SHIPPED.is_dir():
            raise UsageError("this installation has no detector of its own; train one ('linocut eval detector') and "
                             "say --detector DIR")
        return WorldDetector(SHIPPED, device)
    kind, _, rest = name.partition(":")
    if kind == "coco":
        from linocut.eval.coco_detector import CLIP, MASK2FORMER, CocoDetector

        finder, _, clip = rest.partition(",")
        return CocoDetector(finder or MASK2FORMER, clip or CLIP, device)
    return WorldDetector(Path(name), device)
