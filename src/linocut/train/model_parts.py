"""Teacher, student and text encoders of a model that exists, or of one with random weights of the same shapes.

The teacher computes in bfloat16 where the device does, the student's latent weights are float32. The student reads the
text encoder that it will be shipped with, in four bits, and so learns to make up for its rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from linocut.errors import UsageError
from linocut.formats.folder import ModelFolder
from linocut.models.configs import Flux2Config, Qwen3Config
from linocut.models.convert import build_and_load, quantize_
from linocut.models.flux2 import Flux2Transformer, image_position_ids, text_position_ids
from linocut.models.synthetic import SyntheticModel, synthetic_tokenizer
from linocut.models.text_encoder import PromptTokenizer, Qwen3Encoder
from linocut.quantize.policy import Policy
from linocut.quantize.source import open_source
from linocut.train.painter import euler

TOKEN_SIDE = 16  # pixels of a token's side, of every model of this kind


@dataclass
class Parts:
    """All networks of a distillation. `joint` is the width of text features."""

    config: Flux2Config
    teacher: nn.Module
    student: nn.Module
    teacher_encoder: nn.Module
    student_encoder: nn.Module
    tokenizer: PromptTokenizer
    text_length: int


class Drawer:
    """A transformer that draws pictures of one size (`journeys.Network`)."""

    def __init__(self, transformer: nn.Module, tokens: tuple[int, int], text_length: int, device: torch.device) -> None:
        self.transformer = transformer
        self.image_ids = image_position_ids(*tokens, device=device)
        self.text_ids = text_position_ids(text_length, device=device)

    def velocity(self, latents: Tensor, text: Tensor, sigma: Tensor) -> Tensor:
        """Velocity, float32 [B, I, C]."""
        dtype = _dtype_of(self.transformer)
        v: Tensor = self.transformer(latents.to(dtype), text.to(dtype), sigma, self.image_ids, self.text_ids)
        return v.float()

    def features(self, latents: Tensor, text: Tensor, sigma: Tensor) -> list[Tensor]:
        """The image tokens [B, I, width] that leave each block."""
        dtype, taps = _dtype_of(self.transformer), list[Tensor]()
        self.transformer(latents.to(dtype), text.to(dtype), sigma, self.image_ids, self.text_ids, taps=taps)
        return taps

    def walk(self, x: Tensor, text: Tensor, levels: Sequence[float]) -> Tensor:
        """Euler's steps from x at levels[0] to levels[-1]."""
        return euler(self.velocity, x, text, levels)


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def load_parts(source: str | Path, encoding: str, eps: float, device: torch.device) -> Parts:
    """The parts of a dense model, a folder or a name on the hub."""
    folder = ModelFolder.open(source)
    missing = [part for part in ("text_encoder", "tokenizer") if not folder.has(part)]
    if missing:
        raise UsageError(f"{source}: has no {' and no '.join(missing)}; distillation needs a whole model folder")
    opened = open_source(source, pack_text_encoder=True)  # refuses a packed one
    try:
        config, coarse = Flux2Config.from_dict(opened.transformer_config), _coarse(device)
        networks = [build_and_load(Flux2Transformer, config, opened.transformer, dtype=dtype)
                    for dtype in (coarse, torch.float32)]
        taps = tuple(folder.settings["text_taps"])
        text = Qwen3Config.from_dict(folder.config("text_encoder"))
        with folder.checkpoint("text_encoder") as weights:
            encoders = [build_and_load(Qwen3Encoder, text, weights, dtype=coarse, taps=taps) for _ in range(2)]
    finally:
        opened.close()
    tokenizer = PromptTokenizer.from_folder(folder.path("tokenizer"), folder.settings["text_length"])
    return _finish(config, networks, encoders, tokenizer, encoding, eps, device)


def random_parts(shapes: SyntheticModel, encoding: str, eps: float, device: torch.device) -> Parts:
    """Parts with random weights, made on the device."""
    coarse = _coarse(device)
    torch.manual_seed(0)
    networks = [_random(Flux2Transformer, device, dtype, shapes.transformer) for dtype in (coarse, torch.float32)]
    with torch.no_grad():  # the student starts as the teacher
        for own, given in zip(networks[1].parameters(), networks[0].parameters(), strict=True):
            own.copy_(given)
    encoders = [_random(Qwen3Encoder, device, coarse, shapes.text_encoder, shapes.text_taps)] * 2
    encoders[1] = _random(Qwen3Encoder, device, coarse, shapes.text_encoder, shapes.text_taps)
    tokenizer = PromptTokenizer(Tokenizer.from_str(synthetic_tokenizer(shapes.ordinary_tokens).decode()),
                                shapes.text_length)
    return _finish(shapes.transformer, networks, encoders, tokenizer, encoding, eps, device)


def _finish(config: Flux2Config, networks: list[Any], encoders: list[Any], tokenizer: PromptTokenizer, encoding: str,
            eps: float, device: torch.device) -> Parts:
    teacher, student = networks
    quantize_(encoders[1], Policy.preset("qwen3", "affine4"))
    quantize_(student, Policy.preset("flux2", encoding), fake=True, eps=eps)
    for frozen in (teacher, *encoders):
        frozen.to(device).eval().requires_grad_(False)
    student.to(device).requires_grad_(True)
    return Parts(config, teacher, student, encoders[0], encoders[1], tokenizer, tokenizer.length)


def _random(kind: Any, device: torch.device, dtype: torch.dtype, *arguments: Any) -> nn.Module:
    with torch.device("meta"):
        network: nn.Module = kind(*arguments)
    network = network.to(dtype).to_empty(device=device)
    for parameter in network.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            nn.init.ones_(parameter)
    return network


def _coarse(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32
