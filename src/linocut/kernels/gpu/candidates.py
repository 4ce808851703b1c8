"""The kernels of `dispatch` that run on NVIDIA GPUs. Triton is imported when one of them first runs."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linocut.formats.packed import GROUP_SIZE
from linocut.kernels.blocked import blocked_linear
from linocut.kernels.gpu import runtime
from linocut.kernels.problem import FLOAT_DTYPES, PackedWeight, Problem

if TYPE_CHECKING:
    from linocut.kernels.gpu import tuning

SCRATCH_BYTES = 64 << 20
"""Of decoded rows at a time: a block of 16 MB, which is right for a CPU's caches, is a small product on a GPU."""


def _why_not(problem: Problem) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile is tracing, which follows torch operations only"
    if problem.dtype not in FLOAT_DTYPES:
        return f"computes in float32, bfloat16 or float16, not {problem.dtype}"
    return runtime.why_not(problem.device)


@lru_cache(maxsize=4)
def _table(device: str, path: str) -> tuning.Table:
    """What was measured on a GPU when this process first asked; `path` is where it lies."""
    from linocut.kernels.gpu import tuning

    return tuning.Table.of(device)


class Triton:
    """Decoders in Triton of a block of rows, then torch's matrix product on that block."""

    name = "triton"
    summary = "rows decoded on the GPU by Triton, then torch's matrix product"

    @property
    def automatic(self) -> bool:
        """Not in the interpreter, which is for tests."""
        return not runtime.interpreted()

    def why_not(self, problem: Problem) -> str | None:
        return _why_not(problem)

    def decode(self, weight: PackedWeight, out: Tensor) -> None:
        from linocut.kernels.gpu import decode

        with runtime.on_device(out):
            decode.decode(weight, out)

    def linear(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return blocked_linear(x, weight, self.decode, SCRATCH_BYTES)


class TritonInt8(Triton):
    """Activations rounded to int8, products on tensor cores with packed or just unpacked weights."""

    name = "triton-int8"
    summary = "activations rounded to int8, packed weights multiplied on tensor cores by Triton"

    def why_not(self, problem: Problem) -> str | None:
        if problem.gradients:
            return "a gradient is asked for, and rounded activations have none"
        if problem.n % GROUP_SIZE:
            return f"activations are quantized in groups of {GROUP_SIZE}, the weight has N = {problem.n}"
        if problem.encoding not in ("binary", "ternary"):
            return f"{problem.encoding} weights are decoded"
        return _why_not(problem) or runtime.why_no_products(problem.device)

    def linear(self, x: Tensor, weight: PackedWeight) -> Tensor:
        from linocut.kernels.gpu import routes, rows, tuning
        from linocut.kernels.gpu.activations import Activations

        device = str(x.device)
        shape = routes.Shape(x.shape[0], weight.n, weight.o, weight.encoding)
        route = _table(device, str(tuning.place(device))).choose(shape, device, ("packed", "unpacked")).route
        act = Activations.empty(route.kind, x.shape[0], weight.n, x.device)
        out = torch.empty((x.shape[0], weight.o), dtype=x.dtype, device=x.device)
        with runtime.on_device(x):
            rows.quantize(x.detach() if x.stride(1) == 1 else x.detach().contiguous(), act)
            routes.run(route, act, weight, out, routes.Scratch(x.device))
        return out
