"""Stage `teacher`: text encoder and transformer learn together by flow matching on scenes, from nothing or a model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from linocut.models.autoencoder import Autoencoder
from linocut.models.flux2 import image_position_ids
from linocut.models.text_encoder import PromptTokenizer
from linocut.train.autoencoder import load_vae, save_grid
from linocut.train.corpus import CHUNK, endless
from linocut.train.dataset import Captions, LatentBank, make_tokenizer
from linocut.train.guidance import Teacher
from linocut.train.loop import Ranks, Schedule, autocast
from linocut.train.naming import UNTIL, NamingHead
from linocut.train.optimize import Average, make_optimizers, set_rate
from linocut.train.painter import Painter, grid_levels, training_sigmas
from linocut.train.recipe import Recipe
from linocut.train.render import SceneRenderer
from linocut.train.visibility import PICTURES, channel_weights
from linocut.train.vocabulary import objects
from linocut.train.warm import start_from
from linocut.train.weights import State


def train_teacher(recipe: Recipe, run: Path, sprites: Path, ranks: Ranks) -> None:
    """x = (1 - sigma) z + sigma n; the network predicts n - z. Leaves the averaged weights in `run/teacher`."""
    settings, device = recipe.teacher, ranks.device
    if ranks.first:
        if settings.keep_text:
            shutil.copytree(Path(settings.start) / "tokenizer", run / "tokenizer", dirs_exist_ok=True)
        make_tokenizer(recipe, run / "tokenizer")
    ranks.same(0.0)
    tokenizer = make_tokenizer(recipe, run / "tokenizer")
    vae = load_vae(recipe, run, device)
    torch.manual_seed(recipe.data.seed + 2)
    painter = Painter(recipe)
    if settings.start:
        start_from(painter, tokenizer, Path(settings.start))
    painter.text_encoder.requires_grad_(not settings.keep_text)
    painter.to(device)
    learners = nn.ModuleList([painter, head := NamingHead(painter.transformer, len(objects())).to(device)])
    ranks.share(learners)
    average = Average(learners, settings.ema)
    optimizers = make_optimizers(learners, settings.lr, settings.weight_decay, settings.muon)
    state = State(run / "teacher", learners, average, optimizers)
    schedule = Schedule(settings, ranks, state.restore())
    if schedule.steps > schedule.step:
        banks = _banks(recipe, run, sprites, ranks, vae)
        places = [image_position_ids(*grid, device=device) for grid in recipe.grids]
        painter.compile_blocks(device)
        torch.manual_seed(recipe.data.seed + 3 + ranks.rank + schedule.step * ranks.world)
        channels = _channels(recipe, vae, banks[0], ranks)
        fresh = Fresh(recipe, tokenizer, banks, ranks.rank, schedule.step) if settings.fresh else None
    mean: Tensor | None = None
    for step in schedule:
        if fresh is not None:
            fresh.renew(step)
        turn = step % len(banks)
        latents, names, ids, mask = banks[turn].sample(settings.batch)
        noise, sigma = torch.randn_like(latents), training_sigmas(recipe, settings.batch, device)
        noisy = latents + sigma[:, None, None] * (noise - latents)
        with autocast(device):
            v = painter.velocity(noisy, painter.read(ids, mask), sigma, places[turn])
            naming = head.loss(names)
        squares = (v - (noise - latents)).square()
        loss = squares.detach().mean()
        ((squares * channels).mean() + settings.naming * max(0.0, 1 - schedule.progress / UNTIL) * naming).backward()
        ranks.average(p.grad for p in learners.parameters())
        nn.utils.clip_grad_norm_(learners.parameters(), 1.0)
        set_rate(optimizers, schedule.rate)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update()
        losses = torch.stack([loss.detach(), naming.detach()])
        mean = losses if mean is None else torch.lerp(mean, losses, 0.02)
        schedule.log(lambda m=mean: f"loss {float(m[0]):.4f}, naming {float(m[1]):.4f}")
        if schedule.due:
            state.save(step + 1)
    average.install()
    if ranks.first:
        painter.save(run / "teacher")
        state.drop()
        captions = Captions.build(tokenizer, recipe.held_out, device)
        save_grid(draw_held_out(recipe, Teacher(recipe, painter, tokenizer), vae, captions), 8, run / "teacher.png")
    ranks.same(0.0)


def _banks(recipe: Recipe, run: Path, sprites: Path, ranks: Ranks, vae: Autoencoder) -> list[LatentBank]:
    """Scenes for every turn of `recipe.grids`, equally many; squares are the same ones at each of their turns."""
    tokenizer, grids = make_tokenizer(recipe, run / "tokenizer"), recipe.grids
    least = min(side * recipe.token_side for grid in grids for side in grid)
    renderer = SceneRenderer(sprites, recipe.data.size, ranks.device, least=least)
    made: dict[tuple[int, int], LatentBank] = {}
    for grid in dict.fromkeys(grids):
        shaped = renderer if grid == recipe.tokens else renderer.reshaped(*(side * recipe.token_side for side in grid))
        made[grid] = LatentBank.build(recipe, tokenizer, vae, shaped, ranks.rank + 500 * len(made), ranks.device,
                                      recipe.data.scenes * grids.count(grid) // len(grids))
    if ranks.first:
        deviation = float(made[recipe.tokens].latents[:1000].float().std())
        count = sum(len(bank.latents) for bank in made.values())
        print(f"  {count} scenes a process, latent deviation {deviation:.2f}", flush=True)
    return [made[grid] for grid in grids]


class Fresh:
    """New scenes in the place of the oldest of `banks`, which take turns: `teacher.fresh` per step on average."""

    def __init__(self, recipe: Recipe, tokenizer: PromptTokenizer, banks: Sequence[LatentBank], rank: int,
                 step: int) -> None:
        size = min(CHUNK, *(len(bank.latents) for bank in banks))
        self.banks, self.tokenizer, self.every = banks, tokenizer, max(1, round(size / recipe.teacher.fresh))
        self.supply = endless(recipe, rank, size, -(-step // self.every))

    def renew(self, step: int) -> None:
        """What is due before a step."""
        number, rest = divmod(step, self.every)
        if not rest:
            self.banks[number % len(self.banks)].renew(next(self.supply), self.tokenizer)


def _channels(recipe: Recipe, vae: Autoencoder, bank: LatentBank, ranks: Ranks) -> Tensor:
    """Weights [4C] of the latents' channels, the same in every process."""
    latents = bank.latents[:PICTURES].float().transpose(1, 2).unflatten(2, recipe.tokens)
    channels = channel_weights(vae.image_from_latents, latents, recipe.teacher.pixels)
    ranks.average([channels])
    return channels


def held_out_noise(recipe: Recipe, count: int, device: torch.device) -> Tensor:
    """The noise that the pipeline draws for seeds 0, 1, ...: [count, I, 4C], so that pictures can be compared."""
    rows, columns = recipe.tokens
    channels = recipe.transformer.in_channels
    noise = [torch.randn((1, channels, rows, columns), generator=torch.Generator().manual_seed(seed))
             for seed in range(count)]
    return torch.cat(noise).flatten(2).transpose(1, 2).contiguous().to(device)


@torch.no_grad()
def draw_held_out(recipe: Recipe, painter: Painter | Teacher, vae: Autoencoder, captions: Captions) -> Tensor:
    """Pictures [M, 3, H, W] of the captions in the steps of the grid, seed i for caption i."""
    return vae.image_from_latents(held_out_latents(recipe, painter, captions))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def held_out_latents(recipe: Recipe, painter: Painter | Teacher, captions: Captions) -> Tensor:
    """The same as latents [M, 4C, h, w]."""
    device, count = captions.ids.device, len(captions.ids)
    with autocast(device):
        text = painter.read(*captions.pick(torch.arange(count, device=device)))
    x = painter.walk(held_out_noise(recipe, count, device), text, grid_levels(recipe))
    return x.transpose(1, 2).unflatten(2, recipe.tokens)
