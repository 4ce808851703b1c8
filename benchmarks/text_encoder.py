"""What four-bit rounding of the text encoder does to weights, text features and pictures, by method.

    python benchmarks/text_encoder.py RUN/teacher/model.safetensors [--model embedded] [--prompts FILE] [--pictures 12]

The file holds a float text encoder under `text_encoder.` (as `linocut train` leaves it), the model everything else; the
model's own encoder is not used. Everything runs in float, so that nothing but the rounding of the weights differs.
"minmax" spans each group of 64, "search" is what `linocut quantize` does, and "half-quadratic" is HQQ (Badri and Shaji
2023: |w - q|^0.7, 20 iterations) with a real-valued zero point and a float32 scale per group, which affine4 has not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.formats.folder import ModelFolder
from linocut.formats.packed import AFFINE_GROUP_SIZE, dequantize
from linocut.models.prompt_tokenizer import PromptTokenizer
from linocut.models.text_encoder import Qwen3Config, Qwen3Encoder
from linocut.pipeline.generate import Pipeline
from linocut.quantize.policy import DENSE, Policy
from linocut.quantize.rounding import quantize_tensor


def half_quadratic(w: Tensor) -> Tensor:
    """HQQ's rounding of w [O, N], decoded."""
    g = w.reshape(-1, AFFINE_GROUP_SIZE)
    low, high = g.amin(1, keepdim=True), g.amax(1, keepdim=True)
    inverse = 15 / (high - low).clamp_min(1e-9)
    zero, beta = (-low * inverse).round(), 10.0
    for _ in range(20):
        codes = (g * inverse + zero).round().clamp(0, 15)
        error = g - (codes - zero) / inverse
        error = error.sign() * F.relu(error.abs() - error.abs().clamp_min(1e-12).pow(-0.3) / beta)
        zero, beta = (codes - (g - error) * inverse).mean(1, keepdim=True), beta * 1.01
    return (((g * inverse + zero).round().clamp(0, 15) - zero) / inverse).view_as(w)


def packed(method: str) -> Callable[[Tensor], Tensor]:
    return lambda w: torch.from_numpy(dequantize(quantize_tensor(w, "affine4", method)))


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "minmax": packed("tied"), "half-quadratic": half_quadratic, "search": packed("exact")}


def pictures(folder: ModelFolder, state: dict[str, Tensor], prompts: list[str]) -> np.ndarray:
    """Draw with this dense text encoder: float [pictures, H, W, 3] in 0..1."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "model"
        shutil.copytree(folder.root, root, ignore=lambda *_: ["model.safetensors"])
        write_checkpoint(root / "text_encoder" / "model.safetensors", {k: v.numpy() for k, v in state.items()})
        pipe = Pipeline(ModelFolder(root, "changed", folder.transformer_dir), prompt_cache=False)
        return np.stack([np.asarray(pipe(prompt, seed=seed).images[0], dtype=np.float64) / 255
                         for seed, prompt in enumerate(prompts)])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--prompts", type=Path, default=Path("recipes/embedded/prompts.txt"))
    parser.add_argument("--pictures", type=int, default=12)
    arguments = parser.parse_args()
    lines = arguments.prompts.read_text().splitlines()  # task | prompt
    prompts = [line.rpartition("|")[2].strip() for line in lines if line.strip() and not line.startswith("#")]
    os.environ["LINOCUT_PROMPT_CACHE"] = "0"
    folder = ModelFolder.open(arguments.model)
    config, taps = Qwen3Config.from_dict(folder.config("text_encoder")), folder.settings["text_taps"]
    with Checkpoint.open(arguments.weights) as checkpoint:
        state = {name.removeprefix("text_encoder."): torch.from_numpy(checkpoint.array(name).astype(np.float32))
                 for name in checkpoint if name.startswith("text_encoder.")}
    decisions = Policy.preset("qwen3", "affine4").plan({
        name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in state.items()})
    rounded = [f"{name}.weight" for name, (encoding, _) in decisions.items() if encoding != DENSE]
    ids, mask = PromptTokenizer.from_folder(folder.path("tokenizer"), folder.settings["text_length"]).encode(prompts)

    def features(changed: dict[str, Tensor]) -> Tensor:
        encoder = Qwen3Encoder(config, taps).eval()
        encoder.load_state_dict(changed)
        return encoder(ids, mask).unflatten(-1, (len(taps), -1))

    wanted, drawn = features(state), pictures(folder, state, prompts[: arguments.pictures])
    energy = sum(float(state[name].square().sum()) for name in rounded)
    print(f"{len(prompts)} prompts, {len(rounded)} weights, {int(mask.sum())} real and {int((1 - mask).sum())} pad "
          "tokens; 1 - cosine per tap")
    for method, apply in METHODS.items():
        changed = state | {name: apply(state[name]) for name in rounded}
        error = sum(float((changed[name] - state[name]).square().sum()) for name in rounded)
        cosine = 1 - F.cosine_similarity(features(changed), wanted, dim=-1)
        real, pad = (cosine[mask == kind].mean(0).tolist() for kind in (1, 0))
        squared = ((pictures(folder, changed, prompts[: arguments.pictures]) - drawn) ** 2).mean((1, 2, 3))
        print(json.dumps({"method": method, "weight_error": round(error / energy, 6),
                          "real": [round(x, 5) for x in real], "pad": [round(x, 5) for x in pad],
                          "psnr": round(float((-10 * np.log10(squared)).mean()), 2)}), flush=True)


if __name__ == "__main__":
    main()
