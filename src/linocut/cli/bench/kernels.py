"""`linocut bench kernels`: GOP/s of packed products, beside torch's products and beside what the CPU can do at all."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

# (O, N) and how often a layer of that shape is run: by a step of FLUX.2 klein 4B, and by its text encoder
KLEIN = {(3072, 3072): 40, (18432, 3072): 10, (3072, 9216): 10, (27648, 3072): 20, (3072, 12288): 20}
TEXT = {(4096, 2560): 27, (1024, 2560): 54, (2560, 4096): 27, (9728, 2560): 54, (2560, 9728): 27}
TOKENS = (1, 16, 64, 512, 1536)
LEAST_SECONDS = 0.02
PEAK_SECONDS = 0.1
ALL = "all"


class Shapes(click.ParamType):
    """'OxN,OxN,...' as {(O, N): 1}, or the name of a known set."""

    name = "OxN,..."

    def convert(self, value: Any, param: click.Parameter | None,
                ctx: click.Context | None) -> dict[tuple[int, int], int]:
        if isinstance(value, dict):
            return value
        try:
            shapes = {(int(o), int(n)): 1 for o, n in (shape.split("x") for shape in str(value).split(","))}
        except ValueError:
            self.fail(f"{value!r} is no list of shapes; write it like 3072x9216,27648x3072", param, ctx)
        for o, n in shapes:
            if o < 1 or n < 128 or n % 128:
                self.fail(f"{o}x{n}: in-features must be a multiple of 128 (out-features come first)", param, ctx)
        return shapes


@click.command()
@click.option("--shapes", type=Shapes(), help="Out- and in-features; default: klein's layers, for affine4 those of its "
              "text encoder.")
@click.option("--m", "tokens", multiple=True, type=click.IntRange(1, 65536), help=f"Tokens; may be repeated. Default: "
              f"{' '.join(map(str, TOKENS))}.")
@click.option("--encoding", "encodings", multiple=True, type=click.Choice(["binary", "ternary", "affine4"]),
              help="May be repeated; default: all.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True)
@click.option("--quick", is_flag=True, help="One shape, M = 64 and 1536, three rounds.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.")
@click.option("--ours-only", is_flag=True, help="Leave torch out.")
@click.option("--mlx", "on_mlx", is_flag=True, help="Also mlx's products with the same weights, on its default device.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Also write the results to this JSON file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(shapes: dict[tuple[int, int], int] | None, tokens: tuple[int, ...], encodings: tuple[str, ...], rounds: int,
            quick: bool, threads: int | None, ours_only: bool, on_mlx: bool, output: Path | None,
            as_json: bool) -> None:
    """Measure packed products at the shapes of a model.

    A product counts 2 M O N operations and takes activations in float32, so what rounds them to int8 is included. The
    peak is measured in the same rounds: the instructions of the chosen variant on registers alone. torch computes in
    float32, in bfloat16, and in int8 with dense int8 weights (quantized.linear_dynamic, onednn engine). Memory of
    results is used again, for all of them.
    """
    import os

    import torch

    from linocut.cli.bench import report
    from linocut.kernels.problem import thread_count

    if on_mlx:
        from linocut.mlx import runtime

        runtime.require()
    if threads:
        os.environ["LINOCUT_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    _keep_memory()
    if quick:
        shapes, tokens, rounds = shapes or {(18432, 3072): 1}, tokens or (64, 1536), min(rounds, 3)
    rows: list[dict[str, Any]] = []
    for group in (("binary", "ternary"), ("affine4",)):
        chosen = [each for each in group if not encodings or each in encodings]
        wanted = shapes or (TEXT if group == ("affine4",) else KLEIN)
        for m in tokens or TOKENS:
            if chosen:
                found = [_measure(m, o, n, chosen, rounds, not ours_only, on_mlx) for o, n in wanted]
                rows += found + ([_together(found, list(wanted.values()))] if len(found) > 1 else [])
                if not as_json:
                    _print(rows[-len(found) - (len(found) > 1):])
    settings = {"rounds": rounds, "kernel": _kernel(), "activations": "float32"}
    content = report.document("kernels", thread_count()[0], settings, rows)
    if output is not None:
        report.write(output, content)
    if as_json:
        click.echo(json.dumps(content, indent=1))


def _keep_memory() -> None:
    """Have glibc serve large blocks from memory that this process already had.

    By default each result comes in fresh pages, which the system clears first: up to a fifth of a product's time, and a
    matter of memory, not of kernels.
    """
    m_mmap_max, m_trim_threshold = -4, -1  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


def _kernel() -> dict[str, str]:
    """The kernel that runs the largest of klein's layers, and its variant."""
    import torch

    from linocut.kernels import dispatch

    name = dispatch.select(dispatch.Problem("cpu", torch.float32, 1536, 3072, 27648, "ternary")).name
    return {"name": name, "variant": _variant() if name == "int8" else ""}


def _variant() -> str:
    from linocut.kernels import native
    from linocut.kernels.cpu import gemm_variant

    return gemm_variant() if native.why_no_module() is None else "generic"


def _measure(m: int, o: int, n: int, encodings: list[str], rounds: int, beside_torch: bool,
             on_mlx: bool) -> dict[str, Any]:
    """One shape: GOP/s of each arm, and of the peak (0 where none is known)."""
    import torch

    from linocut.cli.bench.arms import interleave, summary

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, n, generator=generator)
    arms: dict[str, Callable[[], object]] = {name: _packed(x, o, name) for name in encodings}
    if on_mlx:
        arms |= {f"mlx {name}": _mlx(x, o, name) for name in encodings}
    if beside_torch:
        arms |= _torch(x, o)
    peaks: list[float] = []
    arms["peak"] = lambda: peaks.append(_peak())
    with torch.inference_mode():
        seconds = interleave(arms, rounds, LEAST_SECONDS)
    del seconds["peak"]
    work = 2.0 * m * o * n / 1e9
    return {"m": m, "o": o, "n": n, "peak": summary([peak / 1e9 for peak in peaks[-rounds:]]),
            "gops": {name: summary([work / each for each in times]) for name, times in seconds.items()}}


def _peak() -> float:
    from linocut.kernels import native
    from linocut.kernels.problem import thread_count

    if native.why_no_module() is not None:
        return 0.0
    return float(native.module().int8_peak(_variant(), thread_count()[0], PEAK_SECONDS))


def _packed(x: torch.Tensor, o: int, encoding: str) -> Callable[[], object]:
    """Our product: the kernel that `dispatch` chooses, on random weights."""
    import numpy as np

    from linocut.kernels import dispatch
    from linocut.models.linear import PackedLinear
    from linocut.models.synthetic import random_packed

    layer = PackedLinear.from_packed(random_packed(np.random.default_rng(0), encoding, (o, x.shape[1])))
    return lambda: dispatch.linear(x, layer.codes, layer.scales, layer.zeros, encoding)


def _mlx(x: torch.Tensor, o: int, encoding: str) -> Callable[[], object]:
    """mlx's product with the weights of `_packed`."""
    import mlx.core as mx
    import numpy as np

    from linocut.mlx.layers import pack
    from linocut.models.synthetic import random_packed

    weight = pack(random_packed(np.random.default_rng(0), encoding, (o, x.shape[1])))
    given = mx.array(x.numpy())
    return lambda: mx.eval(weight.matmul(given))


def _torch(x: torch.Tensor, o: int) -> dict[str, Callable[[], object]]:
    import torch
    import torch.nn.functional as F

    from linocut.cli.bench.baselines import Int8Linear

    weight = torch.randn(o, x.shape[1], generator=torch.Generator().manual_seed(1))
    half, x_half, int8 = weight.bfloat16(), x.bfloat16(), Int8Linear(weight)
    return {"torch fp32": lambda: F.linear(x, weight), "torch bf16": lambda: F.linear(x_half, half),
            "torch int8": lambda: int8(x)}


def _together(rows: list[dict[str, Any]], counts: list[int]) -> dict[str, Any]:
    """GOP/s over all shapes, each as often as the model runs it: the sum of work by the sum of median times."""
    works = [count * row["o"] * row["n"] for row, count in zip(rows, counts, strict=True)]

    def mean(rates: list[float]) -> float:
        return sum(works) / sum(work / max(rate, 1e-9) for work, rate in zip(works, rates, strict=True))

    def merge(summaries: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: float(f"{mean([each[key] for each in summaries]):.5g}") for key in ("median", "min", "max")}

    return {"m": rows[0]["m"], "o": ALL, "n": ALL, "peak": merge([row["peak"] for row in rows]),
            "gops": {name: merge([row["gops"][name] for row in rows]) for name in rows[0]["gops"]}}


def _print(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0]["gops"])
    click.echo(f"\nM = {rows[0]['m']}: GOP/s, median (least to most), and % of the int8 peak")
    click.echo(f"{'O x N':<14}{'peak':>6}" + "".join(f"{name:>28}" for name in names))
    for row in rows:
        peak, shape = row["peak"]["median"], "together" if row["o"] == ALL else f"{row['o']} x {row['n']}"
        cells = ""
        for name in names:
            rate = row["gops"][name]
            share = f"{100 * rate['median'] / peak:.0f}%" if peak else ""
            spread = f"({rate['min']:.4g}-{rate['max']:.4g})"
            cells += f"{rate['median']:>9.4g} {spread:<14}{share:>4}"
        click.echo(f"{shape:<14}{peak:>6.0f}{cells}")
