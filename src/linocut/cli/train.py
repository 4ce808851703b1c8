"""`linocut train`: run the stages of a recipe. Under torchrun, every process runs this command on its own GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from linocut.train.stages import ON_REQUEST, STAGES

if TYPE_CHECKING:
    from linocut.train.model_recipe import ModelRecipe

# Written out so that a checkout needs no option; fetched by recipes/embedded/fetch_sprites.py.
SPRITES = Path(".cache/sprites")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option("--out", "run", type=click.Path(path_type=Path), metavar="DIR", required=True,
              help="The run folder: every stage leaves its result here and finds those of earlier stages.")
@click.option("--stage", "stages", multiple=True, type=click.Choice(STAGES + ON_REQUEST),
              help=f"Repeatable. Left out: {', '.join(STAGES)}, one after another.")
@click.option("--sprites", type=click.Path(path_type=Path), default=SPRITES, show_default=True, metavar="DIR",
              help="Folder of the sprites that scenes are drawn with.")
@click.option("--device", metavar="NAME", help="Such as cpu or cuda:1. Default: this process's GPU, else the CPU.")
@click.option("--rehearse", is_flag=True, help="A few steps on little data, to see that all works; a recipe for a "
              "model that exists trains a toy of its structure instead.")
@click.option("--benchmark", type=click.IntRange(3, 10_000), metavar="STEPS",
              help="For a recipe for a model that exists: so many steps with random weights of its shapes, then tell "
              "memory, samples a second, and hours and cost of the whole.")
@click.option("--price", type=click.FloatRange(0), default=3.0, show_default=True,
              help="Of one GPU for an hour, for --benchmark.")
@click.option("--json", "as_json", is_flag=True, help="Print the result of --benchmark as JSON.")
@click.option("--models", nargs=2, metavar="TERNARY BINARY",
              help="Models that stage sheet draws with, instead of those in DIR/model.")
def command(recipe_file: Path, run: Path, stages: tuple[str, ...], sprites: Path, device: str | None,
            rehearse: bool, benchmark: int | None, price: float, as_json: bool, models: tuple[str, str] | None) -> None:
    """Train a model by RECIPE (a TOML file), distil it into ternary and binary weights, and export it.

    Stage `teacher-model` writes the teacher as a model folder too (DIR/teacher-model), to draw with it and judge it.
    Two more stages make pictures to look at: `scenes` (DIR/scenes.png, what is trained on, with captions) and `sheet`
    (DIR/sheet.png, the held-out prompts as drawn by teacher, ternary and binary model).

    A recipe that names a `source` distils that model, from prompts alone; its stages are `ternary` and `binary`, which
    leave packed models at DIR/model-ternary and DIR/model-binary. Under torchrun the student is dealt out among the
    processes.

    \b
    linocut train recipes/embedded/recipe.toml --out runs/embedded --stage scenes
    linocut train recipes/embedded/recipe.toml --out runs/embedded
    torchrun --nproc-per-node 2 -m linocut train recipes/embedded/recipe.toml --out runs/embedded
    linocut train recipes/klein-4b.toml --out runs/klein --stage ternary
    """
    from linocut.errors import UsageError
    from linocut.train.loop import leave_group
    from linocut.train.model_recipe import read_recipe
    from linocut.train.recipe import Recipe
    from linocut.train.stages import run_stage

    if models and "sheet" not in stages:
        raise UsageError("--models is for stage sheet; add --stage sheet or leave it out")
    if run.exists() and not run.is_dir():
        raise UsageError(f"{run}: is a file; --out names a folder")
    distilled = read_recipe(recipe_file)
    if distilled is not None:
        _distil(distilled.rehearsal() if rehearse else distilled, run, stages, device, benchmark, price, as_json)
        leave_group()
        return
    if benchmark is not None:
        raise UsageError("--benchmark is for a recipe for a model that exists, one with a key `source`")
    recipe = Recipe.from_file(recipe_file)
    recipe = recipe.rehearsal() if rehearse else recipe
    for stage in stages or STAGES:
        run_stage(stage, recipe, run, sprites, device, models or None)
    leave_group()


def _distil(recipe: ModelRecipe, run: Path, stages: tuple[str, ...], device: str | None, steps: int | None,
            price: float, as_json: bool) -> None:
    """Run the stages of a recipe for a model that exists, or measure what they would take."""
    import json

    from linocut.errors import UsageError
    from linocut.train.loop import Ranks, stop_in_order
    from linocut.train.model_distill import benchmark, distil_model, print_benchmark

    known = ("ternary", "binary")
    if set(stages) - set(known):
        raise UsageError(f"a recipe for a model that exists has the stages {' and '.join(known)}, found "
                         f"{', '.join(sorted(set(stages) - set(known)))}")
    ranks = Ranks.start(device)
    stop_in_order()
    for encoding in stages or known:
        if steps is None:
            if ranks.first:
                click.echo(f"{encoding} on {ranks.world} x {ranks.device}")
            distil_model(recipe, encoding, run, ranks)
            continue
        found = benchmark(recipe, encoding, run, ranks, steps, price)
        if ranks.first:
            click.echo(json.dumps(found) if as_json else "\n".join(print_benchmark(found)))
