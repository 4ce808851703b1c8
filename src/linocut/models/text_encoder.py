"""The text encoder: a Qwen3 language model, cut off after the last layer whose output is used.

FLUX.2 klein reads a prompt through the hidden states of three layers of Qwen3-4B, joined per token. Nothing after
the last of them is ever built or loaded, so 27 of klein's 36 layers suffice.

Shape letters: B batch, T text tokens, D width, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linocut.errors import UsageError
from linocut.models.configs import Qwen3Config
from linocut.models.prompt_tokenizer import PromptTokenizer

__all__ = ["PromptTokenizer", "Qwen3Config", "Qwen3Encoder"]

OnLayer = Callable[[int, int], None]

_LAYER_KEY = re.compile(r"layers\.(\d+)\.")


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis. Computed in float32, returned in `dtype`, which is x's if None."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.dtype: torch.dtype | None = None
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(self.dtype or x.dtype)


def rotary_table(tokens: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [T, K] in float32 for positions 0..T-1; the K/2 angles stand twice, side by side."""
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32, device=device), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions for x [..., T, K]: channel j turns together with channel j + K/2 (the Qwen pairing)."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.float() * cos + turned * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: each of the G key/value heads serves H / G query heads."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.width, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.width, config.rms_norm_eps)

    def forward(self, x: Tensor, allowed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def heads(y: Tensor, count: int) -> Tensor:
            return y.unflatten(-1, (count, self.width))

        q = self.q_norm(heads(self.q_proj(x), self.heads)).transpose(1, 2)
        k = self.k_norm(heads(self.k_proj(x), self.kv_heads)).transpose(1, 2)
        v = heads(self.v_proj(x), self.kv_heads).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Repeated by hand: with enable_gqa and a mask, torch falls back to writing the scores out on some devices.
        repeats = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One transformer layer: attention, then feed-forward, each normalised before and added after."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, allowed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), allowed, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Encoder(nn.Module):
    """Hidden states of chosen Qwen3 layers as text features.

    `taps` count as transformers' `hidden_states` do: 0 is the embedding, k the output of the k-th layer. As there,
    the very last one (k = num_hidden_layers) comes after the final norm, which is built only in that case.
    Parameter names are those of Hugging Face's Qwen3Model; `load_state_dict` also takes the names of
    Qwen3ForCausalLM (prefix `model.`) and passes over the layers and the head that are not needed here.
    """

    def __init__(self, config: Qwen3Config, taps: Sequence[int] = (9, 18, 27)) -> None:
        super().__init__()
        self.config, self.taps = config, tuple(taps)
        if not self.taps or min(self.taps) < 0 or max(self.taps) > config.num_hidden_layers:
            raise UsageError(f"text taps must lie between 0 and the model's {config.num_hidden_layers} layers, "
                             f"found {list(self.taps)}; check text_taps in model_index.json")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(max(self.taps)))
        if max(self.taps) == config.num_hidden_layers:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
        self.register_load_state_dict_pre_hook(_rename_state)

    def rename_key(self, name: str) -> str | None:
        """The parameter that a tensor of a Qwen3 checkpoint belongs to, or None if this encoder has no use for it."""
        name = name.removeprefix("model.")
        if name.startswith("lm_head.") or (name.startswith("norm.") and not hasattr(self, "norm")):
            return None
        found = _LAYER_KEY.match(name)
        return None if found and int(found[1]) >= len(self.layers) else name

    def compute_in(self, dtype: torch.dtype) -> Qwen3Encoder:
        """Have layers multiply and attend in `dtype`; what they are added to keeps the dtype of the embedding."""
        for layer in self.layers:
            layer.input_layernorm.dtype = layer.post_attention_layernorm.dtype = dtype
        return self

    def forward(self, ids: Tensor, mask: Tensor, on_layer: OnLayer | None = None) -> Tensor:
        """Features [B, T, taps * D] for token ids [B, T]; each token's row is [tap 1 | tap 2 | ...].

        `mask` [B, T] is 1 for text and 0 for padding on the right. Padding rows get features too (they see the text
        before them), and klein's transformer attends to them. `on_layer(done, total)` runs after each layer and may
        raise to stop.
        """
        tokens = ids.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=ids.device).tril()
        allowed = causal & mask.bool()[:, None, None, :]
        cos, sin = rotary_table(tokens, self.config.head_dim, self.config.rope_theta, ids.device)
        x = self.embed_tokens(ids)
        kept = {0: x}
        for done, layer in enumerate(self.layers, start=1):
            x = layer(x, allowed, cos, sin)
            if done in self.taps:
                kept[done] = self.norm(x) if done == self.config.num_hidden_layers else x
            if on_layer is not None:
                on_layer(done, len(self.layers))
        return torch.cat([kept[tap] for tap in self.taps], dim=-1)


def _rename_state(model: Qwen3Encoder, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Bring a state dict to this encoder's names, in place, before `load_state_dict` looks at it."""
    for name in [name for name in state if name.startswith(prefix)]:
        value = state.pop(name)
        renamed = model.rename_key(name.removeprefix(prefix))
        if renamed is not None:
            state[prefix + renamed] = value
