"""Stage `vae`: the autoencoder learns scenes, then the statistics of its latents and the preview map are measured.

It may go on from a model's autoencoder, near whose latents it is then held, so that networks that learned those need
not begin anew; or only its decoder learns, to draw better from the latents that such networks make.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from linocut.formats.folder import ModelFolder
from linocut.formats.writer import atomic_write_bytes
from linocut.models.autoencoder import Autoencoder, PreviewMap, fit_preview
from linocut.models.configs import AutoencoderConfig
from linocut.models.convert import build_and_load
from linocut.train.corpus import make_scenes
from linocut.train.dataset import measure_latents, psnr, scene_images
from linocut.train.loop import Ranks, Schedule, autocast
from linocut.train.optimize import set_rate
from linocut.train.recipe import Recipe, VaeSettings
from linocut.train.render import BLOCK, SceneRenderer
from linocut.train.weights import load_weights, save_weights

FRESH = 4096  # scenes per pool
LASTING = 300  # steps after which a pool is replaced
HELD_OUT_SEED = -1000


def train_vae(recipe: Recipe, run: Path, sprites: Path, ranks: Ranks) -> None:
    """Reconstruction (absolute and squared error, and both of the differences between neighbours), a weak prior, and
    the squared distance from the latents of the autoencoder that it starts from."""
    settings, device = recipe.vae, ranks.device
    torch.manual_seed(recipe.data.seed)
    vae = Autoencoder(recipe.autoencoder).to(device)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    before = vae_of(Path(settings.start)).to(device).requires_grad_(False) if settings.start else None
    if before is not None:
        vae.load_state_dict({name: value for name, value in before.state_dict().items() if "preview" not in name})
    if (run / "vae" / "model.safetensors").is_file():  # go on from what is there
        vae.preview = PreviewMap(recipe.autoencoder.latent_channels).to(device)
        load_weights(vae, run / "vae")
    ranks.share(vae)
    torch.manual_seed(recipe.data.seed + 1 + ranks.rank)
    renderer = SceneRenderer(sprites, recipe.data.size, device)
    if ranks.first:
        size = sum(p.numel() for p in vae.parameters())
        print(f"  {size:,} parameters, {len(renderer.atlas.texels):,} texels", flush=True)
    if settings.decoder:
        vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)
        if vae.post_quant_conv is not None:  # the decoder's first step
            vae.post_quant_conv.requires_grad_(True)
    learned = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, settings.lr, betas=(0.9, 0.99), weight_decay=0.0,
                                  fused=device.type == "cuda")
    learn: Callable[[Tensor], tuple[Tensor, Tensor]] = Learning(vae, before if settings.stay else None, settings)
    if before is not None and settings.decoder:
        learn = Reading(vae, before, settings)
    forward = torch.compile(learn, dynamic=False) if settings.compile else learn
    schedule = Schedule(settings, ranks)
    pool, pools = _pool(recipe, renderer, ranks, 0), 0
    for step in schedule:
        if step // LASTING != pools:
            pools = step // LASTING
            pool = _pool(recipe, renderer, ranks, pools)
        whole = schedule.progress >= settings.whole_from
        batch = settings.batch if not whole else max(1, settings.batch * settings.crop**2 // recipe.data.size**2)
        index = torch.randint(len(pool[0]), (batch,), device=device)
        side = recipe.data.size if whole else min(settings.crop, recipe.data.size)
        top, left = (random.randrange(0, recipe.data.size - side + 1, BLOCK) for _ in range(2))
        image = renderer.draw(pool[0][index], pool[1][index], (top, left, side))
        set_rate([optimizer], schedule.rate)
        with autocast(device):
            loss, seen = forward(image.contiguous(memory_format=torch.channels_last))
        loss.backward()
        ranks.average(p.grad for p in learned)
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.log(lambda s=seen: f"squared error {float(s[0]):.5f}, latents moved {float(s[1]):.4f}")
    if ranks.first:
        _finish(recipe, vae, renderer, run, before if settings.decoder else None)
    ranks.same(0.0)  # the others wait for the file


class Learning:
    """What an autoencoder learns from a batch of pictures, held near the latents of another, `before`."""

    def __init__(self, vae: Autoencoder, before: Autoencoder | None, settings: VaeSettings) -> None:
        self.vae, self.before, self.settings = vae, before, settings

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of pictures [B, 3, H, W], and for the log [2] the mean squared errors of the pictures and, in parts
        of their variance, of the latents (0 where nothing holds them)."""
        mean, logvar = _moments(self.vae, image)
        fidelity, squared = _fidelity(self.vae.decode(_drawn(mean, logvar)), image)
        prior = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        moved = torch.zeros((), device=image.device)
        if self.before is not None:
            with torch.no_grad():
                wanted = self.before.latents_from_image(image).float()
            moved = (self.before.normalize(mean) - wanted).square().mean()
        loss = fidelity + self.settings.kl * prior + self.settings.stay * moved
        return loss, torch.stack([squared, moved.detach()])


class Reading:
    """What a decoder alone learns from a batch of pictures: to read the latents of another autoencoder, `before`, and
    at every fourth batch those of its own encoder. They are disturbed a little, as those that a network makes are."""

    def __init__(self, vae: Autoencoder, before: Autoencoder, settings: VaeSettings) -> None:
        self.vae, self.before, self.noise, self.batches = vae, before, settings.noise, 0

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """As `Learning`."""
        self.batches += 1
        with torch.no_grad():
            mean, logvar = _moments(self.vae if self.batches % 4 == 0 else self.before, image)
            disturbed = mean.std((0, 2, 3), keepdim=True) * torch.randn_like(mean)
            z = _drawn(mean, logvar) + self.noise * torch.rand(len(mean), 1, 1, 1, device=mean.device) * disturbed
        fidelity, squared = _fidelity(self.vae.decode(z), image)
        return fidelity, torch.stack([squared, torch.zeros_like(squared)])


def _moments(vae: Autoencoder, image: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = vae.encode(image)
    return mean.float(), logvar.float()


def _drawn(mean: Tensor, logvar: Tensor) -> Tensor:
    return mean + torch.randn_like(mean) * (0.5 * logvar).exp()


def _fidelity(drawn: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """How far pictures are from what they should be: the loss, and the mean squared error."""
    error = drawn.float() - image
    edges = [error.diff(dim=-1), error.diff(dim=-2)]
    rough = sum(edge.abs().mean() + 2 * edge.square().mean() for edge in edges)
    return error.abs().mean() + 2 * error.square().mean() + rough, error.detach().square().mean()


def _pool(recipe: Recipe, renderer: SceneRenderer, ranks: Ranks, number: int) -> tuple[Tensor, Tensor]:
    wordless = replace(recipe, data=replace(recipe.data, captions=0))
    count = FRESH if ranks.device.type == "cuda" else 64
    part = make_scenes(wordless, -2000 - number * ranks.world - ranks.rank, count)
    return renderer.table(part.placements), renderer.looks(part.scenes)


@torch.no_grad()
def _finish(recipe: Recipe, vae: Autoencoder, renderer: SceneRenderer, run: Path,
            before: Autoencoder | None = None) -> None:
    """Measure the latents, or take their statistics from the autoencoder whose latents networks know (`before`); fit
    the preview, report held-out PSNR of the weights as they are stored (float16)."""
    vae.half().float()
    count = 2048 if renderer.device.type == "cuda" else 32
    if before is None:
        measure_latents(vae, (scene_images(recipe, renderer, -100 - i, 32) for i in range(count // 32)))
    else:
        vae.bn.load_state_dict(before.bn.state_dict())
    fresh = scene_images(recipe, renderer, HELD_OUT_SEED, 256 if renderer.device.type == "cuda" else 16)
    vae.preview = PreviewMap(recipe.autoencoder.latent_channels).to(renderer.device)
    vae.preview.weight, vae.preview.bias = fit_preview(vae, vae.latents_from_image(fresh[:64]))
    decoded = torch.cat([vae.image_from_latents(vae.latents_from_image(part)) for part in fresh.split(32)])
    report = f"held-out PSNR {psnr(decoded, fresh):.2f} dB over {len(fresh)} scenes\n"
    if before is not None:
        known = torch.cat([vae.image_from_latents(before.latents_from_image(part)) for part in fresh.split(32)])
        report += f"  from the latents of before {psnr(known, fresh):.2f} dB\n"
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


def vae_of(folder: Path) -> Autoencoder:
    """The autoencoder of a model folder. Raises FormatError where there is none."""
    opened = ModelFolder(folder, folder.name)
    with opened.checkpoint("vae") as checkpoint:
        vae = build_and_load(Autoencoder, AutoencoderConfig.from_dict(opened.config("vae")), checkpoint, torch.float32)
        # The file closes: nothing may go on pointing into it.
        vae.load_state_dict({name: value.clone() for name, value in vae.state_dict().items()}, assign=True)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return vae.eval()


def save_grid(images: Tensor, columns: int, path: Path) -> None:
    """Write pictures [B, 3, H, W] in [-1, 1] as one PNG, row by row."""
    from PIL import Image

    images = F.pad(images.float().clamp(-1, 1).cpu(), (2, 2, 2, 2), value=1.0)
    rows = [torch.cat(list(part), dim=-1) for part in images.split(columns)]
    rows[-1] = F.pad(rows[-1], (0, rows[0].shape[-1] - rows[-1].shape[-1]), value=1.0)
    pixels = ((torch.cat(rows, dim=-2) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
