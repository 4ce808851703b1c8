"""The kernels of the C++ module `linocut._native`, and the reasons when it cannot be used.

The module is optional: a source tree that was never built, or a platform without a wheel, runs on the reference. Which
of the two it is, is said by `status()`; nothing is caught silently.
"""

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from linocut.kernels.blocked import blocked_linear
from linocut.kernels.problem import FLOAT_DTYPES, PackedWeight, Problem, thread_count

INTERFACE = 4
"""Version of the Python-to-C++ interface; a module of another version is refused rather than called wrongly."""
_SPLIT_WEIGHTS = 1 << 20
"""Weights per thread below which starting another thread costs more than it saves."""


@lru_cache(maxsize=1)
def status() -> tuple[ModuleType | None, str]:
    """The C++ module, or None, with one line that says what was found."""
    try:
        module = importlib.import_module("linocut._native")
    except ImportError as error:
        return None, f"the C++ module linocut._native cannot be imported ({error}); install a wheel or run `make build`"
    found = getattr(module, "INTERFACE", None)
    if found != INTERFACE:
        return None, f"the C++ module is of another build (expected interface {INTERFACE}, found {found}); `make build`"
    return module, f"linocut._native, {module.build_info()}"


def why_no_module() -> str | None:
    """None if the C++ module is there, else the reason."""
    module, line = status()
    return line if module is None else None


def module() -> ModuleType:
    """The C++ module; RuntimeError if it is not there, which `why_not` of a kernel says beforehand."""
    found, line = status()
    if found is None:
        raise RuntimeError(line)
    return found


def call(function: str, *arguments: object) -> None:
    """Call a function of the C++ module; tensors travel as NumPy arrays of the same memory.

    Given a tensor itself, the binding would run Python code of torch's (`__dlpack__`) and drop what is raised there: a
    Ctrl-C that arrives at that moment would be lost.
    """
    getattr(module(), function)(*(each.detach().numpy() if isinstance(each, Tensor) else each for each in arguments))


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="linocut")


def _in_rows(total_rows: int, weights: int, work: Callable[[int, int], None]) -> None:
    """work(start, stop) over all rows, spread over threads when it is worth it. The C++ side releases the GIL."""
    threads = min(thread_count()[0], total_rows, max(1, weights // _SPLIT_WEIGHTS))
    if threads <= 1:
        work(0, total_rows)
        return
    step = -(-total_rows // threads)
    starts = range(0, total_rows, step)
    for done in [_pool(threads).submit(work, start, min(start + step, total_rows)) for start in starts]:
        done.result()


def _why_not(problem: Problem) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile is tracing, which follows torch operations only"
    if problem.device != "cpu":
        return f"runs on the CPU, the tensors are on {problem.device}"
    if problem.dtype not in FLOAT_DTYPES:
        return f"computes in float32, bfloat16 or float16, not {problem.dtype}"
    return why_no_module()


def bits(tensor: Tensor) -> Tensor:
    """A contiguous tensor as the C++ side takes it: FP16 and BF16 travel as int16."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _decode(weight: PackedWeight, out: Tensor) -> None:
    if out.dtype == torch.float16:
        # C++ writes float32 and bfloat16; FP16 on a CPU is rare enough to go through float32.
        whole = torch.empty(out.shape, dtype=torch.float32)
        _decode(weight, whole)
        out.copy_(whole)
        return
    codes, scales = bits(weight.codes), bits(weight.scales)
    zeros = None if weight.zeros is None else bits(weight.zeros)

    def work(start: int, stop: int) -> None:
        part = None if zeros is None else zeros[start:stop]
        call("decode", codes[start:stop], scales[start:stop], part, weight.encoding, weight.n, bits(out[start:stop]))

    _in_rows(weight.o, weight.o * weight.n, work)


class Native:
    """C++ decoders of a block of rows, then torch's matrix product on that block."""

    name = "native"
    summary = "rows decoded in C++, then torch's matrix product"
    automatic = True

    def why_not(self, problem: Problem) -> str | None:
        return _why_not(problem)

    def decode(self, weight: PackedWeight, out: Tensor) -> None:
        _decode(weight, out)

    def linear(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return blocked_linear(x, weight, self.decode)


class Generic:
    """A scalar C++ product with float64 sums: slow, independent of torch's product, the oracle of C++ kernels."""

    name = "generic"
    summary = "scalar C++ product with float64 sums (slow; for checking)"
    automatic = False

    def why_not(self, problem: Problem) -> str | None:
        return _why_not(problem)

    def decode(self, weight: PackedWeight, out: Tensor) -> None:
        _decode(weight, out)

    def linear(self, x: Tensor, weight: PackedWeight) -> Tensor:
        x32 = x.detach().float().contiguous()
        y = torch.empty((weight.o, x.shape[0]), dtype=torch.float32)
        codes, scales = bits(weight.codes), bits(weight.scales)
        zeros = None if weight.zeros is None else bits(weight.zeros)

        def work(start: int, stop: int) -> None:
            part = None if zeros is None else zeros[start:stop]
            call("linear", x32, codes[start:stop], scales[start:stop], part, weight.encoding, y[start:stop])

        _in_rows(weight.o, weight.o * weight.n * x.shape[0], work)
        return y.t().to(x.dtype).contiguous()
