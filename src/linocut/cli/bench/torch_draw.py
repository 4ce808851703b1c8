"""torch as an arm of `linocut bench image`: weights from a file, a picture drawn in a process of its own.

    python -m linocut.cli.bench.torch_draw PRECISION MODEL WEIGHTS PICTURE WIDTH HEIGHT STEPS THREADS

The weights are random, of the true shapes. bf16: all in bfloat16; fp32: the same file, made float32 when it is opened;
int8: a file that was quantized beforehand, int8 with a scale per row for the Linears of all blocks and bfloat16 for the
rest. The networks are opened one after another and dropped again, as linocut does. Prints the seconds of its steps and
when its phases began and ended.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator
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


def write_weights(model: ModelFolder, folder: Path, int8: bool) -> None:
    """Write WEIGHTS for a model's shapes: `transformer.safetensors` and `text_encoder.safetensors`, random."""
    rng = np.random.default_rng(0)
    for name in ("transformer", "text_encoder"):
        path = folder / f"{name}.safetensors"
        if path.exists():
            continue
        with torch.device("meta"):
            network = _network(model, name)
        tensors: list[tuple[str, str, tuple[int, ...]]] = []
        quantized = {f"{layer}.weight" for layer in _in_blocks(network)} if int8 else set()
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


def _in_blocks(network: nn.Module) -> list[str]:
    """Names of the Linears inside blocks."""
    return [name for name, module in network.named_modules()
            if isinstance(module, nn.Linear) and ("blocks." in name or "layers." in name)]


def _open(model: ModelFolder, weights: Path, name: str, precision: str) -> Any:
    """A network whose weights are mapped; int8 layers are prepacked, float32 ones converted."""
    with torch.device("meta"):
        network = _network(model, name)
    with Checkpoint.open(weights / f"{name}.safetensors") as checkpoint:
        for layer in _in_blocks(network) if precision == "int8" else ():
            parent, _, child = layer.rpartition(".")
            values, scales = (tensor_from(checkpoint, f"{layer}.{part}") for part in ("values", "scales"))
            setattr(network.get_submodule(parent), child, baselines.Int8Linear.from_int8(values, scales))
            checkpoint.release(f"{layer}.values")
        dtype = baselines.DTYPES[precision]
        state = {key: tensor_from(checkpoint, key).to(dtype) for key in network.state_dict()}
    network.load_state_dict(state, assign=True)
    return network.eval()


def _denoise(network: Any, text: Tensor, grid: tuple[int, int], steps: int) -> tuple[Tensor, list[float]]:
    """Latents [1, C, h, w], and the seconds of each step."""
    places = image_position_ids(*grid), text_position_ids(text.shape[1])
    noise = torch.randn(1, grid[0] * grid[1], network.config.in_channels, generator=torch.Generator().manual_seed(0))
    seconds = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        start = time.perf_counter()
        v: Tensor = network(x.to(text.dtype), text, sigma.reshape(1), *places)
        seconds.append(round(time.perf_counter() - start, 3))
        return v

    latents = euler(velocity, noise, sigmas(noise.shape[1], steps))
    return latents.transpose(1, 2).unflatten(2, grid), seconds


@torch.inference_mode()
def draw(model: ModelFolder, weights: Path, precision: str, width: int, height: int,
         steps: int) -> tuple[Tensor, dict[str, Any]]:
    """Pixels [3, H, W] in [0, 1]; the seconds of each step, and the beginning and end of each phase."""
    began = [time.monotonic()]
    dtype, length = baselines.DTYPES[precision], int(model.settings["text_length"])
    vae = AutoencoderConfig.from_dict(model.config("vae"))
    ids, mask = PromptTokenizer.from_folder(model.path("tokenizer"), length).encode([PROMPT])
    text = _open(model, weights, "text_encoder", precision)(ids, mask).to(dtype)
    give_memory_back()
    began.append(time.monotonic())
    grid = (height // vae.token_side, width // vae.token_side)
    latents, seconds = _denoise(_open(model, weights, "transformer", precision), text, grid, steps)
    give_memory_back()
    began.append(time.monotonic())
    with model.checkpoint("vae") as checkpoint:
        decoder = baselines.plain(build_and_load(Autoencoder, vae, checkpoint, dtype=dtype))
    pixels = decoder.image_from_latents(latents)[0] / 2 + 0.5
    began.append(time.monotonic())
    spans = dict(zip(("encode", "denoise", "decode"), itertools.pairwise(began), strict=True))
    return pixels, {"steps": seconds, "spans": spans}


def main() -> None:
    precision, model, weights, picture, width, height, steps, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    pixels, said = draw(ModelFolder.open(model), Path(weights), precision, int(width), int(height), int(steps))
    to_image(pixels).save(picture)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
