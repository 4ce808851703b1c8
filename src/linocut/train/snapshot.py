"""All that distillation needs to go on after a cut as if there had been none, from one process or from many.

Each process writes a safetensors file of its own: its part of the weights, of their average and of what the optimizers
remember (the first process alone where all hold the same), and what only it knows: the states of its pictures and its
random numbers. A small file says which set of them is complete; it is replaced last, so a kill at any moment leaves the
set before. No pickle, which is why this is not torch's distributed checkpoint.

A set of other than so many processes can be gone on with too: weights are then dealt out anew, and pictures begin anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from linocut.formats.checkpoint import Checkpoint
from linocut.formats.writer import CheckpointWriter, atomic_write_bytes
from linocut.models.convert import tensor_from
from linocut.train.loop import Ranks, local
from linocut.train.optimize import Average

_STATE, _CURRENT, _OWN = "state", "current.json", "own."
_DTYPES = {torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64"}


def from_json(blob: Tensor) -> Any:
    """What `to_json` stored."""
    return json.loads(blob.numpy().tobytes())


def to_json(value: Any) -> Tensor:
    """Plain data as bytes in a tensor, numbers to their last digit."""
    return torch.from_numpy(np.frombuffer(json.dumps(value).encode(), np.uint8).copy())


def part_of(saved: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What was saved under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}


class Snapshot:
    """The saved state of a stage. `sharded`: parameters are dealt out among the processes (FSDP2)."""

    def __init__(self, folder: Path, module: nn.Module, average: Average, optimizers: Sequence[torch.optim.Optimizer],
                 ranks: Ranks, sharded: bool = False) -> None:
        self.folder, self.module, self.average, self.optimizers = folder / _STATE, module, average, optimizers
        self.ranks, self.sharded = ranks, sharded

    def save(self, step: int, own: Mapping[str, Tensor]) -> None:
        """Replace the saved state; every process calls this. `own` is what only this process knows."""
        target = self.folder / f"step.{step}"
        target.mkdir(parents=True, exist_ok=True)
        tensors = {_OWN + name: value for name, value in own.items()} | self._random()
        if self.sharded or self.ranks.first:
            tensors |= dict(self._tensors())
        declared = [(name, "F32" if value.is_floating_point() else _DTYPES[value.dtype], tuple(value.shape))
                    for name, value in tensors.items()]
        with CheckpointWriter(target / f"rank.{self.ranks.rank}.safetensors", declared) as writer:
            for name, value in tensors.items():  # one at a time: all of them fill a machine's memory
                plain = value.detach().cpu().contiguous()
                writer.write(name, (plain.float() if plain.is_floating_point() else plain).numpy())
        self._wait()
        if self.ranks.first:
            facts = {"folder": target.name, "step": step, "averaged": self.average.steps, "world": self.ranks.world,
                     "sharded": self.sharded}
            atomic_write_bytes(self.folder / _CURRENT, json.dumps(facts).encode())
            for old in self.folder.glob("step.*"):
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
        self._wait()

    @torch.no_grad()
    def restore(self) -> tuple[int, dict[str, Tensor]]:
        """Take up the saved state if there is one. Returns the step to go on with, 0 at a fresh start, and `own`, empty
        where the number of processes has changed. Random numbers go on where they were only by `restore_random`."""
        current = self.folder / _CURRENT
        if not current.is_file():
            return 0, {}
        facts = json.loads(current.read_text("utf-8"))
        folder, same = self.folder / facts["folder"], facts["world"] == self.ranks.world
        count = facts["world"] if facts["sharded"] else 1
        files = [Checkpoint.open(folder / f"rank.{rank}.safetensors") for rank in range(count)]
        try:
            self.average.steps = facts["averaged"]
            for index, (value, mean) in enumerate(self._pairs()):
                value.copy_(self._part(files, f"weight.{index}", value))
                mean.copy_(self._part(files, f"average.{index}", mean))
            for number, optimizer in enumerate(self.optimizers):
                self._restore_optimizer(files, number, optimizer)
        finally:
            for file in files:
                file.close()
        if not same:
            return int(facts["step"]), {}
        with Checkpoint.open(folder / f"rank.{self.ranks.rank}.safetensors") as mine:
            return int(facts["step"]), {name.removeprefix(_OWN): tensor_from(mine, name).clone() for name in mine.names
                                        if name.startswith(_OWN)}

    def restore_random(self, own: Mapping[str, Tensor]) -> None:
        """Random numbers go on where they were when `own` was saved."""
        torch.set_rng_state(own["random.cpu"])
        if self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(own["random.cuda"], self.ranks.device)

    def drop(self) -> None:
        """Delete the saved state: the stage is over and its result written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _random(self) -> dict[str, Tensor]:
        states = {f"{_OWN}random.cpu": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            states[f"{_OWN}random.cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        return states

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for index, (value, mean) in enumerate(self._pairs()):
            yield f"weight.{index}", value
            yield f"average.{index}", mean
        for number, optimizer in enumerate(self.optimizers):
            for index, memory in optimizer.state_dict()["state"].items():
                for key, value in memory.items():
                    yield f"optimizer.{number}.{index}.{key}", local(value)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(local(parameter.data), mean) for parameter, mean in
                zip(self.module.parameters(), self.average.shadow, strict=True)]

    def _restore_optimizer(self, files: Sequence[Checkpoint], number: int, optimizer: torch.optim.Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        memory: dict[int, dict[str, Tensor]] = {}
        for name in files[0].names:
            if name.startswith(f"optimizer.{number}."):
                place, key = name.split(".", 3)[2:]
                parameter = parameters[int(place)]
                whole = files[0].info(name).shape == ()
                value = tensor_from(files[0], name).clone() if whole else self._part(files, name, local(parameter))
                if isinstance(parameter, DTensor) and not whole:
                    value = DTensor.from_local(value.to(parameter.device), parameter.device_mesh, parameter.placements,
                                               run_check=False, shape=parameter.shape, stride=parameter.stride())
                memory.setdefault(int(place), {})[key] = value
        optimizer.load_state_dict({"state": memory, "param_groups": optimizer.state_dict()["param_groups"]})

    def _part(self, files: Sequence[Checkpoint], name: str, like: Tensor) -> Tensor:
        """This process's rows of a tensor that may lie in pieces in the files of several."""
        if len(files) == 1 and not self.sharded:
            return tensor_from(files[0], name).clone()
        if len(files) == self.ranks.world:
            return tensor_from(files[self.ranks.rank], name).clone()
        pieces = [tensor_from(file, name) for file in files]
        whole = torch.cat([piece for piece in pieces if piece.numel()])
        if not self.sharded:
            return whole.clone()
        each = -(-len(whole) // self.ranks.world)  # rows are dealt out as torch.chunk does
        return whole[self.ranks.rank * each : self.ranks.rank * each + len(like)].clone()

    def _wait(self) -> None:
        if self.ranks.world > 1:
            dist.barrier()
