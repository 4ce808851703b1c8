"""What activations rounded to int8 cost a picture, against the teacher that the embedded models learned from.

    python benchmarks/activations.py RUN/teacher-model [--prompts FILE] [--pictures 24] [--steps 4]

The folder is the teacher as `linocut train --stage teacher-model` exports it. Each prompt is drawn from the same noise
by the teacher with its guidance, by a student with float activations (kernel "native") and by the student as it is
drawn by default: int8 activations in the text encoder and the transformer, attention in bfloat16 where the CPU has it.
"cost" is the difference of two PSNRs against the teacher's pictures, over all pixels of all of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from linocut.formats.folder import EMBEDDED, ModelFolder
from linocut.kernels.dispatch import use_kernel
from linocut.pipeline.generate import Pipeline


def draw(folder: ModelFolder, prompts: list[str], steps: int, kernel: str) -> np.ndarray:
    """float [pictures, H, W, 3] in 0..1."""
    with use_kernel(kernel):
        pipe = Pipeline(folder, prompt_cache=False)
        drawn = [pipe(prompt, seed=seed, num_inference_steps=steps).images[0] for seed, prompt in enumerate(prompts)]
        return np.stack([np.asarray(image, dtype=np.float64) / 255 for image in drawn])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of all pixels, in dB."""
    return float(-10 * np.log10(((a - b) ** 2).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--prompts", type=Path, default=Path("recipes/embedded/prompts.txt"))
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    lines = arguments.prompts.read_text().splitlines()  # task | prompt
    prompts = [line.rpartition("|")[2].strip() for line in lines if line.strip() and not line.startswith("#")]
    prompts = prompts[: arguments.pictures]
    teacher = draw(ModelFolder.open(arguments.teacher), prompts, arguments.steps, "native")
    for name in EMBEDDED:
        folder = ModelFolder.open(name)
        floats, int8 = (draw(folder, prompts, arguments.steps, kernel) for kernel in ("native", "auto"))
        found = {"float": psnr(floats, teacher), "int8": psnr(int8, teacher), "int8 against float": psnr(int8, floats)}
        print(json.dumps({"model": name, "pictures": len(prompts), "steps": arguments.steps}
                         | {key: round(value, 3) for key, value in found.items()}
                         | {"cost": round(found["float"] - found["int8"], 3)}), flush=True)


if __name__ == "__main__":
    main()
