"""Group normalization of channels-last maps, and SiLU after it, in Triton: the map is read twice and written once.

torch's own on a GPU takes maps whose channels lie apart, while convolutions on tensor cores want them side by side: a
decoder then turns its map around and back for every norm. Moments are taken of the distance to the first pixel, in
float32 over some hundred pixels and in float64 over all of them.

Shape letters: B pictures, C channels, H and W the map's sides, P = H * W pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_VALUES = 4096
"""Of a tile: pixels times channels."""
_TILES = 32
"""That a program adds up."""


@triton.jit
def _moments(x, sums, pixels, channels, parts, CHANNELS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Of some hundred pixels of a picture: each channel's sum of distances to the first pixel, and of their squares."""
    part, picture = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, CHANNELS)
    inside = column < channels
    start = x + picture.to(tl.int64) * pixels * channels
    first = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
    total, squares = tl.zeros((ROWS, CHANNELS), tl.float32), tl.zeros((ROWS, CHANNELS), tl.float32)
    for tile in range(TILES):
        row = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < pixels)[:, None] & inside[None, :]
        value = tl.load(start + row[:, None].to(tl.int64) * channels + column[None, :], mask=mask, other=0.0)
        distance = tl.where(mask, value.to(tl.float32) - first[None, :], 0.0)
        total += distance
        squares += distance * distance
    place = sums + ((picture * parts + part) * 2).to(tl.int64) * channels + column
    tl.store(place, tl.sum(total, 0), mask=inside)
    tl.store(place + channels, tl.sum(squares, 0), mask=inside)


@triton.jit
def _scaled(x, scale, shift, y, pixels, channels, CHANNELS: tl.constexpr, ROWS: tl.constexpr, SILU: tl.constexpr):
    picture, column = tl.program_id(1), tl.arange(0, CHANNELS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = column < channels
    mask = (row < pixels)[:, None] & inside[None, :]
    place = (picture.to(tl.int64) * pixels + row[:, None]) * channels + column[None, :]
    factor = tl.load(scale + picture * channels + column, mask=inside, other=0.0)
    offset = tl.load(shift + picture * channels + column, mask=inside, other=0.0)
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * factor[None, :] + offset[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(y + place, value.to(y.dtype.element_ty), mask=mask)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of x [B, C, H, W], channels last: float64 [B, C]."""
    x = x.contiguous(memory_format=torch.channels_last)
    pictures, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    padded = triton.next_power_of_2(channels)
    rows = max(1, _VALUES // padded)
    parts = triton.cdiv(pixels, rows * _TILES)
    sums = torch.empty(pictures, parts, 2, channels, dtype=torch.float32, device=x.device)
    _moments[(parts, pictures)](x, sums, pixels, channels, parts, CHANNELS=padded, ROWS=rows, TILES=_TILES)
    distance, squares = (sums.sum(1, dtype=torch.float64) / pixels).unbind(1)
    return distance + x[:, :, 0, 0], squares - distance**2


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """`F.group_norm(x, groups, weight, bias, eps)` of x [B, C, H, W], followed by SiLU if asked for; channels last.

    Computed in float32; the result has the dtype of x (float32, bfloat16 or float16).
    """
    x = x.contiguous(memory_format=torch.channels_last)
    pictures, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    mean, variance = (each.unflatten(1, (groups, -1)) for each in moments(x))
    centre = mean.mean(2, keepdim=True)
    spread = (variance + (mean - centre) ** 2).mean(2, keepdim=True)
    scale = weight.double() * (spread + eps).rsqrt().expand_as(mean).flatten(1)
    shift = bias.double() - centre.expand_as(mean).flatten(1) * scale
    y, padded = torch.empty_like(x), triton.next_power_of_2(channels)
    rows = max(1, _VALUES // padded)
    _scaled[(triton.cdiv(pixels, rows), pictures)](x, scale.float(), shift.float(), y, pixels, channels,
                                                   CHANNELS=padded, ROWS=rows, SILU=silu)
    return y
