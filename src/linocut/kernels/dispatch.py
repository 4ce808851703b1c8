"""y = x @ W.T on packed W: the one door to every kernel.

`linear` and `dequantize` choose the first candidate that gives no reason against itself; `explain` tells all reasons.
Order: int8 (C++ on packed weights, activations rounded), native (C++ decoders, float activations), the same two on
NVIDIA GPUs (triton-int8, triton), reference (torch only, always can). `generic` (a C++ scalar product, the slow oracle
of the C++ side) runs only when asked for. An override is either the environment variable `LINOCUT_KERNEL`, which is
auto or one of these names, or, in code and for one context only, `use_kernel(name)`. Layers whose activations are never
rounded follow an override that rounds them with their weights decoded.

torch.compile sees a linear on the CPU as one operator, `torch.ops.linocut.packed_linear`, which chooses when it runs;
its gradient for x is another one.

    >>> with use_kernel("reference"):
    ...     y = linear(x, codes, scales, None, "ternary")
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from linocut.errors import KernelError
from linocut.kernels.blocked import blocked_backward
from linocut.kernels.cpu import Int8
from linocut.kernels.fusible import MULTIPLIED, ON_GPU
from linocut.kernels.gpu.candidates import Triton, TritonInt8
from linocut.kernels.native import Generic, Native
from linocut.kernels.problem import Candidate, PackedWeight, Problem, checked
from linocut.kernels.reference import Reference

__all__ = ["CANDIDATES", "Candidate", "PackedWeight", "Problem", "candidate", "dequantize", "explain", "linear",
           "requested", "select", "use_kernel"]

CANDIDATES: tuple[Candidate, ...] = (Int8(), Native(), TritonInt8(), Triton(), Reference(), Generic())
_ROUNDING = {"int8": (MULTIPLIED, "native"), "triton-int8": (ON_GPU, "triton")}
"""Kernels that round activations: the encodings that they do it for, and who computes with the others when one is asked
for, as a model has layers of several encodings."""
_override: ContextVar[str | None] = ContextVar("linocut_kernel", default=None)


def candidate(name: str) -> Candidate:
    """The candidate called `name`; KernelError with the known names if there is none."""
    for each in CANDIDATES:
        if each.name == name:
            return each
    known = ", ".join(("auto", *(each.name for each in CANDIDATES)))
    raise KernelError(f"there is no kernel called {name!r} (known: {known}); check LINOCUT_KERNEL")


def requested() -> str:
    """The kernel that the user asked for: `use_kernel`, else `LINOCUT_KERNEL`, else "auto"."""
    return _override.get() or os.environ.get("LINOCUT_KERNEL", "").strip() or "auto"


@contextmanager
def use_kernel(name: str) -> Iterator[None]:
    """Use only the kernel `name` inside the context ("auto": choose freely again)."""
    if name != "auto":
        candidate(name)
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def explain(problem: Problem) -> list[tuple[str, str | None]]:
    """Each candidate in order of preference with None (can run the problem) or the reason why it does not."""
    reasons: list[tuple[str, str | None]] = []
    for each in CANDIDATES:
        reason = each.why_not(problem)
        if reason is None and not each.automatic:
            reason = "runs on request only (LINOCUT_KERNEL=" + each.name + ")"
        reasons.append((each.name, reason))
    return reasons


def select(problem: Problem) -> Candidate:
    """The kernel for `problem`, honouring an override. KernelError lists every reason if none can."""
    name = requested()
    encodings, instead = _ROUNDING.get(name, (None, name))
    if name != "auto":
        asked = candidate(name if encodings is None or problem.encoding in encodings else instead)
        reason = asked.why_not(problem)
        if reason is None:
            return asked
        raise KernelError(f"kernel {name!r} was asked for but cannot run {problem}: {reason}; unset LINOCUT_KERNEL")
    for each in CANDIDATES:
        if each.automatic and each.why_not(problem) is None:
            return each
    listed = "; ".join(f"{each}: {reason}" for each, reason in explain(problem))
    raise KernelError(f"no kernel can run {problem}: {listed}")


def linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, encoding: str,
           bias: Tensor | None = None) -> Tensor:
    """y[..., O] = x[..., N] @ W.T (+ bias[O]) in x's dtype, W[O, N] packed as codes, scales (and zeros for affine4).

    Weights are frozen: gradients flow to x and bias only.
    """
    flat = x.reshape(-1, x.shape[-1])
    gradients = x.requires_grad and torch.is_grad_enabled()
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        y: Tensor = torch.ops.linocut.packed_linear(flat, codes, scales, zeros, encoding, gradients)
    else:
        weight = checked(codes, scales, zeros, encoding, x.shape[-1])
        if codes.device != x.device:
            raise KernelError(f"x is on {x.device} and the packed weight on {codes.device}; move them together")
        if gradients and flat.shape[0] and weight.o:
            y = _FrozenLinear.apply(flat, weight, select(Problem.of(x, codes, encoding, gradients)))
        else:
            y = _run(flat, weight, gradients)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.view(*x.shape[:-1], codes.shape[0])


def _run(x: Tensor, weight: PackedWeight, gradients: bool) -> Tensor:
    chosen = select(Problem.of(x, weight.codes, weight.encoding, gradients))
    return chosen.linear(x, weight) if x.shape[0] and weight.o else x.new_zeros((x.shape[0], weight.o))


# ---- the operators that torch.compile sees --------------------------------------------------------------------------

def _operator(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, encoding: str,
              gradients: bool) -> Tensor:
    return _run(x, checked(codes, scales, zeros, encoding, x.shape[-1]), gradients)


def _operator_shape(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


def _gradient(grad: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, encoding: str, n: int) -> Tensor:
    problem = Problem(grad.device.type, grad.dtype, grad.shape[0], n, codes.shape[0], encoding, gradients=True)
    return blocked_backward(grad.contiguous(), checked(codes, scales, zeros, encoding, n), select(problem).decode)


def _gradient_shape(grad: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, encoding: str,
                    n: int) -> Tensor:
    return grad.new_empty((grad.shape[0], n))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, zeros, ctx.encoding, _ = inputs
    ctx.n = x.shape[-1]
    ctx.save_for_backward(codes, scales, zeros)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.linocut.packed_linear_gradient(grad, *ctx.saved_tensors, ctx.encoding, ctx.n), *5 * [None]


_library = torch.library.Library("linocut", "DEF")
_WEIGHT = "Tensor codes, Tensor scales, Tensor? zeros, str encoding"
for _name, _schema, _compute, _shape in (
        ("packed_linear", f"(Tensor x, {_WEIGHT}, bool gradients) -> Tensor", _operator, _operator_shape),
        ("packed_linear_gradient", f"(Tensor grad, {_WEIGHT}, int n) -> Tensor", _gradient, _gradient_shape)):
    _library.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(_name, _compute, "CPU")
    torch.library.register_fake(f"linocut::{_name}", _shape, lib=_library)
torch.library.register_autograd("linocut::packed_linear", _backward, setup_context=_keep_weight, lib=_library)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, encoding: str, n: int,
               dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None) -> Tensor:
    """W[o, N] in `dtype` on the tensors' device: all rows, a slice of them, or those that an index tensor names."""
    weight = checked(codes, scales, zeros, encoding, n)
    if rows is not None:
        picked = None if weight.zeros is None else weight.zeros[rows]
        weight = PackedWeight(weight.codes[rows], weight.scales[rows], picked, encoding, n)
    out = torch.empty((weight.o, n), dtype=dtype, device=codes.device)
    if weight.o:
        problem = Problem(codes.device.type, dtype, 1, n, weight.o, encoding)
        select(problem).decode(weight, out)
    return out


class _FrozenLinear(torch.autograd.Function):
    """`Candidate.linear` with a gradient for x that decodes the weight again instead of keeping a float copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, chosen: Candidate) -> Tensor:
        ctx.weight, ctx.chosen = weight, chosen
        return chosen.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return blocked_backward(grads[0].contiguous(), ctx.weight, ctx.chosen.decode), None, None
