"""Autoencoders whose pictures show latents, to find out what another program does between latents and decoder.

stable-diffusion.cpp has the mean and deviation of FLUX.2's latents built in and reads none from a file. A probe is a
decoder of the true structure that copies three channels of its input to red, green and blue: residual branches are
zero, and the last normalization is held open by two constant channels beside each copied one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from linocut.formats.checkpoint import write_checkpoint
from linocut.models.autoencoder import Autoencoder, AutoencoderConfig

REACH = 7.0  # latents from -REACH to REACH become 0..255
_HOLD, _BOOST = 64.0, 32.0  # the constant channels, and the factor behind the normalization
_GROUP = 3  # channels of a group of the last normalization


def write_probe(path: Path, channels: Sequence[int], latent_channels: int = 32) -> None:
    """Write a decoder that shows these (up to three) latent channels."""
    config = AutoencoderConfig(block_out_channels=(32 * _GROUP, 64 * _GROUP, 128 * _GROUP, 128 * _GROUP),
                               latent_channels=latent_channels)
    vae = Autoencoder(config)
    for parameter in vae.parameters():
        parameter.data.zero_()
    assert vae.post_quant_conv is not None
    vae.post_quant_conv.weight.data[:, :, 0, 0] = torch.eye(latent_channels)
    decoder = vae.decoder
    for colour, channel in enumerate(channels):
        for copy, sign in enumerate((1.0, -1.0)):  # silu(y) - silu(-y) = y
            first = _GROUP * (2 * colour + copy)
            decoder.conv_in.weight.data[first, channel, 1, 1] = 1.0
            decoder.conv_in.bias.data[first + 1: first + 3] = torch.tensor([_HOLD, -_HOLD])
            decoder.conv_norm_out.weight.data[first] = sign * _BOOST
            decoder.conv_out.weight.data[colour, first, 1, 1] = sign
    deviation = _HOLD * (2 / _GROUP) ** 0.5  # of a group, as good as
    decoder.conv_out.weight.data *= deviation / (_BOOST * REACH)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                torch.nn.init.eye_(resnet.conv_shortcut.weight.data[:, :, 0, 0])
        for upsampler in block.upsamplers:
            torch.nn.init.dirac_(upsampler.conv.weight.data)
    state = {name: tensor for name, tensor in vae.state_dict().items() if not name.startswith("encoder.")}
    write_checkpoint(path, {name: tensor.numpy() for name, tensor in state.items()})


def shown(picture: np.ndarray) -> Tensor:
    """What a probe's picture [H, W, 3] shows: [3, H/8, W/8], each channel less a third of its mean."""
    levels = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)
    cells = torch.nn.functional.avg_pool2d(levels[None], 8)[0]
    return (cells / 255 * 2 - 1) * REACH


def measured_statistics(pictures: Iterator[tuple[Sequence[int], np.ndarray]], noise: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, deviation), [4C] each, that a program puts on latents before it decodes them.

    pictures: channels and picture of probes, drawn from `noise` [4C, H/16, W/16] with a velocity of zero.
    """
    mean, deviation = torch.full((len(noise),), torch.nan), torch.full((len(noise),), torch.nan)
    for channels, picture in pictures:
        seen = shown(picture)
        seen = seen + seen.mean((1, 2), keepdim=True) / (_GROUP - 1)
        for channel, plane in zip(channels, seen, strict=False):
            for cell in range(4):
                index = 4 * channel + cell
                x, y = noise[index].flatten(), plane[cell // 2::2, cell % 2::2].flatten()
                inside = y.abs() < 0.97 * REACH
                x, y = x[inside], y[inside]
                slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
                mean[index], deviation[index] = y.mean() - slope * x.mean(), slope
    return mean, deviation
