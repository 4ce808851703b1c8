"""Stages `ternary` and `binary`: a quantized student learns to take the teacher's steps.

Every row of a batch is on its way from noise to a picture, one step of the sampler's grid per training step, and at
any time the rows are spread over all steps of the grid (`journeys`). At each state the student learns the straight line
to where the teacher gets to at that step's end. Then the row moves on, at first as the teacher says and increasingly as
the student did (DAgger, Ross et al. 2011), whose errors it must learn to undo; that costs nothing, for the student's
step has been computed anyway. `qat` has the loop. Only captions are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from linocut.models.convert import quantize_, set_eps, set_rounding
from linocut.train.autoencoder import load_vae, save_grid
from linocut.train.calibrate import Batch, calibrate
from linocut.train.critic import make_critic
from linocut.train.dataset import Captions, caption_bank, make_tokenizer, psnr
from linocut.train.export import round_text
from linocut.train.guidance import Teacher
from linocut.train.journeys import Journeys, Network
from linocut.train.loop import Ranks, Schedule, autocast
from linocut.train.model_parts import Drawer
from linocut.train.objective import Objective
from linocut.train.optimize import Average, make_optimizers
from linocut.train.painter import Painter, grid_levels
from linocut.train.qat import Distillation
from linocut.train.recipe import QatSettings, Recipe
from linocut.train.scenes import TASKS
from linocut.train.snapshot import Snapshot
from linocut.train.teacher import draw_held_out, held_out_latents
from linocut.train.visibility import PICTURES, channel_weights
from linocut.train.warm import start_student


def train_quantized(recipe: Recipe, encoding: str, run: Path, ranks: Ranks) -> None:
    """Leaves in `run/<encoding>` the latent weights of a student of `run/teacher`."""
    settings: QatSettings = getattr(recipe, encoding)
    device = ranks.device
    painter, student = Painter.load(recipe, run / "teacher", device), Painter.load(recipe, run / "teacher", device)
    tokenizer = make_tokenizer(recipe, run / "tokenizer")
    teacher = Teacher(recipe, painter, tokenizer)
    # The student reads the text encoder that it will be shipped with, so that it learns to make up for its rounding.
    round_text(student, recipe)
    quantize_(student.transformer, recipe.packing(encoding), fake=True, eps=settings.residual)
    set_rounding(student.transformer, settings.rounding)
    student.transformer.requires_grad_(True)
    if settings.start:
        start_student(student.transformer, Path(settings.start), encoding)
    average = Average(student.transformer, settings.ema)
    optimizers = make_optimizers(student.transformer, settings.lr, 0.0, settings.muon, settings.dense_lr or None)
    snapshot = Snapshot(run / encoding, student.transformer, average, optimizers, ranks)
    done, saved = snapshot.restore()
    schedule = Schedule(settings, ranks, done)
    if schedule.steps > schedule.step:
        captions = caption_bank(recipe, tokenizer, 50 + ranks.rank, settings.scenes, device,
                                settings.tasks or TASKS)
        if settings.calibrate and not settings.start and not schedule.step:
            _calibrate(recipe, teacher, student, captions, encoding, settings.calibrate)
            ranks.share(student.transformer)
            average.restart()
        painter.compile_blocks(device)
        student.compile_blocks(device)
        torch.manual_seed(recipe.data.seed + 200 + ranks.rank + schedule.step * ranks.world)
        distillation = Distillation(
            settings, ranks, student, student.transformer, average, optimizers, snapshot, schedule,
            Objective(settings.loss, settings.contrast, recipe.path.grid, ranks,
                      _channels(recipe, run, teacher, captions, settings.pixels)), run / f"{encoding}.jsonl",
            sheet=_sheet(recipe, run, student, encoding, ranks),
            critic=make_critic(settings.critic, recipe.transformer, ranks, saved), saved=saved)
        reader = CaptionReader(teacher, student, captions)
        distillation.run([_journeys(recipe, grid, index, teacher, student, reader, distillation)
                          for index, grid in enumerate(recipe.grids)])
    average.install()
    set_eps(student.transformer, 0.0)
    if ranks.first:
        student.save(run / encoding)
        snapshot.drop()
        report(recipe, run, teacher, student, encoding)
    ranks.same(0.0)


def _journeys(recipe: Recipe, grid: tuple[int, int], index: int, teacher: Teacher, student: Painter,
              reader: CaptionReader, distillation: Distillation) -> Journeys:
    """A batch of pictures of one shape on their way, number `index` of those that take turns."""
    device, settings = distillation.ranks.device, distillation.settings
    drawers: list[Network] = [teacher, student]
    if grid != recipe.tokens:
        drawers = [teacher.at(grid), Drawer(student.transformer, grid, recipe.data.text_length, device)]
    return Journeys(recipe.path, grid_levels(recipe, grid), drawers[0], reader, settings.batch,
                    (grid[0] * grid[1], recipe.transformer.in_channels),
                    (recipe.data.text_length, recipe.transformer.joint_attention_dim), device, recipe.data.seed + index,
                    bool(settings.contrast), distillation.saved_batch(index), drawers[1])


class CaptionReader:
    """Text features of captions drawn at random, as teacher and student read them (`journeys.Reader`)."""

    def __init__(self, teacher: Teacher, student: Painter, captions: Captions) -> None:
        self.teacher, self.student, self.captions = teacher, student, captions

    @torch.no_grad()
    def read(self, count: int) -> tuple[Tensor, Tensor]:
        """Features [B, T, E] of captions for both."""
        ids, mask = self.captions.draw(count)
        with autocast(ids.device):
            return self.teacher.read(ids, mask).float(), self.student.read(ids, mask).float()


def _channels(recipe: Recipe, run: Path, teacher: Teacher, captions: Captions, share: float) -> Tensor | float:
    """Weights [4C] of the latents' channels, from pictures of the teacher; always the same for the same teacher."""
    if not share:
        return 1.0
    held_out = Captions.build(make_tokenizer(recipe, run / "tokenizer"), recipe.held_out[:PICTURES],
                              captions.ids.device)
    latents = held_out_latents(recipe, teacher, held_out)
    return channel_weights(load_vae(recipe, run, latents.device).image_from_latents, latents, share)


def _sheet(recipe: Recipe, run: Path, student: Painter, encoding: str, ranks: Ranks) -> Callable[[int], None]:
    def draw(step: int) -> None:
        if ranks.first:
            captions = Captions.build(make_tokenizer(recipe, run / "tokenizer"), recipe.held_out, ranks.device)
            pictures = draw_held_out(recipe, student, load_vae(recipe, run, ranks.device), captions)
            save_grid(pictures, 8, run / f"{encoding}.{step}.png")
    return draw


def _calibrate(recipe: Recipe, teacher: Teacher, student: Painter, captions: Captions, encoding: str,
               prompts: int) -> None:
    """Set the student's latent weights by GPTQ on states of the teacher's path."""
    device, batches = captions.ids.device, []
    levels = list(pairwise(grid_levels(recipe)))
    generator = torch.Generator().manual_seed(recipe.data.seed + 300)
    with torch.no_grad(), autocast(device):
        for part in torch.randperm(len(captions.ids), generator=generator)[:prompts].to(device).split(16):
            ids, mask = captions.pick(part)
            text, own = teacher.read(ids, mask), student.read(ids, mask)
            x = torch.randn(len(part), recipe.tokens[0] * recipe.tokens[1], recipe.transformer.in_channels,
                            generator=generator).to(device)
            for step in levels:
                batches.append(Batch(x, own, torch.full((len(part),), step[0], device=device)))
                x = teacher.walk(x, text, step)
    errors: list[float] = []
    plain = Painter(recipe).to(device).transformer.requires_grad_(False)
    plain.load_state_dict(teacher.painter.transformer.state_dict())
    calibrate(plain, batches, student.image_ids, student.text_ids, recipe.packing(encoding),
              lambda _, error: errors.append(error))
    student.transformer.load_state_dict(plain.state_dict())
    print(f"  {len(errors)} layers calibrated, mean relative output error {sum(errors) / len(errors):.4f}", flush=True)


@torch.no_grad()
def report(recipe: Recipe, run: Path, teacher: Teacher, student: Painter, encoding: str) -> None:
    """PSNR of the student's held-out pictures to the teacher's on the same noise, and the student's grid as PNG."""
    device = teacher.empty.device
    captions = Captions.build(make_tokenizer(recipe, run / "tokenizer"), recipe.held_out, device)
    vae = load_vae(recipe, run, device)
    wanted, pictures = (draw_held_out(recipe, painter, vae, captions) for painter in (teacher, student))
    save_grid(pictures, 8, run / f"{encoding}.png")
    print(f"  {encoding}: PSNR to the teacher {psnr(pictures, wanted.clamp(-1, 1)):.2f} dB", flush=True)
