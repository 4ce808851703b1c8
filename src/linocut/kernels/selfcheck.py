"""Each kernel that can run here, checked against the reference on given or model-sized weights.

Tests do this at many small shapes; this is for the user's machine at the sizes that matter there: another CPU, another
torch, a driver that computes wrongly. `linocut doctor` prints the results.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from linocut.formats.packed import ENCODINGS, GROUP_SIZE, groups, row_bytes
from linocut.kernels import dispatch
from linocut.kernels.problem import Candidate, PackedWeight, Problem, checked, thread_count

MODEL_SIZED = (320, 3072, 9216)
"""M, N, O of one of klein's linears for 256 image tokens and 64 text tokens."""
_ON_REQUEST_TOKENS = 4
"""M for kernels that are not made for speed: a scalar loop over the full size would take half a minute."""

# Frobenius norm of the difference over that of the reference's float32 result. float32: order of sums; 16-bit types:
# weights, inputs and results rounded once each (half an eps of 2^-7 and 2^-10).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Check:
    """One kernel on one weight. `error` is relative to the reference; `seconds` is one call, not a benchmark."""

    kernel: str
    weight: str
    encoding: str
    dtype: str
    device: str
    m: int
    n: int
    o: int
    error: float
    tolerance: float
    seconds: float
    ok: bool

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def random_weight(encoding: str, o: int, n: int, seed: int = 0) -> PackedWeight:
    """Random codes (any byte is a legal one for the decoders) and positive scales; deterministic."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (o, row_bytes(encoding, n)), dtype=torch.uint8, generator=generator)
    scales = torch.rand((o, groups(encoding, n)), generator=generator).add_(0.05).mul_(0.02).half()
    zeros = None
    if encoding == "affine4":
        zeros = torch.randint(0, 256, (o, (groups(encoding, n) + 1) // 2), dtype=torch.uint8, generator=generator)
    return checked(codes, scales, zeros, encoding, n)


def check_model_sized(shape: tuple[int, int, int] = MODEL_SIZED,
                      encodings: tuple[str, ...] = ENCODINGS) -> Iterator[Check]:
    """Check all kernels on random weights of M, N, O = `shape` in each encoding."""
    m, n, o = shape
    for encoding in encodings:
        yield from check_weight(random_weight(encoding, o, n), "random", m)


def check_weight(weight: PackedWeight, name: str, m: int) -> Iterator[Check]:
    """Check every kernel that can run here on one weight held on the CPU, with m random tokens."""
    x = random_tokens(m, weight.n)
    with torch.no_grad():
        wanted = dispatch.candidate("reference").linear(x, weight)
        for each in dispatch.CANDIDATES:
            for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                for dtype in (torch.float32, torch.bfloat16):
                    if each.name == "reference" and (device, dtype) == ("cpu", torch.float32):
                        continue  # it would be compared with itself
                    if not each.automatic and dtype != torch.float32:
                        continue
                    problem = Problem(device, dtype, m, weight.n, weight.o, weight.encoding, thread_count()[0])
                    if each.why_not(problem) is None:
                        yield _check(each, weight, name, x, wanted, device, dtype)


def random_tokens(m: int, n: int) -> Tensor:
    """float32 [m, n] that int8 activations, bfloat16 and float16 all hold exactly, so that one tolerance fits all
    kernels: whole numbers up to 127, which every group reaches, times powers of two."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-127, 128, (m, n // GROUP_SIZE, GROUP_SIZE), generator=generator)
    values[:, :, 0] = 127
    exponents = torch.randint(-8, -4, (m, n // GROUP_SIZE, 1), generator=generator)
    return torch.ldexp(values.float(), exponents).flatten(1)


def _check(kernel: Candidate, weight: PackedWeight, name: str, x: Tensor, wanted: Tensor, device: str,
           dtype: torch.dtype) -> Check:
    if not kernel.automatic:
        x, wanted = x[:_ON_REQUEST_TOKENS], wanted[:_ON_REQUEST_TOKENS]
    there = PackedWeight(weight.codes.to(device), weight.scales.to(device),
                         None if weight.zeros is None else weight.zeros.to(device), weight.encoding, weight.n)
    given = x.to(device, dtype)
    start = time.perf_counter()
    found = kernel.linear(given, there).double().cpu()
    seconds = time.perf_counter() - start
    error = float((found - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))
    limit = TOLERANCE[dtype]
    return Check(kernel.name, name, weight.encoding, str(dtype).removeprefix("torch."), device, x.shape[0], weight.n,
                 weight.o, error, limit, seconds, ok=error <= limit)
