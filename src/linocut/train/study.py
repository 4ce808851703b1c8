"""Ways of training compared: arms of a study share one teacher and one beginning and get equal time.

    python -m linocut.train.study recipes/embedded/study.toml --run runs/embedded --out runs/study            # all arms
    python -m linocut.train.study recipes/embedded/study.toml --run runs/embedded --out runs/study --arm muon

An arm is the recipe with other settings: `[qat]`, for all arms, and `[arms.NAME.qat]` replace settings of stages
`ternary` and `binary`, `[path]` and `[arms.NAME.path]` those of the path. Each arm and encoding is one process on one
GPU, `--devices` of them at a time, and leaves `OUT/ARM/ENCODING.report.json` and a model folder, `model-ENCODING`,
when it is over; what is there is not run again, and what was cut goes on from its saved state. All arms draw squares,
whatever shapes the recipe has, and are measured alike, by the path of `[path]` or else the recipe's. The table is
sorted by the likeness of pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from linocut.errors import UsageError
from linocut.formats.writer import atomic_write_bytes
from linocut.train.recipe import PathSettings, QatSettings, Recipe, section
from linocut.train.stages import WEIGHTS

ENCODINGS = ("ternary", "binary")
SHARED = ("teacher", "vae", "tokenizer")  # of the run folder
PROMPTS = 256  # of split dev, on which arms are measured
SETUP = 30.0  # seconds of an arm beside its training, about
REPORT, MODEL = "{}.report.json", "model-{}"  # what is left of an arm and encoding, beside the student itself


@dataclass(frozen=True)
class Study:
    """Arms by name, each a recipe, and the recipe that they vary."""

    arms: dict[str, Recipe]
    base: Recipe
    seconds: float

    @classmethod
    def from_file(cls, path: Path, seconds: float | None = None) -> Study:
        """Read a study. Raises UsageError for an unreadable file, an unknown key or a setting that does not fit."""
        try:
            table = tomllib.loads(path.read_text("utf-8"))
            base = Recipe.from_file(path.parent / table["recipe"])
            base = replace(base, data=replace(base.data, shapes=()), path=_path(base, table.get("path", {}), path))
            limit = float(seconds or table["seconds"])
            arms = {name: _arm(base, table.get("qat", {}), changes, limit, path)
                    for name, changes in table["arms"].items()}
        except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
            raise UsageError(f"{path}: not a readable study (keys recipe and seconds, tables arms.NAME, perhaps qat "
                             f"and path): {error!r}") from error
        return cls(arms, base, limit)


def _arm(base: Recipe, shared: dict[str, Any], changes: dict[str, Any], seconds: float, path: Path) -> Recipe:
    if unknown := set(changes) - {"qat", "path"}:
        raise UsageError(f"{path}: unknown tables {sorted(unknown)} of an arm; known are qat and path")
    qat = shared | changes.get("qat", {})
    section(QatSettings, {"qat": qat}, "qat", path)
    if "start" in qat:
        raise UsageError(f"{path}: all arms of a study have one beginning; take start out")
    qat = {"start": "", "max_seconds": seconds} | qat
    arm = replace(base, path=_path(base, changes.get("path", {}), path), ternary=replace(base.ternary, **qat),
                  binary=replace(base.binary, **qat))
    arm.check(path)
    return arm


def _path(base: Recipe, changes: dict[str, Any], path: Path) -> PathSettings:
    """The recipe's path with other settings."""
    wanted = section(PathSettings, {"path": changes}, "path", path)
    return replace(base.path, **{key: getattr(wanted, key) for key in changes})


def run_arm(recipe: Recipe, base: Recipe, encoding: str, run: Path, folder: Path, device: str | None) -> None:
    """Train one student of the teacher in `run` and leave it, packed too, and its report by `base`, in `folder`."""
    from linocut.train.distill import train_quantized
    from linocut.train.export import export
    from linocut.train.loop import Ranks, stop_in_order

    folder.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        with suppress(FileExistsError):  # the arm's other encoding may begin at the same time
            (folder / name).symlink_to((run / name).resolve())
    ranks = Ranks.start(device)
    stop_in_order()
    if not (folder / encoding / WEIGHTS).is_file():  # else only what follows was cut
        train_quantized(recipe, encoding, folder, ranks)
    last = json.loads((folder / f"{encoding}.jsonl").read_text().splitlines()[-1])
    found = measure(replace(recipe, path=base.path), encoding, folder, ranks.device)
    found |= {"seconds": last["seconds"], "steps": last["step"] + 1}
    export(recipe, folder, folder / MODEL.format(encoding), {encoding: "transformer"})
    atomic_write_bytes(folder / REPORT.format(encoding), (json.dumps(found) + "\n").encode())


def measure(recipe: Recipe, encoding: str, folder: Path, device: Any) -> dict[str, Any]:
    """How far a student is from the teacher on prompts of split dev, drawn from the same noise.

    `errors`: mean squared error of the velocity by step of the grid, on the teacher's path. `picture`: squared error of
    the final latents on the student's own path over the variance of the teacher's. `psnr` in dB, of decoded pictures.
    `psnr_default`: the same where both draw in the recipe's default number of steps, as the exported model will.
    `edges`, `edges_default`: the student's contrast between neighbouring pixels over the teacher's; below 1 lies
    a blur, which PSNR likes.
    """
    import torch

    from linocut.pipeline.sampler import sigmas
    from linocut.train.autoencoder import load_vae
    from linocut.train.dataset import Captions, edges, make_tokenizer, psnr
    from linocut.train.export import quantized
    from linocut.train.guidance import Teacher
    from linocut.train.loop import autocast
    from linocut.train.painter import Painter, grid_levels
    from linocut.train.prompts import sample_prompts
    from linocut.train.teacher import held_out_noise
    from linocut.train.weights import load_weights

    painter, vae = Painter.load(recipe, folder / "teacher", device), load_vae(recipe, folder, device)
    tokenizer = make_tokenizer(recipe, folder / "tokenizer")
    teacher = Teacher(recipe, painter, tokenizer)
    student = quantized(recipe, encoding).eval().requires_grad_(False)
    load_weights(student, folder / encoding)
    student.to(device)
    count = PROMPTS if device.type == "cuda" else 8
    texts = [prompt["prompt"] for prompt in sample_prompts("dev", count)]
    captions = Captions.build(tokenizer, texts, device)
    levels, noise = grid_levels(recipe), held_out_noise(recipe, count, device)
    errors, wrong, energy, found = [0.0] * recipe.path.grid, 0.0, 0.0, dict[str, float]()
    finer = sigmas(recipe.tokens[0] * recipe.tokens[1], recipe.default_steps or recipe.path.grid).tolist()

    def compare(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        drawn, wanted = (vae.image_from_latents(z.transpose(1, 2).unflatten(2, recipe.tokens)).clamp(-1, 1)
                         for z in (ours, theirs))
        for key, value in ((f"psnr{name}", psnr(drawn, wanted)), (f"edges{name}", edges(drawn) / edges(wanted))):
            found[key] = found.get(key, 0.0) + value * len(ours) / count

    with torch.no_grad():
        for rows in torch.arange(count, device=device).split(64):
            with autocast(device):
                text, own = (reader.read(*captions.pick(rows)) for reader in (teacher, student))
            x = noise[rows]
            for stage, (here, there) in enumerate(pairwise(levels)):
                parts = recipe.path.substeps[stage]
                onward = teacher.walk(x, text, [here + (there - here) * i / parts for i in range(parts + 1)])
                with autocast(device):
                    v = student.velocity(x, own, torch.full((len(rows),), here, device=device))
                errors[stage] += float((v - (onward - x) / (there - here)).square().mean()) * len(rows) / count
                x = onward
            drawn = student.walk(noise[rows], own, levels)
            wrong, energy = wrong + float((drawn - x).square().sum()), energy + float((x - x.mean()).square().sum())
            compare("", drawn, x)
            compare("_default", student.walk(noise[rows], own, finer), teacher.walk(noise[rows], text, finer))
    return {"errors": errors, "picture": wrong / energy, **found}


def conduct(options: argparse.Namespace, jobs: list[tuple[str, str]]) -> bool:
    """Run arms that are not done yet, one per device at a time. Whether all that began came to a good end."""
    waiting, running, good = list(jobs), dict[int, subprocess.Popen[bytes]](), True
    while waiting or running:
        if waiting and time.time() + options.expected > options.until:
            print(f"no time for {', '.join(' '.join(job) for job in waiting)}", flush=True)
            waiting.clear()
        for slot in range(options.devices):
            if slot in running and running[slot].poll() is not None:
                good = not running.pop(slot).returncode and good
            if slot not in running and waiting:
                arm, encoding = waiting.pop(0)
                options.out.mkdir(parents=True, exist_ok=True)
                with (options.out / f"{arm}.{encoding}.log").open("ab") as log:
                    command = [sys.executable, "-m", "linocut.train.study", str(options.study), "--arm", arm,
                               "--encoding", encoding, "--run", str(options.run), "--out", str(options.out)]
                    command += ["--seconds", str(options.seconds)] if options.seconds else []
                    command += ["--device", options.device] if options.device else []
                    running[slot] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                                     env=os.environ | {"CUDA_VISIBLE_DEVICES": str(slot)})
        time.sleep(0.2)
    return good


def table(out: Path, names: list[str]) -> str:
    """All reports, best first."""
    found = [(arm, encoding, json.loads((out / arm / REPORT.format(encoding)).read_text()))
             for arm in names for encoding in ENCODINGS if (out / arm / REPORT.format(encoding)).is_file()]
    found.sort(key=lambda row: (ENCODINGS.index(row[1]), -row[2]["psnr_default"]))
    lines = [f"{'arm':16} {'encoding':8} {'PSNR':>6} {'(grid)':>6} {'edges':>6} {'picture':>8}  error by step"]
    lines += [f"{arm:16} {encoding:8} {report['psnr_default']:6.2f} {report['psnr']:6.2f} "
              f"{report.get('edges_default', math.nan):6.3f} {report['picture']:8.4f}  "
              + " ".join(f"{error:.4f}" for error in report["errors"]) for arm, encoding, report in found]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="run folder with the autoencoder and the teacher")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arm", action="append", help="repeatable; default: all")
    parser.add_argument("--encoding", action="append", choices=ENCODINGS, help="repeatable; default: both")
    parser.add_argument("--seconds", type=float, help="of training per arm, instead of the study's")
    parser.add_argument("--devices", type=int, default=1, help="GPUs to use side by side")
    parser.add_argument("--until", type=float, default=math.inf, help="seconds since 1970; arms that would take longer "
                                                                      "are left for another time")
    parser.add_argument("--device")
    options = parser.parse_args()
    study = Study.from_file(options.study, options.seconds)
    options.expected = study.seconds + SETUP
    names, encodings = options.arm or list(study.arms), options.encoding or list(ENCODINGS)
    if unknown := set(names) - set(study.arms):
        raise SystemExit(f"unknown arms {sorted(unknown)}; the study has {', '.join(study.arms)}")
    jobs = [(arm, encoding) for arm in names for encoding in encodings
            if not (options.out / arm / REPORT.format(encoding)).is_file()]
    good = True
    if options.arm and len(names) * len(encodings) == 1:
        for arm, encoding in jobs:
            run_arm(study.arms[arm], study.base, encoding, options.run, options.out / arm, options.device)
    else:
        good = conduct(options, jobs)
    print(table(options.out, names), flush=True)
    if not good:
        raise SystemExit(f"an arm broke: see the logs in {options.out}; the same command runs it again")


if __name__ == "__main__":
    main()
