"""The denoising step on a CPU: what `flux2.Flux2Transformer` defines, run by the native kernels.

Products read packed weights and activations rounded to int8 (kernels/cpu.py); what lies between them is fused
(kernels/fused.py). The residual stream is one float32 matrix of text rows and then image rows, so that joining the two
costs nothing. All memory of a step is taken once and used again by every block and every step; the MLP, which would
need the most, goes through in slices of its hidden units. All but the attention treats each token on its own, so it may
go through in blocks of `rows` tokens: the same bits in less memory.

Shape letters as in flux2.py: T text tokens, I image tokens, S = T + I, D width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
_EDGE_ROWS = 512
"""Tokens that go through the layers before and after the blocks together. `rows` is never less, so that torch sees the
same matrices whatever it is."""


def runner(model: Flux2Transformer, rows: int | None = None) -> Flux2Transformer | FusedTransformer:
    """What computes the velocity best: the fused step where it can run (`fused.why_not`), else the model as it is.

    `rows` is how many tokens the fused step takes at a time (default: all; at least 512).
    """
    dense = dense_layer(model.transformer_blocks) or dense_layer(model.single_transformer_blocks)
    device = next(iter(model.state_dict().values())).device.type
    reason = fused.why_not(model.config.attention_head_dim, dense, device)
    return FusedTransformer(model, rows) if reason is None else model


class FusedTransformer:
    """A transformer ready to run natively; called like the transformer itself. Not for two threads at once."""

    def __init__(self, model: Flux2Transformer, rows: int | None = None) -> None:
        self.model, self.config = model, model.config
        self._rows = None if rows is None else max(rows, _EDGE_ROWS)
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
        context = self._context(text, latents.dtype)
        memory = self._memory_for(text.shape[1], latents.shape[1])
        total, velocity = batch * len(self._blocks), []
        for i in range(batch):
            memory.text.x.copy_(context[i])
            for some, rows in zip(latents[i].split(_EDGE_ROWS), memory.image.x.split(_EDGE_ROWS), strict=True):
                rows.copy_(model.x_embedder(some))
            branches = (_branches(mod.text, i, eps), _branches(mod.image, i, eps), _branches(mod.single, i, eps)[0])
            for done, block in enumerate(self._blocks, start=i * len(self._blocks) + 1):
                block.run(memory, branches, rope, eps)
                if on_block is not None:
                    on_block(done, total)
            shift, scale = (vector[i, 0].float() for vector in mod.out)
            last = Norm(True, eps, 1 + scale, shift)
            velocity.append(torch.cat([self._out(rows, last, memory, latents.dtype)
                                       for rows in memory.image.x.split(_EDGE_ROWS)]))
        return torch.stack(velocity)

    def _out(self, x: Tensor, norm: Norm, memory: _Memory, dtype: torch.dtype) -> Tensor:
        y = memory.block.y[: len(x)]
        fused.normalize(x, norm, y)
        return self.model.proj_out(y.to(dtype))

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
            self._memory = _Memory(self.model.config, text, image, self._rows)
        return self._memory


# ------------------------------------------------------------------------------------------------------ memory

@dataclass(frozen=True)
class _Rows:
    """What is kept of some tokens throughout a block; `first` is the place of their first one in the attention."""

    first: int
    x: Tensor
    """float32 [M, D], the residual stream."""
    normed: Activations
    """[M, D]: what goes into a branch."""
    attended: Activations
    """[M, D]: what comes out of the attention."""

    def part(self, start: int, stop: int) -> _Rows:
        """The tokens start..stop of these."""
        return _Rows(self.first + start, self.x[start:stop], self.normed.rows(start, stop),
                     self.attended.rows(start, stop))


@dataclass(frozen=True)
class _Block:
    """What the tokens at work need in between."""

    qkv: Tensor
    """bfloat16 [R, 3D]"""
    y: Tensor
    """float32 [R, D], what a branch adds to x; in the memory of `qkv`, which is done by then."""
    units: Tensor
    """bfloat16 [R, 2 * slice]: gates and values of some of the MLP's hidden units."""
    hidden: Activations
    """[R, F]: the MLP of a double-stream block; in the memory of `joined`, which belongs to the other kind."""
    joined: Activations
    """[R, D + F]: attention | MLP of a single-stream block."""

    @classmethod
    def of(cls, rows: int, width: int, hidden: int) -> _Block:
        qkv = torch.empty(rows, 3 * width, dtype=torch.bfloat16)
        y = qkv.flatten()[: 2 * rows * width].view(torch.float32).view(rows, width)
        units = torch.empty(rows, 2 * min(hidden, HIDDEN_SLICE), dtype=torch.bfloat16)
        joined = Activations.empty(rows, width + hidden)
        return cls(qkv, y, units, joined.narrowed(hidden), joined)

    def part(self, count: int) -> _Block:
        """The memory of fewer tokens."""
        return _Block(self.qkv[:count], self.y[:count], self.units[:count], self.hidden.rows(0, count),
                      self.joined.rows(0, count))


class _Memory:
    """The memory of a step of T text and I image tokens, of which at most `rows` are at work at a time."""

    def __init__(self, config: Flux2Config, text: int, image: int, rows: int | None) -> None:
        width, tokens, heads = config.width, text + image, config.num_attention_heads
        self.tokens = (text, image)
        self.most = min(rows or tokens, tokens)
        self.all = _Rows(0, torch.empty(tokens, width), Activations.empty(tokens, width),
                         Activations.empty(tokens, width))
        self.text, self.image = self.all.part(0, text), self.all.part(text, tokens)
        self.block = _Block.of(self.most, width, config.mlp_width)
        self.heads = Heads.zeros(heads, heads, config.attention_head_dim, tokens)

    def blocks(self, rows: _Rows) -> Iterator[tuple[_Rows, _Block]]:
        """`rows` as many at a time as there is memory for."""
        count = len(rows.x)
        for start in range(0, count, self.most):
            stop = min(start + self.most, count)
            yield rows.part(start, stop), self.block.part(stop - start)


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
        for stream, stream_rows, (attention, _) in streams:
            for rows, block in memory.blocks(stream_rows):
                fused.normalize(rows.x, attention.norm, rows.normed)
                projected = block.qkv.chunk(3, dim=1)
                for weight, out in zip(stream.qkv, projected, strict=True):
                    linear_quantized(rows.normed, weight, out)
                fused.arrange(projected, memory.heads, norms=stream.norms, eps=eps, rope=rope, first=rows.first)
        fused.attend(memory.heads, memory.all.attended)
        for stream, stream_rows, (attention, mlp) in streams:
            for rows, block in memory.blocks(stream_rows):
                linear_quantized(rows.attended, stream.out, block.y)
                fused.normalize(rows.x, mlp.norm, rows.normed, block.y, attention.gate)
                fused.gated_mlp(rows.normed, stream.gate, stream.value, block.units, block.hidden)
                linear_quantized(block.hidden, stream.mlp_out, block.y)
                fused.add(rows.x, block.y, mlp.gate)


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
        norm, gate = branches[2]
        for rows, block in memory.blocks(memory.all):
            fused.normalize(rows.x, norm, rows.normed)
            linear_quantized(rows.normed, self.qkv, block.qkv)
            fused.arrange(block.qkv.chunk(3, dim=1), memory.heads, norms=self.norms, eps=eps, rope=rope,
                          first=rows.first)
        fused.attend(memory.heads, memory.all.attended)
        for rows, block in memory.blocks(memory.all):
            block.joined.put(rows.attended)
            fused.gated_mlp(rows.normed, self.gate, self.value, block.units, block.joined, rows.x.shape[1])
            linear_quantized(block.joined, self.out, block.y)
            fused.add(rows.x, block.y, gate)
