"""The stages of a recipe by name, in order. Runs alone, or once per GPU under torchrun."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from linocut.errors import Cancelled, UsageError

if TYPE_CHECKING:
    from linocut.train.recipe import Recipe

STAGES = ("vae", "teacher", "ternary", "binary", "export")
NEEDS = {"teacher": ("vae",), "ternary": ("vae", "teacher"), "binary": ("vae", "teacher"), "export": ("vae",),
         "teacher-model": ("vae", "teacher")}
WEIGHTS = "model.safetensors"  # what a stage that is over leaves in its folder
SHEETS = ("scenes", "sheet")  # pictures to look at, before and after
ON_REQUEST = (*SHEETS, "teacher-model")  # made when asked for


def run_stage(stage: str, recipe: Recipe, run: Path, sprites: Path, device: str | None = None,
              models: tuple[str, str] | None = None, until: float = math.inf) -> None:
    """Run one stage; its inputs are the results of earlier stages in the run folder.

    `models` (ternary, binary) are what stage `sheet` draws with instead of the exported ones. Steps of training are
    over by `until` (seconds since 1970), or soon after SIGTERM; then the stage writes what it has.
    """
    from linocut.train.loop import Ranks, stop_in_order, stopped

    if stopped():
        raise Cancelled(f"stopped by SIGTERM before stage {stage}")
    if stage not in STAGES + ON_REQUEST:
        raise UsageError(f"unknown stage {stage!r}; stages are {', '.join(STAGES + ON_REQUEST)}")
    _check_inputs(stage, run)
    ranks = Ranks.start(device, until)
    stop_in_order()
    if ranks.first:
        print(f"{stage} on {ranks.world} x {ranks.device}", flush=True)
    if stage == "vae":
        from linocut.train.autoencoder import train_vae
        train_vae(recipe, run, sprites, ranks)
    elif stage == "teacher":
        from linocut.train.teacher import train_teacher
        train_teacher(recipe, run, sprites, ranks)
    elif stage in ("ternary", "binary"):
        from linocut.train.distill import train_quantized
        train_quantized(recipe, stage, run, ranks)
    elif ranks.first and stage == "export":
        from linocut.train.export import export
        export(recipe, run, run / "model")
    elif ranks.first and stage == "teacher-model":
        from linocut.train.export import export_teacher
        export_teacher(recipe, run, run / "teacher-model")
    elif ranks.first:
        from linocut.train.sheet import held_out_sheet, scene_sheet
        if stage == "scenes":
            scene_sheet(recipe, sprites, run / "scenes.png")
        else:
            held_out_sheet(recipe, run, run / "sheet.png", models, device)
    if ranks.first:
        print(f"{stage} took {time.monotonic() - ranks.began:.0f} s", flush=True)


def _check_inputs(stage: str, run: Path) -> None:
    for earlier in NEEDS.get(stage, ()):
        if not (run / earlier / WEIGHTS).is_file():
            raise UsageError(f"{run / earlier}: no result of stage {earlier}, which stage {stage} goes on from; "
                             f"run it first (--stage {earlier})")
    if stage == "export" and not any((run / student / WEIGHTS).is_file() for student in ("ternary", "binary")):
        raise UsageError(f"{run}: no student to export; run stage ternary or binary first")


def main() -> None:
    from linocut.train.loop import leave_group
    from linocut.train.recipe import Recipe

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", action="append", choices=STAGES + ON_REQUEST, help=f"repeatable; default: {STAGES}")
    parser.add_argument("--sprites", type=Path, default=Path(".cache/sprites"))
    parser.add_argument("--device")
    parser.add_argument("--until", type=float, default=math.inf, help="steps end by then, in seconds since 1970")
    parser.add_argument("--rehearse", action="store_true", help="a few steps on little data, to see that all works")
    options = parser.parse_args()
    recipe = Recipe.from_file(options.recipe)
    recipe = recipe.rehearsal() if options.rehearse else recipe
    for stage in options.stage or STAGES:
        run_stage(stage, recipe, options.out, options.sprites, options.device, until=options.until)
    leave_group()


if __name__ == "__main__":
    main()
