"""Stages `distill`, `ternary` and `binary`: a student learns to take the steps of a teacher.

`distill` makes the many guided steps of the flow-matching teacher into the few unguided ones of the sampler: from a
state of the teacher's path the student predicts the straight line to the teacher's next coarse state (progressive
distillation, Salimans and Ho 2022, with all steps at once). `ternary` and `binary` then train fake-quantized students of
that network on its own path and, increasingly, on states that the student reaches itself. No stage needs pictures.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from linocut.models.convert import quantize_, set_eps
from linocut.quantize.policy import Policy
from linocut.train.autoencoder import load_vae
from linocut.train.dataset import Captions, caption_bank, make_tokenizer, psnr
from linocut.train.loop import Average, Ranks, Schedule, autocast, set_rate
from linocut.train.painter import Painter, student_levels, teacher_levels
from linocut.train.recipe import QatSettings, Recipe
from linocut.train.teacher import make_optimizers, show, tokenizer_captions


def train_few_steps(recipe: Recipe, run: Path, ranks: Ranks) -> None:
    """Leaves in `run/fewstep` a network that draws on the sampler's grid at guidance 1."""
    settings, device = recipe.distill, ranks.device
    teacher = Painter.load(recipe, run / "teacher", device)
    student = Painter.load(recipe, run / "teacher", device)
    captions = _captions(recipe, run, ranks)
    student.transformer.requires_grad_(True)
    average = Average(student.transformer, settings.ema)
    optimizers = make_optimizers(student.transformer, settings.lr, 0.0, muon=False)
    teacher.compile_blocks(device)
    student.compile_blocks(device)
    levels, marks = teacher_levels(recipe)
    coarse = student_levels(recipe).to(device)
    torch.manual_seed(recipe.data.seed + 100 + ranks.rank)
    schedule = Schedule(settings, ranks)
    mean = torch.zeros(settings.grid, device=device)
    for step in schedule:
        text, noise, empty = _prompts(recipe, teacher, captions, settings.batch)
        states = teacher.draw(text, noise, levels, empty, settings.guidance, settings.guidance_until)
        path = [states[mark] for mark in marks]
        targets = [(path[k + 1] - path[k]) / (coarse[k + 1] - coarse[k]) for k in range(settings.grid)]
        errors = _train_step(student, text, path[:-1], targets, coarse, schedule, optimizers, average, ranks)
        mean = torch.lerp(mean, errors, 0.05 if step else 1.0)
        schedule.log(lambda m=mean: "error by step " + " ".join(f"{e:.4f}" for e in m.tolist()))
    average.install()
    if ranks.first:
        student.save(run / "fewstep")
        show(recipe, student, load_vae(recipe, run, device), tokenizer_captions(recipe, run, device),
             run / "fewstep.png", guided=False)
    ranks.same(0.0)


def train_quantized(recipe: Recipe, encoding: str, run: Path, ranks: Ranks) -> None:
    """Leaves in `run/<encoding>` the latent weights of a student that draws like `run/fewstep`."""
    settings: QatSettings = getattr(recipe, encoding)
    device = ranks.device
    teacher = Painter.load(recipe, run / "fewstep", device)
    student = Painter.load(recipe, run / "fewstep", device)
    # The student reads the text encoder that it will be shipped with, so that it learns to make up for its rounding.
    quantize_text_encoder(student)
    student.transformer.requires_grad_(True)
    quantize_(student.transformer, Policy.preset("flux2-embedded", encoding), fake=True, eps=settings.residual)
    captions = _captions(recipe, run, ranks)
    average = Average(student.transformer, settings.ema)
    optimizers = make_optimizers(student.transformer, settings.lr, 0.0, muon=False)
    teacher.compile_blocks(device)
    student.compile_blocks(device)
    coarse = student_levels(recipe).to(device)
    torch.manual_seed(recipe.data.seed + 200 + ranks.rank)
    schedule = Schedule(settings, ranks)
    mean = torch.zeros(recipe.distill.grid, device=device)
    for step in schedule:
        set_eps(student.transformer, settings.residual * max(0.0, 1 - schedule.progress / max(settings.anneal, 1e-9)))
        ids, mask = captions.pick(torch.randint(len(captions.ids), (settings.batch,), device=device))
        with torch.no_grad(), autocast(device):
            text, student_text = teacher.read(ids, mask), student.read(ids, mask)
        noise = torch.randn(settings.batch, *_latent_shape(recipe), device=device)
        share = settings.on_policy * min(1.0, max(0.0, (schedule.progress - 0.3) / 0.3))
        own = int(settings.batch * share)
        path = _paths(teacher, student, text, student_text, noise, coarse, own)
        with torch.no_grad(), autocast(device):
            sigma = coarse[:-1].repeat_interleave(settings.batch)
            wanted = teacher.velocity(torch.cat(path), text.repeat(len(path), 1, 1), sigma).chunk(len(path))
        errors = _train_step(student, student_text, path, list(wanted), coarse, schedule, optimizers, average, ranks)
        mean = torch.lerp(mean, errors, 0.05 if step else 1.0)
        schedule.log(lambda m=mean: "error by step " + " ".join(f"{e:.4f}" for e in m.tolist()))
    average.install()
    set_eps(student.transformer, 0.0)
    if ranks.first:
        student.transformer.eval()
        student.save(run / encoding)
        report(recipe, run, teacher, student, encoding)
    ranks.same(0.0)


def quantize_text_encoder(painter: Painter) -> None:
    """Replace the text encoder's weights by what their affine4 packing decodes to (still dense tensors, frozen)."""
    quantize_(painter.text_encoder, Policy.preset("qwen3", "affine4"), fake=True)
    painter.text_encoder.requires_grad_(False)


@torch.no_grad()
def report(recipe: Recipe, run: Path, teacher: Painter, student: Painter, encoding: str) -> None:
    """PSNR of the student's held-out pictures to the teacher's on the same noise, and both grids as PNG."""
    device = next(teacher.parameters()).device
    vae, captions = load_vae(recipe, run, device), tokenizer_captions(recipe, run, device)
    rows, columns = recipe.tokens
    pictures = [vae.image_from_latents(show(recipe, painter, vae, captions, run / f"{name}.png", guided=False)
                                       .transpose(1, 2).unflatten(2, (rows, columns)))
                for name, painter in (("fewstep", teacher), (encoding, student))]
    print(f"  {encoding}: PSNR to the teacher {psnr(pictures[1], pictures[0].clamp(-1, 1)):.2f} dB", flush=True)


def _captions(recipe: Recipe, run: Path, ranks: Ranks) -> Captions:
    tokenizer = make_tokenizer(recipe, run / "tokenizer")
    return caption_bank(recipe, tokenizer, 50 + ranks.rank, recipe.data.scenes, ranks.device)


def _latent_shape(recipe: Recipe) -> tuple[int, int]:
    rows, columns = recipe.tokens
    return rows * columns, recipe.transformer.in_channels


@torch.no_grad()
def _prompts(recipe: Recipe, painter: Painter, captions: Captions, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Text features of random captions, noise, and features of the empty prompt."""
    device = captions.ids.device
    with autocast(device):
        text = painter.read(*captions.pick(torch.randint(len(captions.ids), (batch,), device=device)))
        empty = painter.read(*captions.empty(1)).expand(batch, -1, -1)
    return text, torch.randn(batch, *_latent_shape(recipe), device=device), empty


@torch.no_grad()
def _paths(teacher: Painter, student: Painter, text: Tensor, student_text: Tensor, noise: Tensor, levels: Tensor,
           own: int) -> list[Tensor]:
    """States before each step; the first `own` rows walk with the student, the others with the teacher.

    Both walk the whole batch, so that every call has one shape and nothing is compiled twice.
    """
    path = teacher.draw(text, noise, levels[:-1])
    if own:
        with autocast(noise.device):
            walked = student.draw(student_text, noise, levels[:-1])
        path = [torch.cat([mine[:own], theirs[own:]]) for mine, theirs in zip(walked, path, strict=True)]
    return path


def _train_step(student: Painter, text: Tensor, states: list[Tensor], targets: list[Tensor], levels: Tensor,
                schedule: Schedule, optimizers: list[torch.optim.Optimizer], average: Average, ranks: Ranks) -> Tensor:
    """One optimizer step on all steps of a batch of paths; returns the mean squared error of each step."""
    steps, batch = len(states), len(text)
    sigma = levels[:-1].repeat_interleave(batch)
    with autocast(text.device):
        v = student.velocity(torch.cat(states), text.repeat(steps, 1, 1), sigma)
    errors = (v - torch.cat(targets)).square().flatten(1).mean(1).view(steps, batch).mean(1)
    errors.mean().backward()
    parameters = list(student.transformer.parameters())
    ranks.average(p.grad for p in parameters)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    set_rate(optimizers, schedule.rate)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    average.update()
    return errors.detach()
