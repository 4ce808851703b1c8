"""What all sections of `gpu.py` share: results, shapes, inputs, clocks."""

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linocut.kernels.gpu import accuracy, routes, timing, tuning
from linocut.kernels.gpu.routes import Shape
from linocut.kernels.problem import PackedWeight
from linocut.models.configs import AutoencoderConfig, Flux2Config, Qwen3Config
from linocut.models.flux2 import image_position_ids, text_position_ids
from linocut.models.modulations import Modulations
from linocut.models.synthetic import KNOWN, SyntheticModel
from on_gpu.networks import DEVICE

TOY = SyntheticModel(
    transformer=Flux2Config(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64,
                            num_attention_heads=2, joint_attention_dim=384, timestep_guidance_channels=32,
                            axes_dims_rope=(16, 16, 16, 16)),
    text_encoder=Qwen3Config(vocab_size=512, hidden_size=128, intermediate_size=128, num_hidden_layers=3,
                             num_attention_heads=2, num_key_value_heads=1, head_dim=64),
    vae=AutoencoderConfig(block_out_channels=(16, 16, 32, 32), layers_per_block=1, latent_channels=4,
                          norm_num_groups=8),
    text_taps=(1, 2, 3), text_length=7, default_size=(64, 64), ordinary_tokens=300)
LEVELS = ("exact", "rows", "fast")
PROMPT = "a red apple and two blue cups on a wooden table"
STEPS = 4


class Bench:
    """Results, and what was asked for."""

    def __init__(self, out: Path, toy: bool, encodings: list[str], tune_seconds: float = 110.0,
                 work: Path | None = None) -> None:
        self.out, self.toy, self.encodings, self.tune_seconds = out, toy, encodings, tune_seconds
        self.work = work or Path(tempfile.gettempdir()) / f"linocut-gpu{'-toy' if toy else ''}"
        self.model = TOY if toy else KNOWN["klein-4b"]
        self.config, self.vae = self.model.transformer, self.model.vae
        self.text = self.model.text_length
        self.sides = [32, 64] if toy else [512, 1024]
        self.rounds = 1 if toy else 7
        self.results: dict[str, Any] = {"toy": toy}
        self.ok = True

    def tokens(self, side: int) -> int:
        return (side // 16) ** 2

    def shapes(self, encoding: str, side: int) -> list[Shape]:
        """All products of a step at side x side pixels."""
        d, f, image = self.config.width, self.config.mlp_width, self.tokens(side)
        double = [(d, 3 * d), (d, d), (d, 2 * f), (f, d)]
        found = [Shape(m, n, o, encoding) for m in (self.text, image) for n, o in double]
        return [*found, *(Shape(self.text + image, n, o, encoding) for n, o in ((d, 3 * d + 2 * f), (d + f, d)))]

    def tune(self, encoding: str, level: str) -> None:
        """Have all routes of a level measured that were not yet, as drawing does before the first step of a size."""
        if not self.toy:
            shapes = list(dict.fromkeys(shape for side in self.sides for shape in self.shapes(encoding, side)))
            tuning.measure(shapes, DEVICE, timing.Products(DEVICE, rounds=3, least=0.002),
                           names=accuracy.LEVELS[level], budget=20.0)
            release()

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1, default=str) + "\n")
        partial.replace(self.out)


def say(line: str) -> None:
    print(f"  {line}", flush=True)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def alive() -> bool:
    """Whether this process can still compute on the GPU: after some errors none can."""
    try:
        return bool(torch.ones(4, device=DEVICE).sum() == 4)
    except RuntimeError:
        return False


def release() -> None:
    gc.collect()
    if DEVICE == "cuda" and alive():
        torch.cuda.empty_cache()


def seconds(work: Any, rounds: int, graph: bool = False) -> float:
    """Median of the GPU's own clock."""
    return wall(work, 1) if DEVICE == "cpu" else timing.seconds(work, DEVICE, rounds, 0.02, graph)


def wall(work: Callable[[], object], rounds: int) -> float:
    """Median of the wall clock, from nothing waiting to nothing waiting: what ends on the CPU."""
    found = []
    for _ in range(max(rounds, 1)):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        found.append(time.perf_counter() - start)
    return sorted(found)[len(found) // 2]


@contextmanager
def peak() -> Iterator[dict[str, int]]:
    """Most bytes of tensors, and of what torch held for them, while the block runs; what was there before counts."""
    found = {"peak_memory": 0, "peak_reserved": 0}
    release()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield found
    if DEVICE == "cuda":
        found |= {"peak_memory": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}


@contextmanager
def level(name: str) -> Iterator[None]:
    """What runs inside asks for this accuracy, and measures no routes."""
    before = {key: os.environ.get(key) for key in (accuracy.VARIABLE, "LINOCUT_GPU_TUNE")}
    os.environ.update({accuracy.VARIABLE: name, "LINOCUT_GPU_TUNE": "0"})
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def on_device(weight: PackedWeight) -> PackedWeight:
    zeros = None if weight.zeros is None else weight.zeros.to(DEVICE)
    return PackedWeight(weight.codes.to(DEVICE), weight.scales.to(DEVICE), zeros, weight.encoding, weight.n)


def modulations(width: int, seed: int) -> Modulations:
    generator = torch.Generator().manual_seed(seed)
    return Modulations.from_rows(0.1 * torch.randn(1, 17, width, generator=generator).to(DEVICE))


def step_inputs(bench: Bench, config: Flux2Config, side: int, dtype: torch.dtype = torch.float32,
                batch: int = 1) -> list[Any]:
    """Arguments of a transformer at side x side pixels."""
    torch.manual_seed(1)
    return [torch.randn(batch, bench.tokens(side), config.in_channels, device=DEVICE, dtype=dtype),
            torch.randn(batch, bench.text, config.joint_attention_dim, device=DEVICE, dtype=dtype),
            modulations(config.width, 2), image_position_ids(side // 16, side // 16, device=DEVICE),
            text_position_ids(bench.text, device=DEVICE)]


def line(entry: dict[str, Any]) -> str:
    """An entry's facts on one line."""
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in entry.items() if value != "")


def tiles_of(name: str, shape: Shape, every: bool) -> list[Any]:
    return routes.tiles(name, shape, DEVICE)[: None if every else 1]
