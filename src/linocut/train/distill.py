"""Stages `ternary` and `binary`: a quantized student learns to take the teacher's steps.

Every row of a batch is on its way from noise to a picture, one step of the sampler's grid per training step, and at
any time the rows are spread over all steps of the grid. At each state the student learns the straight line to where
the teacher gets to at that step's end. Then the row moves on, at first as the teacher says and increasingly as the
student did (DAgger, Ross et al. 2011), whose errors it must learn to undo; that costs nothing, for the student's step
has been computed anyway. Weights are quantized in every forward pass with straight-through gradients; every dense
tensor trains too. Only captions are needed.
"""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from linocut.models.convert import quantize_, set_eps
from linocut.quantize.policy import Policy
from linocut.train.autoencoder import load_vae, save_grid
from linocut.train.calibrate import Batch, calibrate
from linocut.train.dataset import Captions, caption_bank, make_tokenizer, psnr
from linocut.train.loop import Ranks, Schedule, autocast
from linocut.train.optimize import Average, make_optimizers, set_rate
from linocut.train.painter import Painter, grid_levels, jittered
from linocut.train.recipe import QatSettings, Recipe
from linocut.train.teacher import draw_held_out
from linocut.train.weights import State


def train_quantized(recipe: Recipe, encoding: str, run: Path, ranks: Ranks) -> None:
    """Leaves in `run/<encoding>` the latent weights of a student of `run/teacher`."""
    settings: QatSettings = getattr(recipe, encoding)
    device, grid = ranks.device, recipe.path.grid
    teacher, student = Painter.load(recipe, run / "teacher", device), Painter.load(recipe, run / "teacher", device)
    # The student reads the text encoder that it will be shipped with, so that it learns to make up for its rounding.
    quantize_(student.text_encoder, Policy.preset("qwen3", "affine4"), fake=True)
    quantize_(student.transformer, Policy.preset("flux2-embedded", encoding), fake=True, eps=settings.residual)
    student.transformer.requires_grad_(True)
    average = Average(student.transformer, settings.ema)
    parameters = list(student.transformer.parameters())
    optimizers = make_optimizers(student.transformer, settings.lr, 0.0, muon=False)
    state = State(run / encoding, student.transformer, average, optimizers)
    schedule = Schedule(settings, ranks, state.restore())
    tokenizer = make_tokenizer(recipe, run / "tokenizer")
    if schedule.steps > schedule.step:
        captions = caption_bank(recipe, tokenizer, 50 + ranks.rank, settings.scenes, device)
        if settings.calibrate and not schedule.step:
            _calibrate(recipe, teacher, student, captions, encoding, settings.calibrate)
            ranks.share(student.transformer)
            average = state.average = Average(student.transformer, settings.ema)
        teacher.compile_blocks(device)
        student.compile_blocks(device)
        torch.manual_seed(recipe.data.seed + 200 + ranks.rank + schedule.step * ranks.world)
        journeys = _Journeys(recipe, teacher, student, captions, settings.batch)
    mean: Tensor | None = None
    for step in schedule:
        if settings.residual:
            left = max(0.0, 1 - schedule.progress / max(settings.anneal, 1e-9))
            set_eps(student.transformer, settings.residual * left)
        journeys.depart(step, settings.on_policy * min(1.0, max(0.0, (schedule.progress - 0.2) / 0.3)))
        target = journeys.target(step)
        sigma, stage = journeys.sigma(step), journeys.stage(step)
        with autocast(device):
            v = student.velocity(journeys.x, journeys.student_text, sigma)
        errors = (v - target).square().flatten(1).mean(1)
        (errors * journeys.weight[stage]).mean().backward()
        journeys.move(step, v.detach(), target)
        ranks.average(p.grad for p in parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        set_rate(optimizers, schedule.rate)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update()
        by_stage = torch.zeros(grid, device=device).index_add_(0, stage, errors.detach()) / (len(stage) / grid)
        mean = by_stage if mean is None else torch.lerp(mean, by_stage, 0.05)
        schedule.log(lambda m=mean: "error by step " + " ".join(f"{e:.4f}" for e in m.tolist()))
        if schedule.due:
            state.save(step + 1)
    average.install()
    set_eps(student.transformer, 0.0)
    if ranks.first:
        student.save(run / encoding)
        state.drop()
        report(recipe, run, teacher, student, encoding)
    ranks.same(0.0)


class _Journeys:
    """Rows between noise and picture: states x [B, I, 4C] in blocks of equal size, block j at stage (step + j) mod K.

    K is the number of steps of the grid and must divide B. `own` marks rows that move as the student says. Each block
    has a route of its own, K + 1 noise levels.
    """

    def __init__(self, recipe: Recipe, teacher: Painter, student: Painter, captions: Captions, batch: int) -> None:
        self.teacher, self.student, self.captions, self.path = teacher, student, captions, recipe.path
        self.levels, self.rng = grid_levels(recipe), random.Random(recipe.data.seed)
        device, self.grid = captions.ids.device, recipe.path.grid
        self.block = batch // self.grid
        self.routes = [self.levels] * self.grid
        rows, columns = recipe.tokens
        self.x = torch.empty(self.block * self.grid, rows * columns, recipe.transformer.in_channels, device=device)
        shape = len(self.x), recipe.data.text_length, recipe.transformer.joint_attention_dim
        self.teacher_text, self.student_text = torch.empty(shape, device=device), torch.empty(shape, device=device)
        self.own = torch.zeros(len(self.x), 1, 1, dtype=torch.bool, device=device)
        self.weight = torch.tensor(recipe.path.weights or [1.0] * self.grid, device=device)
        for block in range(self.grid):  # each starts where it has to be at step 0
            self._set_out(block, 0.0)
            part = self._part(block)
            for levels in pairwise(self.routes[block][:block + 1]):
                self.x[part] = teacher.walk(self.x[part], self.teacher_text[part], levels)

    def stage(self, step: int) -> Tensor:
        """The step of the grid that each row is at: int64 [B]."""
        return (torch.arange(len(self.x), device=self.x.device) // self.block + step) % self.grid

    def sigma(self, step: int) -> Tensor:
        """The noise level of each row: float32 [B]."""
        return self._each([route[(block + step) % self.grid] for block, route in enumerate(self.routes)])

    def depart(self, step: int, own: float) -> None:
        """Rows that are through begin anew, with another caption; a share `own` of them will go the student's way."""
        if step:
            self._set_out(-step % self.grid, own)

    @torch.no_grad()
    def target(self, step: int) -> Tensor:
        """The velocity that leads from each row's state to where the teacher gets to at the step's end."""
        with autocast(self.x.device):
            v = self.teacher.velocity(self.x, self.teacher_text, self.sigma(step))
        for block, route in enumerate(self.routes):
            stage, part = (block + step) % self.grid, self._part(block)
            here, there, count = route[stage], route[stage + 1], self.path.substeps[stage]
            if count > 1:
                levels = [here + (there - here) * i / count for i in range(1, count + 1)]
                ahead = self.x[part] + (levels[0] - here) * v[part]
                v[part] = (self.teacher.walk(ahead, self.teacher_text[part], levels) - self.x[part]) / (there - here)
        return v

    def move(self, step: int, student: Tensor, teacher: Tensor) -> None:
        """Every row makes its step, the student's or the teacher's."""
        stages = [(block + step) % self.grid for block in range(self.grid)]
        length = self._each([route[stage + 1] - route[stage] for route, stage in zip(self.routes, stages, strict=True)])
        self.x = self.x + length[:, None, None] * torch.where(self.own, student, teacher)

    def _each(self, of_blocks: list[float]) -> Tensor:
        """A number per block as one per row: float32 [B]."""
        return torch.tensor(of_blocks, device=self.x.device).repeat_interleave(self.block)

    def _part(self, block: int) -> slice:
        return slice(block * self.block, (block + 1) * self.block)

    @torch.no_grad()
    def _set_out(self, block: int, own: float) -> None:
        part, device = self._part(block), self.x.device
        ids, mask = self.captions.pick(torch.randint(len(self.captions.ids), (self.block,), device=device))
        with autocast(device):
            self.teacher_text[part] = self.teacher.read(ids, mask).float()
            self.student_text[part] = self.student.read(ids, mask).float()
        self.x[part] = torch.randn_like(self.x[part])
        self.own[part] = torch.rand(self.block, 1, 1, device=device) < own
        self.routes[block] = jittered(self.levels, self.rng) if self.rng.random() < self.path.jitter else self.levels


def _calibrate(recipe: Recipe, teacher: Painter, student: Painter, captions: Captions, encoding: str,
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
    plain.load_state_dict(teacher.transformer.state_dict())
    calibrate(plain, batches, student.image_ids, student.text_ids, Policy.preset("flux2-embedded", encoding),
              lambda _, error: errors.append(error))
    student.transformer.load_state_dict(plain.state_dict())
    print(f"  {len(errors)} layers calibrated, mean relative output error {sum(errors) / len(errors):.4f}", flush=True)


@torch.no_grad()
def report(recipe: Recipe, run: Path, teacher: Painter, student: Painter, encoding: str) -> None:
    """PSNR of the student's held-out pictures to the teacher's on the same noise, and the student's grid as PNG."""
    device = next(teacher.parameters()).device
    captions = Captions.build(make_tokenizer(recipe, run / "tokenizer"), recipe.held_out, device)
    vae = load_vae(recipe, run, device)
    wanted, pictures = (draw_held_out(recipe, painter, vae, captions) for painter in (teacher, student))
    save_grid(pictures, 8, run / f"{encoding}.png")
    print(f"  {encoding}: PSNR to the teacher {psnr(pictures, wanted.clamp(-1, 1)):.2f} dB", flush=True)
