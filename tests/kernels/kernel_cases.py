"""Random packed weights for kernel tests, and the tolerances with their reasons."""

import numpy as np
import torch
from torch import Tensor

from linocut.formats.packed import PackedTensor, groups, pack

# Widths: one group; below, at and just past a full ternary block; klein's three.
WIDTHS = (128, 384, 512, 640, 768, 1280, 3072)
# Rows: one, odd, a bit over a block's multiple of 64.
ROWS = (1, 3, 65)
TOKENS = (1, 2, 7, 16, 17, 33, 256)

# |y - oracle| relative to the norm of y. The weights of all kernels are equal to the last bit, so only sums differ.
# float32: order of accumulation over up to 3072 products, some eps * sqrt(N) = 6e-8 * 55.
# bfloat16 and float16: weights, inputs and result are rounded once each, eps = 2^-8 and 2^-11; sums run in float32.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def random_packed(encoding: str, o: int, n: int, seed: int = 0) -> PackedTensor:
    """A valid packed weight with scales over several orders of magnitude."""
    rng = np.random.default_rng((seed, o, n))
    scales = np.float32(2.0) ** rng.uniform(-10, 2, (o, groups(encoding, n))).astype(np.float32)
    if encoding == "affine4":
        zeros = rng.integers(0, 16, (o, groups(encoding, n)), dtype=np.uint8)
        return pack(rng.integers(0, 16, (o, n), dtype=np.uint8), scales.astype(np.float16), encoding, zeros)
    if encoding == "int8":
        return pack(rng.integers(-127, 128, (o, n), dtype=np.int8), scales.astype(np.float16), encoding)
    values = rng.integers(-1, 2, (o, n), dtype=np.int8)
    if encoding == "binary":
        values[values == 0] = 1
    return pack(values, scales.astype(np.float16), encoding)


def tensors(packed: PackedTensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """codes, scales and zeros as torch tensors."""
    zeros = None if packed.zeros is None else torch.from_numpy(packed.zeros)
    return torch.from_numpy(packed.codes), torch.from_numpy(packed.scales), zeros


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of `wanted`, in float64."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
