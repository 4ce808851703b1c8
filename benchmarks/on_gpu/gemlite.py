"""Section `gemlite`: the step by gemlite's kernels in all linears of the blocks, and its products.

Its package is no dependency of this project: it is measured where it is installed (`gpu.py` says how to bring it).
"""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from linocut.formats.packed import GROUP_SIZE
from on_gpu.bench import Bench, line, release, say, seconds, step_inputs
from on_gpu.networks import DEVICE, compile_blocks, dense_network
from on_gpu.steps import measure

BITS = {"binary": 1, "ternary": 2}


def installed() -> str | None:
    """gemlite's version, or None. It asks for the GPU when it is imported."""
    try:
        import gemlite  # type: ignore[import-not-found]
    except Exception:
        return None
    return str(gemlite.__version__)


def layer(codes: Tensor, scales: Tensor, encoding: str) -> Any:
    """A GemLiteLinear in bfloat16 from codes [O, N] (0 and 1, or 0, 1, 2 for -1, 0, +1) and scales [O, N / 128].

    Its weight is (code - zero) * scale, so a binary one has twice the scale, around a half.
    """
    from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]

    o, n = codes.shape
    made = GemLiteLinear(BITS[encoding], GROUP_SIZE, n, o, input_dtype=DType.BF16, output_dtype=DType.BF16)
    scales = scales.to(torch.bfloat16)
    zeros = torch.full_like(scales, 0.5 if encoding == "binary" else 1.0)
    return made.pack(codes.to(torch.uint8), 2 * scales if encoding == "binary" else scales, zeros, None)


def random_layer(n: int, o: int, encoding: str) -> Any:
    codes = torch.randint(0, 2 if encoding == "binary" else 3, (o, n), dtype=torch.uint8, device=DEVICE)
    size = (n * (1.0 if encoding == "binary" else 2 / 3)) ** -0.5
    return layer(codes, torch.full((o, n // GROUP_SIZE), size, device=DEVICE), encoding)


def gemlite(bench: Bench) -> dict[str, Any] | list[dict[str, Any]]:
    """Steps, eager and with compiled blocks, and each of their products; first the step that the targets name."""
    version = installed()
    if version is None:
        return {"skipped": "gemlite is not installed here, or finds no GPU"}
    side = bench.sides[-1]
    shapes = [(m, n, o) for m, n, o in dict.fromkeys((shape.m, shape.n, shape.o) for shape in
                                                     bench.shapes("ternary", side)) if o != 3 * n]
    _tune_ahead(sorted({(n, o) for _, n, o in shapes}), bench.text)
    found: list[dict[str, Any]] = []
    with torch.no_grad():
        for encoding, how, pixels in (("ternary", "eager", side), ("ternary", "compiled", side),
                                      ("binary", "compiled", side), ("ternary", "compiled", bench.sides[0])):
            network: Any = dense_network(bench.config)
            for name, module in list(network.named_modules()):
                if "blocks." in name and isinstance(module, nn.Linear):
                    parent, _, child = name.rpartition(".")
                    setattr(network.get_submodule(parent), child,
                            random_layer(module.in_features, module.out_features, encoding))
            release()
            if how == "compiled":
                compile_blocks(network.transformer_blocks, network.single_transformer_blocks)
            entry = measure(bench, network, pixels, step_inputs(bench, bench.config, pixels, torch.bfloat16))
            found.append({"what": f"gemlite A16W{BITS[encoding]} {how}", "version": version, **entry})
            say(line(found[-1]))
            del network
            release()
        for m, n, o in shapes:
            x = torch.randn(m, n, device=DEVICE, dtype=torch.bfloat16)
            for encoding in ("ternary", "binary") if m == max(shapes)[0] else ("ternary",):
                product = random_layer(n, o, encoding)
                took = seconds(lambda product=product, x=x: product(x), 3)
                found.append({"what": f"gemlite A16W{BITS[encoding]} product", "m": m, "n": n, "o": o, "seconds": took,
                              "tflops": 2 * m * n * o / took / 1e12})
                say(line(found[-1]))
    return found


def _tune_ahead(shapes: list[tuple[int, int]], m: int) -> None:
    """Have the variants that it will try compiled by several processes, into Triton's cache."""
    start = time.perf_counter()
    with ProcessPoolExecutor(min(len(shapes), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        list(pool.map(_run_once, shapes, [m] * len(shapes)))
    say(f"{len(shapes)} shapes compiled ahead in {time.perf_counter() - start:.1f} s")


def _run_once(shape: tuple[int, int], m: int) -> None:
    n, o = shape
    with torch.no_grad():
        random_layer(n, o, "ternary")(torch.randn(m, n, device=DEVICE, dtype=torch.bfloat16))
    torch.cuda.synchronize()
