"""stable-diffusion.cpp as an arm of `linocut bench image`, through the package stable-diffusion-cpp-python.

    python -m linocut.cli.bench.sdcpp MODEL WEIGHTS PICTURE WIDTH HEIGHT STEPS THREADS

Its files are GGUF with random weights of the true shapes: the blocks of the transformer in TQ2_0, on x86 the fastest of
ggml's low-bit types (one scale for 256 weights), the text encoder in Q4_0, cut off as ours is, other matrices in Q8_0.
The autoencoder is the model's own file. Prints the seconds of its steps as JSON.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from linocut.formats.folder import ModelFolder
from linocut.models.configs import Flux2Config, Qwen3Config

# name -> (number in ggml, weights of a block, bytes of a block)
TYPES = {"F32": (0, 1, 4), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34), "TQ2_0": (35, 256, 66)}
ALIGNMENT = 32
_PIECE = 1 << 24
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def write_weights(model: ModelFolder, folder: Path) -> None:
    """Write `transformer.gguf` and `text_encoder.gguf` for a model's shapes."""
    for name, tensors in (("transformer", transformer_tensors(Flux2Config.from_dict(model.config("transformer")))),
                          ("text_encoder", encoder_tensors(Qwen3Config.from_dict(model.config("text_encoder")),
                                                           max(model.settings["text_taps"])))):
        path = folder / f"{name}.gguf"
        if not path.exists():
            partial = path.with_suffix(".partial")
            write_gguf(partial, tensors)
            partial.rename(path)


def transformer_tensors(config: Flux2Config) -> Tensors:
    """{original name: (type, shape)} of a FLUX.2 transformer."""
    width, hidden, head = config.width, config.mlp_width, config.attention_head_dim
    found: Tensors = {
        "img_in.weight": ("Q8_0", (width, config.in_channels)),
        "txt_in.weight": ("Q8_0", (width, config.joint_attention_dim)),
        "time_in.in_layer.weight": ("Q8_0", (width, config.timestep_guidance_channels)),
        "time_in.out_layer.weight": ("Q8_0", (width, width)),
        "double_stream_modulation_img.lin.weight": ("Q8_0", (6 * width, width)),
        "double_stream_modulation_txt.lin.weight": ("Q8_0", (6 * width, width)),
        "single_stream_modulation.lin.weight": ("Q8_0", (3 * width, width)),
        "final_layer.linear.weight": ("Q8_0", (config.velocity_channels, width)),
        "final_layer.adaLN_modulation.1.weight": ("Q8_0", (2 * width, width))}
    for block in range(config.num_layers):
        for stream in ("img", "txt"):
            prefix = f"double_blocks.{block}.{stream}"
            found |= {f"{prefix}_attn.qkv.weight": ("TQ2_0", (3 * width, width)),
                      f"{prefix}_attn.norm.query_norm.scale": ("F32", (head,)),
                      f"{prefix}_attn.norm.key_norm.scale": ("F32", (head,)),
                      f"{prefix}_attn.proj.weight": ("TQ2_0", (width, width)),
                      f"{prefix}_mlp.0.weight": ("TQ2_0", (2 * hidden, width)),
                      f"{prefix}_mlp.2.weight": ("TQ2_0", (width, hidden))}
    for block in range(config.num_single_layers):
        prefix = f"single_blocks.{block}"
        found |= {f"{prefix}.linear1.weight": ("TQ2_0", (3 * width + 2 * hidden, width)),
                  f"{prefix}.linear2.weight": ("TQ2_0", (width, width + hidden)),
                  f"{prefix}.norm.query_norm.scale": ("F32", (head,)),
                  f"{prefix}.norm.key_norm.scale": ("F32", (head,))}
    return found


def encoder_tensors(config: Qwen3Config, layers: int) -> Tensors:
    """{llama.cpp's name: (type, shape)} of the first `layers` layers of a Qwen3."""
    width, mlp = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    found: Tensors = {"token_embd.weight": ("Q4_0", (config.vocab_size, width)),
                      "output_norm.weight": ("F32", (width,))}
    for layer in range(layers):
        found |= {f"blk.{layer}.{name}.weight": value for name, value in {
            "attn_q": ("Q4_0", (queries, width)), "attn_k": ("Q4_0", (keys, width)), "attn_v": ("Q4_0", (keys, width)),
            "attn_output": ("Q4_0", (width, queries)), "attn_q_norm": ("F32", (config.head_dim,)),
            "attn_k_norm": ("F32", (config.head_dim,)), "attn_norm": ("F32", (width,)), "ffn_norm": ("F32", (width,)),
            "ffn_gate": ("Q4_0", (mlp, width)), "ffn_up": ("Q4_0", (mlp, width)), "ffn_down": ("Q4_0", (width, mlp)),
        }.items()}
    return found


def write_gguf(path: Path, tensors: Tensors) -> None:
    """Write a GGUF file (version 3) of random weights that keep the size of what they multiply."""
    header, offset, sizes = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), 0), 0, {}
    for name, (kind, shape) in tensors.items():
        number, block, nbytes = TYPES[kind]
        sizes[name] = int(np.prod(shape)) // block * nbytes
        text = name.encode()
        header += struct.pack("<Q", len(text)) + text + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", number, offset)
        offset += -(-sizes[name] // ALIGNMENT) * ALIGNMENT
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(header.ljust(-(-len(header) // ALIGNMENT) * ALIGNMENT, b"\0"))
        for name, (kind, shape) in tensors.items():
            for piece in _random_blocks(rng, kind, shape):
                file.write(piece)
            file.write(b"\0" * (-sizes[name] % ALIGNMENT))


def _random_blocks(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> Iterator[bytes]:
    count = int(np.prod(shape))
    if kind == "F32":
        yield np.ones(count, dtype=np.float32).tobytes()
        return
    _, block, nbytes = TYPES[kind]
    # the standard deviation of a weight at scale 1: of uniform -1..1, -8..7 and -128..127
    spread = {"TQ2_0": 0.82, "Q4_0": 4.6, "Q8_0": 74.0}[kind]
    scale = np.float16(shape[-1] ** -0.5 / spread)
    step = _PIECE // nbytes
    for first in range(0, count // block, step):
        number = min(step, count // block - first)
        blocks = np.frombuffer(bytearray(rng.bytes(number * nbytes)), dtype=np.uint8).reshape(number, nbytes)
        if kind == "TQ2_0":  # four codes 0..2 a byte, the scale last
            blocks = np.where((blocks & (blocks >> 1) & 0x55) != 0, np.uint8(0b10010010), blocks)
            blocks[:, -2:] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
        else:
            blocks[:, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
        yield blocks.tobytes()


def main() -> None:
    model, weights, picture, width, height, steps, threads = sys.argv[1:]
    from stable_diffusion_cpp import StableDiffusion

    seconds: list[float] = []

    def on_step(step: int, total: int, taken: float) -> None:
        if total == int(steps) and step:  # opening files reports its progress here too
            seconds.append(round(taken, 3))

    (vae,) = ModelFolder.open(model).path("vae").glob("*.safetensors")
    pipe = StableDiffusion(diffusion_model_path=f"{weights}/transformer.gguf", llm_path=f"{weights}/text_encoder.gguf",
                           vae_path=str(vae), n_threads=int(threads), diffusion_flash_attn=False, vae_decode_only=True,
                           vae_conv_direct=False)
    images = pipe.generate_image("a red apple and two blue cups on a wooden table", width=int(width),
                                 height=int(height), cfg_scale=1.0, sample_steps=int(steps), sample_method="euler",
                                 seed=0, progress_callback=on_step)
    images[0].save(picture)
    print(json.dumps({"steps": seconds}))


if __name__ == "__main__":
    main()
