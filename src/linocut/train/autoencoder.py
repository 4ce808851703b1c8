"""Stage `vae`: the autoencoder learns scenes, then the statistics of its latents and the preview map are measured."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from linocut.formats.writer import atomic_write_bytes
from linocut.models.autoencoder import Autoencoder, PreviewMap, fit_preview
from linocut.train.corpus import make_scenes
from linocut.train.dataset import measure_latents, psnr, scene_images
from linocut.train.loop import Ranks, Schedule, autocast
from linocut.train.optimize import set_rate
from linocut.train.recipe import Recipe
from linocut.train.render import BLOCK, SceneRenderer
from linocut.train.weights import load_weights, save_weights

FRESH = 4096  # scenes per pool; pools are replaced as training goes on
HELD_OUT_SEED = -1000


def train_vae(recipe: Recipe, run: Path, sprites: Path, ranks: Ranks) -> None:
    """Reconstruction (absolute and squared error, and both of the differences between neighbours) plus a weak prior."""
    settings, device = recipe.vae, ranks.device
    torch.manual_seed(recipe.data.seed)
    vae = Autoencoder(recipe.autoencoder).to(device)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    if (run / "vae" / "model.safetensors").is_file():  # go on from what is there
        vae.preview = PreviewMap(recipe.autoencoder.latent_channels).to(device)
        load_weights(vae, run / "vae")
    ranks.share(vae)
    torch.manual_seed(recipe.data.seed + 1 + ranks.rank)
    renderer = SceneRenderer(sprites, recipe.data.size, device)
    if ranks.first:
        size = sum(p.numel() for p in vae.parameters())
        print(f"  {size:,} parameters, {len(renderer.atlas.texels):,} texels", flush=True)
    optimizer = torch.optim.AdamW(vae.parameters(), settings.lr, betas=(0.9, 0.99), weight_decay=0.0,
                                  fused=device.type == "cuda")
    forward = torch.compile(_losses, dynamic=False) if settings.compile else _losses
    schedule = Schedule(settings, ranks)
    pool, pools = _pool(recipe, renderer, ranks, 0), 0
    for step in schedule:
        if step // 100 != pools:
            pools = step // 100
            pool = _pool(recipe, renderer, ranks, pools)
        whole = schedule.progress >= settings.whole_from
        batch = settings.batch if not whole else max(1, settings.batch * settings.crop**2 // recipe.data.size**2)
        index = torch.randint(len(pool[0]), (batch,), device=device)
        side = recipe.data.size if whole else min(settings.crop, recipe.data.size)
        top, left = (random.randrange(0, recipe.data.size - side + 1, BLOCK) for _ in range(2))
        image = renderer.draw(pool[0][index], pool[1][index], (top, left, side))
        set_rate([optimizer], schedule.rate)
        with autocast(device):
            loss, fidelity = forward(vae, image.contiguous(memory_format=torch.channels_last), settings.kl)
        loss.backward()
        ranks.average(p.grad for p in vae.parameters())
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.log(lambda f=fidelity: f"squared error {float(f):.5f}")
    if ranks.first:
        _finish(recipe, vae, renderer, run)
    ranks.same(0.0)  # the others wait for the file


def _losses(vae: Autoencoder, image: Tensor, kl: float) -> tuple[Tensor, Tensor]:
    mean, logvar = vae.encode(image)
    mean, logvar = mean.float(), logvar.float()
    z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
    error = vae.decode(z).float() - image
    edges = [error.diff(dim=-1), error.diff(dim=-2)]
    prior = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    squared = error.square().mean()
    rough = sum(edge.abs().mean() + 2 * edge.square().mean() for edge in edges)
    return error.abs().mean() + 2 * squared + rough + kl * prior, squared.detach()


def _pool(recipe: Recipe, renderer: SceneRenderer, ranks: Ranks, number: int) -> tuple[Tensor, Tensor]:
    wordless = replace(recipe, data=replace(recipe.data, captions=0))
    count = FRESH if ranks.device.type == "cuda" else 64
    part = make_scenes(wordless, -2000 - number * ranks.world - ranks.rank, count)
    return renderer.table(part.placements), renderer.looks(part.scenes)


@torch.no_grad()
def _finish(recipe: Recipe, vae: Autoencoder, renderer: SceneRenderer, run: Path) -> None:
    """Measure the latents, fit the preview, report held-out PSNR of the weights as they are stored (float16)."""
    vae.half().float()
    count = 2048 if renderer.device.type == "cuda" else 32
    measure_latents(vae, (scene_images(recipe, renderer, -100 - i, 32) for i in range(count // 32)))
    fresh = scene_images(recipe, renderer, HELD_OUT_SEED, 256 if renderer.device.type == "cuda" else 16)
    vae.preview = PreviewMap(recipe.autoencoder.latent_channels).to(renderer.device)
    vae.preview.weight, vae.preview.bias = fit_preview(vae, vae.latents_from_image(fresh[:64]))
    decoded = torch.cat([vae.image_from_latents(vae.latents_from_image(part)) for part in fresh.split(32)])
    report = f"held-out PSNR {psnr(decoded, fresh):.2f} dB over {len(fresh)} scenes\n"
    print(f"  {report}", end="", flush=True)
    save_weights(run / "vae", vae.state_dict())
    atomic_write_bytes(run / "vae" / "report.txt", report.encode())
    save_grid(torch.cat([fresh[:8], decoded[:8]]), 8, run / "vae" / "held_out.png")


def load_vae(recipe: Recipe, run: Path, device: torch.device) -> Autoencoder:
    """The trained autoencoder, frozen."""
    vae = Autoencoder(recipe.autoencoder)
    load_weights(vae, run / "vae")
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return vae.to(device).eval().requires_grad_(False)


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    """Write pictures [B, 3, H, W] in [-1, 1] as one PNG, row by row."""
    from PIL import Image

    images = F.pad(images.float().clamp(-1, 1).cpu(), (2, 2, 2, 2), value=1.0)
    rows = [torch.cat(list(part), dim=-1) for part in images.split(columns)]
    rows[-1] = F.pad(rows[-1], (0, rows[0].shape[-1] - rows[-1].shape[-1]), value=1.0)
    pixels = ((torch.cat(rows, dim=-2) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
