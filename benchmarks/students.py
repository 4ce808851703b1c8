"""The teacher and the students of a run folder, judged by GenEval's rules at two sizes.

    PYTHONPATH=src python benchmarks/students.py recipes/embedded/recipe.toml --run runs/embedded
    PYTHONPATH=src python benchmarks/students.py recipes/embedded/recipe.toml --run runs/embedded --table  # again

Pictures of prompts of the test split: four of each of `--count` at the recipe's size, one of each of the first 553 at
the first of its other shapes; the teacher in four steps, as FLUX.2 klein draws, and in the models' own, students in
the models' own.
Results, one folder per model, size and number of steps, lie in `RUN/judged`; what is there already is not drawn again.
Each is drawn by `--shards` processes, of which `--at-once` run side by side. `--table` with a smaller `--count` tells
of the first prompts alone.

The table, Markdown, has scores in percent with their standard errors; `points from teacher` is the difference to
its score at that size in four steps, with its standard error, `keeps` the ratio, `in equal steps` that to the teacher's
in the model's own steps, with 95 % intervals by bootstrap over prompts.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from judging import Judging, judge, outcomes
from quality import interval, plain

from linocut.errors import UsageError
from linocut.eval.rules import GENEVAL_TASKS
from linocut.eval.statistics import compare, scores
from linocut.train.export import export, export_teacher
from linocut.train.recipe import Recipe

TEACHER, STUDENTS = "teacher", ("ternary", "binary")
IMAGES = (4, 1)  # of a prompt, by size
FEW = 553  # prompts at the second size
TEACHER_STEPS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="run folder with teacher and students")
    parser.add_argument("-n", "--count", type=int, default=553, help="prompts")
    parser.add_argument("--detector")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="draw nothing, only tell what is there")
    given = parser.parse_args()
    recipe = Recipe.from_file(given.recipe)
    if not given.table:
        draw(given, recipe)
    print("\n".join(table(recipe, given.run / "judged", given.count)))
    return 0


def sizes(recipe: Recipe) -> list[tuple[int, int]]:
    """Width and height of the pictures that are judged."""
    return [(recipe.data.size, recipe.data.size), *recipe.data.shapes[:1]]


def draw(given: argparse.Namespace, recipe: Recipe) -> None:
    """Pack what was trained, and judge its pictures."""
    out, usual = given.run / "judged", recipe.default_steps or recipe.path.grid
    shared = ["--split", "test", "--device", given.device, "--keep", "none"]
    shared += ["--detector", given.detector] if given.detector else []
    models = []
    for name in (TEACHER, *STUDENTS):
        if not (given.run / name / "model.safetensors").is_file():
            continue
        model = out / "models" / name
        if not model.exists() and name == TEACHER:
            export_teacher(recipe, given.run, model)
        elif not model.exists():
            export(recipe, given.run, model, {name: "transformer"})
        models.append((name, model, TEACHER_STEPS if name == TEACHER else usual))
    # What may be cut for time comes last.
    models += [(name, model, usual) for name, model, steps in models if steps != usual]
    counts = given.count, min(FEW, given.count)
    judge([Judging(out / f"{name}-{width}x{height}-{steps}", [
        "-m", f"{name}={model}", "--size", f"{width}x{height}", "--steps", str(steps), "--images", str(images),
        "-n", str(count), *shared], shard=f"{shard}/{given.shards}")
        for (width, height), images, count in zip(sizes(recipe), IMAGES, counts, strict=False)
        for name, model, steps in models for shard in range(given.shards)], given.at_once)


def table(recipe: Recipe, out: Path, count: int) -> list[str]:
    """All scores in Markdown, by the first `count` prompts of those that were judged."""
    columns = ["size", "model", "steps", *GENEVAL_TASKS, "mean", "points from teacher", "keeps, %", "in equal steps"]
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for (width, height), images in zip(sizes(recipe), IMAGES, strict=False):
        found, tasks = {}, np.empty(0)
        for folder in sorted(out.glob(f"*-{width}x{height}-*/")):
            name, _, steps = folder.name.split("-")
            try:
                found[name, int(steps)], tasks = outcomes(folder, name, images, count)
            except UsageError as error:  # cut before its end
                print(f"{folder.name} is left out: {error}", file=sys.stderr)
        order = sorted(found, key=lambda each: ((TEACHER, *STUDENTS).index(each[0]), each[1]))
        for name, steps in order:
            right = found[name, steps]
            (score,) = scores(right.mean(1)[:, None], tasks)
            each = [f"{100 * right[tasks == task].mean():.2f}" for task in range(len(GENEVAL_TASKS))]
            each.append(plain(score.to_dict()))
            beside = [compare(found[TEACHER, theirs], right, tasks) if (TEACHER, theirs) in found and name != TEACHER
                      else None for theirs in (TEACHER_STEPS, steps)]
            each.append(plain(beside[0].difference.to_dict()) if beside[0] else "")
            each += [interval(one.ratio.to_dict()) if one else "" for one in beside]
            lines.append(f"| {width}x{height} | {name} | {steps} | {' | '.join(each)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
