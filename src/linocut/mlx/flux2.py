"""The FLUX.2 transformer on mlx: what `models.flux2` defines, without the layers that see the noise level alone.

Shape letters: B batch, T text tokens, I image tokens, S = T + I, D width, H heads, K head width, C latent channels, E
text feature width. Each block is evaluated before the next is begun, so memory holds the activations of one, and a run
can be stopped between blocks. A block's weights are read when it runs for the first time.

Precision is that of the torch network: activations in the dtype of the latents, q and k normalized and rotated in
float32.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from linocut.formats.checkpoint import Checkpoint
from linocut.formats.names import is_timestep
from linocut.formats.timestep_table import VECTORS
from linocut.mlx.layers import Linear, Source, attend, heads, rms_norm, silu
from linocut.models.configs import Flux2Config

Rope = tuple[mx.array, mx.array]  # cos and sin, each float32 [S, K/2]
Vectors = tuple[mx.array, ...]  # shift, scale, gate, ..., each [1, 1, D]
FLOAT16_MAX = 65504.0


def rotate(x: mx.array, rope: Rope) -> mx.array:
    """Rotate adjacent channel pairs of x [B, H, S, K] (float32) by the tables' angles."""
    cos, sin = rope
    a, b = x[..., 0::2], x[..., 1::2]
    return mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


def modulate(x: mx.array, shift: mx.array, scale: mx.array, eps: float) -> mx.array:
    """Parameter-free layer norm of x [B, S, D], then (1 + scale) * x + shift."""
    return mx.fast.layer_norm(x, None, None, eps) * (1 + scale) + shift


def swiglu(x: mx.array) -> mx.array:
    """silu of the first half of the channels times the second half."""
    gate, value = mx.split(x, 2, axis=-1)
    return silu(gate) * value


def clip_float16(x: mx.array) -> mx.array:
    """Keep a float16 residual stream finite; other dtypes have the range."""
    return mx.clip(x, -FLOAT16_MAX, FLOAT16_MAX) if x.dtype == mx.float16 else x


class Heads:
    """The norms of q and k, and attention over what they give."""

    def __init__(self, source: Source, config: Flux2Config, query: str, key: str) -> None:
        self.width, self.eps = config.attention_head_dim, config.eps
        self.query = source.array(f"{query}.weight", (self.width,), mx.float32)
        self.key = source.array(f"{key}.weight", (self.width,), mx.float32)

    def __call__(self, q: mx.array, k: mx.array, v: mx.array) -> Vectors:
        """[B, S, D] each to [B, H, S, K]; q and k come normalized, in float32."""
        return (rms_norm(heads(q, self.width), self.query, self.eps),
                rms_norm(heads(k, self.width), self.key, self.eps), heads(v, self.width))


class FeedForward:
    """SwiGLU MLP of a double-stream block."""

    def __init__(self, source: Source, name: str, width: int, hidden: int) -> None:
        self.linear_in = Linear(source, f"{name}.linear_in", width, 2 * hidden)
        self.linear_out = Linear(source, f"{name}.linear_out", hidden, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_out(swiglu(self.linear_in(x)))


class Stream:
    """One of the two streams of a double block: its projections, norms and MLP."""

    def __init__(self, source: Source, config: Flux2Config, attn: str, names: tuple[str, ...], mlp: str) -> None:
        width = config.width
        self.eps = config.eps
        self.q, self.k, self.v, self.out = (Linear(source, f"{attn}.{name}", width, width) for name in names[:4])
        self.heads = Heads(source, config, f"{attn}.{names[4]}", f"{attn}.{names[5]}")
        self.ff = FeedForward(source, mlp, width, config.mlp_width)

    def project(self, x: mx.array, mod: Vectors) -> Vectors:
        x = modulate(x, mod[0], mod[1], self.eps)
        return self.heads(self.q(x), self.k(x), self.v(x))

    def add(self, x: mx.array, attended: mx.array, mod: Vectors) -> mx.array:
        """The stream after attention and MLP."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = mod
        x = x + gate * self.out(attended)
        return x + mlp_gate * self.ff(modulate(x, mlp_shift, mlp_scale, self.eps))


class DoubleBlock:
    """Two residual streams, text and image, that meet in the attention."""

    def __init__(self, source: Source, config: Flux2Config, name: str) -> None:
        attn = f"{name}.attn"
        self.image = Stream(source, config, attn, ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k"),
                            f"{name}.ff")
        self.text = Stream(source, config, attn, ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
                                                  "norm_added_q", "norm_added_k"), f"{name}.ff_context")

    def __call__(self, image: mx.array, text: mx.array, image_mod: Vectors, text_mod: Vectors,
                 rope: Rope) -> tuple[mx.array, mx.array]:
        tokens = text.shape[1]
        q, k, v = (mx.concatenate(list(pair), axis=2) for pair in zip(
            self.text.project(text, text_mod), self.image.project(image, image_mod), strict=True))
        out = attend(rotate(q, rope).astype(v.dtype), rotate(k, rope).astype(v.dtype), v)
        return (self.image.add(image, out[:, tokens:], image_mod),
                clip_float16(self.text.add(text, out[:, :tokens], text_mod)))


class SingleBlock:
    """One residual stream over text and image tokens together; attention and MLP side by side."""

    def __init__(self, source: Source, config: Flux2Config, name: str) -> None:
        width, hidden = config.width, config.mlp_width
        self.eps, self.width = config.eps, width
        self.proj = Linear(source, f"{name}.attn.to_qkv_mlp_proj", width, 3 * width + 2 * hidden)
        self.heads = Heads(source, config, f"{name}.attn.norm_q", f"{name}.attn.norm_k")
        self.out = Linear(source, f"{name}.attn.to_out", width + hidden, width)

    def __call__(self, x: mx.array, mod: Vectors, rope: Rope) -> mx.array:
        shift, scale, gate = mod
        q, k, v, hidden = mx.split(self.proj(modulate(x, shift, scale, self.eps)),
                                   [self.width, 2 * self.width, 3 * self.width], axis=-1)
        q, k, v = self.heads(q, k, v)
        out = attend(rotate(q, rope).astype(v.dtype), rotate(k, rope).astype(v.dtype), v)
        return clip_float16(x + gate * self.out(mx.concatenate([out, swiglu(hidden)], axis=-1)))


class Flux2:
    """Velocity of the probability flow at one noise level, given text features; see `__call__`."""

    def __init__(self, config: Flux2Config, checkpoint: Checkpoint, dtype: mx.Dtype = mx.float32) -> None:
        """Raises FormatError if a tensor of the blocks or the edges is missing, foreign or of another shape."""
        self.config = config
        source = Source(checkpoint, dtype, rename=lambda name: None if is_timestep(name) else name)
        self.x_embedder = Linear(source, "x_embedder", config.in_channels, config.width)
        self.context_embedder = Linear(source, "context_embedder", config.joint_attention_dim, config.width)
        self.double = [DoubleBlock(source, config, f"transformer_blocks.{i}") for i in range(config.num_layers)]
        self.single = [SingleBlock(source, config, f"single_transformer_blocks.{i}")
                       for i in range(config.num_single_layers)]
        self.proj_out = Linear(source, "proj_out", config.width, config.velocity_channels)
        source.finish()

    def __call__(self, latents: mx.array, text: mx.array, modulations: mx.array, rope: Rope,
                 on_block: Callable[[int, int], None] | None = None) -> mx.array:
        """Predict the velocity [B, I, C] of latents [B, I, C], given text features [B, T, E] in the same dtype.

        modulations [17, D] is a row of the timestep table (`linocut.formats.timestep_table`), rope the rotation tables
        of the text's tokens and then the image's. on_block(done, total) is called after each block has been computed
        and may raise `Cancelled`.
        """
        assert modulations.shape[0] == VECTORS
        mod = [vector[None, None] for vector in modulations.astype(latents.dtype)]
        total, done = len(self.double) + len(self.single), 0
        image, stream = self.x_embedder(latents), self.context_embedder(text)
        for double in self.double:
            image, stream = double(image, stream, tuple(mod[:6]), tuple(mod[6:12]), rope)
            mx.eval(image, stream)
            done += 1
            if on_block is not None:
                on_block(done, total)
        x = mx.concatenate([stream, image], axis=1)
        for single in self.single:
            x = single(x, tuple(mod[12:15]), rope)
            mx.eval(x)
            done += 1
            if on_block is not None:
                on_block(done, total)
        y = self.proj_out(modulate(x[:, text.shape[1]:], mod[15], mod[16], self.config.eps))
        mx.eval(y)
        return y
