"""The FLUX.2 diffusion transformer (klein class): five double-stream and twenty single-stream blocks at klein's size.

Parameter names and shapes equal those of diffusers' `Flux2Transformer2DModel`, so the published weights load as they
are. Every Linear is bias-free, and all of them may be replaced by packed ones (`linocut.models.convert`).

Shape letters: B batch, T text tokens, I image tokens, S = T + I, D width, H heads, K head width (D = H * K),
M MLP width, C latent channels, E text feature width.

Precision: activations have the dtype of the latents (or autocast's). Normalization of q and k, rotation and the time
features are computed in float32, layer norms accumulate in float32. Nothing in `forward` depends on tensor values,
so it compiles to one graph and trains under autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linocut.errors import UsageError
from linocut.formats.names import is_timestep
from linocut.models.configs import Flux2Config
from linocut.models.modulations import Modulations, TimestepNetwork

Rope = tuple[Tensor, Tensor]  # cos and sin, each float32 [S, 1, K/2]: broadcast over heads
FLOAT16_MAX = 65504.0


# ---------------------------------------------------------------------------------------------------- positions

def text_position_ids(tokens: int, device: torch.device | str | None = None) -> Tensor:
    """Ids (T, H, W, L) of `tokens` text tokens: (0, 0, 0, l). int64 [T, 4]."""
    ids = torch.zeros(tokens, 4, dtype=torch.int64, device=device)
    ids[:, 3] = torch.arange(tokens, device=device)
    return ids


def image_position_ids(height: int, width: int, time: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Ids (T, H, W, L) of a grid of latent tokens, row-major: (time, h, w, 0). int64 [height * width, 4].

    `time` is 0 for the picture that is drawn; the i-th reference picture (from 0) uses 10 + 10 * i.
    """
    rows = torch.arange(height, device=device)[:, None].expand(height, width)
    columns = torch.arange(width, device=device)[None, :].expand(height, width)
    return torch.stack([torch.full_like(rows, time), rows, columns, torch.zeros_like(rows)], dim=-1).reshape(-1, 4)


def rope_tables(ids: Tensor, axes: tuple[int, ...], theta: float) -> Rope:
    """Rotation tables of tokens with ids [S, len(axes)]: cos and sin, float32 [S, 1, sum(axes) / 2].

    Each axis owns its share of the channels; angles are computed in float64 (float32 where the device has no float64).
    """
    dtype = torch.float32 if ids.device.type == "mps" else torch.float64
    angles = []
    for axis, channels in enumerate(axes):
        exponents = torch.arange(0, channels, 2, dtype=dtype, device=ids.device) / channels
        angles.append(ids[:, axis, None].to(dtype) * (1.0 / theta**exponents))
    angle = torch.cat(angles, dim=-1)[:, None]
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate adjacent channel pairs of x [B, S, H, K] (float32) by the tables' angles."""
    cos, sin = rope
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


# ------------------------------------------------------------------------------------------------------ blocks

def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Parameter-free layer norm of x [B, S, D], then (1 + scale) * x + shift, both [B, 1, D]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def swiglu(x: Tensor) -> Tensor:
    """silu of the first half of the channels times the second half."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention over tokens; q, k, v [B, S, H, K] to [B, S, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def clip_float16(x: Tensor) -> Tensor:
    """Keep a float16 residual stream finite, where diffusers does; other dtypes have the range."""
    return x.clip(-FLOAT16_MAX, FLOAT16_MAX) if x.dtype == torch.float16 else x


class RMSNorm(nn.Module):
    """Root-mean-square norm over head channels with a learned weight. The result is float32, whatever goes in."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)


class FeedForward(nn.Module):
    """SwiGLU MLP of a double-stream block."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(width, 2 * hidden, bias=False)
        self.linear_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(swiglu(self.linear_in(x)))


class JointAttention(nn.Module):
    """Attention of a double-stream block: text and image have their own projections and attend to both."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        width, head, eps = config.width, config.attention_head_dim, config.eps
        self.head_width = head
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.add_q_proj = nn.Linear(width, width, bias=False)
        self.add_k_proj = nn.Linear(width, width, bias=False)
        self.add_v_proj = nn.Linear(width, width, bias=False)
        self.norm_q, self.norm_k = RMSNorm(head, eps), RMSNorm(head, eps)
        self.norm_added_q, self.norm_added_k = RMSNorm(head, eps), RMSNorm(head, eps)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])
        self.to_add_out = nn.Linear(width, width, bias=False)

    def forward(self, image: Tensor, text: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_width))

        tokens = text.shape[1]
        v = torch.cat([heads(self.add_v_proj(text)), heads(self.to_v(image))], dim=1)
        q = torch.cat([self.norm_added_q(heads(self.add_q_proj(text))), self.norm_q(heads(self.to_q(image)))], dim=1)
        k = torch.cat([self.norm_added_k(heads(self.add_k_proj(text))), self.norm_k(heads(self.to_k(image)))], dim=1)
        out = attend(rotate(q, rope).to(v.dtype), rotate(k, rope).to(v.dtype), v)
        return self.to_out[0](out[:, tokens:]), self.to_add_out(out[:, :tokens])


class DoubleBlock(nn.Module):
    """Two residual streams, text and image, that meet in the attention."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn = JointAttention(config)
        self.ff = FeedForward(config.width, config.mlp_width)
        self.ff_context = FeedForward(config.width, config.mlp_width)

    def forward(self, image: Tensor, text: Tensor, image_mod: tuple[Tensor, ...], text_mod: tuple[Tensor, ...],
                rope: Rope) -> tuple[Tensor, Tensor]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = image_mod
        text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = text_mod
        image_out, text_out = self.attn(modulate(image, shift, scale, self.eps),
                                        modulate(text, text_shift, text_scale, self.eps), rope)
        image = image + gate * image_out
        image = image + mlp_gate * self.ff(modulate(image, mlp_shift, mlp_scale, self.eps))
        text = text + text_gate * text_out
        text = text + text_mlp_gate * self.ff_context(modulate(text, text_mlp_shift, text_mlp_scale, self.eps))
        return image, clip_float16(text)


class ParallelAttention(nn.Module):
    """Attention and MLP of a single-stream block side by side, with fused input and output projections."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        width, head = config.width, config.attention_head_dim
        self.head_width = head
        self.widths = (width, width, width, 2 * config.mlp_width)
        self.to_qkv_mlp_proj = nn.Linear(width, sum(self.widths), bias=False)
        self.norm_q, self.norm_k = RMSNorm(head, config.eps), RMSNorm(head, config.eps)
        self.to_out = nn.Linear(width + config.mlp_width, width, bias=False)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        q, k, v, hidden = self.to_qkv_mlp_proj(x).split(self.widths, dim=-1)
        q, k, v = (y.unflatten(-1, (-1, self.head_width)) for y in (q, k, v))
        out = attend(rotate(self.norm_q(q), rope).to(v.dtype), rotate(self.norm_k(k), rope).to(v.dtype), v)
        return self.to_out(torch.cat([out, swiglu(hidden)], dim=-1))


class SingleBlock(nn.Module):
    """One residual stream over text and image tokens together."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn = ParallelAttention(config)

    def forward(self, x: Tensor, mod: tuple[Tensor, ...], rope: Rope) -> Tensor:
        shift, scale, gate = mod
        return clip_float16(x + gate * self.attn(modulate(x, shift, scale, self.eps), rope))


# ----------------------------------------------------------------------------------------------------- network

class Flux2Transformer(TimestepNetwork):
    """Velocity of the probability flow at noise level sigma, given text features. See `forward`."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__(config)
        width = config.width
        self.x_embedder = nn.Linear(config.in_channels, width, bias=False)
        self.context_embedder = nn.Linear(config.joint_attention_dim, width, bias=False)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
        self.proj_out = nn.Linear(width, config.velocity_channels, bias=False)

    def init_weights(self) -> None:
        """Weights for training from scratch: the network starts as "velocity 0" and every block as the identity.

        Linears are normal with standard deviation 1 / sqrt(inputs); the modulations, norm_out and proj_out are zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for name in ("double_stream_modulation_img.linear", "double_stream_modulation_txt.linear",
                     "single_stream_modulation.linear", "norm_out.linear", "proj_out"):
            nn.init.zeros_(self.get_parameter(f"{name}.weight"))

    def rename_key(self, name: str) -> str | None:
        """The name of a checkpoint's tensor in this network: its own."""
        return name

    def forward(self, latents: Tensor, text: Tensor, sigma: Tensor | Modulations, image_ids: Tensor, text_ids: Tensor,
                on_block: Callable[[int, int], None] | None = None, taps: list[Tensor] | None = None) -> Tensor:
        """Predict the velocity (noise minus clean latents).

        latents [B, I, C] noisy latent tokens, text [B, T, E] text features, sigma [B] noise level in [0, 1] or what
        `modulations` makes of it, image_ids [I, 4] and text_ids [T, 4] positions (`image_position_ids`,
        `text_position_ids`). on_block(done, total) is called after each block and may raise `Cancelled`. The
        image tokens [B, I, width] that leave each block are appended to `taps`. Returns [B, I, C].
        """
        config = self.config
        rope = self.rope(latents, text, image_ids, text_ids)
        mod = sigma.to(latents.dtype) if isinstance(sigma, Modulations) else self.modulations(sigma, latents.dtype)
        total, done = config.num_layers + config.num_single_layers, 0
        image, stream = self.x_embedder(latents), self.context_embedder(text.to(latents.dtype))
        for block in self.transformer_blocks:
            image, stream = block(image, stream, mod.image, mod.text, rope)
            if taps is not None:
                taps.append(image)
            done += 1
            if on_block is not None:
                on_block(done, total)
        x = torch.cat([stream, image], dim=1)
        for block in self.single_transformer_blocks:
            x = block(x, mod.single, rope)
            if taps is not None:
                taps.append(x[:, text.shape[1]:])
            done += 1
            if on_block is not None:
                on_block(done, total)
        return self.proj_out(modulate(x[:, text.shape[1]:], *mod.out, config.eps))

    def rope(self, latents: Tensor, text: Tensor, image_ids: Tensor, text_ids: Tensor) -> Rope:
        """Rotation tables of the text's tokens and then the image's, on the device of the latents."""
        if text.shape[1] != text_ids.shape[0] or latents.shape[1] != image_ids.shape[0]:
            raise UsageError(f"one position id per token expected, found {text_ids.shape[0]} ids for {text.shape[1]} "
                             f"text tokens and {image_ids.shape[0]} ids for {latents.shape[1]} image tokens")
        ids = torch.cat([text_ids, image_ids.to(text_ids.device)])
        cos, sin = rope_tables(ids, self.config.axes_dims_rope, self.config.rope_theta)
        return cos.to(latents.device), sin.to(latents.device)


class Flux2Blocks(Flux2Transformer):
    """The transformer without the layers of `TimestepNetwork`, for drawing: `forward` takes `Modulations` only."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__(config)
        for name, _ in list(self.named_children()):
            if is_timestep(name):
                delattr(self, name)

    def rename_key(self, name: str) -> str | None:
        """The name of a checkpoint's tensor in this network, or None for those of `TimestepNetwork`."""
        return None if is_timestep(name) else name
