"""Weights and the state of a training run on disk, as safetensors, without pickle."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from linocut.errors import FormatError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.packed import GROUP_SIZE, PackedTensor, dequantize, layout
from linocut.formats.writer import write_checkpoint
from linocut.models.convert import tensor_from
from linocut.quantize.rounding import quantize_tensor
from linocut.train.optimize import Average

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WEIGHT = ".weight"
_STATE = "state"  # folder inside a stage's folder


def to_arrays(state: Mapping[str, Tensor], dtype: str) -> dict[str, np.ndarray | tuple[np.ndarray, str]]:
    """Tensors as the checkpoint writer takes them; floating ones in `dtype` (F32, F16 or BF16)."""
    arrays: dict[str, np.ndarray | tuple[np.ndarray, str]] = {}
    for name, tensor in state.items():
        value = tensor.detach().cpu().contiguous()
        if value.is_floating_point():
            value = value.to(_DTYPES[dtype])
        arrays[name] = (value.view(torch.uint16).numpy(), "BF16") if value.dtype == torch.bfloat16 else value.numpy()
    return arrays


def save_weights(folder: Path, state: Mapping[str, Tensor], dtype: str = "F32") -> None:
    """Write `model.safetensors` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder / "model.safetensors", to_arrays(state, dtype))


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load what `save_weights` wrote, casting to the module's dtypes."""
    module.load_state_dict(read_weights(folder))


def load_transformer(module: nn.Module, folder: Path) -> None:
    """Load the transformer alone out of what a painter saved. Raises FormatError for one of another shape."""
    prefix = "transformer."
    state = {name.removeprefix(prefix): value for name, value in read_weights(folder).items()
             if name.startswith(prefix)}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise FormatError("weights of another network than the recipe's", path=folder, found=str(error).split("\n")[1],
                          advice="start from a student of the same shape") from error


def slim(folder: Path, target: Path, eight_bits: bool = False) -> None:
    """Copy the weights in `folder` to `target` with floating tensors in bfloat16, or matrices in int8: a half of the
    bytes, or a quarter. Latent weights of students need the first, as they lie close to where they round otherwise."""
    state, packed = read_weights(folder), dict[str, PackedTensor]()
    for name in [name for name, value in state.items() if eight_bits and _fits(name, value)]:
        packed[name.removesuffix(_WEIGHT)] = quantize_tensor(state.pop(name), "int8")
    target.mkdir(parents=True, exist_ok=True)
    write_checkpoint(target / "model.safetensors", {**to_arrays(state, "BF16"), **packed})


def _fits(name: str, value: Tensor) -> bool:
    return name.endswith(_WEIGHT) and value.ndim == 2 and value.shape[1] % GROUP_SIZE == 0


class State:
    """All that a stage needs to go on after a cut: weights, their average, what the optimizers remember, the step."""

    def __init__(self, folder: Path, module: nn.Module, average: Average,
                 optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.folder, self.module, self.average, self.optimizers = folder / _STATE, module, average, optimizers

    def save(self, step: int) -> None:
        """Replace the saved state; the old one stays until the new one is complete."""
        tensors = {"step": torch.tensor(step), "averaged": torch.tensor(self.average.steps)}
        for index, (value, mean) in enumerate(self._pairs()):
            tensors |= {f"weight.{index}": value, f"average.{index}": mean}
        for number, optimizer in enumerate(self.optimizers):
            for index, memory in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{key}": value for key, value in memory.items()}
        save_weights(self.folder, tensors)

    @torch.no_grad()
    def restore(self) -> int:
        """Take up the saved state if there is one. Returns the step to go on with, 0 at a fresh start."""
        if not self.folder.is_dir():
            return 0
        tensors = read_weights(self.folder)
        for index, (value, mean) in enumerate(self._pairs()):
            value.copy_(tensors[f"weight.{index}"])
            mean.copy_(tensors[f"average.{index}"])
        self.average.steps = int(tensors["averaged"])
        for number, optimizer in enumerate(self.optimizers):
            memory: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer.{number}."):
                    place, key = name.split(".", 3)[2:]
                    memory.setdefault(int(place), {})[key] = tensor
            optimizer.load_state_dict({"state": memory, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(tensors["step"])

    def drop(self) -> None:
        """Delete the saved state: the stage is over and its result written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip((p.data for p in self.module.parameters()), self.average.shadow, strict=True))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of `model.safetensors` in a folder, in the dtypes they are stored in, packed ones in float32."""
    with Checkpoint.open(folder) as checkpoint:
        parts = {f"{module}.{part}" for module, entry in checkpoint.packed.items()
                 for part, _, _ in layout(entry.encoding, entry.shape)}
        whole = {name: tensor_from(checkpoint, name).clone() for name in checkpoint.names if name not in parts}
        return whole | {module + _WEIGHT: torch.from_numpy(dequantize(checkpoint.packed_tensor(module)))
                        for module in checkpoint.packed}
