"""The denoising step on an NVIDIA GPU: what `flux2.Flux2Transformer` defines, run by Triton's kernels.

As on the CPU (flux2_cpu.py), products read packed weights and rounded activations, what lies between them is fused, the
residual stream is one float32 matrix of text rows and then image rows, and all memory of a step is taken once. Each
product takes the route that suits its shape (kernels/gpu/tuning.py), and what comes before it writes the activations
that the route reads. Residual additions wait for the next norm. From the second call of a size on the whole step is one
CUDA graph. Pictures too small to keep a GPU busy go through it together, text rows of all of them first.

Shape letters as in flux2.py: B batch, T text tokens, I image tokens, S = T + I, D width, F MLP width, H heads, K head
width.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linocut.kernels import fusible
from linocut.kernels.gpu import accuracy, graphs, routes, rows, runtime, timing, tuning
from linocut.kernels.gpu.activations import Activations, layout
from linocut.kernels.gpu.routes import Route, Scratch, Shape
from linocut.kernels.problem import PackedWeight
from linocut.models.configs import Flux2Config
from linocut.models.flux2 import Flux2Transformer
from linocut.models.linear import PackedLinear, packed_weight
from linocut.models.modulations import Modulations

DTYPE = torch.bfloat16
"""Of what is kept between products."""
TUNE_SECONDS = 20.0
"""Most seconds that measuring products takes before the first step of a size on a GPU that was never measured."""
BATCH_BYTES = 128 << 20
"""Most memory of a step's largest matrix that pictures of a batch may share: 45 of the embedded model's squares go
through together, klein's from 448 px on one after another."""
_PROMPTS = 2
"""Prompts whose embedded features are kept between steps: guidance alternates between two."""


class GpuTransformer:
    """A transformer ready to run on a GPU; called like the transformer itself. Not for two threads at once.

    Attributes: `choices` of the last size, by shape of product; `graph_note` says why there is no CUDA graph.
    """

    def __init__(self, model: Flux2Transformer, graph: bool = True) -> None:
        self.model, self.config = model, model.config
        self.device = next(model.parameters()).device
        self._doubles = [_Double.of(block) for block in model.transformer_blocks]
        self._singles = [_Single.of(block) for block in model.single_transformer_blocks]
        self._scratch = Scratch(self.device)
        self._sizes: dict[tuple[int, int, int], _Step] = {}
        self._contexts: list[tuple[Tensor, Tensor]] = []
        self._graphs = graph and self.device.type == "cuda"
        self.graph_note: str | None = None if self._graphs else "graphs are for CUDA devices"

    @property
    def choices(self) -> dict[Shape, tuning.Choice]:
        """The routes of the size that ran last."""
        return next(reversed(self._sizes.values())).choices if self._sizes else {}

    @torch.no_grad()
    def __call__(self, latents: Tensor, text: Tensor, sigma: Tensor | Modulations, image_ids: Tensor, text_ids: Tensor,
                 on_block: Callable[[int, int], None] | None = None) -> Tensor:
        """Predict the velocity [B, I, C]; the arguments are those of `Flux2Transformer.forward`.

        Pictures of one noise level go through as many at a time as BATCH_BYTES allows, others one after another.
        on_block(done, total) is called after each such step, which takes milliseconds and is not interrupted.
        """
        model, batch = self.model, latents.shape[0]
        mod = sigma if isinstance(sigma, Modulations) else model.modulations(sigma, latents.dtype)
        velocity = []
        with runtime.on_device(latents):
            context = self._context(text)
            blocks = len(self._doubles) + len(self._singles)
            most = self._at_once(text.shape[1] + latents.shape[1]) if len(mod.single[0]) == 1 else 1
            many = min(most, batch)
            for start in range(0, batch, many):
                first = min(start, batch - many)  # the last ones with some of before: one size of step for all
                part = slice(first, first + many)
                step = self._step(latents[part], text[part], image_ids, text_ids)
                step.set(latents[part], context[part], mod, first)
                self._run(step)
                fresh = step.velocity.unflatten(0, (many, -1))[start - first:]
                velocity.append(fresh.to(latents.dtype, copy=True))
                if on_block is not None:
                    if self.device.type == "cuda":
                        torch.cuda.synchronize(self.device)
                    on_block(part.stop * blocks, batch * blocks)
            return torch.cat(velocity)

    def _at_once(self, tokens: int) -> int:
        """Pictures of so many tokens that go through a step together."""
        return max(1, BATCH_BYTES // (tokens * _columns(self.config) * DTYPE.itemsize))

    def _step(self, latents: Tensor, text: Tensor, image_ids: Tensor, text_ids: Tensor) -> _Step:
        key = (latents.shape[0], text.shape[1], latents.shape[1])
        step = self._sizes.pop(key, None)
        if step is None:
            self._sizes.clear()  # let go of the other size's memory first
            batch, *tokens = key
            step = _Step(self.config, *key, self.device, self._shapes(*(batch * each for each in tokens)))
        self._sizes[key] = step
        if step.ids is None or step.ids[0] is not image_ids or step.ids[1] is not text_ids:
            cos, sin = self.model.rope(latents, text, image_ids, text_ids)
            for table, of_picture in zip(step.rope, (cos, sin), strict=True):
                table.copy_(step.by_stream(of_picture[:, 0].expand(step.batch, -1, -1)))
            step.ids = (image_ids, text_ids)
        return step

    def _shapes(self, text: int, image: int) -> list[Shape]:
        """All products of a step, each once."""
        found = [Shape(tokens, weight.n, weight.o, weight.encoding) for double in self._doubles
                 for tokens, stream in ((text, double.text), (image, double.image))
                 for weight in (stream.qkv, stream.out, stream.mlp_in, stream.mlp_out)]
        found += [Shape(text + image, weight.n, weight.o, weight.encoding) for single in self._singles
                  for weight in (single.into, single.out)]
        return list(dict.fromkeys(found))

    def _run(self, step: _Step) -> None:
        if not self._graphs or step.runs == 0:
            self._compute(step)  # compiles kernels, and takes the memory of libraries
        elif step.graph is None:
            try:
                with graphs.recorded(self.device) as graph:
                    self._compute(step)
                step.graph = graph
                graph.replay()
            except RuntimeError as error:
                self._graphs, self.graph_note = False, f"capturing failed: {error}".splitlines()[0]
                torch.cuda.synchronize(self.device)
                self._compute(step)
        else:
            step.graph.replay()
        step.runs += 1

    def _compute(self, step: _Step) -> None:
        """One step, from and to the fixed memory of `step`."""
        model, text = self.model, step.text
        step.x[:text].copy_(step.context)
        step.x[text:].copy_(model.x_embedder(step.latents))
        step.pending.clear()
        for double in self._doubles:
            double.run(step, self._scratch)
        for single in self._singles:
            single.run(step, self._scratch)
        last = Activations.empty("float", step.image, self.config.width, self.device, torch.float32)
        step.normalize(slice(text, text + step.image), step.out, last)
        step.velocity.copy_(model.proj_out(last.values))

    def _context(self, text: Tensor) -> Tensor:
        """The embedded features of `text`, which do not change from step to step."""
        for known, context in self._contexts:
            if known is text:
                return context
        context = self.model.context_embedder(text.float())
        self._contexts = [*self._contexts[1 - _PROMPTS :], (text, context)]
        return context


def runner(model: Flux2Transformer) -> Flux2Transformer | GpuTransformer:
    """What computes the velocity best: the fused step where it can run (`why_not`), else the model as it is."""
    return GpuTransformer(model) if why_not(model) is None else model


def why_not(model: Flux2Transformer) -> str | None:
    """None if the blocks of this transformer can run fused where its weights are, else the reason."""
    reason = runtime.why_not_fused(str(next(model.parameters()).device), model.config.attention_head_dim)
    if reason is not None:
        return reason
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for name, layer in blocks.named_modules():
            if isinstance(layer, nn.Linear) or (isinstance(layer, PackedLinear)
                                                and layer.encoding not in fusible.ON_GPU):
                return f"{name} is neither binary nor ternary"
    return None


# ------------------------------------------------------------------------------------------------------ memory

class _Vectors(NamedTuple):
    """What modulates a branch, float32 [D] each: the norm before it and, but for the last norm, the gate after it."""

    shift: Tensor
    factor: Tensor
    gate: Tensor


@dataclass
class _Pending:
    """y[M, D], to be added to rows start..stop of x times gate[D] when they are normed next."""

    start: int
    stop: int
    y: Tensor
    gate: Tensor


class _Step:
    """The memory of a step of B pictures, which a graph reads and writes wherever it is replayed. Its rows are the text
    tokens of all pictures, then their image tokens; `text` and `image` say how many of either there are."""

    def __init__(self, config: Flux2Config, batch: int, text: int, image: int, device: torch.device,
                 shapes: Sequence[Shape]) -> None:
        self.batch, self.config, self.device = batch, config, device
        self.text, self.image = text, image = batch * text, batch * image
        width, tokens = config.width, text + image
        self.choices = _choose(shapes, device)
        self.x = torch.empty(tokens, width, device=device)
        self.y = torch.empty(tokens, width, dtype=DTYPE, device=device)
        wide = torch.empty(tokens * _columns(config), dtype=DTYPE, device=device)
        self.wide = wide.view(tokens, -1)
        """[S, 3D + 2F]: q | k | v | gates | values of a single-stream block."""
        self.qkv = wide[: tokens * 3 * width].view(tokens, -1)
        """[S, 3D] of a double-stream block and, behind it, [S, 2F]."""
        self.units = wide[tokens * 3 * width :].view(tokens, -1)
        half = config.attention_head_dim // 2
        self.rope = (torch.empty(tokens, half, device=device), torch.empty(tokens, half, device=device))
        self.ids: tuple[Tensor, Tensor] | None = None
        self.latents = torch.empty(image, config.in_channels, device=device)
        self.context = torch.empty(text, width, device=device)
        self.velocity = torch.empty(image, config.velocity_channels, device=device)
        self._modulations = torch.empty(18, width, device=device)
        triples = [_Vectors(*triple) for triple in self._modulations.split(3)]
        self.image_mod, self.text_mod, self.single_mod, self.out = triples[:2], triples[2:4], triples[4], triples[5]
        self._acts = Scratch(device)
        self.pending: list[_Pending] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.runs = 0
        for shape, choice in self.choices.items():  # as much as any of them takes, before there is a graph
            self.activations(choice.route.kind, shape.m, shape.n)

    def set(self, latents: Tensor, context: Tensor, mod: Modulations, picture: int) -> None:
        """Put in what a step starts from: latents [B, I, C], context [B, T, D], and the modulations of them all or, if
        pictures have their own, of number `picture`."""
        self.latents.copy_(latents.flatten(0, 1))
        self.context.copy_(context.flatten(0, 1))
        vectors = [vector[picture if vector.shape[0] > 1 else 0, 0].float()
                   for part in (mod.image, mod.text, mod.single, mod.out) for vector in part]
        self._modulations[:17].copy_(torch.stack(vectors))
        self._modulations[1::3] += 1  # scales come second in every triple

    def route(self, m: int, weight: PackedWeight) -> Route:
        """How a product of m tokens with a weight runs."""
        return self.choices[Shape(m, weight.n, weight.o, weight.encoding)].route

    def activations(self, kind: str, m: int, n: int) -> Activations:
        """Memory for activations [m, n] of a kind, which one product reads; the next one's lie in the same place."""
        values, *scales = self._acts.take(*layout(kind, m, n, DTYPE))
        return Activations(kind, values, scales[0] if scales else None)

    def normalize(self, tokens: slice, vectors: _Vectors, out: Activations) -> None:
        """Add to x what is pending for these tokens, and norm them into `out`."""
        start, stop, _ = tokens.indices(self.text + self.image)
        waiting = [each for each in self.pending if each.start < stop and start < each.stop]
        self.pending = [each for each in self.pending if each not in waiting]
        for each in waiting:
            first, end = max(start, each.start), min(stop, each.stop)
            rows.normalize(self.x[first:end], vectors.factor, vectors.shift, self.config.eps,
                           out.rows(first - start, end - start), each.y[first - each.start : end - each.start],
                           each.gate)
        if not waiting:
            rows.normalize(self.x[start:stop], vectors.factor, vectors.shift, self.config.eps, out)

    def wait(self, tokens: slice, y: Tensor, gate: Tensor) -> None:
        """Have y added to the rows `tokens` of x when they are normed next."""
        self.pending.append(_Pending(tokens.start, tokens.stop, y, gate))

    def attend(self, qkv: Tensor) -> Tensor:
        """Attention over a picture's tokens of q, k and v in the first columns of qkv [B S, ...]: bfloat16 [B S, D]."""
        config = self.config
        q, k, v = (part.unflatten(2, (config.num_attention_heads, -1)).transpose(1, 2)
                   for part in self.by_picture(qkv[:, : 3 * config.width]).chunk(3, dim=2))
        with _attention_order(self.device):
            return self.by_stream(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def by_picture(self, rows: Tensor) -> Tensor:
        """Rows [B S, N] in the step's order as [B, S, N]."""
        if self.batch == 1:
            return rows[None]
        return torch.cat([part.unflatten(0, (self.batch, -1)) for part in rows.split([self.text, self.image])], dim=1)

    def by_stream(self, x: Tensor) -> Tensor:
        """x [B, S, N] as rows [B S, N] in the step's order."""
        if self.batch == 1:
            return x[0]
        tokens = [self.text // self.batch, self.image // self.batch]
        return torch.cat([part.flatten(0, 1) for part in x.split(tokens, dim=1)])


def _columns(config: Flux2Config) -> int:
    """Of a step's largest matrix, one row per token."""
    return 3 * config.width + 2 * config.mlp_width


@contextlib.contextmanager
def _attention_order(device: torch.device) -> Iterator[None]:
    """cuDNN's attention first: on Hopper it is the quickest that torch has."""
    if device.type != "cuda" or runtime.capability(str(device)) < runtime.COPY_ENGINE:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


def _choose(shapes: Sequence[Shape], device: torch.device) -> dict[Shape, tuning.Choice]:
    """A route for each shape: as it was measured, after measuring what is new on a real GPU."""
    allowed = accuracy.LEVELS[accuracy.level()]
    name = str(device)
    if device.type == "cuda" and os.environ.get("LINOCUT_GPU_TUNE", "").strip() != "0":
        table = tuning.measure(shapes, name, timing.Products(name), names=allowed, budget=TUNE_SECONDS)
        torch.cuda.empty_cache()  # as much as a step needs, in pieces of other sizes
    else:
        table = tuning.Table.of(name)
    return {shape: table.choose(shape, name, allowed) for shape in shapes}


# ------------------------------------------------------------------------------------------------------ blocks

def joined(layers: Sequence[PackedLinear]) -> PackedWeight:
    """The rows of several weights as one, whose memory the layers share from then on."""
    first = packed_weight(layers[0])
    if any(layer.encoding != first.encoding or layer.in_features != first.n for layer in layers):
        raise TypeError("weights of one encoding and width are needed to join them")
    codes, scales = torch.cat([layer.codes for layer in layers]), torch.cat([layer.scales for layer in layers])
    start = 0
    for layer in layers:
        stop = start + layer.out_features
        layer.codes, layer.scales = codes[start:stop], scales[start:stop]
        start = stop
    return PackedWeight(codes, scales, None, first.encoding, first.n)


def _norms(q: Any, k: Any) -> tuple[Tensor, Tensor]:
    return q.weight.detach().float(), k.weight.detach().float()


class _Stream(NamedTuple):
    """The weights of one residual stream of a double-stream block."""

    qkv: PackedWeight
    norms: tuple[Tensor, Tensor]
    out: PackedWeight
    mlp_in: PackedWeight
    mlp_out: PackedWeight


class _Double(NamedTuple):
    """A `DoubleBlock`."""

    text: _Stream
    image: _Stream

    @classmethod
    def of(cls, block: Any) -> _Double:
        attn = block.attn
        return cls(_Stream(joined([attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]),
                           _norms(attn.norm_added_q, attn.norm_added_k), packed_weight(attn.to_add_out),
                           packed_weight(block.ff_context.linear_in), packed_weight(block.ff_context.linear_out)),
                   _Stream(joined([attn.to_q, attn.to_k, attn.to_v]), _norms(attn.norm_q, attn.norm_k),
                           packed_weight(attn.to_out[0]), packed_weight(block.ff.linear_in),
                           packed_weight(block.ff.linear_out)))

    def run(self, step: _Step, scratch: Scratch) -> None:
        config, total = step.config, step.text + step.image
        streams = ((self.text, slice(0, step.text), step.text_mod), (self.image, slice(step.text, total),
                                                                     step.image_mod))
        for stream, tokens, mods in streams:
            _multiply(step, scratch, stream.qkv, step.qkv[tokens], tokens,
                      partial(step.normalize, tokens, mods[0]))
            rows.turn(step.qkv[tokens], stream.norms, step.rope, config.num_attention_heads, config.eps, tokens.start)
        attended = step.attend(step.qkv)
        for stream, tokens, mods in streams:
            y, units = step.y[tokens], step.units[tokens]
            _multiply(step, scratch, stream.out, y, tokens, partial(rows.quantize, attended[tokens]))
            step.wait(tokens, y, mods[0].gate)
            _multiply(step, scratch, stream.mlp_in, units, tokens, partial(step.normalize, tokens, mods[1]))
            _multiply(step, scratch, stream.mlp_out, y, tokens, partial(rows.gated, units))
            step.wait(tokens, y, mods[1].gate)


class _Single(NamedTuple):
    """A `SingleBlock`."""

    into: PackedWeight
    norms: tuple[Tensor, Tensor]
    out: PackedWeight

    @classmethod
    def of(cls, block: Any) -> _Single:
        attn = block.attn
        return cls(packed_weight(attn.to_qkv_mlp_proj), _norms(attn.norm_q, attn.norm_k), packed_weight(attn.to_out))

    def run(self, step: _Step, scratch: Scratch) -> None:
        config, everything = step.config, slice(0, step.text + step.image)
        _multiply(step, scratch, self.into, step.wide, everything, partial(step.normalize, everything, step.single_mod))
        rows.turn(step.wide, self.norms, step.rope, config.num_attention_heads, config.eps)
        attended = step.attend(step.wide)
        _multiply(step, scratch, self.out, step.y, everything,
                  partial(rows.gated, step.wide[:, 3 * config.width :], attended=attended))
        step.wait(everything, step.y, step.single_mod.gate)


def _multiply(step: _Step, scratch: Scratch, weight: PackedWeight, out: Tensor, tokens: slice,
              fill: Callable[[Activations], None]) -> None:
    """out = x @ W.T for the activations x of some tokens, which `fill` writes in the form that the route reads."""
    m = tokens.stop - tokens.start
    route = step.route(m, weight)
    act = step.activations(route.kind, m, weight.n)
    fill(act)
    routes.run(route, act, weight, out, scratch)
