"""Packed linears on a CPU in int8: activations are rounded once, weights are read as they are stored.

Per token and 128 activations the scale is max|x| / 127; products are summed exactly as integers within a group of
weights and as float32 across groups, so results depend neither on threads nor on the instruction set. What it costs is
half a step of each activation. Callers that feed several linears with the same x quantize it once:

    >>> act = quantize(x)
    >>> q, k = linear_quantized(act, to_q), linear_quantized(act, to_k)

Shape letters: M tokens, N in-features, O out-features.
"""

import os
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from linocut.errors import KernelError
from linocut.formats.packed import GROUP_SIZE
from linocut.kernels import native
from linocut.kernels.fusible import MULTIPLIED
from linocut.kernels.problem import PackedWeight, Problem, thread_count

SUM_SIZE = 64
"""Neighbouring values whose sum is kept: the group of affine4, half of the others'."""


@dataclass(frozen=True)
class Activations:
    """x[M, N] as int8; made by `quantize`, or filled by fused kernels after `empty`."""

    values: Tensor
    """int8 [M, N + padding] in -127..127; the padding is never read."""
    scales: Tensor
    """float32 [M, N / 128]."""
    sums: Tensor
    """int32 [M, N / 64]: sums of neighbouring values, which the zero points of weights multiply."""
    n: int

    @classmethod
    def empty(cls, m: int, n: int) -> "Activations":
        """Memory for M tokens of N features; N is a multiple of 128."""
        if n <= 0 or n % GROUP_SIZE:
            raise KernelError(f"activations are quantized in groups (expected N a multiple of 128, found {n})")
        return cls(torch.empty((m, n + native.module().ACTIVATION_PADDING), dtype=torch.int8),
                   torch.empty((m, n // GROUP_SIZE), dtype=torch.float32),
                   torch.empty((m, n // SUM_SIZE), dtype=torch.int32), n)

    @property
    def m(self) -> int:
        """Number of tokens."""
        return self.values.shape[0]

    def rows(self, start: int, stop: int) -> "Activations":
        """Tokens start..stop as views; no copy."""
        return Activations(self.values[start:stop], self.scales[start:stop], self.sums[start:stop], self.n)

    def narrowed(self, n: int) -> "Activations":
        """Memory for as many tokens of fewer features, in the memory of these."""
        m, padding = self.m, self.values.shape[1] - self.n
        return Activations(self.values.flatten()[: m * (n + padding)].view(m, -1),
                           self.scales.flatten()[: m * (n // GROUP_SIZE)].view(m, -1),
                           self.sums.flatten()[: m * (n // SUM_SIZE)].view(m, -1), n)

    def put(self, some: "Activations") -> None:
        """Copy `some`, of as many tokens and fewer features, into the first columns."""
        self.values[:, : some.n] = some.values[:, : some.n]
        self.scales[:, : some.n // GROUP_SIZE] = some.scales
        self.sums[:, : some.n // SUM_SIZE] = some.sums

    def dequantize(self) -> Tensor:
        """float32 [M, N]: what the products see."""
        groups = self.values[:, : self.n].float().reshape(self.m, -1, GROUP_SIZE)
        return (groups * self.scales[:, :, None]).flatten(1)


def gemm_variant() -> str:
    """The variant of the C++ product that runs: `LINOCUT_GEMM`, else the first that this CPU can. KernelError if the
    variable names one that cannot."""
    return _variant(os.environ.get("LINOCUT_GEMM", "").strip())


@lru_cache(maxsize=8)
def _variant(asked: str) -> str:
    variants = [(name, reason) for name, _, reason in native.module().gemm_variants()]
    for name, reason in variants:
        if name == asked or not (asked or reason):
            if reason:
                raise KernelError(f"LINOCUT_GEMM={asked} cannot run: {reason}; unset it")
            return str(name)
    known = ", ".join(name for name, _ in variants)
    raise KernelError(f"LINOCUT_GEMM={asked} names no variant of the packed product (known: {known})")


def _rows(x: Tensor) -> Tensor:
    """x[M, N] as C++ takes it: float32, or the bits of bfloat16, each row contiguous."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        x = x.float()
    x = x.detach()
    if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        x = x.contiguous()
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def quantize(x: Tensor) -> Activations:
    """Activations of x[M, N] (float32, bfloat16 or float16). A token with an infinity or a NaN gives NaN results."""
    act = Activations.empty(x.shape[0], x.shape[1])
    if x.shape[0]:
        native.call("quantize_activations", _rows(x), act.values, act.scales, act.sums, act.n, 0, thread_count()[0])
    return act


def linear_quantized(act: Activations, weight: PackedWeight, out: Tensor | None = None,
                     dtype: torch.dtype = torch.float32) -> Tensor:
    """y[M, O] = x @ W.T in `dtype` (float32 or bfloat16), or into `out`, whose rows may be wider than O."""
    if act.n != weight.n:
        raise KernelError(f"activations and weight do not fit (expected N = {weight.n}, found {act.n})")
    y = torch.empty((act.m, weight.o), dtype=dtype) if out is None else out
    if y.dtype not in (torch.float32, torch.bfloat16):
        raise KernelError(f"the packed product writes float32 or bfloat16, not {y.dtype}")
    if act.m and weight.o:
        target = y.view(torch.int16) if y.dtype == torch.bfloat16 else y
        zeros = None if weight.zeros is None else native.bits(weight.zeros)
        native.call("gemm", act.values, act.scales, act.sums, native.bits(weight.codes), native.bits(weight.scales),
                    zeros, weight.encoding, weight.n, target, thread_count()[0], gemm_variant())
    return y


class Int8(native.Native):
    """Activations rounded to int8, products with packed weights in C++. Decoding alone is that of `Native`."""

    name = "int8"
    summary = "activations rounded to int8, packed weights multiplied in C++"

    @property
    def automatic(self) -> bool:  # type: ignore[override]
        """Not where only the plain C++ product can run, unless LINOCUT_GEMM asks for it: `native` is faster."""
        if native.why_no_module() is not None:
            return True  # `why_not` says so
        return bool(os.environ.get("LINOCUT_GEMM", "").strip()) or gemm_variant() != "generic"

    def why_not(self, problem: Problem) -> str | None:
        if problem.gradients:
            return "a gradient is asked for, and rounded activations have none"
        if problem.n % GROUP_SIZE:
            return f"activations are quantized in groups of {GROUP_SIZE}, the weight has N = {problem.n}"
        if problem.encoding not in MULTIPLIED:
            return f"{problem.encoding} weights are for layers whose activations are not rounded"
        return super().why_not(problem)

    def linear(self, x: Tensor, weight: PackedWeight) -> Tensor:
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        return linear_quantized(quantize(x), weight, dtype=dtype).to(x.dtype)
