"""Section `parity`: every kernel, encoding, M and shape against the reference decoder and float32 products."""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from linocut.cli.bench.baselines import plain
from linocut.formats.packed import ENCODINGS, unpack
from linocut.kernels import reference
from linocut.kernels.dispatch import use_kernel
from linocut.kernels.gpu import decode, routes, rows
from linocut.kernels.gpu.accuracy import KIND
from linocut.kernels.gpu.activations import KINDS, Activations
from linocut.kernels.gpu.columns import TritonColumns
from linocut.kernels.gpu.routes import Route, Scratch, Shape
from linocut.kernels.selfcheck import random_weight
from linocut.models.configs import Flux2Config
from linocut.models.flux2_gpu import GpuTransformer
from linocut.models.text_encoder_gpu import GpuEncoder
from linocut.quantize.columns import TorchColumns
from linocut.quantize.gptq import gptq, outer_sum
from linocut.quantize.rounding import quantize_tensor
from on_gpu.bench import Bench, level, on_device, relative, say, step_inputs, tiles_of
from on_gpu.networks import DEVICE, decoder, packed_network, packed_text_encoder

# What rounding may do to random weights and normal activations, by kind of activations; bfloat16 results.
LIMITS = {"int8": 0.012, "rows": 0.025, "fp8": 0.04, "float": 0.006}
SLACK = 3 if DEVICE == "cpu" else 1  # the interpreter cuts off where a GPU rounds


def parity(bench: Bench) -> list[dict[str, Any]]:
    """All checks, on the same device; cases are spread over processes, since most of their time is compiling."""
    widths = (128, 384) if bench.toy else (128, 384, 768, 1280, 3072, 12288)
    cases: list[tuple[Any, ...]] = [("decode", encoding, n, torch.float32) for encoding in ENCODINGS for n in widths]
    cases += [("decode", encoding, widths[-1], dtype) for encoding in ENCODINGS
              for dtype in (torch.bfloat16, torch.float16)]
    sizes = [(9, 384, 40)] if bench.toy else [(m, n, o) for n, o in ((384, 200), (3072, 3072), (12288, 1008))
                                              for m in (1, 7, 16, 33, 64, 200, 512, 1536)]
    if not bench.toy:
        sizes.append((4608, 3072, 27648))  # klein's largest
    cases += [("product", name, encoding, n, [size for size in sizes if size[1] == n])
              for n in sorted({size[1] for size in sizes}) for encoding in ("binary", "ternary") for name in KIND]
    cases += [("rows", kind) for kind in KINDS]
    cases += [("columns", encoding, *((40, 256) if bench.toy else (3000, 3072))) for encoding in ("binary", "ternary")]
    cases += [("sums",), ("affine4",)]
    if DEVICE == "cpu":
        found = [each for case in cases for each in _case(case)]
    else:
        with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
            found = [each for checks in pool.map(_case, cases) for each in checks]
    found += [_step(bench, name, encoding) for name in (("exact",) if bench.toy else ("exact", "rows", "fast"))
              for encoding in bench.encodings[: 1 if bench.toy else None]]
    found += [_text(bench), _decoder(bench)]
    for each in found:
        if not each["ok"]:
            bench.ok = False
            say(f"FAIL {each}")
    say(f"{sum(each['ok'] for each in found)} of {len(found)} checks passed")
    return found


def _check(what: str, error: float, limit: float, **facts: Any) -> dict[str, Any]:
    return {"what": what, **facts, "error": error, "limit": limit, "ok": bool(error <= limit)}  # a NaN is not


def _case(case: tuple[Any, ...]) -> list[dict[str, Any]]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    what, *rest = case
    try:
        with torch.no_grad():
            if what == "decode":
                return [_decode(*rest)]
            if what == "product":
                return _product(*rest)
            if what == "columns":
                return [_columns(*rest)]
            if what == "sums":
                y, x = (torch.randn(5000, size, device=DEVICE).bfloat16() for size in (300, 200))
                return [_check("sums", relative(outer_sum(y, x), y.double().T @ x.double()), 1e-4)]
            if what == "affine4":
                weight = torch.randn(300, 2560).bfloat16()
                here, wanted = (unpack(quantize_tensor(weight.to(device), what)) for device in (DEVICE, "cpu"))
                return [_check("affine4 rounding, share of other codes", float((here != wanted).mean()), 1e-3)]
            x, act = torch.randn(9, 640, device=DEVICE), Activations.empty(rest[0], 9, 640, DEVICE)
            rows.quantize(x, act)
            return [_check(f"rows {rest[0]}", relative(act.dequantize(), x), LIMITS[rest[0]] * SLACK)]
    except Exception as error:
        return [_check(what, math.nan, 0.0, case=str(rest), raised=f"{type(error).__name__}: {error}"[:400])]


def _decode(encoding: str, n: int, dtype: torch.dtype) -> dict[str, Any]:
    weight = random_weight(encoding, 40 if DEVICE == "cpu" else 200, n)
    wanted = reference.decode(weight).to(DEVICE)
    out = torch.empty(weight.o, n, dtype=dtype, device=DEVICE)
    decode.decode(on_device(weight), out)
    limit = math.inf if DEVICE == "cpu" and dtype == torch.bfloat16 else 0
    return _check("decode", float((out != wanted.to(dtype)).sum()), limit, encoding=encoding, n=n, dtype=str(dtype))


def _product(name: str, encoding: str, n: int, sizes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    found = []
    for m, _, o in sizes:
        shape = Shape(m, n, o, encoding)
        if routes.why_not(name, shape, DEVICE) is not None:
            continue
        weight, x = on_device(random_weight(encoding, o, n)), torch.randn(m, n, device=DEVICE)
        wanted = x @ reference.decode(weight).T
        act, scratch = Activations.empty(KIND[name], m, n, DEVICE), Scratch(DEVICE)
        rows.quantize(x, act)
        for tile in tiles_of(name, shape, every=DEVICE == "cuda" and n == 3072 and m in (64, 1536)):
            out = torch.full((m, o), math.nan, dtype=torch.bfloat16, device=DEVICE)
            routes.run(Route(name, tile), act, weight, out, scratch)
            found.append(_check(name, relative(out, wanted), LIMITS[KIND[name]] * SLACK, encoding=encoding, m=m, n=n,
                                o=o, tile=str(tile)))
    return found


def _columns(encoding: str, o: int, n: int) -> dict[str, Any]:
    """GPTQ with its inner loops in Triton: how many codes and scales are not those of torch's loops."""
    tokens = torch.randn(2 * n, n, device=DEVICE) * torch.arange(1, n + 1, device=DEVICE) ** -0.3
    weight, hessian = 0.05 * torch.randn(o, n, device=DEVICE), tokens.T @ tokens
    (codes, scales), (wanted, own) = (gptq(weight, hessian, encoding, sweeps=1, columns=columns)
                                      for columns in (TritonColumns(), TorchColumns()))
    return _check("columns", float((codes != wanted).sum() + (scales != own).sum()), 0, encoding=encoding, o=o, n=n)


def _step(bench: Bench, name: str, encoding: str) -> dict[str, Any]:
    """A network with few blocks: the fused step, eager and then as a graph, against the layers one by one."""
    small = bench.config if bench.toy else Flux2Config(num_layers=1, num_single_layers=2)
    network = packed_network(small, encoding)
    given = step_inputs(bench, small, bench.sides[0])
    with use_kernel("reference"):
        wanted = network(*given)
    with level(name):
        fused = GpuTransformer(network)
        errors = [relative(fused(*given), wanted) for _ in range(1 if bench.toy else 4)]
    return _check("step", max(errors), {"exact": 0.03, "rows": 0.04, "fast": 0.06}[name] * SLACK, accuracy=name,
                  encoding=encoding, graph=fused.graph_note or "yes")


def _text(bench: Bench) -> dict[str, Any]:
    """The text encoder with few layers, as it is written and then as a graph, against float32."""
    taps = bench.model.text_taps[:1]
    ids = torch.arange(1, bench.text + 1, device=DEVICE)[None]
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    network = packed_text_encoder(bench.model.text_encoder, taps)
    fused = GpuEncoder(network)
    errors = [fused(ids, mask) for _ in range(1 if bench.toy else 4)]
    with use_kernel("reference"):
        wanted = network.compute_in(torch.float32)(ids, mask)
    return _check("text encoder", max(relative(each, wanted) for each in errors), 0.04 * SLACK,
                  graph=fused.graph_note or "yes")


def _decoder(bench: Bench) -> dict[str, Any]:
    """The decoder as it is against the same weights in torch's own layers."""
    vae = decoder(bench.vae)
    latents = torch.randn(1, 4 * bench.vae.latent_channels, 12, 20, device=DEVICE)
    found = vae.develop(latents, None, lambda *_: None)
    return _check("decoder", relative(found, plain(vae).develop(latents, None, lambda *_: None)), 0.06)
