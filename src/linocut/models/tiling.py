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
from linocut.models.autoencoder import (
    Autoencoder,
    OnTile,
    ResnetBlock,
    UpBlock,
    Upsample,
    subpixel_kernels,
    upsampled_rows,
)
from linocut.models.group_norm import Moments, silu_
from linocut.models.threads import convolve

Fetch = Callable[[int, int], Tensor]  # rows lo..hi-1 of a feature map, [1, C, hi - lo, W]


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
    return convolve(rows, conv.weight, conv.bias, padding=(0, 1))


def _stored(x: Tensor) -> Fetch:
    return lambda low, high: x[:, :, low:high]


def _upsampled(conv: nn.Conv2d, x: Tensor) -> Fetch:
    """Rows of conv(x at twice the resolution), computed when asked for."""
    kernels = subpixel_kernels(conv.weight)
    return lambda low, high: upsampled_rows(x, kernels, conv.bias, low, high)


def _new_map(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An empty map [1, channels, height, width], channels last."""
    return like.new_empty(1, height, width, channels).permute(0, 3, 1, 2)


def _activation(moments: Moments, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
    normalize = moments.normalization(norm)
    return lambda x: silu_(normalize(x))


def _residual(block: ResnetBlock, fetch: Fetch, moments: Moments, x: Tensor, height: int, width: int,
              strips: _Strips) -> tuple[Tensor, Moments]:
    """One residual block over the map [height, width] behind `fetch`.

    `x` is the map itself if it is stored; a block without a shortcut then writes its output over it.
    """
    hidden = _new_map(x, block.conv1.out_channels, height, width)
    out = x if block.conv_shortcut is None else torch.empty_like(hidden)
    activate, moments = _activation(moments, block.norm1), Moments()
    for top, bottom in strips.over(height):
        low, high = max(top - 1, 0), min(bottom + 1, height)
        rows = fetch(low, high)
        if block.conv_shortcut is not None:
            out[:, :, top:bottom] = block.conv_shortcut(rows[:, :, top - low:bottom - low])
        rows = activate(rows)
        rows = _conv_rows(block.conv1, lambda *_, rows=rows: rows, top, bottom, height)
        moments.add(rows)
        hidden[:, :, top:bottom] = rows
    activate, moments = _activation(moments, block.norm2), Moments()
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
    moments = Moments()
    moments.add(x)
    strips.tick()
    upsampler: nn.Conv2d | None = None
    blocks = cast(list[UpBlock], list(decoder.up_blocks))
    for block in blocks:
        resnets, last = cast(list[ResnetBlock], list(block.resnets)), block is blocks[-1]
        if upsampler is not None:
            height, width = 2 * x.shape[2], 2 * x.shape[3]
            fetch, moments = _upsampled(upsampler, x), Moments()
            # The widest map is computed twice rather than stored, if its block does not need it whole.
            stored = None if last and resnets[0].conv_shortcut is not None else _new_map(
                x, upsampler.out_channels, height, width)
            for top, bottom in strips.over(height):
                rows = fetch(top, bottom)
                moments.add(rows)
                if stored is not None:
                    stored[:, :, top:bottom] = rows
            if stored is None:
                x, moments = _residual(resnets.pop(0), fetch, moments, x, height, width, strips)
            else:
                x = stored
            del fetch, stored
        for resnet in resnets:
            x, moments = _residual(resnet, _stored(x), moments, x, x.shape[2], x.shape[3], strips)
        upsampler = None if last else cast(Upsample, block.upsamplers[0]).conv
    activate = _activation(moments, decoder.conv_norm_out)
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
