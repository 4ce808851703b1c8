"""stable-diffusion.cpp as a process of its own, which may abort: what to draw comes as JSON, what it says is kept.

    python tests/integrations/sdcpp.py < job.json

A job names the files and the pictures: {"transformer", "text_encoder", "vae": paths, "size": [width, height],
"pictures": [{"path", "prompt", "seed", "steps"}]}.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PACKAGE = "stable_diffusion_cpp"


class Refused(Exception):
    """The program did not draw; the message is the end of what it said."""


def draw(folder: Path, *, pictures: list[dict[str, Any]], size: tuple[int, int], vae: Path | None = None,
         transformer: Path | None = None, text_encoder: Path | None = None) -> tuple[list[np.ndarray], str]:
    """Pictures [H, W, 3] in levels 0..255 of a folder in GGUF form, and what the program said while it drew them.

    Each of `pictures` is {"prompt", "seed", "steps"}. Raises Refused.
    """
    (own,) = (folder / "vae").glob("*.safetensors")
    paths = [folder / f"sdcpp-{number}.png" for number in range(len(pictures))]
    job = {"transformer": str(transformer or folder / "transformer.gguf"), "vae": str(vae or own), "size": size,
           "text_encoder": str(text_encoder or folder / "text_encoder.gguf"),
           "pictures": [{"path": str(path)} | picture for path, picture in zip(paths, pictures, strict=True)]}
    done = subprocess.run([sys.executable, __file__], input=json.dumps(job), capture_output=True, text=True,
                          errors="replace")
    if done.returncode:
        raise Refused(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths], done.stdout + done.stderr


def knows(kind: str) -> bool:
    """Whether the installed build lists this type of ggml."""
    from stable_diffusion_cpp import GGMLType

    return any(member.name.endswith(f"_{kind}") for member in GGMLType)


def main() -> None:
    from stable_diffusion_cpp import StableDiffusion

    job = json.load(sys.stdin)
    # rng "cpu" is torch's generator on the CPU. The schedule "simple" starts from 1, 1 - 1/n, ..., as klein's does.
    pipe = StableDiffusion(diffusion_model_path=job["transformer"], llm_path=job["text_encoder"], vae_path=job["vae"],
                           vae_decode_only=True, n_threads=2, rng_type="cpu", sampler_rng_type="cpu", verbose=True)
    for picture in job["pictures"]:
        (image,) = pipe.generate_image(
            picture["prompt"], width=job["size"][0], height=job["size"][1], cfg_scale=1.0, seed=picture["seed"],
            sample_steps=picture["steps"], sample_method="euler", scheduler=picture.get("scheduler", "simple"))
        image.save(picture["path"])


if __name__ == "__main__":
    main()
