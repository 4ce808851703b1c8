"""The FLUX.2 autoencoder: pictures to latents and back, an eighth of the size on each side.

Between the networks and the transformer stand three plain steps: 2x2 cells of latent pixels become channels
(`patchify`), and each of those channels is normalised by a stored mean and variance. There is no scaling factor.

Shape letters: B batch, C latent channels, H and W the picture's height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linocut.errors import UsageError
from linocut.models.configs import CELL, AutoencoderConfig
from linocut.models.group_norm import GroupNorm, norm_silu
from linocut.models.threads import convolve

OnTile = Callable[[int, int], None]

NORM_EPS = 1e-6


def patchify(z: Tensor) -> Tensor:
    """[B, C, 2h, 2w] -> [B, 4C, h, w]: row i, column j of a cell of channel c becomes channel 4c + 2i + j."""
    return F.pixel_unshuffle(z, CELL)


def unpatchify(z: Tensor) -> Tensor:
    """[B, 4C, h, w] -> [B, C, 2h, 2w], the inverse of `patchify`."""
    return F.pixel_shuffle(z, CELL)


class Conv(nn.Conv2d):
    """A convolution with stride 1 and zeros around the map."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, self.padding)  # type: ignore[arg-type]


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, on a CPU as a plain matrix product on channels-last pixels.

    torch's own picks another algorithm for one thread than for several, and pixels shall not depend on that.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, NORM_EPS)
        self.conv1 = Conv(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, NORM_EPS)
        self.conv2 = Conv(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = PointwiseConv(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention with a single head over all positions of a feature map, added to its input."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        rows = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (to(rows)[:, None] for to in (self.to_q, self.to_k, self.to_v))
        y = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution; the padding is on the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def subpixel_kernels(weight: Tensor) -> list[Tensor]:
    """Four 2x2 kernels that make of a map what `weight` [O, I, 3, 3] makes of it with each pixel repeated 2x2.

    Kernel 2i + j gives the pixels in odd (1) or even (0) row i and column j. Where two of the nine weights meet the
    same pixel they are added once instead of multiplied twice: 4/9 of the products.
    """
    def merge(w: Tensor, dim: int, odd: int) -> Tensor:
        a, b, c = w.unbind(dim)
        return torch.stack((a + b, c) if odd else (a, b + c), dim)

    return [merge(merge(weight.float(), 2, i), 3, j).to(weight.dtype).contiguous(memory_format=torch.channels_last)
            for i in (0, 1) for j in (0, 1)]


def upsampled_rows(x: Tensor, kernels: list[Tensor], bias: Tensor | None, low: int, high: int) -> Tensor:
    """Rows low..high-1 of x [B, I, H, W] at twice the resolution and convolved, from `subpixel_kernels`."""
    height, width = x.shape[2:]
    first, last = low // 2, (high + 1) // 2
    rows = x[:, :, max(first - 1, 0):min(last + 1, height)]
    rows = F.pad(rows, (1, 1, int(first == 0), int(last == height)))
    y = x.new_empty(x.shape[0], 2 * (last - first), 2 * width, len(kernels[0])).permute(0, 3, 1, 2)
    for i in (0, 1):
        for j in (0, 1):
            part = rows[:, :, i:i + last - first + 1, j:j + width + 1]
            y[:, :, i::2, j::2] = convolve(part, kernels[2 * i + j], bias)
    return y[:, :, low - 2 * first:high - 2 * first]


class Upsample(nn.Module):
    """Double the resolution: each pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            return upsampled_rows(x, subpixel_kernels(self.conv.weight), self.conv.bias, 0, 2 * x.shape[2])
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """Residual blocks, then half the resolution unless this is the last stage."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups)
                                     for i in range(layers))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.downsamplers):
            x = module(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks, then twice the resolution unless this is the last stage."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups)
                                     for i in range(layers))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for module in (*self.resnets, *self.upsamplers):
            x = module(x)
        return x


class Encoder(nn.Module):
    """Picture [B, 3, H, W] -> mean and log variance, joined [B, 2C, H/8, W/8] (klein has four stages)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(i - 1, 0)], width, config.layers_per_block, groups, last=i == len(widths) - 1)
            for i, width in enumerate(widths))
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(norm_silu(self.conv_norm_out, self.mid_block(x)))


class Decoder(nn.Module):
    """Latents [B, C, H/8, W/8] -> picture [B, 3, H, W]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.decoder_widths[::-1]
        groups = config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, last=i == len(widths) - 1)
            for i, width in enumerate(widths))
        self.conv_norm_out = GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = Conv(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class PreviewMap(nn.Module):
    """Linear map from latent channels to red, green and blue in [0, 1]; empty until it is fitted or loaded."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", None if channels is None else torch.zeros(3, channels))
        self.register_buffer("bias", None if channels is None else torch.full((3,), 0.5))

    def forward(self, z: Tensor) -> Tensor:
        assert self.weight is not None
        assert self.bias is not None
        colours = torch.einsum("bchw,rc->brhw", z.float(), self.weight.float())
        return (colours + self.bias.float()[:, None, None]).clamp(0, 1)


class Autoencoder(nn.Module):
    """The FLUX.2 autoencoder. Parameter names are those of diffusers' AutoencoderKLFlux2.

    "Latents" in the method names means what the transformer works on: normalised and patchified,
    [B, 4C, H/16, W/16]. `encode` and `decode` work on the plain ones, [B, C, H/8, W/8].
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = PointwiseConv(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = PointwiseConv(channels, channels, 1) if config.use_post_quant_conv else None
        # Only a holder of running_mean and running_var: it is never called, so training mode does not move them.
        self.bn = nn.BatchNorm2d(CELL * CELL * channels, eps=config.batch_norm_eps, affine=False)
        self.preview = PreviewMap(channels if config.preview else None)
        self.register_load_state_dict_pre_hook(_make_room_for_preview)

    @property
    def factor(self) -> int:
        """Picture pixels per latent pixel and side (8 for klein), before patchify."""
        return self.config.factor

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, C, H/8, W/8] of the latents of a picture [B, 3, H, W] in [-1, 1]."""
        step = self.config.token_side
        if image.shape[-2] % step or image.shape[-1] % step:
            raise UsageError(f"picture sides must be multiples of {step}, found {image.shape[-1]}x{image.shape[-2]}; "
                             "crop or resize it first")
        moments = self.encoder(image)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Picture [B, 3, H, W], about [-1, 1], of plain latents [B, C, H/8, W/8]."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def normalize(self, z: Tensor) -> Tensor:
        """Plain latents [B, C, H/8, W/8] -> what the transformer works on, [B, 4C, H/16, W/16]."""
        mean, deviation = self._statistics(z)
        return (patchify(z) - mean) / deviation

    def denormalize(self, latents: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        mean, deviation = self._statistics(latents)
        return unpatchify(latents * deviation + mean)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        # The eps belongs inside the root (klein's is 1e-4, large enough to matter).
        mean, variance = self.bn.running_mean, self.bn.running_var
        assert mean is not None
        assert variance is not None
        mean = mean.to(like)[:, None, None]
        return mean, (variance.float() + self.config.batch_norm_eps).sqrt().to(like)[:, None, None]

    def latents_from_image(self, image: Tensor) -> Tensor:
        """Normalised, patchified latents [B, 4C, H/16, W/16] of a picture in [-1, 1]: the mode, nothing is drawn."""
        return self.normalize(self.encode(image.to(self.encoder.conv_in.weight.dtype))[0])

    def image_from_latents(self, latents: Tensor, tile: int | None = None, on_tile: OnTile | None = None) -> Tensor:
        """Picture [B, 3, H, W], about [-1, 1], of normalised latents [B, 4C, H/16, W/16].

        With `tile` (rows of pixels) the decoder runs in strips of that height. The result is the same up to float
        rounding, takes a fraction of the memory and cannot be differentiated. `on_tile(done, total)` runs after each
        strip and may raise to stop.
        """
        z = self.denormalize(latents).to(self.decoder.conv_in.weight.dtype)
        if tile is None:
            return self.decode(z)
        from linocut.models.tiling import decode_in_strips
        return decode_in_strips(self, z, tile, on_tile)

    @torch.no_grad()
    def preview_rgb(self, latents: Tensor) -> Tensor:
        """A quick look at normalised latents [B, 4C, H/16, W/16]: colours [B, 3, H/8, W/8] in [0, 1].

        Uses the linear map stored with the model; without one, fits it to the decoder on first use.
        """
        if self.preview.weight is None:
            self.preview.weight, self.preview.bias = fit_preview(self)
        return self.preview(self.denormalize(latents))


@torch.no_grad()
def fit_preview(vae: Autoencoder, latents: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Least-squares weight [3, C] and bias [3] that map plain latent channels to the mean colour of their pixels.

    `latents` [B, 4C, h, w] are normalised latents of typical pictures (from `latents_from_image`). Without them,
    random latents take their place, smoothed at several scales, since those of pictures are smooth too.
    """
    some = vae.decoder.conv_in.weight
    device, dtype = some.device, some.dtype
    if latents is None:
        generator = torch.Generator().manual_seed(seed)
        channels = CELL * CELL * vae.config.latent_channels
        fields = [F.interpolate(torch.randn((1, channels, side, side), generator=generator), (4, 4), mode="bicubic")
                  for side in (1, 1, 2, 2, 3, 4)]
        latents = torch.cat(fields).to(device)
    colours, features = [], []
    for one in latents.split(1):
        z = vae.denormalize(one.to(dtype))
        image = vae.decode(z).float().div(2).add(0.5).clamp(0, 1)
        colours.append(F.avg_pool2d(image, vae.factor).flatten(2)[0].T)
        features.append(z.float().flatten(2)[0].T)
    # In float64 with a light ridge, so that few or flat latents still give a finite map.
    x, y = torch.cat(features).double(), torch.cat(colours).double()
    middle, target = x.mean(0), y.mean(0)
    x, y = x - middle, y - target
    gram = x.T @ x
    ridge = 1e-3 * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(gram + ridge, x.T @ y).T
    return weight.float(), (target - weight @ middle).float()


def _make_room_for_preview(model: Autoencoder, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Let `load_state_dict` take the optional preview tensors when the state has them."""
    for name in ("weight", "bias"):
        value = state.get(f"{prefix}preview.{name}")
        if value is not None and getattr(model.preview, name) is None:
            setattr(model.preview, name, torch.empty_like(value))
