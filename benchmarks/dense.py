"""What eight and four bits do to the layers that stay dense: context_embedder, x_embedder, proj_out.

    python benchmarks/dense.py [embedded] [--pictures 16] [-o benchmarks/results/dense.json]

Rounds them in memory, all else as it is, and draws the same pictures again: error of the weights, and PSNR of the
pictures to those of the unrounded layers on the same noise. Eight bits: int8 with a float16 scale for 128 weights
(max / 127). Four bits: affine4 as the quantizer searches it.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from linocut.models.linear import PackedLinear
from linocut.pipeline.generate import Pipeline
from linocut.quantize.rounding import quantize_tensor

LAYERS = ("context_embedder", "x_embedder", "proj_out")
PROMPTS = ("two red apples and a blue cup", "a green fox above a book", "three yellow stars", "a dog left of a cat",
           "a purple car", "four blue balloons", "a frog and a crown", "an orange below a clock")
GROUP = 128


def eight_bits(w: Tensor) -> Tensor:
    groups = w.float().unflatten(1, (-1, GROUP)) if w.shape[1] % GROUP == 0 else w.float()[:, None]
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp_min(2.0**-24).half().float()
    return ((groups / scale).round().clamp(-127, 127) * scale).flatten(1)


def four_bits(w: Tensor) -> Tensor:
    if w.shape[1] % 128:  # a layer that is too narrow for its groups
        pad = torch.nn.functional.pad(w.float(), (0, -w.shape[1] % 128))
        return PackedLinear.from_packed(quantize_tensor(pad, "affine4")).dequantize()[:, : w.shape[1]]
    return PackedLinear.from_packed(quantize_tensor(w.float(), "affine4")).dequantize()


def draw(pipe: Pipeline, pictures: int) -> np.ndarray:
    """uint8 [pictures, H, W, 3]."""
    return np.stack([np.asarray(pipe(PROMPTS[i % len(PROMPTS)], seed=i).images[0]) for i in range(pictures)])


def psnr(a: np.ndarray, b: np.ndarray) -> list[float]:
    errors = ((a.astype(np.float64) - b) ** 2).mean(axis=(1, 2, 3))
    return [round(10 * math.log10(255**2 / max(error, 1e-3)), 2) for error in errors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    pipe = Pipeline.from_pretrained(given.model, keep_loaded=True)
    before = draw(pipe, given.pictures)
    with pipe.components.use("transformer") as network:
        stored = {name: getattr(network, name).weight.detach().clone() for name in LAYERS}
        results = {}
        for bits, rounded in (("8", eight_bits), ("4", four_bits)):
            for changed in (LAYERS, *((name,) for name in LAYERS)):
                errors = {}
                for name in changed:
                    w = rounded(stored[name])
                    errors[name] = round(float((w - stored[name].float()).norm() / stored[name].float().norm()), 5)
                    getattr(network, name).weight = torch.nn.Parameter(w, requires_grad=False)
                found = psnr(draw(pipe, given.pictures), before)
                for name in changed:
                    getattr(network, name).weight = torch.nn.Parameter(stored[name], requires_grad=False)
                what = "all three" if len(changed) > 1 else changed[0]
                results[f"{bits} bits, {what}"] = {
                    "relative_error": errors, "psnr_mean": round(sum(found) / len(found), 2), "psnr_min": min(found)}
                print(f"{bits} bits, {what:<17} PSNR {results[f'{bits} bits, {what}']['psnr_mean']:6.2f} dB, worst "
                      f"{min(found):6.2f}; weights {errors}", flush=True)
        same = psnr(draw(pipe, given.pictures), before)
        assert min(same) > 70, "the layers were not put back"
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps({"model": given.model, "pictures": given.pictures, "results": results},
                                           indent=1) + "\n")


if __name__ == "__main__":
    main()
