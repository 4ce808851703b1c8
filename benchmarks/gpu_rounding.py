"""What the rounding of each GPU route costs a picture: emulated in torch on any CPU, with the embedded models.

    python benchmarks/gpu_rounding.py [--pictures 8] [-o benchmarks/results/gpu_rounding.json]

Blocks run layer by layer in float; before each packed layer of a block its activations are rounded as a route rounds
them (kernels/gpu/routes.py), and for `folded` the scales of weights too. Compared on the same noise with pictures of
activations that are not rounded: PSNR over all pixels of all pictures, and the worst picture's.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from linocut.formats.folder import EMBEDDED
from linocut.kernels.dispatch import use_kernel
from linocut.models.linear import PackedLinear
from linocut.pipeline.components import Components
from linocut.pipeline.generate import Pipeline

ROUNDINGS = ("none", "int8", "rows", "folded", "fp8")
PROMPTS = ("two red apples and a blue cup", "a green fox above a book", "three yellow stars", "a dog left of a cat",
           "a purple car", "four blue balloons", "a frog and a crown", "an orange below a clock")


def rounded(x: Tensor, rounding: str) -> Tensor:
    """x[..., N] as the products of a route see it."""
    grouped = x.unflatten(-1, (1, -1) if rounding in ("rows", "folded") else (-1, 128))
    most = 448.0 if rounding == "fp8" else 127.0
    scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-30) / most
    steps = grouped / scale
    steps = steps.to(torch.float8_e4m3fn).float() if rounding == "fp8" else steps.round()
    return (steps * scale).flatten(-2)


def folded(scales: Tensor) -> Tensor:
    """Scales [O, G] as `decode.fold` rounds them."""
    largest = scales.float().amax(1, keepdim=True) / 127
    return ((scales.float() / largest).round() * largest).to(scales.dtype)


def emulate(network: nn.Module, rounding: str) -> None:
    for name, layer in network.named_modules():
        if isinstance(layer, PackedLinear) and "blocks." in name and rounding != "none":
            layer.register_forward_pre_hook(lambda _, given: (rounded(given[0], rounding),))
            if rounding == "folded":
                layer.scales = folded(layer.scales)


def draw(model: str, rounding: str, pictures: int) -> np.ndarray:
    """float [pictures, H, W, 3] in 0..1."""

    class Emulated(Components):
        def runner(self, network, rows=None):
            if hasattr(network, "transformer_blocks") and not getattr(network, "emulated", False):
                emulate(network, rounding)
                network.emulated = True
            return network

    pipe = Pipeline.from_pretrained(model, device="cpu", prompt_cache=False)
    pipe.components = Emulated(pipe.folder, pipe.dtype, pipe.device, True)
    with use_kernel("native"):
        return np.stack([np.asarray(pipe(PROMPTS[i % len(PROMPTS)], seed=i).images[0], dtype=np.float64) / 255
                         for i in range(pictures)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(max(((a - b) ** 2).mean(), 1e-12)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    found = []
    for model in EMBEDDED:
        exact = draw(model, "none", arguments.pictures)
        for rounding in ROUNDINGS[1:]:
            drawn = draw(model, rounding, arguments.pictures)
            found.append({"model": model, "rounding": rounding, "pictures": arguments.pictures,
                          "psnr": round(psnr(drawn, exact), 2),
                          "worst": round(min(map(psnr, drawn, exact)), 2)})
            print(json.dumps(found[-1]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
