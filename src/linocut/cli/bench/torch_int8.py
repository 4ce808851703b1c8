"""torch as an arm of `linocut bench image`: int8 weights from a file that was quantized beforehand, drawn in a process.

    python -m linocut.cli.bench.torch_int8 MODEL WEIGHTS PICTURE WIDTH HEIGHT STEPS THREADS

The weights are random, of the true shapes: int8 with a scale per row for the Linears of all blocks, bfloat16 for the
rest. The networks are opened one after another and dropped again, as linocut does. Prints its seconds as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linocut.cli.bench import baselines
from linocut.formats.checkpoint import Checkpoint, CheckpointWriter
from linocut.formats.folder import ModelFolder
from linocut.models.autoencoder import Autoencoder
from linocut.models.configs import AutoencoderConfig, Flux2Config, Qwen3Config
from linocut.models.convert import build_and_load, tensor_from
from linocut.models.flux2 import Flux2Transformer, image_position_ids, text_position_ids
from linocut.models.prompt_tokenizer import PromptTokenizer
from linocut.models.text_encoder import Qwen3Encoder
from linocut.pipeline.components import give_memory_back
from linocut.pipeline.run import to_image
from linocut.pipeline.sampler import euler, sigmas

PROMPT = "a red apple and two blue cups on a wooden table"
_PIECE = 1 << 24


def write_weights(model: ModelFolder, folder: Path) -> None:
    """Write WEIGHTS for a model's shapes: `transformer.safetensors` and `text_encoder.safetensors`, random."""
    rng = np.random.default_rng(0)
    for name in ("transformer", "text_encoder"):
        path = folder / f"{name}.safetensors"
        if path.exists():
            continue
        with torch.device("meta"):
            network = _network(model, name)
        tensors: list[tuple[str, str, tuple[int, ...]]] = []
        quantized = {f"{layer}.weight" for layer in _quantized(network)}
        for key, parameter in network.state_dict().items():
            if key in quantized:
                stem = key.removesuffix("weight")
                tensors += [(stem + "values", "I8", tuple(parameter.shape)),
                            (stem + "scales", "F32", (parameter.shape[0],))]
            else:
                tensors.append((key, "BF16", tuple(parameter.shape)))
        with CheckpointWriter(path, tensors) as writer:
            for key, dtype, shape in tensors:
                writer.write_chunks(key, _random(rng, dtype, shape))


def _random(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    count = int(np.prod(shape))
    for first in range(0, count, _PIECE):
        size = min(_PIECE, count - first)
        if dtype == "I8":
            yield np.frombuffer(rng.bytes(size), dtype=np.int8)
        elif dtype == "F32":  # of int8 weights that are uniform, in rows of some thousands
            yield np.full(size, 2.5e-4, dtype=np.float32)
        else:
            spread = shape[-1] ** -0.5
            values = np.ones(size) if len(shape) == 1 else rng.standard_normal(size, dtype=np.float32) * spread
            yield torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()


def _network(model: ModelFolder, name: str) -> nn.Module:
    config = model.config(name)
    if name == "transformer":
        return Flux2Transformer(Flux2Config.from_dict(config))
    return Qwen3Encoder(Qwen3Config.from_dict(config), tuple(model.settings["text_taps"]))


def _quantized(network: nn.Module) -> list[str]:
    """Names of the Linears inside blocks."""
    return [name for name, module in network.named_modules()
            if isinstance(module, nn.Linear) and ("blocks." in name or "layers." in name)]


def _open(model: ModelFolder, weights: Path, name: str) -> Any:
    """A network with its int8 layers prepacked and everything else mapped."""
    with torch.device("meta"):
        network = _network(model, name)
    with Checkpoint.open(weights / f"{name}.safetensors") as checkpoint:
        for layer in _quantized(network):
            parent, _, child = layer.rpartition(".")
            values, scales = (tensor_from(checkpoint, f"{layer}.{part}") for part in ("values", "scales"))
            setattr(network.get_submodule(parent), child, baselines.Int8Linear.from_int8(values, scales))
            checkpoint.release(f"{layer}.values")
        state = {key: tensor_from(checkpoint, key) for key in network.state_dict()}
    network.load_state_dict(state, assign=True)
    return network.eval()


def _encode(model: ModelFolder, weights: Path) -> Tensor:
    length = int(model.settings["text_length"])
    ids, mask = PromptTokenizer.from_folder(model.path("tokenizer"), length).encode([PROMPT])
    return _open(model, weights, "text_encoder")(ids, mask).bfloat16()


def _denoise(model: ModelFolder, weights: Path, text: Tensor, grid: tuple[int, int], steps: int) -> Tensor:
    network = _open(model, weights, "transformer")
    places = image_position_ids(*grid), text_position_ids(text.shape[1])
    noise = torch.randn(1, grid[0] * grid[1], network.config.in_channels, generator=torch.Generator().manual_seed(0))

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return network(x.bfloat16(), text, sigma.reshape(1), *places)

    return euler(velocity, noise, sigmas(noise.shape[1], steps)).transpose(1, 2).unflatten(2, grid)


def _decode(model: ModelFolder, latents: Tensor) -> Tensor:
    config = AutoencoderConfig.from_dict(model.config("vae"))
    with model.checkpoint("vae") as checkpoint:
        decoder = baselines.plain(build_and_load(Autoencoder, config, checkpoint, dtype=torch.bfloat16))
    return decoder.image_from_latents(latents)[0] / 2 + 0.5


@torch.inference_mode()
def draw(model: ModelFolder, weights: Path, width: int, height: int, steps: int) -> tuple[Tensor, dict[str, float]]:
    """Pixels [3, H, W] in [0, 1], and seconds of each stage, opening included."""
    side = AutoencoderConfig.from_dict(model.config("vae")).token_side
    times = [time.perf_counter()]
    text = _encode(model, weights)
    give_memory_back()
    times.append(time.perf_counter())
    latents = _denoise(model, weights, text, (height // side, width // side), steps)
    give_memory_back()
    times.append(time.perf_counter())
    pixels = _decode(model, latents)
    times.append(time.perf_counter())
    seconds = (round(end - start, 3) for start, end in pairwise(times))
    return pixels, dict(zip(("encode", "denoise", "decode"), seconds, strict=True))


def main() -> None:
    model, weights, picture, width, height, steps, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    pixels, seconds = draw(ModelFolder.open(model), Path(weights), int(width), int(height), int(steps))
    to_image(pixels).save(picture)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
