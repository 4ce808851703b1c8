"""The stages of a recipe by name, in order. Runs alone, or once per GPU under torchrun."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from linocut.errors import UsageError
from linocut.train.recipe import Recipe

STAGES = ("vae", "teacher", "ternary", "binary", "export")


def run_stage(stage: str, recipe: Recipe, run: Path, sprites: Path, device: str | None = None) -> None:
    """Run one stage; its inputs are the results of earlier stages in the run folder."""
    from linocut.train.loop import Ranks

    if stage not in STAGES:
        raise UsageError(f"unknown stage {stage!r}; stages are {', '.join(STAGES)}")
    ranks, begin = Ranks.start(device), time.monotonic()
    if ranks.first:
        print(f"{stage} on {ranks.world} x {ranks.device}", flush=True)
    if stage == "vae":
        from linocut.train.autoencoder import train_vae
        train_vae(recipe, run, sprites, ranks)
    elif stage == "teacher":
        from linocut.train.teacher import train_teacher
        train_teacher(recipe, run, sprites, ranks)
    elif stage == "export":
        from linocut.train.export import export
        if ranks.first:
            export(recipe, run, run / "model")
    else:
        from linocut.train.distill import train_quantized
        train_quantized(recipe, stage, run, ranks)
    if ranks.first:
        print(f"{stage} took {time.monotonic() - begin:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", action="append", choices=STAGES, help="repeatable; all stages if left out")
    parser.add_argument("--sprites", type=Path, default=Path(".cache/sprites"))
    parser.add_argument("--device")
    options = parser.parse_args()
    recipe = Recipe.from_file(options.recipe)
    for stage in options.stage or STAGES:
        run_stage(stage, recipe, options.out, options.sprites, options.device)


if __name__ == "__main__":
    main()
