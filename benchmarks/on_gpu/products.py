"""Sections `device`, `tune`, `products` and `rows`: what single kernels reach."""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linocut.kernels.gpu import decode, rows, runtime, timing, tuning
from linocut.kernels.gpu.accuracy import KIND
from linocut.kernels.gpu.activations import Activations
from linocut.kernels.gpu.routes import Route, Shape
from linocut.kernels.selfcheck import random_weight
from on_gpu.bench import Bench, line, on_device, say, seconds
from on_gpu.networks import DEVICE


def device(bench: Bench) -> dict[str, Any]:
    """Which GPU, which versions, and what it can do at all."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__,
                             "triton": runtime.triton_version(), "toy": bench.toy,
                             "capability": runtime.capability(), "name": "interpreter"}
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"name": properties.name, "memory": properties.total_memory,
                  "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version()}
    side, count = (64, 1 << 10) if bench.toy else (8192, 1 << 31)
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    source, target = (torch.empty(count, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    facts["copy_bytes_per_second"] = 2 * count / seconds(lambda: target.copy_(source), bench.rounds)
    facts["bf16_flops"] = 2 * side**3 / seconds(lambda: a @ a, bench.rounds)
    say(line(facts))
    return facts


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
            said = ", ".join(f"{each['route']} {each['seconds'] * 1e3:.3f} ms ({each['tflops']:.0f})"
                             for each in {each["route"]: each for each in best[::-1]}.values())
            say(f"{shape}: {said}")
    return found


def products(bench: Bench) -> list[dict[str, Any]]:
    """Dense products of torch's at the same shapes, and unpacking alone."""
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
        entry: dict[str, Any] = {"m": m, "n": n, "o": o}
        for name, work in arms.items():
            try:
                entry[name] = seconds(work, min(bench.rounds, 3), graph=True)
            except Exception as error:
                entry[name] = f"failed: {error}"[:200]
        found.append(entry)
        say(", ".join(f"{key} {value * 1e3:.3f} ms" if isinstance(value, float) else f"{key} {value}"
                      for key, value in entry.items()))
    return found


def row_kernels(bench: Bench) -> list[dict[str, Any]]:
    """Row kernels: microseconds, and bytes moved per second."""
    found, d, f = [], bench.config.width, bench.config.mlp_width
    for side in bench.sides[: 1 if bench.toy else None]:
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
                took = seconds(work, bench.rounds, graph=True)
                found.append({"what": what, "kind": kind, "m": m, "seconds": took, "bytes_per_second": moved / took})
        given = (wide, norms, rope, bench.config.num_attention_heads, 1e-6)
        took = seconds(lambda given=given: rows.turn(*given), bench.rounds, graph=True)
        found.append({"what": "turn", "kind": "", "m": m, "seconds": took, "bytes_per_second": 8 * m * d / took})
        found += _attention(bench, wide, m)
    for each in found:
        say(line(each))
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
