"""The text encoder on mlx: a Qwen3 language model up to the last layer whose output is used (`models.text_encoder`).

Shape letters: B batch, T text tokens, D width, H query heads, G key/value heads, K head width. Layers are evaluated one
by one. Unless weights are kept, each layer's leave memory with it, and of the table of embeddings only the rows of the
prompt ever enter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from linocut.errors import UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.mlx.layers import Embedding, Linear, Source, attend, heads, rms_norm, silu
from linocut.models.configs import Qwen3Config

OnLayer = Callable[[int, int], None]
_LAYER_KEY = re.compile(r"layers\.(\d+)\.")


def rotary_table(tokens: int, width: int, theta: float) -> tuple[mx.array, mx.array]:
    """cos and sin [T, K/2] in float32 for positions 0..T-1."""
    frequencies = np.float32(1) / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    angles = np.outer(np.arange(tokens, dtype=np.float32), frequencies)
    return mx.array(np.cos(angles)), mx.array(np.sin(angles))


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotary positions for x [..., T, K]: channel j turns together with channel j + K/2."""
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Layer:
    """One transformer layer: grouped-query attention, then feed-forward, each normalised before and added after."""

    def __init__(self, source: Source, config: Qwen3Config, name: str) -> None:
        width, head = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        self.head, self.eps = head, config.rms_norm_eps
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        self.q, self.k, self.v = (Linear(source, f"{attention}.{part}_proj", width, size)
                                  for part, size in (("q", queries), ("k", keys), ("v", keys)))
        self.o = Linear(source, f"{attention}.o_proj", queries, width)
        self.gate, self.up = (Linear(source, f"{mlp}.{part}_proj", width, config.intermediate_size)
                              for part in ("gate", "up"))
        self.down = Linear(source, f"{mlp}.down_proj", config.intermediate_size, width)
        self.q_norm, self.k_norm = (source.array(f"{attention}.{part}_norm.weight", (head,)) for part in "qk")
        self.before, self.between = (source.array(f"{name}.{part}_layernorm.weight", (width,))
                                     for part in ("input", "post_attention"))

    def __call__(self, x: mx.array, allowed: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
        y = rms_norm(x, self.before, self.eps).astype(x.dtype)
        q = rotate(rms_norm(heads(self.q(y), self.head), self.q_norm, self.eps), *rope).astype(x.dtype)
        k = rotate(rms_norm(heads(self.k(y), self.head), self.k_norm, self.eps), *rope).astype(x.dtype)
        x = x + self.o(attend(q, k, heads(self.v(y), self.head), allowed))
        y = rms_norm(x, self.between, self.eps).astype(x.dtype)
        return x + self.down(silu(self.gate(y)) * self.up(y))


class TextEncoder:
    """Hidden states of chosen Qwen3 layers as text features; `taps` as in `models.text_encoder.Qwen3Encoder`."""

    def __init__(self, config: Qwen3Config, checkpoint: Checkpoint, taps: Sequence[int],
                 dtype: mx.Dtype = mx.float32, keep: bool = True) -> None:
        """Raises FormatError if a tensor that is needed is missing or of another shape, or one is foreign."""
        self.config, self.taps = config, tuple(taps)
        if not self.taps or min(self.taps) < 0 or max(self.taps) > config.num_hidden_layers:
            raise UsageError(f"text taps must lie between 0 and the model's {config.num_hidden_layers} layers, "
                             f"found {list(self.taps)}; check text_taps in model_index.json")
        final = max(self.taps) == config.num_hidden_layers

        def rename(name: str) -> str | None:
            name = name.removeprefix("model.")
            found = _LAYER_KEY.match(name)
            unused = name.startswith("lm_head.") or (name.startswith("norm.") and not final)
            return None if unused or (found and int(found[1]) >= max(self.taps)) else name

        source = Source(checkpoint, dtype, keep, rename)
        self.embed_tokens = Embedding(source, "embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = [Layer(source, config, f"layers.{i}") for i in range(max(self.taps))]
        self.norm = source.array("norm.weight", (config.hidden_size,)) if final else None
        source.finish()

    def __call__(self, ids: np.ndarray, mask: np.ndarray, on_layer: OnLayer | None = None) -> mx.array:
        """Features [B, T, taps * D] for token ids [B, T]; `mask` [B, T] is 1 for text and 0 for padding on the right.

        on_layer(done, total) runs after each layer has been computed and may raise to stop.
        """
        batch, tokens = ids.shape
        causal = np.tril(np.ones((tokens, tokens), dtype=bool))
        allowed = mx.array(causal[None, None] & mask.astype(bool)[:, None, None, :])
        rope = rotary_table(tokens, self.config.head_dim, self.config.rope_theta)
        x = self.embed_tokens(ids.reshape(-1)).reshape(batch, tokens, -1)
        kept = {0: x}
        for done, layer in enumerate(self.layers, start=1):
            x = layer(x, allowed, rope)
            mx.eval(x)
            if done in self.taps:
                kept[done] = x if self.norm is None or done < self.config.num_hidden_layers else \
                    rms_norm(x, self.norm, self.config.rms_norm_eps).astype(x.dtype)
            if on_layer is not None:
                on_layer(done, len(self.layers))
        y = mx.concatenate([kept[tap] for tap in self.taps], axis=-1)
        mx.eval(y)
        return y
