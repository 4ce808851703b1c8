"""What a kernel is asked to do, and how a kernel says whether it can.

A kernel candidate is an object with a name, `why_not(problem)` and two functions (`Candidate`). Selection takes the
first candidate that gives no reason against itself; the reasons are kept, so that `linocut doctor` can print them.

Shape letters: M tokens (all leading dimensions of x), N in-features, O out-features, G groups of one row.
"""

import os
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from linocut.errors import KernelError, UsageError
from linocut.formats.packed import groups, row_bytes

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """One linear layer: y[M, O] = x[M, N] @ W[O, N].T with W packed. Hashable, so that selection can be cached."""

    device: str
    dtype: torch.dtype
    m: int
    n: int
    o: int
    encoding: str
    threads: int = 1
    gradients: bool = False
    """Whether a gradient for x is wanted."""

    @classmethod
    def of(cls, x: Tensor, codes: Tensor, encoding: str, gradients: bool = False) -> "Problem":
        """The problem that x[..., N] and codes[O, bytes] pose on this machine with its current thread count."""
        n = x.shape[-1]
        return cls(x.device.type, x.dtype, x.numel() // max(n, 1), n, codes.shape[0], encoding, thread_count()[0],
                   gradients)


@dataclass(frozen=True)
class PackedWeight:
    """The tensors of one packed weight W[O, N], checked against each other (`checked`)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    encoding: str
    n: int

    @property
    def o(self) -> int:
        """Out-features: the number of rows."""
        return self.codes.shape[0]

    def rows(self, start: int, stop: int) -> "PackedWeight":
        """The weight's rows start..stop as views; no copy."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return PackedWeight(self.codes[start:stop], self.scales[start:stop], zeros, self.encoding, self.n)


class Candidate(Protocol):
    """One way of computing with packed weights."""

    name: str
    summary: str

    @property
    def automatic(self) -> bool:
        """False for a kernel that runs only when asked for by name."""
        ...

    def why_not(self, problem: Problem) -> str | None:
        """None if this candidate can run the problem, else one line saying why not."""
        ...

    def linear(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """y[M, O] = x[M, N] @ W.T, in x's dtype. Autograd is the caller's affair."""
        ...

    def decode(self, weight: PackedWeight, out: Tensor) -> None:
        """Write W[O, N] into the contiguous `out` (float32, bfloat16 or float16)."""
        ...


def checked(codes: Tensor, scales: Tensor, zeros: Tensor | None, encoding: str, n: int) -> PackedWeight:
    """Bundle a packed weight's tensors after checking that shapes and dtypes fit each other.

    This is what makes the decoders safe: each of them derives its reads from `n` and the row count alone.
    """
    o = codes.shape[0] if codes.ndim else 0
    wanted: list[tuple[str, Tensor | None, tuple[int, int], torch.dtype]] = [
        ("codes", codes, (o, row_bytes(encoding, n)), torch.uint8),
        ("scales", scales, (o, groups(encoding, n)), torch.float16),
    ]
    if encoding == "affine4":
        wanted.append(("zeros", zeros, (o, (groups(encoding, n) + 1) // 2), torch.uint8))
    elif zeros is not None:
        raise KernelError(f"{encoding} weights have no zero points, yet `zeros` was given; pass zeros=None")
    for name, tensor, shape, dtype in wanted:
        if tensor is None:
            raise KernelError(f"{encoding} weights need `{name}` (expected {dtype} {list(shape)}, found None)")
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise KernelError(
                f"`{name}` of a {encoding} weight with {n} in-features does not fit (expected {dtype} {list(shape)}, "
                f"found {tensor.dtype} {list(tensor.shape)})"
            )
        if tensor.device != codes.device:
            raise KernelError(f"`{name}` is on {tensor.device} and `codes` on {codes.device}; move them together")
    return PackedWeight(codes, scales, zeros, encoding, n)


def thread_count() -> tuple[int, str]:
    """Threads that kernels use, and the reason: `LINOCUT_THREADS`, else what torch was told or found."""
    asked = os.environ.get("LINOCUT_THREADS", "").strip()
    if not asked:
        return torch.get_num_threads(), "torch's own count (set LINOCUT_THREADS or --threads to change it)"
    if not asked.isdecimal() or int(asked) < 1:
        raise UsageError(f"LINOCUT_THREADS must be a whole number of threads, 1 or more (found {asked!r})")
    return int(asked), f"LINOCUT_THREADS={asked}"
