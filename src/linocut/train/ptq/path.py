"""Calibration data without data: prompts, their text features, and the teacher's own way from noise to picture.

Everything lies in a folder as it is made, so that a run that was cut goes on: `text.safetensors` with the features that
the full-precision text encoder gives ("teacher") and those of the one that will be shipped ("student"), and for each
step of the sampler `path.K.safetensors` with the latents before it ("x") and the velocity there ("v").

Shape letters: P prompts, T text tokens, E feature width, I image tokens, C latent channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linocut.errors import UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.writer import write_checkpoint
from linocut.models.configs import AutoencoderConfig, Qwen3Config
from linocut.models.convert import build_and_load, tensor_from
from linocut.models.text_encoder import PromptTokenizer, Qwen3Encoder
from linocut.pipeline.sampler import sigmas
from linocut.quantize.source import Source
from linocut.train.ptq.ladder import CalibrationSettings
from linocut.train.ptq.network import States, StreamedTransformer, run_block
from linocut.train.weights import to_arrays

_LARGEST = 512  # pixels a side, unless another size is asked for
OnText = Callable[[str], None]


@dataclass(frozen=True)
class TeacherPath:
    """The teacher's path: `levels` [K + 1] from 1 to 0, rows and columns of image tokens, files of its parts."""

    levels: list[float]
    tokens: tuple[int, int]
    text_length: int
    folder: Path
    prompts: int

    def text(self, whose: str, part: slice) -> Tensor:
        """Features [P, T, E] that "teacher" or "student" read, float32."""
        with Checkpoint.open(self.folder / "text.safetensors") as file:
            return tensor_from(file, whose)[part].float()

    def at(self, step: int, part: slice) -> tuple[Tensor, Tensor]:
        """(latents, velocity), float32 [P, I, C], before a step of the sampler."""
        with Checkpoint.open(self.folder / f"path.{step}.safetensors") as file:
            return tensor_from(file, "x")[part].clone(), tensor_from(file, "v")[part].clone()

    def batches(self, size: int, held_out: int) -> list[tuple[slice, bool]]:
        """Ranges of prompts, each with whether it is held out; none is both."""
        known = self.prompts - held_out
        return [(slice(first, min(first + size, end)), start > 0) for start, end in ((0, known), (known, self.prompts))
                for first in range(start, end, size)]


def plan_path(source: Source, settings: CalibrationSettings, folder: Path) -> TeacherPath:
    """Where the path leads: sizes and levels. Raises UsageError for a source without text encoder and tokenizer."""
    missing = [part for part, there in (("text encoder", source.text_encoder is not None or _carried(source,
               "text_encoder") is not None), ("tokenizer", _carried(source, "tokenizer") is not None)) if not there]
    if missing:
        raise UsageError(f"{source.path}: has no {' and no '.join(missing)}, so prompts cannot be read; quantize the "
                         "whole model folder, or use --method exact or folds without --prompts")
    side, vae = 16, _carried(source, "vae")
    if vae is not None and (vae / "config.json").is_file():
        side = AutoencoderConfig.from_dict(json.loads((vae / "config.json").read_text("utf-8"))).token_side
    width, height = settings.size or (min(_LARGEST, pixels) for pixels in source.settings["default_size"])
    if width % side or height % side:
        raise UsageError(f"calibration pictures of {width}x{height} pixels: sides must be multiples of {side}")
    tokens = height // side, width // side
    steps = settings.steps or int(source.settings["default_steps"])
    levels: list[float] = sigmas(tokens[0] * tokens[1], steps).tolist()
    return TeacherPath(levels, tokens, int(source.settings["text_length"]), folder, len(settings.prompts))


def read_text(path: TeacherPath, source: Source, work: Path, settings: CalibrationSettings,
              device: torch.device) -> None:
    """Write the text features of every prompt, unless they are there."""
    target = path.folder / "text.safetensors"
    if target.exists():
        return
    tokenizer = PromptTokenizer.from_folder(_folder(source, "tokenizer"), path.text_length)
    ids, mask = tokenizer.encode(settings.prompts)
    config, taps = _text_config(source), tuple(source.settings["text_taps"])
    if source.text_encoder is not None:
        teacher = _features(source.text_encoder, config, taps, ids, mask, settings.batch, device)
        with Checkpoint.open(work / "text_encoder" / "model.safetensors") as packed:
            student = _features(packed, config, taps, ids, mask, settings.batch, device)
    else:
        with Checkpoint.open(_folder(source, "text_encoder"), taps) as kept:
            teacher = student = _features(kept, config, taps, ids, mask, settings.batch, device)
    write_checkpoint(target, to_arrays({"teacher": teacher, "student": student}, "BF16"))


def walk(path: TeacherPath, network: StreamedTransformer, settings: CalibrationSettings, say: OnText) -> None:
    """The teacher draws every prompt; states before each step and the velocity there are written."""
    rope, count = network.rope(path.tokens, path.text_length), path.tokens[0] * path.tokens[1]
    mods, channels = network.modulations(path.levels[:-1]), network.config.in_channels
    batches = [part for part, _ in path.batches(settings.batch, settings.held_out)]
    shapes = [(part.stop - part.start, path.text_length + count, network.config.width) for part in batches]
    x = torch.cat([torch.randn((1, channels, *path.tokens), generator=torch.Generator().manual_seed(settings.seed + i))
                   for i in range(path.prompts)]).flatten(2).transpose(1, 2).contiguous()
    states: States | None = None
    for step, mod in enumerate(mods):
        file = path.folder / f"path.{step}.safetensors"
        if not file.exists():
            states = states or States(path.folder / "walk.bin", shapes, network.device)
            for index, part in enumerate(batches):
                states[index] = network.enter(x[part].to(network.device), path.text("teacher", part).to(network.device))
            for kind, number in network.blocks():
                say(f"teacher's step {step + 1} of {len(mods)}, {kind}.{number}")
                block = network.block(kind, number)
                for index in range(len(states)):
                    states[index] = run_block(block, states[index], mod, rope, path.text_length)
                del block
            v = torch.cat([network.leave(states[index], mod, path.text_length).cpu() for index in range(len(batches))])
            write_checkpoint(file, to_arrays({"x": x, "v": v}, "F32"))
        x, v = path.at(step, slice(None))
        x = x + (path.levels[step + 1] - path.levels[step]) * v
    (path.folder / "walk.bin").unlink(missing_ok=True)


@torch.no_grad()
def _features(checkpoint: Checkpoint, config: Mapping[str, Any], taps: tuple[int, ...], ids: Tensor, mask: Tensor,
              batch: int, device: torch.device) -> Tensor:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    encoder = build_and_load(Qwen3Encoder, Qwen3Config.from_dict(config), checkpoint, compute_dtype=dtype,
                             taps=taps).to(device)

    def release(done: int, _: int) -> None:
        if device.type == "cpu":
            for name in checkpoint.names:
                if f"layers.{done - 1}." in name:
                    checkpoint.release(name)

    return torch.cat([encoder(some.to(device), real.to(device), on_layer=release).to("cpu", torch.bfloat16)
                      for some, real in zip(ids.split(batch), mask.split(batch), strict=True)])


def _text_config(source: Source) -> Mapping[str, Any]:
    if source.text_encoder is not None:
        return source.text_encoder_config
    config: dict[str, Any] = json.loads((_folder(source, "text_encoder") / "config.json").read_text("utf-8"))
    return config


def _carried(source: Source, component: str) -> Path | None:
    return next((file.parent for place, file in source.carried.items() if place.startswith(f"{component}/")), None)


def _folder(source: Source, component: str) -> Path:
    found = _carried(source, component)
    assert found is not None  # plan_path has looked
    return found
