"""Stage `teacher`: text encoder and transformer learn together, from scratch, by flow matching on scenes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from linocut.models.autoencoder import Autoencoder
from linocut.train.autoencoder import load_vae, save_grid
from linocut.train.dataset import Captions, LatentBank, make_tokenizer
from linocut.train.loop import Average, Ranks, Schedule, autocast, set_rate
from linocut.train.painter import Painter, step_levels, training_sigmas
from linocut.train.recipe import Recipe
from linocut.train.render import SceneRenderer


def train_teacher(recipe: Recipe, run: Path, sprites: Path, ranks: Ranks) -> None:
    """x = (1 - sigma) z + sigma n; the network predicts n - z. Leaves the averaged weights in `run/teacher`."""
    settings, device = recipe.teacher, ranks.device
    if ranks.first:
        make_tokenizer(recipe, run / "tokenizer")
    ranks.same(0.0)
    tokenizer = make_tokenizer(recipe, run / "tokenizer")
    vae = load_vae(recipe, run, device)
    renderer = SceneRenderer(sprites, recipe.data.size, device)
    bank = LatentBank.build(recipe, tokenizer, vae, renderer, ranks.rank, device)
    del renderer  # gigabytes of texture
    if ranks.first:
        deviation = float(bank.latents[:1000].float().std())
        print(f"  {len(bank.latents)} scenes a process, latent deviation {deviation:.2f}", flush=True)
    torch.manual_seed(recipe.data.seed + 2)
    painter = Painter(recipe).to(device)
    ranks.share(painter)
    average = Average(painter, settings.ema)
    optimizers = make_optimizers(painter, settings.lr, settings.weight_decay, settings.muon)
    painter.compile_blocks(device)
    torch.manual_seed(recipe.data.seed + 3 + ranks.rank)
    schedule = Schedule(settings, ranks)
    mean = torch.zeros((), device=device)
    for step in schedule:
        latents, ids, mask = bank.sample(settings.batch, settings.drop_text)
        noise, sigma = torch.randn_like(latents), training_sigmas(recipe, settings.batch, device)
        noisy = latents + sigma[:, None, None] * (noise - latents)
        with autocast(device):
            v = painter.velocity(noisy, painter.read(ids, mask), sigma)
        loss = (v - (noise - latents)).square().mean()
        loss.backward()
        ranks.average(p.grad for p in painter.parameters())
        nn.utils.clip_grad_norm_(painter.parameters(), 1.0)
        set_rate(optimizers, schedule.rate)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update()
        mean = torch.lerp(mean, loss.detach(), 0.02 if step else 1.0)
        schedule.log(lambda m=mean: f"loss {float(m):.4f}")
    average.install()
    if ranks.first:
        painter.save(run / "teacher")
        save_grid(draw_held_out(recipe, painter, vae, held_out_captions(recipe, run, device), teacher=True), 8,
                  run / "teacher.png")
    ranks.same(0.0)


def make_optimizers(painter: nn.Module, lr: float, weight_decay: float, muon: bool) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks (scaled to AdamW's step size), AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in painter.named_parameters():
        in_block = parameter.ndim == 2 and ("blocks." in name or "layers." in name)
        (matrices if muon and in_block else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=others[0].is_cuda)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr, weight_decay=weight_decay, momentum=0.95,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


def held_out_captions(recipe: Recipe, run: Path, device: torch.device) -> Captions:
    """The held-out prompts as tokens."""
    return Captions.build(make_tokenizer(recipe, run / "tokenizer"), list(recipe.held_out), device)


def held_out_noise(recipe: Recipe, count: int, device: torch.device) -> Tensor:
    """The noise that the pipeline draws for seeds 0, 1, ...: [count, I, 4C], so that pictures can be compared."""
    rows, columns = recipe.tokens
    channels = recipe.transformer.in_channels
    noise = [torch.randn((1, channels, rows, columns), generator=torch.Generator().manual_seed(seed))
             for seed in range(count)]
    return torch.cat(noise).flatten(2).transpose(1, 2).contiguous().to(device)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def draw_held_out(recipe: Recipe, painter: Painter, vae: Autoencoder, captions: Captions, teacher: bool) -> Tensor:
    """Pictures [M, 3, H, W] of the held-out prompts, seed i for prompt i.

    A teacher takes its guided substeps, a student the steps of the grid.
    """
    device, count, settings = captions.ids.device, len(captions.ids), recipe.path
    with autocast(device):
        text = painter.read(*captions.pick(torch.arange(count, device=device)))
        empty = painter.read(*captions.empty(count))
    x = held_out_noise(recipe, count, device)
    for levels in step_levels(recipe):
        if teacher:
            x = painter.walk(x, text, levels, empty, settings.guidance, settings.guidance_until)
        else:
            x = painter.walk(x, text, [levels[0], levels[-1]])
    return vae.image_from_latents(x.transpose(1, 2).unflatten(2, recipe.tokens))
