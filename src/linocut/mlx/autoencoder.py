"""The decoder of the FLUX.2 autoencoder on mlx: latents to pictures (`models.autoencoder` defines it).

Feature maps are [B, H, W, C] here, as mlx's convolutions take them. They are evaluated after each residual block.
Group norms gather their statistics in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from linocut.formats.checkpoint import Checkpoint
from linocut.mlx.layers import Linear, Source, silu
from linocut.models.configs import CELL, AutoencoderConfig

NORM_EPS = 1e-6
QUERIES_AT_ONCE = 1024
"""Positions that attend at a time: mlx writes the scores of such wide heads out, a gigabyte for all at 1024 px."""


class Conv:
    """A convolution of `side` by `side` with a bias; the map keeps its size."""

    def __init__(self, source: Source, name: str, inputs: int, outputs: int, side: int = 3) -> None:
        weight = source.array(f"{name}.weight", (outputs, inputs, side, side))
        self.weight, self.bias = mx.contiguous(weight.transpose(0, 2, 3, 1)), source.array(f"{name}.bias", (outputs,))
        self.padding = side // 2
        mx.eval(self.weight)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.conv2d(x, self.weight, padding=self.padding) + self.bias


class GroupNorm:
    """Normalise groups of neighbouring channels over the whole map."""

    def __init__(self, source: Source, name: str, channels: int, groups: int) -> None:
        self.groups = groups
        self.weight = source.array(f"{name}.weight", (channels,), mx.float32)
        self.bias = source.array(f"{name}.bias", (channels,), mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        grouped = x.reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups).astype(mx.float32)
        mean = grouped.mean(axis=(1, 3), keepdims=True)
        inverse = mx.rsqrt((grouped - mean).square().mean(axis=(1, 3), keepdims=True) + NORM_EPS)
        y = ((grouped - mean) * inverse).reshape(x.shape)
        return (y * self.weight + self.bias).astype(x.dtype)


class ResnetBlock:
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the channels change."""

    def __init__(self, source: Source, name: str, inputs: int, outputs: int, groups: int) -> None:
        self.norm1, self.conv1 = (GroupNorm(source, f"{name}.norm1", inputs, groups),
                                  Conv(source, f"{name}.conv1", inputs, outputs))
        self.norm2, self.conv2 = (GroupNorm(source, f"{name}.norm2", outputs, groups),
                                  Conv(source, f"{name}.conv2", outputs, outputs))
        self.shortcut = Conv(source, f"{name}.conv_shortcut", inputs, outputs, 1) if inputs != outputs else None

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(silu(self.norm1(x)))
        mx.eval(h)
        h = self.conv2(silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention:
    """Self-attention with a single head over all positions of a map, added to its input."""

    def __init__(self, source: Source, name: str, channels: int, groups: int) -> None:
        self.norm = GroupNorm(source, f"{name}.group_norm", channels, groups)
        self.q, self.k, self.v, self.out = (Linear(source, f"{name}.{part}", channels, channels, bias=True)
                                            for part in ("to_q", "to_k", "to_v", "to_out.0"))

    def __call__(self, x: mx.array) -> mx.array:
        rows = self.norm(x).reshape(x.shape[0], 1, -1, x.shape[-1])
        k, v = self.k(rows), self.v(rows)
        parts = []
        for first in range(0, rows.shape[2], QUERIES_AT_ONCE):
            q = self.q(rows[:, :, first : first + QUERIES_AT_ONCE])
            parts.append(self.out(mx.fast.scaled_dot_product_attention(q, k, v, scale=x.shape[-1] ** -0.5)))
            mx.eval(parts[-1])
        return x + mx.concatenate(parts, axis=2).reshape(x.shape)


def upsample(x: mx.array) -> mx.array:
    """Each pixel four times."""
    return mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)


class Decoder:
    """Normalised, patchified latents -> picture."""

    def __init__(self, config: AutoencoderConfig, checkpoint: Checkpoint, dtype: mx.Dtype = mx.float32) -> None:
        """Raises FormatError if a tensor of the decoder is missing, foreign or of another shape."""
        self.config, self.dtype = config, dtype

        def rename(name: str) -> str | None:
            unused = ("encoder.", "quant_conv.", "preview.", "bn.num_batches_tracked")
            return None if name.startswith(unused) else name

        source = Source(checkpoint, dtype, rename=rename)
        widths, groups, channels = config.decoder_widths[::-1], config.norm_num_groups, config.latent_channels
        cells = CELL * CELL * channels
        self.mean = source.array("bn.running_mean", (cells,), mx.float32)
        variance = source.array("bn.running_var", (cells,), mx.float32)
        self.deviation = mx.sqrt(variance + config.batch_norm_eps)  # the eps belongs inside the root
        mx.eval(self.deviation)
        self.post_quant_conv = Conv(source, "post_quant_conv", channels, channels, 1) \
            if config.use_post_quant_conv else None
        self.conv_in = Conv(source, "decoder.conv_in", channels, widths[0])
        mid = "decoder.mid_block"
        first, second = (ResnetBlock(source, f"{mid}.resnets.{i}", widths[0], widths[0], groups) for i in range(2))
        attention = [Attention(source, f"{mid}.attentions.0", widths[0], groups)] \
            if config.mid_block_add_attention else []
        self.mid: list[Callable[[mx.array], mx.array]] = [first, *attention, second]
        self.stages: list[tuple[list[ResnetBlock], Conv | None]] = []
        for i, width in enumerate(widths):
            name = f"decoder.up_blocks.{i}"
            resnets = [ResnetBlock(source, f"{name}.resnets.{j}", widths[max(i - 1, 0)] if j == 0 else width, width,
                                   groups) for j in range(config.layers_per_block + 1)]
            last = i == len(widths) - 1
            self.stages.append((resnets, None if last else Conv(source, f"{name}.upsamplers.0.conv", width, width)))
        self.norm_out = GroupNorm(source, "decoder.conv_norm_out", widths[-1], groups)
        self.conv_out = Conv(source, "decoder.conv_out", widths[-1], config.out_channels)
        source.finish()

    def __call__(self, latents: mx.array, on_block: Callable[[int, int], None] | None = None) -> mx.array:
        """Picture float32 [B, 3, H, W], about [-1, 1], of normalised latents [B, 4C, H/16, W/16].

        on_block(done, total) is called after each residual block has been computed and may raise to stop.
        """
        done, total = 0, 2 + sum(len(resnets) for resnets, _ in self.stages)

        def finished(x: mx.array, counts: bool) -> mx.array:
            nonlocal done
            mx.eval(x)
            mx.clear_cache()  # the next map often has another size, for which buffers of this one are of no use
            done += counts
            if counts and on_block is not None:
                on_block(done, total)
            return x

        x = self.conv_in(self._plain(latents))
        for part in self.mid:
            x = finished(part(x), isinstance(part, ResnetBlock))
        for resnets, upsampler in self.stages:
            for resnet in resnets:
                x = finished(resnet(x), True)
            if upsampler is not None:
                x = finished(upsampler(upsample(x)), False)
        x = self.conv_out(silu(self.norm_out(x))).transpose(0, 3, 1, 2).astype(mx.float32)
        mx.eval(x)
        return x

    def _plain(self, latents: mx.array) -> mx.array:
        """Plain latents [B, H/8, W/8, C]: the normalisation undone, cells of channels as pixels again."""
        batch, _, height, width = latents.shape
        z = latents.transpose(0, 2, 3, 1).astype(mx.float32) * self.deviation + self.mean
        z = z.reshape(batch, height, width, -1, CELL, CELL).transpose(0, 1, 4, 2, 5, 3)
        z = z.reshape(batch, CELL * height, CELL * width, -1).astype(self.dtype)
        return z if self.post_quant_conv is None else self.post_quant_conv(z)
