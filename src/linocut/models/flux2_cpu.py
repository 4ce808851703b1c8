"""The denoising step on a CPU: what `flux2.Flux2Transformer` defines, run by the native kernels.

Products read packed weights and activations rounded to int8 (kernels/cpu.py); what lies between them is fused
(kernels/fused.py). The residual stream is one float32 matrix of text rows and then image rows, so that joining the two
costs nothing. All memory of a step is taken once and used again by every block and every step; the MLP, which would
need the most, goes through in slices of its hidden units.

Shape letters as in flux2.py: T text tokens, I image tokens, S = T + I, D width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linocut.kernels import fused
from linocut.kernels.cpu import Activations, linear_quantized
from linocut.kernels.fused import Heads, Norm
from linocut.kernels.fusible import HIDDEN_SLICE
from linocut.kernels.problem import PackedWeight
from linocut.models.configs import Flux2Config
from linocut.models.flux2 import Flux2Transformer, RMSNorm, Rope
from linocut.models.linear import dense_layer, packed_weight
from linocut.models.modulations import Modulations

_PROMPTS = 2
"""Prompts whose embedded features are kept between steps: guidance alternates between two."""


def runner(model: Flux2Transformer) -> Flux2Transformer | FusedTransformer:
    """What computes the velocity best: the fused step where it can run (`fused.why_not`), else the model as it is."""
    dense = dense_layer(model.transformer_blocks) or dense_layer(model.single_transformer_blocks)
    reason = fused.why_not(model.config.attention_head_dim, dense, model.x_embedder.weight.device.type)
    return FusedTransformer(model) if reason is None else model


class FusedTransformer:
    """A transformer ready to run natively; called like the transformer itself. Not for two threads at once."""

    def __init__(self, model: Flux2Transformer) -> None:
        self.model, self.config = model, model.config
        self._blocks: list[_Double | _Single] = [_Double.of(block) for block in model.transformer_blocks]
        self._blocks += [_Single.of(block) for block in model.single_transformer_blocks]
        self._memory: _Memory | None = None
        self._contexts: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def __call__(self, latents: Tensor, text: Tensor, sigma: Tensor | Modulations, image_ids: Tensor, text_ids: Tensor,
                 on_block: Callable[[int, int], None] | None = None) -> Tensor:
        """Predict the velocity [B, I, C]; the arguments are those of `Flux2Transformer.forward`.

        Pictures go through one after another; on_block counts the blocks of all of them.
        """
        model, eps, batch = self.model, self.model.config.eps, latents.shape[0]
        cos, sin = model.rope(latents, text, image_ids, text_ids)
        rope = (cos[:, 0].contiguous(), sin[:, 0].contiguous())
        mod = sigma if isinstance(sigma, Modulations) else model.modulations(sigma, latents.dtype)
        context, embedded = self._context(text, latents.dtype), model.x_embedder(latents)
        memory = self._memory_for(text.shape[1], latents.shape[1])
        total, velocity = batch * len(self._blocks), []
        for i in range(batch):
            memory.text.x.copy_(context[i])
            memory.image.x.copy_(embedded[i])
            branches = (_branches(mod.text, i, eps), _branches(mod.image, i, eps), _branches(mod.single, i, eps)[0])
            for done, block in enumerate(self._blocks, start=i * len(self._blocks) + 1):
                block.run(memory, branches, rope, eps)
                if on_block is not None:
                    on_block(done, total)
            shift, scale = (vector[i, 0].float() for vector in mod.out)
            fused.normalize(memory.image.x, Norm(True, eps, 1 + scale, shift), memory.image.y)
            velocity.append(model.proj_out(memory.image.y.to(latents.dtype)))
        return torch.stack(velocity)

    def _context(self, text: Tensor, dtype: torch.dtype) -> Tensor:
        """The embedded features of `text`, which do not change from step to step."""
        for known, context in self._contexts:
            if known is text:
                return context
        context = self.model.context_embedder(text.to(dtype))
        self._contexts = [*self._contexts[1 - _PROMPTS :], (text, context)]
        return context

    def _memory_for(self, text: int, image: int) -> _Memory:
        if self._memory is None or self._memory.tokens != (text, image):
            self._memory = None  # let go of the old one first
            self._memory = _Memory(self.model.config, text, image)
        return self._memory


# ------------------------------------------------------------------------------------------------------ memory

@dataclass(frozen=True)
class _Rows:
    """The memory of some tokens; `first` is the place of their first one in the attention."""

    first: int
    x: Tensor
    """float32 [M, D], the residual stream."""
    y: Tensor
    """float32 [M, D], what a branch adds to it."""
    qkv: Tensor
    """[M, 3D]"""
    units: Tensor
    """[M, 2 * slice]: gates and values of some of the MLP's hidden units."""
    normed: Activations
    """[M, D]: what goes into a block; in a double-stream block also what comes out of the attention."""
    hidden: Activations
    """[M, F]: the MLP of a double-stream block."""
    joined: Activations
    """[M, D + F]: attention | MLP of a single-stream block."""

    def part(self, start: int, stop: int) -> _Rows:
        """The memory of tokens start..stop of these."""
        return _Rows(start, self.x[start:stop], self.y[start:stop], self.qkv[start:stop], self.units[start:stop],
                     self.normed.rows(start, stop), self.hidden.rows(start, stop), self.joined.rows(start, stop))


class _Memory:
    """The memory of a step of T text and I image tokens."""

    def __init__(self, config: Flux2Config, text: int, image: int) -> None:
        width, hidden, tokens, heads = config.width, config.mlp_width, text + image, config.num_attention_heads
        self.tokens = (text, image)
        self.all = _Rows(
            0, torch.empty(tokens, width), torch.empty(tokens, width),
            torch.empty(tokens, 3 * width, dtype=torch.bfloat16),
            torch.empty(tokens, 2 * min(hidden, HIDDEN_SLICE), dtype=torch.bfloat16),
            Activations.empty(tokens, width), Activations.empty(tokens, hidden),
            Activations.empty(tokens, width + hidden))
        self.text, self.image = self.all.part(0, text), self.all.part(text, tokens)
        self.heads = Heads.zeros(heads, heads, config.attention_head_dim, tokens)


# ------------------------------------------------------------------------------------------------------ blocks

class _Branch(NamedTuple):
    """A residual branch: the norm before it and the gate after it."""

    norm: Norm
    gate: Tensor


_Branches = tuple[tuple[_Branch, ...], tuple[_Branch, ...], _Branch]
"""(attention, MLP) of the text stream and of the image stream of double-stream blocks; that of single-stream blocks."""


def _branches(vectors: tuple[Tensor, ...], picture: int, eps: float) -> tuple[_Branch, ...]:
    """Triples (shift, scale, gate) [B, 1, D] of one picture."""
    rows = [vector[picture, 0].float().contiguous() for vector in vectors]
    return tuple(_Branch(Norm(True, eps, 1 + scale, shift), gate)
                 for shift, scale, gate in zip(rows[::3], rows[1::3], rows[2::3], strict=True))


def _halves(weight: PackedWeight) -> tuple[PackedWeight, PackedWeight]:
    """The rows that make the MLP's gates, and those that make its values."""
    return weight.rows(0, weight.o // 2), weight.rows(weight.o // 2, weight.o)


class _Stream(NamedTuple):
    """The weights of one residual stream of a double-stream block."""

    qkv: tuple[PackedWeight, ...]
    norms: tuple[Tensor, Tensor]
    out: PackedWeight
    gate: PackedWeight
    value: PackedWeight
    mlp_out: PackedWeight

    @classmethod
    def of(cls, qkv: Sequence[nn.Module], norm_q: RMSNorm, norm_k: RMSNorm, out: nn.Module, mlp: Any) -> _Stream:
        return cls(tuple(map(packed_weight, qkv)), (norm_q.weight.detach().float(), norm_k.weight.detach().float()),
                   packed_weight(out), *_halves(packed_weight(mlp.linear_in)), packed_weight(mlp.linear_out))


class _Double(NamedTuple):
    """A `DoubleBlock`."""

    text: _Stream
    image: _Stream

    @classmethod
    def of(cls, block: Any) -> _Double:
        attn = block.attn
        return cls(_Stream.of((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), attn.norm_added_q,
                              attn.norm_added_k, attn.to_add_out, block.ff_context),
                   _Stream.of((attn.to_q, attn.to_k, attn.to_v), attn.norm_q, attn.norm_k, attn.to_out[0], block.ff))

    def run(self, memory: _Memory, branches: _Branches, rope: Rope, eps: float) -> None:
        streams = ((self.text, memory.text, branches[0]), (self.image, memory.image, branches[1]))
        for stream, rows, (attention, _) in streams:
            fused.normalize(rows.x, attention.norm, rows.normed)
            projected = rows.qkv.chunk(3, dim=1)
            for weight, out in zip(stream.qkv, projected, strict=True):
                linear_quantized(rows.normed, weight, out)
            fused.arrange(projected, memory.heads, norms=stream.norms, eps=eps, rope=rope, first=rows.first)
        fused.attend(memory.heads, memory.all.normed)
        for stream, rows, (attention, mlp) in streams:
            linear_quantized(rows.normed, stream.out, rows.y)
            fused.normalize(rows.x, mlp.norm, rows.normed, rows.y, attention.gate)
            fused.gated_mlp(rows.normed, stream.gate, stream.value, rows.units, rows.hidden)
            linear_quantized(rows.hidden, stream.mlp_out, rows.y)
            fused.add(rows.x, rows.y, mlp.gate)


class _Single(NamedTuple):
    """A `SingleBlock`."""

    qkv: PackedWeight
    norms: tuple[Tensor, Tensor]
    gate: PackedWeight
    value: PackedWeight
    out: PackedWeight

    @classmethod
    def of(cls, block: Any) -> _Single:
        attn, into = block.attn, packed_weight(block.attn.to_qkv_mlp_proj)
        mlp = into.o - attn.widths[-1]  # q, k and v come before it
        return cls(into.rows(0, mlp), (attn.norm_q.weight.detach().float(), attn.norm_k.weight.detach().float()),
                   *_halves(into.rows(mlp, into.o)), packed_weight(attn.to_out))

    def run(self, memory: _Memory, branches: _Branches, rope: Rope, eps: float) -> None:
        rows, (norm, gate) = memory.all, branches[2]
        fused.normalize(rows.x, norm, rows.normed)
        linear_quantized(rows.normed, self.qkv, rows.qkv)
        fused.arrange(rows.qkv.chunk(3, dim=1), memory.heads, norms=self.norms, eps=eps, rope=rope)
        fused.attend(memory.heads, rows.joined)
        fused.gated_mlp(rows.normed, self.gate, self.value, rows.units, rows.joined, rows.x.shape[1])
        linear_quantized(rows.joined, self.out, rows.y)
        fused.add(rows.x, rows.y, gate)
