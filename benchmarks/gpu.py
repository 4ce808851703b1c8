"""Everything about the GPU path in one run: parity, tuning, products, steps, pictures; as JSON, and as a plot.

    PYTHONPATH=src python benchmarks/gpu.py -o benchmarks/results/gpu.json         # on a GPU, under eight minutes
    PYTHONPATH=src TRITON_INTERPRET=1 python benchmarks/gpu.py --toy -o toy.json   # a rehearsal on a CPU, in minutes
    python benchmarks/gpu.py --plot benchmarks/results/gpu.json docs/gpu.png

Sections (`--sections`): device, parity, compile, tune, products, rows, step, profile, dense, compiled, picture. The
file is written after each, so that a run that is cut short loses nothing; a section that fails is recorded with its
error and the others go on. Networks have klein 4B's shapes and random weights. Exit code 1 if parity or a section
fails. gemlite is measured where it is installed. It needs torch and Triton, and no C++ module.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from itertools import product as pairs
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_networks import DEVICE, dense_network, packed_network
from gpu_plot import entries, plot
from torch import Tensor, nn

from linocut.formats.packed import ENCODINGS
from linocut.kernels import reference
from linocut.kernels.gpu import decode, routes, rows, runtime, timing, tuning
from linocut.kernels.gpu.accuracy import KIND
from linocut.kernels.gpu.activations import KINDS, Activations
from linocut.kernels.gpu.routes import Route, Scratch, Shape
from linocut.kernels.problem import PackedWeight
from linocut.kernels.selfcheck import random_weight
from linocut.models.configs import AutoencoderConfig, Flux2Config
from linocut.models.flux2 import image_position_ids, text_position_ids
from linocut.models.flux2_gpu import GpuTransformer
from linocut.models.modulations import Modulations

TOY_CONFIG = Flux2Config(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64,
                         num_attention_heads=2, joint_attention_dim=384, axes_dims_rope=(16, 16, 16, 16))
TOY_VAE = AutoencoderConfig(block_out_channels=(16, 16, 32, 32), layers_per_block=1, latent_channels=4,
                            norm_num_groups=8)
# What rounding may do to random weights and normal activations, by kind of activations; bfloat16 results.
LIMITS = {"int8": 0.012, "rows": 0.025, "fp8": 0.04, "float": 0.006}


class Bench:
    """Results, and what all sections share."""

    def __init__(self, out: Path, toy: bool, encodings: list[str], tune_seconds: float) -> None:
        self.out, self.toy, self.encodings, self.tune_seconds = out, toy, encodings, tune_seconds
        self.config = TOY_CONFIG if toy else Flux2Config()
        self.vae = TOY_VAE if toy else AutoencoderConfig()
        self.text = 5 if toy else 512
        self.sides = [32, 48] if toy else [512, 1024]
        self.rounds = 1 if toy else 7
        self.results: dict[str, Any] = {}
        self.ok = True

    def tokens(self, side: int) -> int:
        return (side // 16) ** 2

    def shapes(self, encoding: str, side: int) -> list[Shape]:
        """All products of a step at side x side pixels."""
        d, f, image = self.config.width, self.config.mlp_width, self.tokens(side)
        double = [(d, 3 * d), (d, d), (d, 2 * f), (f, d)]
        found = [Shape(m, n, o, encoding) for m in (self.text, image) for n, o in double]
        return [*found, *(Shape(self.text + image, n, o, encoding) for n, o in ((d, 3 * d + 2 * f), (d + f, d)))]

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.results, indent=1, default=str) + "\n")


def seconds(work: Any, rounds: int) -> float:
    return timing.seconds(work, DEVICE, max(rounds, 1), 0.0 if DEVICE == "cpu" else 0.02)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def on_device(weight: PackedWeight) -> PackedWeight:
    zeros = None if weight.zeros is None else weight.zeros.to(DEVICE)
    return PackedWeight(weight.codes.to(DEVICE), weight.scales.to(DEVICE), zeros, weight.encoding, weight.n)


# ---------------------------------------------------------------------------------------------------- sections

def device(bench: Bench) -> dict[str, Any]:
    """Which GPU, which versions, and what it can do at all."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__,
                             "triton": runtime.triton_version(), "toy": bench.toy,
                             "capability": runtime.capability(), "name": "interpreter"}
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"name": properties.name, "memory": properties.total_memory,
                  "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}
    side, count = (64, 1 << 10) if bench.toy else (8192, 1 << 31)
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    source, target = (torch.empty(count, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    facts["copy_bytes_per_second"] = 2 * count / seconds(lambda: target.copy_(source), bench.rounds)
    facts["bf16_flops"] = 2 * side**3 / seconds(lambda: a @ a, bench.rounds)
    return facts


def parity(bench: Bench) -> list[dict[str, Any]]:
    """Every kernel, encoding, M and shape against the reference decoder and float32 products on the same device.

    Cases are spread over processes, since most of their time is compiling.
    """
    widths = (128, 384) if bench.toy else (128, 384, 768, 1280, 3072, 12288)
    cases: list[tuple[Any, ...]] = [("decode", encoding, n, torch.float32) for encoding in ENCODINGS for n in widths]
    cases += [("decode", encoding, widths[-1], dtype) for encoding in ENCODINGS
              for dtype in (torch.bfloat16, torch.float16)]
    sizes = [(9, 384, 40)] if bench.toy else [(m, n, o) for n, o in ((384, 200), (3072, 3072), (12288, 1008))
                                              for m in (1, 7, 16, 33, 64, 200, 512, 1536)]
    cases += [("product", name, encoding, n, [size for size in sizes if size[1] == n])
              for n in sorted({size[1] for size in sizes}) for encoding in ("binary", "ternary") for name in KIND]
    cases += [("rows", kind) for kind in KINDS]
    if DEVICE == "cpu":
        found = [each for case in cases for each in _parity_case(case)]
    else:
        with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
            found = [each for checks in pool.map(_parity_case, cases) for each in checks]
    error, limit = _step_parity(bench)
    found.append(_check("step", error, limit))
    for each in found:
        if not each["ok"]:
            bench.ok = False
            print(f"  FAIL {each}", flush=True)
    print(f"  {sum(each['ok'] for each in found)} of {len(found)} checks passed", flush=True)
    return found


def _check(what: str, error: float, limit: float, **facts: Any) -> dict[str, Any]:
    return {"what": what, **facts, "error": error, "limit": limit, "ok": bool(error <= limit)}  # a NaN is not


def _parity_case(case: tuple[Any, ...]) -> list[dict[str, Any]]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    slack = 3 if DEVICE == "cpu" else 1  # the interpreter cuts off where a GPU rounds
    what, *rest = case
    try:
        with torch.no_grad():
            if what == "decode":
                return [_decode_parity(*rest)]
            if what == "product":
                return _product_parity(*rest, slack=slack)
            x, act = torch.randn(9, 640, device=DEVICE), Activations.empty(rest[0], 9, 640, DEVICE)
            rows.quantize(x, act)
            return [_check(f"rows {rest[0]}", relative(act.dequantize(), x), LIMITS[rest[0]] * slack)]
    except Exception as error:
        return [_check(what, math.nan, 0.0, case=str(rest), raised=f"{type(error).__name__}: {error}"[:400])]


def _decode_parity(encoding: str, n: int, dtype: torch.dtype) -> dict[str, Any]:
    weight = random_weight(encoding, 40 if DEVICE == "cpu" else 200, n)
    wanted = reference.decode(weight).to(DEVICE)
    out = torch.empty(weight.o, n, dtype=dtype, device=DEVICE)
    decode.decode(on_device(weight), out)
    limit = math.inf if DEVICE == "cpu" and dtype == torch.bfloat16 else 0
    return _check("decode", float((out != wanted.to(dtype)).sum()), limit, encoding=encoding, n=n, dtype=str(dtype))


def _product_parity(name: str, encoding: str, n: int, sizes: list[tuple[int, int, int]],
                    slack: float) -> list[dict[str, Any]]:
    found = []
    for m, _, o in sizes:
        shape = Shape(m, n, o, encoding)
        if routes.why_not(name, shape, DEVICE) is not None:
            continue
        weight, x = on_device(random_weight(encoding, o, n)), torch.randn(m, n, device=DEVICE)
        wanted = x @ reference.decode(weight).T
        act, scratch = Activations.empty(KIND[name], m, n, DEVICE), Scratch(DEVICE)
        rows.quantize(x, act)
        every = DEVICE == "cuda" and n == 3072 and m in (64, 1536)
        for tile in routes.tiles(name, shape, DEVICE)[: None if every else 1]:
            out = torch.zeros(m, o, dtype=torch.bfloat16, device=DEVICE)
            routes.run(Route(name, tile), act, weight, out, scratch)
            found.append(_check(name, relative(out, wanted), LIMITS[KIND[name]] * slack, encoding=encoding, m=m, n=n,
                                o=o, tile=str(tile)))
    return found


def _step_parity(bench: Bench) -> tuple[float, float]:
    """A network with few blocks: the fused step, eager and then as a graph, against the layers one by one."""
    small = Flux2Config(num_layers=1, num_single_layers=2) if not bench.toy else TOY_CONFIG
    network = packed_network(small, "ternary")
    given = step_inputs(bench, small, bench.sides[0])
    os.environ["LINOCUT_KERNEL"] = "reference"
    try:
        wanted = network.float()(*given)
    finally:
        del os.environ["LINOCUT_KERNEL"]
    fused = GpuTransformer(network)
    errors = [relative(fused(*given), wanted) for _ in range(1 if bench.toy else 4)]
    return max(errors), 0.03 * (3 if DEVICE == "cpu" else 1)


def compile_(bench: Bench) -> dict[str, Any]:
    """Compile what tuning will want in several processes, into Triton's cache; a cold start takes this long once."""
    if DEVICE == "cpu":
        return {"skipped": "the interpreter compiles nothing"}
    wanted = {}
    for encoding, side in pairs(bench.encodings, bench.sides):
        for shape in bench.shapes(encoding, side):
            for name in KIND:
                if routes.why_not(name, shape, DEVICE) is None:
                    for tile in routes.tiles(name, shape, DEVICE):
                        wanted.setdefault((name, tile, shape.n, encoding), (Route(name, tile), shape))
    start = time.perf_counter()
    workers = min(12, os.cpu_count() or 1)
    jobs = [list(wanted.values())[i::workers] for i in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        failed = [line for lines in pool.map(_compile_some, jobs) for line in lines]
    return {"variants": len(wanted), "workers": workers, "seconds": time.perf_counter() - start, "failed": failed}


def _compile_some(jobs: list[tuple[Route, Shape]]) -> list[str]:
    products, failed = timing.Products(DEVICE), []
    for route, shape in jobs:
        try:
            products.prepare(route, Shape(shape.m, shape.n, min(shape.o, 3072), shape.encoding))()
            torch.cuda.synchronize()
        except Exception as error:
            failed.append(f"{route} {shape}: {error}"[:300])
    return failed


def tune(bench: Bench) -> list[dict[str, Any]]:
    """Seconds of every route and tile at every shape of a step, kept in the user's cache as drawing finds them."""
    found: list[dict[str, Any]] = []

    def keep(shape: Shape, route: Route, took: float) -> None:
        rate = 2 * shape.m * shape.n * shape.o / took if took > 0 else None
        found.append({**shape.__dict__, "route": route.name, "tile": None if route.tile is None else
                      route.tile.to_dict(), "seconds": took, "tflops": None if rate is None else rate / 1e12})

    for encoding in bench.encodings:
        shapes = list(dict.fromkeys(shape for side in bench.sides for shape in bench.shapes(encoding, side)))
        products = timing.Products(DEVICE, rounds=1 if bench.toy else 3, least=0.0 if bench.toy else 0.002)
        tuning.measure(shapes[:2] if bench.toy else shapes, DEVICE, products, on_result=keep, names=tuple(KIND),
                       budget=bench.tune_seconds / len(bench.encodings))
        for shape in shapes:
            best = sorted((each for each in found if each["seconds"] > 0 and all(
                each[key] == value for key, value in shape.__dict__.items())), key=lambda each: each["seconds"])
            line = ", ".join(f"{each['route']} {each['seconds'] * 1e3:.3f} ms ({each['tflops']:.0f})"
                             for each in {each["route"]: each for each in best[::-1]}.values())
            print(f"  {shape}: {line}", flush=True)
    return found


def products(bench: Bench) -> list[dict[str, Any]]:
    """Dense products of torch's at the same shapes, gemlite's where it is installed, and unpacking alone."""
    found = []
    shapes = {(s.m, s.n, s.o): s for side in bench.sides for s in bench.shapes("ternary", side)}
    for shape in list(shapes.values())[: 1 if bench.toy else None]:
        m, n, o = shape.m, shape.n, shape.o
        x, w = (torch.randn(each, n, device=DEVICE, dtype=torch.bfloat16) for each in (m, o))
        arms: dict[str, Any] = {"bf16": lambda x=x, w=w: F.linear(x, w)}
        if DEVICE == "cuda":
            x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
            ones = (torch.ones(m, 1, device=DEVICE), torch.ones(1, o, device=DEVICE))
            arms["fp8 by rows"] = lambda a=x8, b=w8, s=ones: torch._scaled_mm(a, b.t(), *s, out_dtype=torch.bfloat16)
            xi, wi = (each.clamp(-1, 1).mul(100).to(torch.int8) for each in (x, w))
            arms["int8 _int_mm"] = lambda a=xi, b=wi: torch._int_mm(a, b.t())
        for encoding in bench.encodings:
            weight = on_device(random_weight(encoding, o, n))
            values, scales = (torch.empty(o, n, dtype=torch.int8, device=DEVICE),
                              torch.empty(n // 128, o, device=DEVICE))
            arms[f"unpack {encoding}"] = lambda p=weight, v=values, s=scales: decode.unpack(p, v, s)
            arms[f"fold {encoding}"] = lambda p=weight, v=values, s=scales: decode.fold(p, v, s[0])
        arms |= _gemlite(x, o)
        entry: dict[str, Any] = {"m": m, "n": n, "o": o}
        for name, work in arms.items():
            try:
                entry[name] = seconds(work, bench.rounds)
            except Exception as error:
                entry[name] = f"failed: {error}"[:200]
        found.append(entry)
        print("  " + ", ".join(f"{key} {value * 1e3:.3f} ms" if isinstance(value, float) else f"{key} {value}"
                               for key, value in entry.items()), flush=True)
    return found


def _gemlite(x: Tensor, o: int) -> dict[str, Any]:
    try:
        from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]
    except Exception:
        return {}
    arms, n = {}, x.shape[1]
    for bits in (1, 2):
        layer = GemLiteLinear(bits, 128, n, o, input_dtype=DType.FP16, output_dtype=DType.FP16)
        codes = torch.randint(0, 2 if bits == 1 else 3, (o, n), dtype=torch.uint8, device=DEVICE)
        scales = torch.full((o, n // 128), 0.02, device=DEVICE, dtype=torch.float16)
        layer.pack(codes, scales, torch.ones_like(scales), None)
        half = x.half()
        arms[f"gemlite A16W{bits}"] = lambda layer=layer, half=half: layer(half)
    return arms


def rows_(bench: Bench) -> list[dict[str, Any]]:
    """Row kernels: microseconds, and bytes moved per second."""
    found, d, f = [], bench.config.width, bench.config.mlp_width
    for side in bench.sides:
        m = bench.text + bench.tokens(side)
        x, y = torch.randn(m, d, device=DEVICE), torch.randn(m, d, device=DEVICE, dtype=torch.bfloat16)
        wide = torch.randn(m, 3 * d + 2 * f, device=DEVICE, dtype=torch.bfloat16)
        vectors = [torch.randn(d, device=DEVICE) for _ in range(3)]
        k = bench.config.attention_head_dim
        rope = (torch.ones(m, k // 2, device=DEVICE), torch.zeros(m, k // 2, device=DEVICE))
        norms = (torch.ones(k, device=DEVICE), torch.ones(k, device=DEVICE))
        for kind in ("int8", "rows", "fp8", "float") if runtime.capability() >= runtime.FP8 else ("int8", "rows"):
            a, j = Activations.empty(kind, m, d, DEVICE), Activations.empty(kind, m, d + f, DEVICE)
            size = 2 if kind == "float" else 1
            for what, work, moved in (
                    ("norm", lambda a=a, x=x, y=y, v=vectors: rows.normalize(x, v[0], v[1], 1e-6, a, y, v[2]),
                     m * d * (10 + size)),
                    ("gated", lambda j=j, w=wide, y=y: rows.gated(w[:, 3 * d:], j, y),
                     m * (4 * f + 2 * d + size * (d + f))),
                    ("quantize", lambda a=a, y=y: rows.quantize(y, a), m * d * (2 + size))):
                took = seconds(work, bench.rounds)
                found.append({"what": what, "kind": kind, "m": m, "seconds": took, "bytes_per_second": moved / took})
        given = (wide, norms, rope, bench.config.num_attention_heads, 1e-6)
        took = seconds(lambda given=given: rows.turn(*given), bench.rounds)
        found.append({"what": "turn", "kind": "", "m": m, "seconds": took, "bytes_per_second": 8 * m * d / took})
        found += _attention(bench, wide, m)
    for each in found:
        print("  " + ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}"
                               for key, value in each.items()), flush=True)
    return found


def _attention(bench: Bench, wide: Tensor, m: int) -> list[dict[str, Any]]:
    """torch's attention back ends on q, k and v where the step has them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    d, heads, found = bench.config.width, bench.config.num_attention_heads, []
    q, k, v = (wide[:, i * d : (i + 1) * d].unflatten(1, (heads, -1)).transpose(0, 1)[None] for i in range(3))
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                took = seconds(lambda: F.scaled_dot_product_attention(q, k, v), bench.rounds)
            found.append({"what": f"attention {backend.name}", "kind": "", "m": m, "seconds": took,
                          "tflops": 4 * m * m * d / took / 1e12})
        except RuntimeError as error:
            found.append({"what": f"attention {backend.name}", "kind": "", "m": m, "failed": str(error)[:200]})
    return found


def step_inputs(bench: Bench, config: Flux2Config, side: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    torch.manual_seed(1)
    tokens = bench.tokens(side)
    mod = Modulations.from_rows(0.1 * torch.randn(1, 17, config.width, device=DEVICE))
    return [torch.randn(1, tokens, config.in_channels, device=DEVICE, dtype=dtype),
            torch.randn(1, bench.text, config.joint_attention_dim, device=DEVICE, dtype=dtype), mod,
            image_position_ids(side // 16, side // 16, device=DEVICE), text_position_ids(bench.text, device=DEVICE)]


def _measure_step(bench: Bench, run: Any, side: int, given: list[Any]) -> dict[str, Any]:
    start = time.perf_counter()
    run(*given)
    _synchronize()
    first = time.perf_counter() - start
    for _ in range(0 if bench.toy else 3):
        run(*given)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = seconds(lambda: run(*given), bench.rounds)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    d, s = bench.config.width, bench.text + bench.tokens(side)
    blocks = bench.config.num_layers + bench.config.num_single_layers
    work = 26 * s * d * d * blocks + 4 * s * s * d * blocks if not bench.toy else 0
    return {"side": side, "seconds": took, "first_call_seconds": first, "peak_memory": peak,
            "tflops": work / took / 1e12}


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def step(bench: Bench) -> list[dict[str, Any]]:
    """The packed step at each accuracy, as one CUDA graph."""
    found = []
    for encoding, accuracy in pairs(bench.encodings, ("exact", "rows", "fast")):
        os.environ["LINOCUT_GPU_ACCURACY"] = accuracy
        run = GpuTransformer(packed_network(bench.config, encoding))
        for side in bench.sides[: 1 if bench.toy else None]:
            entry = _measure_step(bench, run, side, step_inputs(bench, bench.config, side))
            chosen = {f"M{shape.m} N{shape.n} O{shape.o}": f"{choice.route.name} {choice.route.tile}"
                      for shape, choice in run.choices.items()}
            found.append({"what": f"linocut {encoding} {accuracy}", **entry, "graph": run.graph_note or "yes",
                          "routes": chosen})
            print(f"  {encoding} {accuracy} {side}: {entry['seconds'] * 1e3:.2f} ms, {entry['tflops']:.0f} TFLOP/s, "
                  f"{entry['peak_memory'] / 1e9:.2f} GB, graph {run.graph_note or 'yes'}", flush=True)
        del run
        _release()
    os.environ.pop("LINOCUT_GPU_ACCURACY", None)
    return found


def _release() -> None:
    import gc

    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def profile(bench: Bench) -> dict[str, Any]:
    """Where the time of an exact and of a fast step goes, by kernel, in milliseconds."""
    if DEVICE == "cpu":
        return {"skipped": "needs a GPU"}
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    found = {}
    for accuracy, side in pairs(("exact", "fast"), bench.sides):
        os.environ["LINOCUT_GPU_ACCURACY"] = accuracy
        run = GpuTransformer(packed_network(bench.config, "ternary"), graph=False)
        given = step_inputs(bench, bench.config, side)
        for _ in range(2):
            run(*given)
        with record(activities=[ProfilerActivity.CUDA]) as events:
            run(*given)
            torch.cuda.synchronize()
        times: dict[str, list[float]] = {}
        for event in events.events():
            times.setdefault(event.name[:90], []).append(event.device_time_total / 1e3)
        ranked = sorted(((sum(each), len(each), name) for name, each in times.items()), reverse=True)
        found[f"{accuracy} {side}"] = [{"ms": round(total, 3), "calls": calls, "kernel": name}
                                       for total, calls, name in ranked[:16]]
        for total, calls, name in ranked[:9]:
            print(f"  {accuracy} {side}: {total:8.3f} ms {calls:4d} x {name}", flush=True)
        del run
        _release()
    os.environ.pop("LINOCUT_GPU_ACCURACY", None)
    return found


def dense(bench: Bench, compiled: bool = False) -> list[dict[str, Any]]:
    """The same network in dense bfloat16, as it is written."""
    found = []
    network: Any = dense_network(bench.config)
    if compiled and DEVICE == "cuda":
        for block in (*network.transformer_blocks, *network.single_transformer_blocks):
            block.compile(dynamic=False)
    for side in bench.sides[: 1 if bench.toy else None]:
        given = step_inputs(bench, bench.config, side, torch.bfloat16)
        with torch.no_grad():
            entry = _measure_step(bench, network, side, given)
        found.append({"what": f"dense bf16 {'compiled' if compiled else 'eager'}", **entry})
        print(f"  {found[-1]['what']} {side}: {entry['seconds'] * 1e3:.2f} ms, {entry['peak_memory'] / 1e9:.2f} GB",
              flush=True)
    del network
    _release()
    return found


def compiled(bench: Bench) -> list[dict[str, Any]]:
    """The same with its blocks under torch.compile: one compilation for all blocks of a kind."""
    return dense(bench, compiled=True)


def picture(bench: Bench) -> dict[str, Any]:
    """Decoding and PNG at the larger size, so four steps and a picture; embedded pictures on the GPU and the CPU."""
    import io

    from linocut.pipeline.components import PictureDecoder
    from linocut.pipeline.run import to_image

    side = bench.sides[-1]
    with torch.device("meta"):
        vae = PictureDecoder(bench.vae)
    vae = vae.to_empty(device=DEVICE)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    vae.bn.reset_running_stats()
    vae = vae.made_ready(torch.bfloat16).requires_grad_(False).eval()
    latents = torch.randn(1, 4 * bench.vae.latent_channels, side // 16, side // 16, device=DEVICE)

    def develop() -> None:
        with torch.no_grad():
            image = to_image(vae.develop(latents, None, lambda *_: None)[0] / 2 + 0.5)
        image.save(io.BytesIO(), "PNG", compress_level=1)

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"side": side, "decode_and_png_seconds": seconds(develop, bench.rounds)}
    found["decode_peak_memory"] = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    for section in ("step", "dense", "compiled"):
        for entry in entries(bench.results.get(section)):
            if entry["side"] == side:
                found[entry["what"]] = 4 * entry["seconds"] + found["decode_and_png_seconds"]
    print("  " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
    return {**found, **({} if bench.toy else _embedded())}


def _embedded() -> dict[str, Any]:
    """The embedded models: seconds of a picture, and how far it is from the CPU's of the same seed (PSNR, dB)."""
    import numpy as np

    from linocut.pipeline.generate import Pipeline

    found: dict[str, Any] = {}
    for model in ("embedded", "embedded-binary"):
        wanted = None
        for where, accuracy in (("cpu", ""), (DEVICE, "exact"), (DEVICE, "rows"), (DEVICE, "fast")):
            os.environ["LINOCUT_GPU_ACCURACY"] = accuracy or "exact"
            pipe = Pipeline.from_pretrained(model, device=where, prompt_cache=False)
            start = time.perf_counter()
            images = pipe("two red apples and a blue cup", seed=7).images
            first = time.perf_counter() - start
            start = time.perf_counter()
            images = pipe("two red apples and a blue cup", seed=7).images
            pixels = np.asarray(images[0]).astype(float)
            name = f"{model} {where} {accuracy}".strip()
            found[name] = {"first_seconds": first, "seconds": time.perf_counter() - start, "kernel": pipe.kernel(320)}
            if wanted is None:
                wanted = pixels
            else:
                found[name]["psnr_to_cpu"] = 10 * math.log10(255**2 / max(float(((pixels - wanted) ** 2).mean()), 1e-3))
            print(f"  {name}: {found[name]}", flush=True)
    os.environ.pop("LINOCUT_GPU_ACCURACY", None)
    return found


SECTIONS = {"device": device, "parity": parity, "compile": compile_, "tune": tune, "products": products, "rows": rows_,
            "step": step, "profile": profile, "dense": dense, "compiled": compiled, "picture": picture}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma separated")
    parser.add_argument("--encodings", default="ternary,binary", help="comma separated, for tuning and steps")
    parser.add_argument("--tune-seconds", type=float, default=110.0)
    parser.add_argument("--toy", action="store_true", help="next to no size, for a rehearsal on a CPU")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("JSON", "PNG"))
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu.json"))
    given = parser.parse_args()
    if given.plot:
        plot(*given.plot)
        return 0
    unknown = [name for name in given.sections.split(",") if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {unknown[0]!r}; known: {', '.join(SECTIONS)}")
    bench = Bench(given.output, given.toy, given.encodings.split(","), given.tune_seconds)
    os.environ.setdefault("LINOCUT_GPU_TUNE", "0")  # steps take what the section `tune` measured
    for name in given.sections.split(","):
        start = time.perf_counter()
        print(f"{name} ...", flush=True)
        try:
            with torch.no_grad():
                bench.results[name] = SECTIONS[name](bench)
        except Exception as error:
            traceback.print_exc()
            bench.ok = False
            bench.results[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        bench.results.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 1)
        bench.save()
        print(f"{name}: {bench.results['seconds'][name]} s", flush=True)
        _release()
    return 0 if bench.ok else 1


if __name__ == "__main__":
    sys.exit(main())
