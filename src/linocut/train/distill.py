"""Stages `ternary` and `binary`: a quantized student learns to take the teacher's steps, and longer ones.

The teacher draws in many guided steps. From a state at the start of one step of the sampler's grid the student learns
the straight line to where the teacher gets to at that step's end, so the student draws in the grid's few steps at
guidance 1 (progressive distillation, Salimans and Ho 2022, for all steps at once). The states are the teacher's own at
first and increasingly the student's (DAgger, Ross et al. 2011), whose errors it must learn to undo. Weights are
quantized in every forward pass with straight-through gradients; every dense tensor trains too. Only captions are
needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from linocut.models.convert import quantize_, set_eps
from linocut.quantize.policy import Policy
from linocut.train.autoencoder import load_vae, save_grid
from linocut.train.calibrate import Batch, calibrate
from linocut.train.dataset import Captions, caption_bank, make_tokenizer, psnr
from linocut.train.loop import Average, Ranks, Schedule, autocast, set_rate
from linocut.train.painter import Painter, step_levels
from linocut.train.recipe import QatSettings, Recipe
from linocut.train.teacher import draw_held_out, held_out_captions, make_optimizers


def train_quantized(recipe: Recipe, encoding: str, run: Path, ranks: Ranks) -> None:
    """Leaves in `run/<encoding>` the latent weights of a student of `run/teacher`."""
    settings: QatSettings = getattr(recipe, encoding)
    device = ranks.device
    teacher, student = Painter.load(recipe, run / "teacher", device), Painter.load(recipe, run / "teacher", device)
    # The student reads the text encoder that it will be shipped with, so that it learns to make up for its rounding.
    quantize_(student.text_encoder, Policy.preset("qwen3", "affine4"), fake=True)
    captions = caption_bank(recipe, make_tokenizer(recipe, run / "tokenizer"), 50 + ranks.rank, settings.scenes, device)
    policy = Policy.preset("flux2-embedded", encoding)
    if settings.calibrate:
        _calibrate(recipe, teacher, student, captions, policy, settings.calibrate)
        ranks.share(student.transformer)
    student.transformer.requires_grad_(True)
    quantize_(student.transformer, policy, fake=True, eps=settings.residual)
    parameters = list(student.transformer.parameters())
    average = Average(student.transformer, settings.ema)
    optimizers = make_optimizers(student.transformer, settings.lr, 0.0, muon=False)
    teacher.compile_blocks(device)
    student.compile_blocks(device)
    starts = torch.tensor([levels[0] for levels in step_levels(recipe)], device=device)
    torch.manual_seed(recipe.data.seed + 200 + ranks.rank)
    schedule = Schedule(settings, ranks)
    mean = torch.zeros(recipe.path.grid, device=device)
    lesson: _Lesson | None = None
    for step in schedule:
        # Each lesson (a batch of paths) is used once per step of the grid, with every row at another step each time.
        turn = step % recipe.path.grid
        set_eps(student.transformer, settings.residual * max(0.0, 1 - schedule.progress / max(settings.anneal, 1e-9)))
        if lesson is None or turn == 0:
            own = settings.on_policy * min(1.0, max(0.0, (schedule.progress - 0.3) / 0.3))
            lesson = _prepare(recipe, teacher, student, captions, settings.batch, own)
        row = torch.arange(settings.batch, device=device)
        which = (row + turn) % recipe.path.grid
        with autocast(device):
            v = student.velocity(lesson.states[which, row], lesson.text, starts[which])
        errors = (v - lesson.targets[which, row]).square().flatten(1).mean(1)
        errors.mean().backward()
        ranks.average(p.grad for p in parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        set_rate(optimizers, schedule.rate)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update()
        by_step = torch.zeros_like(mean).index_add_(0, which, errors.detach()) / (settings.batch / recipe.path.grid)
        mean = torch.lerp(mean, by_step, 0.05 if step else 1.0)
        schedule.log(lambda m=mean: "error by step " + " ".join(f"{e:.4f}" for e in m.tolist()))
        if ranks.first and step and step % settings.save_every == 0:  # so that a stop costs little
            with average.installed():
                student.save(run / encoding)
    average.install()
    set_eps(student.transformer, 0.0)
    if ranks.first:
        student.save(run / encoding)
        report(recipe, run, teacher, student, encoding)
    ranks.same(0.0)


class _Lesson:
    """States at the start of each step [K, B, I, 4C], the velocities to learn there, and the student's text."""

    def __init__(self, states: list[Tensor], targets: list[Tensor], text: Tensor) -> None:
        self.states, self.targets, self.text = torch.stack(states), torch.stack(targets), text


@torch.no_grad()
def _prepare(recipe: Recipe, teacher: Painter, student: Painter, captions: Captions, batch: int, own: float) -> _Lesson:
    """Random captions and noise, walked by the teacher; in a share `own` of the rows the student takes the steps."""
    settings, device = recipe.path, captions.ids.device
    ids, mask = captions.pick(torch.randint(len(captions.ids), (batch,), device=device))
    with autocast(device):
        text, student_text = teacher.read(ids, mask), _eager(student.read, ids, mask)
        empty = teacher.read(*captions.empty(batch))
    rows, columns = recipe.tokens
    x = torch.randn(batch, rows * columns, recipe.transformer.in_channels, device=device)
    mine = int(batch * own)
    states, targets = [], []
    for levels in step_levels(recipe):
        there = teacher.walk(x, text, levels, empty, settings.guidance, settings.guidance_until)
        states.append(x)
        targets.append((there - x) / (levels[-1] - levels[0]))
        if mine:
            there[:mine] = _eager(student.walk, x[:mine], student_text[:mine], [levels[0], levels[-1]])
        x = there
    return _Lesson(states, targets, student_text)


def _calibrate(recipe: Recipe, teacher: Painter, student: Painter, captions: Captions, policy: Policy,
               prompts: int) -> None:
    """Round the student's blocks by GPTQ on states of the teacher's path."""
    device, settings, batches = captions.ids.device, recipe.path, []
    levels = step_levels(recipe)
    generator = torch.Generator().manual_seed(recipe.data.seed + 300)
    with torch.no_grad(), autocast(device):
        for part in torch.randperm(len(captions.ids), generator=generator)[:prompts].to(device).split(16):
            ids, mask = captions.pick(part)
            text, own = _eager(teacher.read, ids, mask), _eager(student.read, ids, mask)
            empty = _eager(teacher.read, *captions.empty(len(part)))
            x = torch.randn(len(part), recipe.tokens[0] * recipe.tokens[1], recipe.transformer.in_channels,
                            generator=generator).to(device)
            for step in levels:
                batches.append(Batch(x, own, torch.full((len(part),), step[0], device=device)))
                x = _eager(teacher.walk, x, text, step, empty, settings.guidance, settings.guidance_until)
    errors: list[float] = []
    calibrate(student.transformer, batches, student.image_ids, student.text_ids, policy,
              lambda _, error: errors.append(error))
    print(f"  {len(errors)} layers calibrated, mean relative output error {sum(errors) / len(errors):.4f}", flush=True)


@torch.compiler.set_stance("force_eager")
def _eager(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Call without compiled blocks: for shapes that occur too rarely to be worth a compilation."""
    return function(*arguments)


@torch.no_grad()
def report(recipe: Recipe, run: Path, teacher: Painter, student: Painter, encoding: str) -> None:
    """PSNR of the student's held-out pictures to the teacher's on the same noise, and the student's grid as PNG."""
    device = next(teacher.parameters()).device
    vae, captions = load_vae(recipe, run, device), held_out_captions(recipe, run, device)
    wanted = draw_held_out(recipe, teacher, vae, captions, teacher=True)
    pictures = draw_held_out(recipe, student, vae, captions, teacher=False)
    save_grid(pictures, 8, run / f"{encoding}.png")
    print(f"  {encoding}: PSNR to the teacher {psnr(pictures, wanted.clamp(-1, 1)):.2f} dB", flush=True)
