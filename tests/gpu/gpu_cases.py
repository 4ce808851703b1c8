"""Packed weights on the device under test."""

import numpy as np
import torch
from torch import Tensor

from linocut.formats.packed import PackedTensor, groups, pack
from linocut.kernels.problem import PackedWeight, checked


def random_packed(encoding: str, o: int, n: int, seed: int = 0) -> PackedTensor:
    """A valid packed weight whose scales lie within a factor of eight, and a ternary group of zeros."""
    rng = np.random.default_rng((seed, o, n))
    scales = (np.float32(2.0) ** rng.uniform(-7, -4, (o, groups(encoding, n)))).astype(np.float16)
    if encoding == "affine4":
        zeros = rng.integers(0, 16, scales.shape, dtype=np.uint8)
        return pack(rng.integers(0, 16, (o, n), dtype=np.uint8), scales, encoding, zeros)
    if encoding == "int8":
        return pack(rng.integers(-127, 128, (o, n), dtype=np.int8), scales, encoding)
    values = rng.integers(-1, 2, (o, n), dtype=np.int8)
    values[0, :128] = 0
    if encoding == "binary":
        values[values == 0] = 1
    return pack(values, scales, encoding)


def on_device(packed: PackedTensor, device: str) -> PackedWeight:
    zeros = None if packed.zeros is None else torch.from_numpy(packed.zeros.copy()).to(device)
    return checked(torch.from_numpy(packed.codes.copy()).to(device), torch.from_numpy(packed.scales.copy()).to(device),
                   zeros, packed.encoding, packed.shape[1])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of `wanted`, in float64."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def stored(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """float32 x as a kernel stores it in `dtype`: rounded, but in the interpreter bfloat16 is cut off."""
    if dtype == torch.bfloat16 and device == "cpu":
        return (x.contiguous().view(torch.int32) & -65536).view(torch.float32).to(dtype)
    return x.to(dtype)
