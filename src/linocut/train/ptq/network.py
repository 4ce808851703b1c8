"""A FLUX.2 transformer of which one block at a time is in memory, and the states of many pictures on their way through.

Shape letters: B batch, T text tokens, I image tokens, S = T + I, D width, C latent channels, E text feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linocut.models.configs import Flux2Config
from linocut.models.convert import build_and_load, tensor_from
from linocut.models.flux2 import (
    DoubleBlock,
    Rope,
    SingleBlock,
    image_position_ids,
    modulate,
    rope_tables,
    text_position_ids,
)
from linocut.models.modulations import Modulations, TimestepNetwork, tabulate
from linocut.quantize.source import Reader
from linocut.train.loop import autocast

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
# Layers in the order in which they run: sets of groups, a group's layers reading the same inputs.
LAYERS = {
    DOUBLE: ((("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
             (("attn.to_out.0",), ("attn.to_add_out",)), (("ff.linear_in",), ("ff_context.linear_in",)),
             (("ff.linear_out",), ("ff_context.linear_out",))),
    SINGLE: ((("attn.to_qkv_mlp_proj",),), (("attn.to_out",),)),
}


class StreamedTransformer:
    """The transformer in a reader, its blocks built when asked for, in float32.

    A GPU keeps what it was given, as it is stored, if that takes no more than a third of its free memory: every block
    is asked for at each of the sampler's steps, and once more to be rounded.
    """

    def __init__(self, reader: Reader, config: dict[str, Any], device: torch.device) -> None:
        self.reader, self.device, self._there = reader, device, dict[str, Tensor]()
        self._keeps = device.type == "cuda" and 3 * sum(reader.info(name).nbytes for name in reader.names) < \
            torch.cuda.mem_get_info(device)[0]
        self.config = Flux2Config.from_dict(config)
        self.edges = {name: self._weight(f"{name}.weight") for name in ("x_embedder", "context_embedder", "proj_out")}

    def blocks(self) -> list[tuple[str, int]]:
        """(kind, index) of every block in order."""
        return [*((DOUBLE, i) for i in range(self.config.num_layers)),
                *((SINGLE, i) for i in range(self.config.num_single_layers))]

    def block(self, kind: str, index: int) -> nn.Module:
        """A block in full precision, frozen."""
        with torch.device("meta"):
            block: nn.Module = (DoubleBlock if kind == DOUBLE else SingleBlock)(self.config)
        state = {name: self._weight(f"{kind}.{index}.{name}") for name in block.state_dict()}
        block.load_state_dict(state, assign=True)
        return block.requires_grad_(False).eval()

    def _weight(self, name: str) -> Tensor:
        if name in self._there:
            return self._there[name].float()
        weight = tensor_from(self.reader, name).to(self.device, copy=True)  # as it is stored: half the way is saved
        self.reader.release(name)
        if self._keeps:
            self._there[name] = weight
        return weight.float()

    @torch.no_grad()
    def modulations(self, levels: Sequence[float]) -> list[Modulations]:
        """What the blocks need to know of each noise level."""
        network = build_and_load(TimestepNetwork, self.config, self.reader)
        rows = tabulate(network, levels)
        return [Modulations.from_rows(row) for row in rows.to(self.device).split(1)]

    def rope(self, tokens: tuple[int, int], text_length: int) -> Rope:
        """Rotation tables of text and then image tokens; tokens are rows and columns."""
        ids = torch.cat([text_position_ids(text_length), image_position_ids(*tokens)])
        cos, sin = rope_tables(ids, self.config.axes_dims_rope, self.config.rope_theta)
        return cos.to(self.device), sin.to(self.device)

    def enter(self, latents: Tensor, text: Tensor) -> Tensor:
        """States [B, S, D] before the first block, of latents [B, I, C] and text features [B, T, E]."""
        with autocast(self.device):
            return torch.cat([text.float() @ self.edges["context_embedder"].T,
                              latents @ self.edges["x_embedder"].T], dim=1).float()

    def leave(self, states: Tensor, modulation: Modulations, text_length: int) -> Tensor:
        """The velocity [B, I, C] of states after the last block."""
        with autocast(self.device):
            y = modulate(states[:, text_length:], *modulation.out, self.config.eps)
            return (y @ self.edges["proj_out"].T).float()


def run_block(block: nn.Module, states: Tensor, modulation: Modulations, rope: Rope, text_length: int) -> Tensor:
    """States [B, S, D] after a block: text tokens first, then image tokens."""
    with autocast(states.device):
        if isinstance(block, DoubleBlock):
            image, text = block(states[:, text_length:], states[:, :text_length], modulation.image, modulation.text,
                                rope)
            return torch.cat([text, image], dim=1).float()
        return block(states, modulation.single, rope).float()


class States:
    """States [B, S, D] of many batches: on a GPU in its memory, on the CPU in a file that is mapped."""

    def __init__(self, path: Path, shapes: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        sizes = [b * s * d for b, s, d in shapes]
        if device.type == "cpu":
            path.unlink(missing_ok=True)
            whole = torch.from_file(str(path), shared=True, size=sum(sizes), dtype=torch.float32)
        else:
            whole = torch.empty(sum(sizes), dtype=torch.bfloat16, device=device)
        self.parts = [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Tensor:
        return self.parts[index].float()

    def __setitem__(self, index: int, value: Tensor) -> None:
        self.parts[index].copy_(value)


class Stop(Exception):
    """Ends a block's forward pass once everything wanted was seen."""


class Inputs:
    """Catches what goes into layers of a block: `with Inputs(block, names) as seen: run(...)`, then `seen[name]`."""

    def __init__(self, block: nn.Module, names: Sequence[str]) -> None:
        self.block, self.names, self.found = block, names, dict[str, Tensor]()

    def __enter__(self) -> dict[str, Tensor]:
        def look(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                self.found[name] = inputs[0].flatten(0, -2).float()
                if len(self.found) == len(self.names):
                    raise Stop
            return hook

        self._hooks = [self.block.get_submodule(name).register_forward_pre_hook(look(name)) for name in self.names]
        return self.found

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        for hook in self._hooks:
            hook.remove()
        return kind is Stop
