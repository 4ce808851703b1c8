"""Model folders with random weights of the true shapes, to measure size, memory and speed where no weights are at hand.

Names and shapes come from the networks themselves, built without memory; every tensor is drawn from its own generator,
seeded by its name, so a folder is the same bytes whichever parts are made and in whatever order. Nothing but the tensor
in hand is ever in memory. Magnitudes are chosen such that activations stay finite: a matrix keeps the size of what it
is given, norms are near one. The pictures that come out are noise.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from linocut.errors import UsageError
from linocut.formats.checkpoint import Checkpoint, CheckpointWriter, atomic_write_bytes, write_checkpoint
from linocut.formats.names import is_timestep
from linocut.formats.packed import PackedTensor, groups, pack, packed_nbytes, row_bytes
from linocut.formats.timestep_table import CONFIG_KEY, TABLE_FILE, TABLE_VERSION, WEIGHTS_FILE
from linocut.models.autoencoder import Autoencoder, AutoencoderConfig
from linocut.models.flux2 import Flux2Config, Flux2Transformer
from linocut.models.prompt_tokenizer import CHAT_TEMPLATE
from linocut.models.text_encoder import Qwen3Config, Qwen3Encoder
from linocut.quantize.policy import DENSE, Policy
from linocut.quantize.stream import MakeTable, quantization_config

PARTS = ("transformer", "text_encoder", "vae", "tokenizer")
TRANSFORMER_ENCODINGS = ("binary", "ternary", "bf16")
OnProgress = Callable[[int, int, str], None]

_CHUNK = 1 << 20  # weights drawn at a time
# Qwen's added tokens, in the order of their ids: the first follows the last ordinary token.
_SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)
_PLAIN_ADDED = 12  # the tokens from <tool_call> on do not count as special
_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")


@dataclass(frozen=True)
class SyntheticModel:
    """What to make. The defaults are FLUX.2 klein 4B: 3.9 B + 3.1 B (27 of 36 layers) + 84 M parameters."""

    transformer: Flux2Config = field(default_factory=Flux2Config)
    text_encoder: Qwen3Config = field(default_factory=Qwen3Config)
    vae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text_taps: tuple[int, ...] = (9, 18, 27)
    text_length: int = 512
    default_size: tuple[int, int] = (1024, 1024)
    ordinary_tokens: int = 151_643
    seed: int = 0


KNOWN = {"klein-4b": SyntheticModel()}


def write_synthetic(out: str | Path, model: SyntheticModel, encoding: str = "ternary",
                    parts: tuple[str, ...] = PARTS, on_progress: OnProgress | None = None,
                    make_table: MakeTable | None = None) -> None:
    """Write a model folder at `out`, which may exist if it lacks the parts asked for.

    encoding: "binary" or "ternary" packs the transformer and the text encoder (affine4); "bf16" writes both dense, as
    a source to quantize. `make_table` adds a timestep table, as in `quantize_folder`. on_progress(bytes done, bytes in
    all, tensor) is called after each tensor. An interrupted run leaves no unfinished weight file, and the next one goes
    on with the parts that are missing.
    """
    if encoding not in TRANSFORMER_ENCODINGS:
        raise UsageError(f"unknown encoding {encoding!r}; choose from {', '.join(TRANSFORMER_ENCODINGS)}")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UsageError(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    jobs = [_Weights(out, model, part, encoding) for part in parts if part not in ("transformer", "tokenizer")]
    if "transformer" in parts:
        kinds = ("transformer",) if make_table is None else ("transformer without timestep", "timestep")
        jobs = [*(_Weights(out, model, kind, encoding) for kind in kinds), *jobs]
    jobs = [job for job in jobs if not job.path.exists()]
    total = sum(job.nbytes for job in jobs)
    free = shutil.disk_usage(out).free
    if free < total + (64 << 20):
        raise UsageError(f"{out}: {total / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; choose another place")
    done = 0
    for job in jobs:
        for name, nbytes in job.write():
            done += nbytes
            if on_progress is not None:
                on_progress(done, total, f"{job.part}.{name}")
    if "transformer" in parts and make_table is not None and not (out / "transformer" / TABLE_FILE).exists():
        with Checkpoint.open(out / "transformer" / WEIGHTS_FILE) as weights:
            settings = {"default_size": model.default_size, "default_steps": 4}
            write_checkpoint(out / "transformer" / TABLE_FILE,
                             make_table(model.transformer.to_dict(), settings, weights), {"format": "pt"})
    if "tokenizer" in parts:
        (out / "tokenizer").mkdir(exist_ok=True)
        atomic_write_bytes(out / "tokenizer" / "tokenizer.json", synthetic_tokenizer(model.ordinary_tokens))
        _write_json(out / "tokenizer" / "tokenizer_config.json", {
            "tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>",
            "model_max_length": 131072, "add_prefix_space": False, "chat_template": CHAT_TEMPLATE})
    _write_frame(out, model)


def share_parts(source: str | Path, out: str | Path, parts: tuple[str, ...]) -> None:
    """Give folder `out` the `parts` of folder `source` by hard links, or copies where links cannot be."""
    for part in parts:
        (Path(out) / part).mkdir(parents=True, exist_ok=True)
        for file in sorted((Path(source) / part).iterdir()):
            target = Path(out) / part / file.name
            if target.exists():
                continue
            try:
                os.link(file, target)
            except OSError:
                shutil.copyfile(file, target)


def _write_frame(out: Path, model: SyntheticModel) -> None:
    (out / "scheduler").mkdir(exist_ok=True)
    _write_json(out / "scheduler" / "scheduler_config.json", {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
        "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
        "max_image_seq_len": 4096, "time_shift_type": "exponential"})
    _write_json(out / "model_index.json", {
        "_class_name": "Flux2KleinPipeline", "is_distilled": True,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"], "vae": ["diffusers", "AutoencoderKLFlux2"],
        "linocut": {"text_length": model.text_length, "text_taps": list(model.text_taps),
                    "default_size": list(model.default_size), "default_steps": 4}})


class _Weights:
    """One weight file: which tensors it holds, how big it is, and how it is written.

    `kind` is a part, or one of the two files of a transformer with a timestep table.
    """

    def __init__(self, out: Path, model: SyntheticModel, kind: str, encoding: str) -> None:
        part = self.part = "transformer" if "timestep" in kind else kind
        self.folder, self.seed = out / part, model.seed
        if part == "transformer":
            network, config = _meta(Flux2Transformer, model.transformer), model.transformer.to_dict()
            policy = None if encoding == "bf16" else Policy.preset("flux2", encoding)
            self.path = self.folder / "diffusion_pytorch_model.safetensors"
        elif part == "text_encoder":
            network = _meta(Qwen3Encoder, model.text_encoder, taps=model.text_taps)
            config = model.text_encoder.to_dict()
            policy = None if encoding == "bf16" else Policy.preset("qwen3", "affine4")
            self.path = self.folder / "model.safetensors"
        else:
            network, config, policy = _meta(Autoencoder, model.vae), model.vae.to_dict(), None
            self.path = self.folder / "diffusion_pytorch_model.safetensors"
        self.config = config if policy is None else config | {"quantization_config": quantization_config(policy)}
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        self.packed: dict[str, tuple[str, tuple[int, int]]] = {}
        if policy is not None:
            modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items()}
            self.packed = {name: (chosen, (modules[name][0], modules[name][1]))
                           for name, (chosen, _) in policy.plan(modules).items() if chosen != DENSE}
        self.dense = {name: shape for name, shape in shapes.items() if name.removesuffix(".weight") not in self.packed}
        if "timestep" in kind:
            self.config |= {CONFIG_KEY: {"format_version": TABLE_VERSION}}
            if kind == "timestep":
                self.path = self.folder / WEIGHTS_FILE
            self.dense, self.packed = ({name: entry for name, entry in entries.items()
                                        if is_timestep(name) == (kind == "timestep")}
                                       for entries in (self.dense, self.packed))

    @property
    def nbytes(self) -> int:
        dense = sum(8 if name.endswith("num_batches_tracked") else 2 * int(np.prod(shape))
                    for name, shape in self.dense.items())
        return dense + sum(packed_nbytes(encoding, shape) for encoding, shape in self.packed.values())

    def write(self) -> Iterator[tuple[str, int]]:
        """Write config and weights, yielding (name, bytes) after each tensor."""
        self.folder.mkdir(exist_ok=True)
        _write_json(self.folder / "config.json", self.config)
        declared = [(name, "I64" if name.endswith("num_batches_tracked") else "BF16", shape)
                    for name, shape in self.dense.items()]
        with CheckpointWriter(self.path, declared, {"format": "pt"}, self.packed) as writer:
            for name, (encoding, shape) in self.packed.items():
                tensor = random_packed(self._generator(name), encoding, shape)
                writer.write(name, tensor)
                yield name, tensor.nbytes
            for name, dtype, shape in declared:
                if dtype == "I64":
                    writer.write(name, np.zeros(shape, dtype=np.int64))
                else:
                    writer.write_chunks(name, _random_bf16(self._generator(name), name, shape))
                yield name, int(np.prod(shape)) * (8 if dtype == "I64" else 2)

    def _generator(self, name: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.seed}/{self.part}/{name}".encode()).digest()
        return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))


def _meta(network: Callable[..., nn.Module], config: Any, **arguments: Any) -> nn.Module:
    with torch.device("meta"):
        return network(config, **arguments)


def random_packed(rng: np.random.Generator, encoding: str, shape: tuple[int, int]) -> PackedTensor:
    """A packed matrix whose entries have a standard deviation of about N^-1/2; scales vary by a quarter."""
    o, n = shape
    # standard deviation of the values at scale 1: of -1/+1, of uniform -1/0/+1, of a uniform code 0..15, of -127..127
    spread = {"binary": 1.0, "ternary": (2 / 3) ** 0.5, "affine4": 4.61, "int8": 73.6}[encoding]
    jitter = rng.uniform(0.75, 1.25, size=(o, groups(encoding, n))).astype(np.float32)
    scales = jitter * np.float32(n**-0.5 / spread)
    if encoding == "ternary":
        values = np.empty((o, n), dtype=np.int8)
        step = max(1, _CHUNK // n)
        for first in range(0, o, step):
            values[first : first + step] = rng.integers(-1, 2, size=values[first : first + step].shape, dtype=np.int8)
        return pack(values, scales, encoding)
    if encoding == "int8":
        return pack(rng.integers(-127, 128, size=shape, dtype=np.int8), scales, encoding)
    codes = rng.integers(0, 256, size=(o, row_bytes(encoding, n)), dtype=np.uint8)
    zeros = None
    if encoding == "affine4":  # 7 and 8, so that codes are centred
        zeros = rng.integers(0, 2, size=(o, groups(encoding, n) // 2), dtype=np.uint8) * np.uint8(0x11) + np.uint8(0x77)
    return PackedTensor(encoding, shape, codes, scales.astype(np.float16), zeros)


def _random_bf16(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Rows of a dense tensor as BF16 bits: matrices and kernels keep variance, norms are near 1, biases near 0."""
    count = int(np.prod(shape))
    if len(shape) > 1:
        mean, deviation = 0.0, (count // shape[0]) ** -0.5
    elif name.endswith((".bias", "running_mean")):
        mean, deviation = 0.0, 0.05
    elif name.endswith("running_var"):
        mean, deviation = 1.0, 0.0
    else:
        mean, deviation = 1.0, 0.1
    for first in range(0, count, _CHUNK):
        values = rng.standard_normal(min(_CHUNK, count - first), dtype=np.float32)
        values *= np.float32(deviation)
        values += np.float32(mean)
        yield torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()


def synthetic_tokenizer(ordinary_tokens: int) -> bytes:
    """A byte-level BPE `tokenizer.json`: 256 bytes, made-up merges up to `ordinary_tokens`, then Qwen's added tokens.

    Any text can be encoded; how it falls into tokens is not Qwen's way. Printable pairs come first, then pairs with a
    letter before them, then longer chains, so that the number of tokens of English text is of the right order.
    """
    if ordinary_tokens < 256:
        raise UsageError(f"a byte-level tokenizer needs at least 256 tokens, found {ordinary_tokens}")
    characters = _byte_characters()
    letters = [characters[byte] for byte in b" etaoinshrdlcumwfgypbvkjxqzETAOINSHRDLCUMWFGYPBVKJXQZ0123456789-,.'"]
    tokens, merges = list(characters), []
    last = letters
    while len(tokens) < ordinary_tokens:
        room = ordinary_tokens - len(tokens)
        pairs = [(left, right) for left in last for right in letters][:room]
        if not pairs:
            break
        merges += pairs
        last = [left + right for left, right in pairs]
        tokens += last
    added = [{"id": ordinary_tokens + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": i < len(_SPECIAL_TOKENS) - _PLAIN_ADDED}
             for i, text in enumerate(_SPECIAL_TOKENS)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}, byte_level]},
        "post_processor": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": [list(pair) for pair in merges]},
    }
    return json.dumps(document, ensure_ascii=False).encode("utf-8")


def _byte_characters() -> list[str]:
    """The printable stand-in of each byte in byte-level BPE (GPT-2's table)."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    result, next_free = [], 256
    for byte in range(256):
        if byte in kept:
            result.append(chr(byte))
        else:
            result.append(chr(next_free))
            next_free += 1
    return result


def _write_json(path: Path, data: Any) -> None:
    atomic_write_bytes(path, (json.dumps(data, indent=2) + "\n").encode())
