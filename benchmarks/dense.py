"""What eight and four bits do to the layers that stay dense: context_embedder, x_embedder, proj_out.

    python benchmarks/dense.py [embedded] [--pictures 16] [-o benchmarks/results/dense.json]
    python benchmarks/dense.py MODEL --copy OUT --edges int8       # such a model, for 'linocut bench memory'

Packs them in memory, all else as it is, and draws the same pictures again: error of the weights, and PSNR of the
pictures to those of the dense layers on the same noise. They run on the kernels that a packed file would run on. To
compare with: the same for activations of the blocks that are not rounded to int8, all weights as they are. Rows that
are no multiple of 128, which files keep dense, are filled up with zeros.
"""

import argparse
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.kernels.dispatch import use_kernel
from linocut.models.linear import PackedLinear
from linocut.pipeline.generate import Pipeline
from linocut.quantize.rounding import quantize_tensor

LAYERS = ("context_embedder", "x_embedder", "proj_out")
PROMPTS = ("two red apples and a blue cup", "a green fox above a book", "three yellow stars", "a dog left of a cat",
           "a purple car", "four blue balloons", "a frog and a crown", "an orange below a clock")
GROUP = 128


class Packed(nn.Module):
    """A Linear without bias whose weight [O, N] is packed, with zeros behind its rows up to whole groups."""

    def __init__(self, weight: Tensor, encoding: str) -> None:
        super().__init__()
        self.width, self.missing = weight.shape[1], -weight.shape[1] % GROUP
        filled = nn.functional.pad(weight.float(), (0, self.missing))
        self.layer = PackedLinear.from_packed(quantize_tensor(filled, encoding))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(nn.functional.pad(x, (0, self.missing)))

    def error(self, weight: Tensor) -> float:
        """|w - q| / |w|."""
        difference = self.layer.dequantize()[:, : self.width] - weight.float()
        return round(float(difference.norm() / weight.float().norm()), 5)


def draw(pipe: Pipeline, pictures: int) -> np.ndarray:
    """uint8 [pictures, H, W, 3]."""
    return np.stack([np.asarray(pipe(PROMPTS[i % len(PROMPTS)], seed=i).images[0]) for i in range(pictures)])


def compare(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Mean and worst PSNR, and the share of values that are off by more than 2 of 255."""
    errors = ((a.astype(np.float64) - b) ** 2).mean(axis=(1, 2, 3))
    psnr = [10 * math.log10(255**2 / max(error, 1e-3)) for error in errors]
    return {"psnr_mean": round(sum(psnr) / len(psnr), 2), "psnr_min": round(min(psnr), 2),
            "over_2": round(float((np.abs(a.astype(int) - b) > 2).mean()), 5)}


def measure(model: str, pictures: int) -> dict[str, dict]:
    pipe = Pipeline.from_pretrained(model, keep_loaded=True, prompt_cache=False)
    before = draw(pipe, pictures)
    results: dict[str, dict] = {}

    def add(what: str, errors: dict[str, float]) -> None:
        results[what] = {"relative_error": errors, **compare(draw(pipe, pictures), before)}
        found = results[what]
        print(f"{what:<26} PSNR {found['psnr_mean']:6.2f} dB, worst {found['psnr_min']:6.2f}, off by over 2 levels "
              f"{100 * found['over_2']:.3f} %; weights {errors}", flush=True)

    with pipe.components.use("transformer") as network:
        dense = {name: getattr(network, name) for name in LAYERS}
        for encoding in ("int8", "affine4"):
            for changed in (LAYERS, *((name,) for name in LAYERS)):
                errors = {}
                for name in changed:
                    packed = Packed(dense[name].weight.detach(), encoding)
                    errors[name] = packed.error(dense[name].weight.detach())
                    setattr(network, name, packed)
                add(f"{encoding}, {'all three' if len(changed) > 1 else changed[0]}", errors)
                for name in changed:
                    setattr(network, name, dense[name])
        with use_kernel("native"):
            add("activations not rounded", {})
        assert compare(draw(pipe, pictures), before)["psnr_min"] > 70, "the layers were not put back"
    return results


def copy(source: Path, out: Path, encoding: str) -> None:
    """Write the model folder `source` with its edges in another encoding; all else goes along by hard link."""
    place = Path("transformer", "diffusion_pytorch_model.safetensors")
    shutil.copytree(source, out, copy_function=os.link, ignore=lambda folder, _: (
        [place.name] if Path(folder) == source / place.parent else []))
    with Checkpoint.open(source / place) as checkpoint:
        tensors: dict = {name: (checkpoint.array(name), checkpoint.info(name).dtype) for name in checkpoint.names
                         if name.rpartition(".")[0] not in checkpoint.packed}
        tensors |= {module: checkpoint.packed_tensor(module) for module in checkpoint.packed}
        for name in LAYERS:
            array, dtype = tensors.pop(f"{name}.weight")
            weight = torch.from_numpy(array.copy())
            tensors[name] = quantize_tensor(weight.view(torch.bfloat16) if dtype == "BF16" else weight, encoding)
        write_checkpoint(out / place, tensors)
    for file in (source / place, out / place):
        print(f"{file}: {file.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--copy", type=Path)
    parser.add_argument("--edges", choices=("int8", "affine4"), default="int8")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    if given.copy is not None:
        copy(Path(given.model), given.copy, given.edges)
        return
    results = measure(given.model, given.pictures)
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps({"model": given.model, "pictures": given.pictures, "results": results},
                                           indent=1) + "\n")


if __name__ == "__main__":
    main()
