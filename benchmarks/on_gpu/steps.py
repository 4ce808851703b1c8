"""Sections `step`, `together`, `profile`, `dense` and `compiled`: one denoising step, packed and dense."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product as pairs
from typing import Any

import torch

from linocut.kernels.gpu import runtime
from linocut.models import flux2_gpu
from linocut.models.configs import Flux2Config
from linocut.models.flux2_gpu import GpuTransformer
from linocut.pipeline.generate import Pipeline
from on_gpu.bench import LEVELS, Bench, level, line, peak, relative, release, say, seconds, step_inputs, synchronize
from on_gpu.networks import DEVICE, compile_blocks, dense_network, fp8_network, packed_network


def measure(bench: Bench, run: Any, side: int, given: list[Any]) -> dict[str, Any]:
    """Seconds of run(*given), of its first call, and the most memory from that on: a graph's is taken when recorded."""
    with peak() as most:
        start = time.perf_counter()
        run(*given)
        synchronize()
        first = time.perf_counter() - start
        for _ in range(0 if bench.toy else 3):
            run(*given)
        took = seconds(lambda: run(*given), bench.rounds)
    d, s = bench.config.width, bench.text + bench.tokens(side)
    blocks = bench.config.num_layers + bench.config.num_single_layers
    work = (26 * s * d * d * blocks + 4 * s * s * d * blocks) * given[0].shape[0]
    return {"side": side, "seconds": took, "first_call_seconds": first, **most, "tflops": work / took / 1e12}


def step(bench: Bench) -> list[dict[str, Any]]:
    """The packed step at each accuracy, as one CUDA graph, by the routes that were measured."""
    found = []
    for encoding in bench.encodings:
        network = packed_network(bench.config, encoding)
        for accuracy, side in pairs(LEVELS[:: 2 if bench.toy else 1], bench.sides[: 1 if bench.toy else None]):
            bench.tune(encoding, accuracy)
            with level(accuracy):
                run = GpuTransformer(network)
                entry = measure(bench, run, side, step_inputs(bench, bench.config, side))
            chosen = {f"M{shape.m} N{shape.n} O{shape.o}": f"{choice.route.name} {choice.route.tile}"
                      for shape, choice in run.choices.items()}
            found.append({"what": f"linocut {encoding} {accuracy}", **entry, "graph": run.graph_note or "yes",
                          "routes": chosen})
            say(line({key: value for key, value in found[-1].items() if key != "routes"}))
            del run
        del network
        release()
    return found


def together(bench: Bench) -> list[dict[str, Any]]:
    """A step of several pictures of the embedded model's shape: through the network together, one after another, and
    together by the layers as they are written."""
    config, side, text = bench.config, bench.sides[0], bench.text
    if not bench.toy:
        folder = Pipeline.from_pretrained("embedded", device="cpu").folder
        config, side = Flux2Config.from_dict(folder.config("transformer")), 256
        text = int(folder.settings["text_length"])
    found = []
    for encoding in bench.encodings:
        network = packed_network(config, encoding)
        for many in (2,) if bench.toy else (1, 4, 32):
            latents, features, mod, image_ids, text_ids = step_inputs(bench, config, side, batch=many)
            found.append({"encoding": encoding, "pictures": many, **_together(
                bench, network, [latents, features[:, :text], mod, image_ids, text_ids[:text]])})
            say(line(found[-1]))
            bench.ok &= found[-1]["difference"] < 0.02
    return found


def _together(bench: Bench, network: Any, given: list[Any]) -> dict[str, float]:
    """Seconds of each way, and how far the results of the first two are apart."""
    found, results, most = {}, [], flux2_gpu.BATCH_BYTES
    with level("exact"):
        try:
            for name, flux2_gpu.BATCH_BYTES in (("together", most), ("one by one", 0)):
                run = GpuTransformer(network)
                results.append(run(*given))
                for _ in range(0 if bench.toy else 3):
                    run(*given)
                found[name] = seconds(partial(run, *given), bench.rounds)
        finally:
            flux2_gpu.BATCH_BYTES = most
        plain = [each.to(torch.bfloat16) for each in given[:2]]
        found["layer by layer"] = seconds(partial(network, *plain, *given[2:]), bench.rounds)
    return found | {"difference": relative(*results)}


def profile(bench: Bench) -> dict[str, Any]:
    """Where the time of an exact and of a fast step goes, by kernel, in milliseconds."""
    if DEVICE == "cpu":
        return {"skipped": "needs a GPU"}
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    found = {}
    network = packed_network(bench.config, "ternary")
    for accuracy, side in pairs(("exact", "fast"), bench.sides):
        bench.tune("ternary", accuracy)
        with level(accuracy):
            run = GpuTransformer(network, graph=False)
            given = step_inputs(bench, bench.config, side)
            for _ in range(2):
                run(*given)
            with record(activities=[ProfilerActivity.CUDA]) as events:
                run(*given)
                synchronize()
        times: dict[str, list[float]] = {}
        for event in events.events():
            times.setdefault(event.name[:90], []).append(event.device_time_total / 1e3)
        ranked = sorted(((sum(each), len(each), name) for name, each in times.items()), reverse=True)
        found[f"{accuracy} {side}"] = [{"ms": round(total, 3), "calls": calls, "kernel": name}
                                       for total, calls, name in ranked[:16]]
        for total, calls, name in ranked[:9]:
            say(f"{accuracy} {side}: {total:8.3f} ms {calls:4d} x {name}")
        del run
    return found


def dense(bench: Bench) -> list[dict[str, Any]]:
    """The same network in dense bfloat16, as it is written."""
    return _dense(bench, "dense bf16 eager", dense_network(bench.config))


def compiled(bench: Bench) -> list[dict[str, Any]]:
    """The same with its blocks under torch.compile, at the larger size also with cuDNN's attention; and in FP8."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    found = _compiled(bench, "dense bf16 compiled", dense_network)
    if DEVICE == "cuda":
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            found += _compiled(bench, "dense bf16 compiled, cuDNN's attention", dense_network, bench.sides[-1:])
        if runtime.capability() >= runtime.FP8:
            found += _compiled(bench, "dense fp8 compiled", fp8_network)
    return found


def _compiled(bench: Bench, what: str, make: Callable[[Flux2Config], Any],
              sides: Sequence[int] | None = None) -> list[dict[str, Any]]:
    torch._dynamo.reset()  # which attention it is was decided while compiling
    network = make(bench.config)
    compile_blocks(network.transformer_blocks, network.single_transformer_blocks)
    found = _dense(bench, what, network, sides)
    del network
    release()
    torch._dynamo.reset()
    return found


def _dense(bench: Bench, what: str, network: Any, sides: Sequence[int] | None = None) -> list[dict[str, Any]]:
    found = []
    for side in sides or bench.sides[: 1 if bench.toy else None]:
        with torch.no_grad():
            entry = measure(bench, network, side, step_inputs(bench, bench.config, side, torch.bfloat16))
        found.append({"what": what, **entry})
        say(line(found[-1]))
    return found
