"""Decode a picture in horizontal strips, with the same result as in one piece.

Group normalisation and attention look at the whole picture, so tiles that are decoded on their own never quite fit
together. Here the strips are no small pictures: the decoder runs layer by layer, each layer strip by strip, with one
more row above and below for the convolutions. The statistics for the next normalisation are gathered while a layer
writes its output. Nothing is approximated; only the order of additions differs from the plain decoder.

What must be held in full are two feature maps of the current residual block (512 MiB each for klein at 1024 px in
float32) and, in the last stage, its input at half the resolution. All else is as tall as a strip. The price is one
convolution computed twice: the upsampling before the last stage, whose output, twice as wide, is never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linocut.errors import UsageError
from linocut.models.autoencoder import Autoencoder, OnTile, ResnetBlock, UpBlock, Upsample

Fetch = Callable[[int, int], Tensor]  # rows lo..hi-1 of a feature map, [1, C, hi - lo, W]


class _Moments:
    """Mean and variance of each channel, gathered strip by strip and merged in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor
        self.squares: Tensor  # sum of squared distances from the mean

    def add(self, strip: Tensor) -> None:
        variance, mean = (value.double() for value in torch.var_mean(strip.float(), dim=(2, 3), correction=0))
        count = strip.shape[2] * strip.shape[3]
        if self.count == 0:
            self.mean, self.squares = torch.zeros_like(mean), torch.zeros_like(mean)
        total, distance = self.count + count, mean - self.mean
        self.squares = self.squares + variance * count + distance**2 * (self.count * count / total)
        self.mean = self.mean + distance * (count / total)
        self.count = total

    def activation(self, norm: nn.GroupNorm, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """silu(norm(x)) for strips x of the map that was gathered."""
        mean = self.mean.unflatten(1, (norm.num_groups, -1))
        variance = (self.squares / self.count).unflatten(1, (norm.num_groups, -1))
        centre = mean.mean(2, keepdim=True)
        variance = (variance + (mean - centre) ** 2).mean(2, keepdim=True)
        scale = norm.weight.double() * (variance + norm.eps).rsqrt().expand_as(mean).flatten(1)
        shift = norm.bias.double() - centre.expand_as(mean).flatten(1) * scale
        scale, shift = (value.to(dtype)[:, :, None, None] for value in (scale, shift))
        return lambda x: F.silu(torch.addcmul(shift, x, scale), inplace=True)


class _Strips:
    """Cuts heights into strips, counts them and reports each one that is done."""

    def __init__(self, rows: int, total: int, on_tile: OnTile | None) -> None:
        self.rows, self.total, self.on_tile, self.done = rows, total, on_tile, 0

    def over(self, height: int) -> Iterator[tuple[int, int]]:
        for top in range(0, height, self.rows):
            yield top, min(top + self.rows, height)
            self.tick()

    def tick(self) -> None:
        self.done += 1
        if self.on_tile is not None:
            self.on_tile(self.done, self.total)


def _conv_rows(conv: nn.Conv2d, fetch: Fetch, top: int, bottom: int, height: int) -> Tensor:
    """Rows top..bottom-1 of a 3x3 convolution over the map behind `fetch`, zeros around the whole map."""
    rows = fetch(max(top - 1, 0), min(bottom + 1, height))
    if top == 0 or bottom == height:
        rows = F.pad(rows, (0, 0, int(top == 0), int(bottom == height)))
    return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))


def _stored(x: Tensor) -> Fetch:
    return lambda low, high: x[:, :, low:high]


def _upsampled(conv: nn.Conv2d, x: Tensor) -> Fetch:
    """Rows of conv(x at twice the resolution), computed when asked for."""
    def doubled(low: int, high: int) -> Tensor:
        first = low // 2
        rows = F.interpolate(x[:, :, first:(high + 1) // 2], scale_factor=2.0, mode="nearest")
        return rows[:, :, low - 2 * first:high - 2 * first]

    return lambda low, high: _conv_rows(conv, doubled, low, high, 2 * x.shape[2])


def _residual(block: ResnetBlock, fetch: Fetch, moments: _Moments, x: Tensor | None, like: Tensor,
              strips: _Strips) -> tuple[Tensor, _Moments]:
    """One residual block. `x` is the stored input, if there is one: without a shortcut it becomes the output.

    `like` gives the dtype, the device and (in its last two sizes) the resolution.
    """
    height, width = like.shape[2:]
    hidden = like.new_empty(1, block.conv1.out_channels, height, width)
    if block.conv_shortcut is not None:
        out = torch.empty_like(hidden)
    else:
        assert x is not None
        out = x
    activate, moments = moments.activation(block.norm1, like.dtype), _Moments()
    for top, bottom in strips.over(height):
        low, high = max(top - 1, 0), min(bottom + 1, height)
        rows = fetch(low, high)
        if block.conv_shortcut is not None:
            out[:, :, top:bottom] = block.conv_shortcut(rows[:, :, top - low:bottom - low])
        rows = activate(rows)
        rows = _conv_rows(block.conv1, lambda *_, rows=rows: rows, top, bottom, height)
        moments.add(rows)
        hidden[:, :, top:bottom] = rows
    activate, moments = moments.activation(block.norm2, like.dtype), _Moments()
    for top, bottom in strips.over(height):
        rows = _conv_rows(block.conv2, lambda low, high: activate(hidden[:, :, low:high]), top, bottom, height)
        rows += out[:, :, top:bottom]
        moments.add(rows)
        out[:, :, top:bottom] = rows
    return out, moments


def _decode_one(vae: Autoencoder, z: Tensor, strips: _Strips) -> Tensor:
    decoder = vae.decoder
    # The mid block works at the lowest resolution; its maps are small, and its attention needs all of them.
    x = decoder.mid_block(decoder.conv_in(z if vae.post_quant_conv is None else vae.post_quant_conv(z)))
    moments = _Moments()
    moments.add(x)
    strips.tick()
    upsampler: nn.Conv2d | None = None
    blocks = cast(list[UpBlock], list(decoder.up_blocks))
    for block in blocks:
        resnets, last = cast(list[ResnetBlock], list(block.resnets)), block is blocks[-1]
        if upsampler is not None:
            height, width = 2 * x.shape[2], 2 * x.shape[3]
            fetch, moments = _upsampled(upsampler, x), _Moments()
            stored = None if last and resnets[0].conv_shortcut is not None else x.new_empty(
                1, upsampler.out_channels, height, width)
            for top, bottom in strips.over(height):
                rows = fetch(top, bottom)
                moments.add(rows)
                if stored is not None:
                    stored[:, :, top:bottom] = rows
            if stored is None:
                x, moments = _residual(resnets.pop(0), fetch, moments, None, x.new_empty(1).expand(1, 1, height, width),
                                       strips)
            else:
                x = stored
            del fetch, stored
        for resnet in resnets:
            x, moments = _residual(resnet, _stored(x), moments, x, x, strips)
        upsampler = None if last else cast(Upsample, block.upsamplers[0]).conv
    activate = moments.activation(decoder.conv_norm_out, x.dtype)
    image = x.new_empty(1, decoder.conv_out.out_channels, *x.shape[2:])
    for top, bottom in strips.over(x.shape[2]):
        image[:, :, top:bottom] = _conv_rows(
            decoder.conv_out, lambda low, high: activate(x[:, :, low:high]), top, bottom, x.shape[2])
    return image


@torch.no_grad()
def decode_in_strips(vae: Autoencoder, z: Tensor, rows: int, on_tile: OnTile | None = None) -> Tensor:
    """`vae.decode(z)` for plain latents [B, C, h, w], one picture after the other, `rows` pixel rows at a time.

    `on_tile(done, total)` runs after each strip of each layer and may raise to stop.
    """
    if rows < 1:
        raise UsageError(f"a strip must be at least 1 row tall, found {rows}; 32 to 128 work well")
    total = 1
    for stage, block in enumerate(cast(list[UpBlock], list(vae.decoder.up_blocks))):
        passes = 2 * len(block.resnets) + (stage > 0)
        total += -(-(z.shape[2] << stage) // rows) * passes
    total += -(-(z.shape[2] * vae.factor) // rows)
    strips = _Strips(rows, total * z.shape[0], on_tile)
    return torch.cat([_decode_one(vae, one, strips) for one in z.split(1)])
