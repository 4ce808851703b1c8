"""Packed weights decoded by plain torch operations: the oracle of every other kernel.

It runs on any device that torch knows, in any build, and is written to be read next to `docs/format.md`: one function
per encoding, no lookup tables, no bit tricks beyond those of the format itself. It decodes small blocks of rows, so
that its scratch stays in the cache; that makes it usable for drawing, not only for tests.

Layouts in one glance (N in-features):
- binary: bit n % 8 of byte n // 8, least significant first; 1 is +1.
- ternary: blocks of 640 weights, the last one of R. Byte j of a block of S bytes holds weights j, S+j, 2S+j, 3S+j and
  4S+j as base-3 digits of a fixed-point fraction: digit i = ((b * 3^i mod 256) * 3) >> 8.
- affine4: byte n // 2, low nibble first; w = (code - zero) * scale with one zero point per 64 weights.
- int8: byte n is the weight in two's complement; w = code * scale.
"""

import torch
from torch import Tensor

from linocut.formats.packed import AFFINE_GROUP_SIZE, BLOCK, GROUP_SIZE
from linocut.kernels.blocked import blocked_linear
from linocut.kernels.problem import FLOAT_DTYPES, PackedWeight, Problem

_BLOCK_BYTES = BLOCK // 5
_DECODE_WEIGHTS = 1 << 18
"""Weights decoded at a time: their temporaries (some 2 MB) stay in a CPU's cache."""


def binary_values(codes: Tensor, n: int) -> Tensor:
    """int8 [O, N] of -1 and +1 from binary codes [O, N/8]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    bits = ((codes.unsqueeze(-1) >> shifts) & 1).view(torch.int8)
    return (bits * 2 - 1).flatten(1)[:, :n]


def ternary_values(codes: Tensor, n: int) -> Tensor:
    """int8 [O, N] of -1, 0 and +1 from ternary codes. Any byte decodes to digits 0..2, the invalid ones too."""
    rows, full = codes.shape[0], n // BLOCK
    parts = []
    if full:
        blocks = codes[:, : full * _BLOCK_BYTES].reshape(rows, full, _BLOCK_BYTES)
        parts.append(_digits(blocks).reshape(rows, full * BLOCK))
    if n % BLOCK:
        parts.append(_digits(codes[:, full * _BLOCK_BYTES :]).flatten(1)[:, : n % BLOCK])
    return torch.cat(parts, dim=1) - 1


def _digits(blocks: Tensor) -> Tensor:
    """int8 [..., 5, S], digit planes 0..2 of bytes [..., S]: uint8 products wrap, which is the `mod 256`."""
    planes = torch.stack([blocks * 3**i for i in range(5)], dim=-2)
    # (p * 3) >> 8 without leaving 8 bits: p * 3 reaches 256 at p = 86 and 512 at p = 171.
    return (planes >= 86).view(torch.int8) + (planes >= 171).view(torch.int8)


def affine4_values(codes: Tensor, zeros: Tensor, n: int) -> Tensor:
    """int8 [O, N] of code - zero (-15..15) from affine4 codes [O, N/2] and zero points [O, ceil(G/2)]."""
    grouped = _nibbles(codes)[:, :n].reshape(codes.shape[0], -1, AFFINE_GROUP_SIZE)
    return (grouped - _nibbles(zeros)[:, : grouped.shape[1], None]).flatten(1)


def _nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).view(torch.int8).flatten(1)


def decode(weight: PackedWeight) -> Tensor:
    """float32 [O, N] of all rows of `weight` at once. Products of a small integer and an FP16 scale are exact."""
    group = GROUP_SIZE
    if weight.encoding == "binary":
        values = binary_values(weight.codes, weight.n)
    elif weight.encoding == "ternary":
        values = ternary_values(weight.codes, weight.n)
    elif weight.encoding == "int8":
        values = weight.codes.view(torch.int8)
    else:
        assert weight.zeros is not None
        values, group = affine4_values(weight.codes, weight.zeros, weight.n), AFFINE_GROUP_SIZE
    grouped = values.float().reshape(weight.o, -1, group)
    return grouped.mul_(weight.scales.float().unsqueeze(-1)).flatten(1)


class Reference:
    """The candidate that always can."""

    name = "reference"
    summary = "rows decoded by torch operations, then torch's matrix product"
    automatic = True

    def why_not(self, problem: Problem) -> str | None:
        if problem.dtype not in FLOAT_DTYPES and problem.dtype != torch.float64:
            return f"computes in floating point, not {problem.dtype}"
        return None

    def decode(self, weight: PackedWeight, out: Tensor) -> None:
        step = max(1, _DECODE_WEIGHTS // max(weight.n, 1))
        for start in range(0, weight.o, step):
            out[start : start + step] = decode(weight.rows(start, start + step))

    def linear(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return blocked_linear(x, weight, self.decode)
