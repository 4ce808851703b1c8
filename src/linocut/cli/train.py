"""`linocut train`: run the stages of a recipe. Under torchrun, every process runs this command on its own GPU."""

from __future__ import annotations

from pathlib import Path

import click

from linocut.train.stages import ON_REQUEST, STAGES

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
@click.option("--models", nargs=2, metavar="TERNARY BINARY",
              help="Models that stage sheet draws with, instead of those in DIR/model.")
def command(recipe_file: Path, run: Path, stages: tuple[str, ...], sprites: Path, device: str | None,
            models: tuple[str, str] | None) -> None:
    """Train a model by RECIPE (a TOML file), distil it into ternary and binary weights, and export it.

    Stage `teacher-model` writes the teacher as a model folder too (DIR/teacher-model), to draw with it and judge it.
    Two more stages make pictures to look at: `scenes` (DIR/scenes.png, what is trained on, with captions) and `sheet`
    (DIR/sheet.png, the held-out prompts as drawn by teacher, ternary and binary model).

    \b
    linocut train recipes/embedded/recipe.toml --out runs/embedded --stage scenes
    linocut train recipes/embedded/recipe.toml --out runs/embedded
    torchrun --nproc-per-node 2 -m linocut train recipes/embedded/recipe.toml --out runs/embedded
    """
    from linocut.errors import UsageError
    from linocut.train.recipe import Recipe
    from linocut.train.stages import run_stage

    if models and "sheet" not in stages:
        raise UsageError("--models is for stage sheet; add --stage sheet or leave it out")
    recipe = Recipe.from_file(recipe_file)
    if run.exists() and not run.is_dir():
        raise UsageError(f"{run}: is a file; --out names a folder")
    for stage in stages or STAGES:
        run_stage(stage, recipe, run, sprites, device, models or None)
