"""mlx's products with packed weights against the reference, at the size of a real model, for `linocut doctor`."""

from __future__ import annotations

import time
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from linocut.formats.packed import ENCODINGS, PackedTensor
from linocut.kernels import dispatch
from linocut.kernels.problem import PackedWeight
from linocut.kernels.selfcheck import MODEL_SIZED, TOLERANCE, Check, random_tokens, random_weight
from linocut.mlx.layers import Packed, pack
from linocut.mlx.runtime import on_gpu

TOKENS_ON_CPU = 4
"""M on mlx's CPU build, which multiplies a hundredth as fast as other kernels here."""


def packed_tensor(weight: PackedWeight) -> PackedTensor:
    """The arrays of a weight on the CPU; no copy."""
    zeros = None if weight.zeros is None else weight.zeros.numpy()
    return PackedTensor(weight.encoding, (weight.o, weight.n), weight.codes.numpy(), weight.scales.numpy(), zeros)


def check_model_sized(shape: tuple[int, int, int] = MODEL_SIZED,
                      encodings: tuple[str, ...] = ENCODINGS) -> Iterator[Check]:
    """Check products with random weights of M, N, O = `shape` in each encoding, in float32; fewer tokens on a CPU."""
    m, n, o = shape
    device = "gpu" if on_gpu() else "cpu"
    x = random_tokens(m if device == "gpu" else min(m, TOKENS_ON_CPU), n)
    for encoding in encodings:
        weight = random_weight(encoding, o, n)
        wanted = dispatch.candidate("reference").linear(x, weight).double().numpy()
        given = mx.array(x.numpy())
        packed: Packed = pack(packed_tensor(weight))
        mx.eval(given)
        start = time.perf_counter()
        y = packed.matmul(given)
        mx.eval(y)
        seconds = time.perf_counter() - start
        found = np.array(y).astype(np.float64)
        error = float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))
        limit = TOLERANCE[x.dtype]
        yield Check("mlx", "random", encoding, "float32", device, len(x), n, o, error, limit, seconds,
                    ok=error <= limit)
