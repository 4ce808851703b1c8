"""What a transformer block does between its packed products, in C++: attention, norms, SwiGLU, rotation, residuals.

Thin wrappers: they choose types and threads, and C++ checks the shapes. Rows are 2-d tensors on the CPU, float32 or
bfloat16, contiguous within a row; `Activations` (kernels/cpu.py) are what the products read. Everything is computed in
float32, but attention takes q, k and v as bfloat16 where the CPU multiplies that natively.

Shape letters: M tokens of a call, S tokens of the attention, D width, H heads of q, G heads of k and v, K head width.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from linocut.errors import KernelError
from linocut.formats.packed import GROUP_SIZE
from linocut.kernels import dispatch, fusible, native
from linocut.kernels.cpu import Activations, linear_quantized
from linocut.kernels.problem import PackedWeight, thread_count


def why_not(head_width: int, dense: str | None, device: str) -> str | None:
    """`fusible.why_not` as things stand: with the kernel that the code around asks for."""
    return fusible.why_not(head_width, dense, device, dispatch.requested()) or native.why_no_module()


def attention_variant() -> str:
    """The variant of attention that runs: `LINOCUT_ATTENTION`, else the first that this CPU can. KernelError if the
    variable names one that cannot."""
    return _variant(os.environ.get("LINOCUT_ATTENTION", "").strip())


@lru_cache(maxsize=8)
def _variant(asked: str) -> str:
    variants = [(name, reason) for name, _, reason in native.module().attention_variants()]
    for name, reason in variants:
        if name == asked or not (asked or reason):
            if reason:
                raise KernelError(f"LINOCUT_ATTENTION={asked} cannot run: {reason}; unset it")
            return str(name)
    known = ", ".join(name for name, _ in variants)
    raise KernelError(f"LINOCUT_ATTENTION={asked} names no variant of attention (known: {known})")


@dataclass(frozen=True)
class Norm:
    """Layer norm (`centered`) or RMS norm of rows, times factor [D], plus shift [D] if there is one (both float32)."""

    centered: bool
    eps: float
    factor: Tensor
    shift: Tensor | None = None


@dataclass(frozen=True)
class Heads:
    """q, k and v of S tokens in the layout that attention reads (csrc/attention.h); filled by `arrange`."""

    q: Tensor
    """[H, S rounded up to 32, K], as k and v bfloat16 or float32, whichever this CPU's attention takes."""
    k: Tensor
    v: Tensor
    tokens: int

    @classmethod
    def zeros(cls, heads: int, kv_heads: int, width: int, tokens: int) -> "Heads":
        """Places for `tokens` tokens. What is never filled stays zero, as it must."""
        panel, dtype = native.module().PANEL, getattr(torch, native.module().attention_dtype(attention_variant()))
        padded = -(-tokens // panel) * panel
        q, k, v = (torch.zeros(count, padded, width, dtype=dtype) for count in (heads, kv_heads, kv_heads))
        return cls(q, k, v, tokens)


def add(x: Tensor, y: Tensor, gate: Tensor | None = None) -> None:
    """x[M, D] += gate[D] * y[M, D] in place; x is float32."""
    native.call("add_rows", x, _bits(y), gate, thread_count()[0])


def normalize(x: Tensor, norm: Norm, out: Activations | Tensor, y: Tensor | None = None,
              gate: Tensor | None = None) -> None:
    """x[M, D] += gate[D] * y[M, D] in place if y is given; then the norm of x into `out`, quantized or as float32."""
    residual = (x, None if y is None else _bits(y), gate, norm.centered, norm.eps, norm.factor, norm.shift)
    if isinstance(out, Tensor):
        native.call("normalize", *residual, out, thread_count()[0])
    else:
        native.call("normalize_quantize", *residual, out.values, out.scales, out.sums, thread_count()[0])


def swiglu(gate: Tensor, value: Tensor, out: Activations, first: int = 0) -> None:
    """silu(gate) * value, both [M, D], into columns first .. first + D of `out`."""
    native.call("swiglu", _bits(gate), _bits(value), out.values, out.scales, out.sums, out.n, first, thread_count()[0])


def gated_mlp(x: Activations, gate: PackedWeight, value: PackedWeight, units: Tensor, out: Activations,
              first: int = 0) -> None:
    """silu(x gate^T) * (x value^T) into columns first.. of `out`, as many hidden units at a time as `units` has room
    for: [M, 2 * some], so that the MLP's widest matrix never exists."""
    step = units.shape[1] // 2
    for start in range(0, gate.o, step):
        stop = min(start + step, gate.o)
        gates, values = units[:, : stop - start], units[:, step : step + stop - start]
        linear_quantized(x, gate.rows(start, stop), gates)
        linear_quantized(x, value.rows(start, stop), values)
        swiglu(gates, values, out, first + start)


def arrange(qkv: Sequence[Tensor], out: Heads, *, norms: tuple[Tensor, Tensor] | None = None,
            eps: float = 0.0, rope: tuple[Tensor, Tensor] | None = None, adjacent: bool = True,
            first: int = 0) -> None:
    """Make three matrices of rows, q [M, H * K], k and v [M, G * K], the tokens first .. first + M of `out`.

    On the way q and k get an RMS norm per head (weights `norms`, float32 [K] each) and turn by the angles of `rope`
    (cos and sin, float32 [S, K/2]): channel 2j together with 2j + 1 if `adjacent`, else j together with j + K/2.
    """
    q_norm, k_norm = norms or (None, None)
    cos, sin = rope or (None, None)
    native.call("arrange_heads", *map(_bits, qkv), q_norm, k_norm, eps, cos, sin, adjacent, first, _bits(out.q),
                _bits(out.k), _bits(out.v), out.tokens, thread_count()[0])


def attend(heads: Heads, out: Activations | Tensor, keys: int | None = None, causal: bool = False) -> None:
    """softmax(q k^T / sqrt(K)) v into columns 0 .. H * K of `out`, rows [S, ...], quantized or as float32.

    A query sees the first `keys` tokens (default: all), and none after itself if `causal`.
    """
    threads, variant = thread_count()[0], attention_variant()
    given = (_bits(heads.q), _bits(heads.k), _bits(heads.v), heads.tokens, heads.tokens if keys is None else keys,
             causal)
    if isinstance(out, Tensor):
        native.call("attend", *given, out, threads, variant)
    elif heads.q.shape[2] == GROUP_SIZE:
        native.call("attend_quantize", *given, out.values, out.scales, out.sums, out.n, threads, variant)
    else:  # a group of activations spans several heads
        rows = torch.empty(heads.tokens, heads.q.shape[0] * heads.q.shape[2])
        native.call("attend", *given, rows, threads, variant)
        native.call("quantize_activations", rows, out.values, out.scales, out.sums, out.n, 0, threads)


def _bits(x: Tensor) -> Tensor:
    """x as C++ takes it: bfloat16 travels as int16."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x
