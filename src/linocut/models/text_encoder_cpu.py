"""The text encoder on a CPU: what `text_encoder.Qwen3Encoder` defines, run by the native kernels.

As in flux2_cpu.py, products read packed weights and int8 activations, what lies between them is fused, and one set of
buffers serves every layer. Weights stay in the memory map and are read layer by layer.

Shape letters: T text tokens, D width, H query heads, G key/value heads, K head width, F MLP width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linocut.errors import UsageError
from linocut.kernels import fused
from linocut.kernels.cpu import Activations, linear_quantized
from linocut.kernels.fused import Heads, Norm
from linocut.kernels.fusible import HIDDEN_SLICE
from linocut.models.configs import Qwen3Config
from linocut.models.linear import dense_layer, packed_weight
from linocut.models.text_encoder import OnLayer, Qwen3Encoder, RMSNorm, rotary_table


def runner(model: Qwen3Encoder) -> Qwen3Encoder | FusedEncoder:
    """What encodes best: the fused encoder where it can run (`fused.why_not`), else the model as it is."""
    device = next(model.layers.parameters()).device.type
    reason = fused.why_not(model.config.head_dim, dense_layer(model.layers), device)
    return FusedEncoder(model) if reason is None else model


class FusedEncoder:
    """A text encoder ready to run natively; called like the encoder itself."""

    def __init__(self, model: Qwen3Encoder) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor, on_layer: OnLayer | None = None) -> Tensor:
        """Features [B, T, taps * D]; the arguments are those of `Qwen3Encoder.forward`.

        Prompts go through one after another; on_layer counts the layers of all of them.
        """
        model, (batch, tokens) = self.model, ids.shape
        lengths = mask.long().sum(dim=1).tolist()
        if any(not mask[i, :length].all() or length == 0 for i, length in enumerate(lengths)):
            raise UsageError("the mask of a prompt must be ones, at least one, and then zeros for padding on the right")
        memory = _Memory(model.config, tokens)
        embedded, features = model.embed_tokens(ids), []
        for i, length in enumerate(lengths):
            memory.x.copy_(embedded[i])
            kept = {0: embedded[i]}
            for done, layer in enumerate(model.layers, start=1):
                memory.run(layer, length)
                if done in model.taps:
                    kept[done] = self._tapped(memory.x, done).to(embedded.dtype)
                if on_layer is not None:
                    on_layer(i * len(model.layers) + done, batch * len(model.layers))
            features.append(torch.cat([kept[tap] for tap in model.taps], dim=-1))
        return torch.stack(features)

    def _tapped(self, x: Tensor, done: int) -> Tensor:
        if done < self.model.config.num_hidden_layers:
            return x.clone()
        normed = torch.empty_like(x)
        fused.normalize(x, _norm(self.model.norm), normed)
        return normed


class _Memory:
    """The memory of a prompt of T tokens, and the layer that works in it."""

    def __init__(self, config: Qwen3Config, tokens: int) -> None:
        queries, keys = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
        self.widths = [queries, keys, keys]
        self.x, self.y = torch.empty(tokens, config.hidden_size), torch.empty(tokens, config.hidden_size)
        """float32 [T, D]: the residual stream, and what a branch adds to it."""
        self.qkv = torch.empty(tokens, sum(self.widths))
        self.units = torch.empty(tokens, 2 * min(HIDDEN_SLICE, config.intermediate_size))
        """[T, 2 * slice]: gates and values of some of the MLP's hidden units."""
        self.normed = Activations.empty(tokens, config.hidden_size)
        self.attended = Activations.empty(tokens, queries)
        self.hidden = Activations.empty(tokens, config.intermediate_size)
        self.heads = Heads.zeros(config.num_attention_heads, config.num_key_value_heads, config.head_dim, tokens)
        cos, sin = rotary_table(tokens, config.head_dim, config.rope_theta, torch.device("cpu"))
        self.rope = (cos[:, : config.head_dim // 2].contiguous(), sin[:, : config.head_dim // 2].contiguous())

    def run(self, layer: Any, keys: int) -> None:
        """One `Layer` on x, in place; the first `keys` tokens are text."""
        attention, mlp = layer.self_attn, layer.mlp
        fused.normalize(self.x, _norm(layer.input_layernorm), self.normed)
        q, k, v = self.qkv.split(self.widths, dim=1)
        for linear, out in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v)):
            linear_quantized(self.normed, packed_weight(linear), out)
        norms = (attention.q_norm.weight.float(), attention.k_norm.weight.float())
        fused.arrange((q, k, v), self.heads, norms=norms, eps=attention.q_norm.eps, rope=self.rope, adjacent=False)
        fused.attend(self.heads, self.attended, keys, causal=True)
        linear_quantized(self.attended, packed_weight(attention.o_proj), self.y)

        fused.normalize(self.x, _norm(layer.post_attention_layernorm), self.normed, self.y)
        fused.gated_mlp(self.normed, packed_weight(mlp.gate_proj), packed_weight(mlp.up_proj), self.units, self.hidden)
        linear_quantized(self.hidden, packed_weight(mlp.down_proj), self.y)
        fused.add(self.x, self.y)


def _norm(norm: RMSNorm) -> Norm:
    return Norm(False, norm.eps, norm.weight.float())
