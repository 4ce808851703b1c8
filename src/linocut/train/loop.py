"""What every training stage shares: processes, schedules, averages, and weights on disk without pickle."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from linocut.errors import UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.writer import atomic_write_bytes, write_checkpoint
from linocut.models.convert import tensor_from
from linocut.train.recipe import StageSettings


@dataclass(frozen=True)
class Ranks:
    """This process among its equals: one per GPU under torchrun, else the only one."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: str | None = None) -> Ranks:
        """Join torchrun's group if there is one. The device is this process's GPU, or the CPU where there is none.

        Raises UsageError for a device that does not exist.
        """
        world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        try:
            chosen = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
        except RuntimeError:
            raise UsageError(f"unknown device {device!r}; choose cpu, cuda or cuda:N") from None
        if chosen == torch.device("cuda"):
            chosen = torch.device("cuda", local)
        if chosen.type == "cuda" and chosen.index >= torch.cuda.device_count():
            raise UsageError(f"no device {chosen}: torch sees {torch.cuda.device_count()} CUDA GPUs here")
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            torch.backends.cudnn.benchmark = True  # shapes are few and fixed
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(int(os.environ.get("RANK", "0")), world, chosen)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor | None]) -> None:
        """Average tensors over the processes, in place, in one message."""
        if self.world == 1:
            return
        present = [tensor for tensor in tensors if tensor is not None]
        flat = torch.cat([tensor.reshape(-1) for tensor in present])
        dist.all_reduce(flat)
        for tensor, part in zip(present, flat.div_(self.world).split([t.numel() for t in present]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def same(self, value: float) -> float:
        """The first process's value, everywhere."""
        if self.world == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(box, 0)
        return float(box)

    def share(self, module: nn.Module) -> None:
        """Give every process the first one's weights."""
        if self.world > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.data, 0)


class Schedule:
    """Counts steps up to `settings.steps`, or fewer if they would take longer than `max_seconds`.

    `progress` runs from 0 to 1; `rate` is the learning rate factor: linear warm-up, then a cosine to 1 %.
    """

    def __init__(self, settings: StageSettings, ranks: Ranks) -> None:
        self.settings, self.ranks, self.steps, self.step = settings, ranks, settings.steps, 0
        self._begin = time.monotonic()
        self._probe = min(60, settings.steps // 4)
        self._probed = self._begin

    def __iter__(self) -> Iterator[int]:
        while self.step < self.steps:
            yield self.step
            self.step += 1
            if self.step == self._probe // 2:  # compilation is over by now
                self._probed = time.monotonic()
            elif self.step == self._probe and self._probe > 1:
                self._fit()

    def _fit(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.monotonic()
        each = (now - self._probed) / (self._probe - self._probe // 2)
        possible = self.step + int((self.settings.max_seconds - (now - self._begin)) / each)
        self.steps = int(self.ranks.same(max(self.step + 1, min(self.steps, possible))))
        if self.ranks.first:
            print(f"  {each * 1000:.0f} ms a step, {self.steps} of {self.settings.steps} steps", flush=True)

    @property
    def progress(self) -> float:
        return self.step / self.steps

    @property
    def rate(self) -> float:
        warm = min(1.0, (self.step + 1) / max(1, self.settings.warmup))
        return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.progress)))

    def log(self, make: Callable[..., str], force: bool = False) -> None:
        """Print the line that `make()` gives, in the first process, at every `log_every`-th step and the last."""
        due = self.step % self.settings.log_every == 0 or self.step == self.steps - 1
        if self.ranks.first and (due or force):
            seconds = time.monotonic() - self._begin
            print(f"  {self.step:6d}/{self.steps} {seconds:6.0f} s  {make()}", flush=True)


class Average:
    """Exponential moving average of a module's parameters, in float32; young averages forget faster."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.steps = module, decay, 0
        self.shadow = [parameter.detach().clone() for parameter in module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.module.parameters()], 1 - decay)

    @torch.no_grad()
    def install(self) -> None:
        """Put the average into the module (training is over)."""
        for parameter, value in zip(self.module.parameters(), self.shadow, strict=True):
            parameter.copy_(value)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The module holds the average inside the block and its own weights again after it."""
        own = [parameter.detach().clone() for parameter in self.module.parameters()]
        self.install()
        yield
        with torch.no_grad():
            for parameter, value in zip(self.module.parameters(), own, strict=True):
                parameter.copy_(value)


def set_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Scale each group's own `base_lr`, which is its learning rate when it was made."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
            group["lr"] = group["base_lr"] * factor


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic where the device has it; a CPU without such instructions stays in float32."""
    quick = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=quick)


def compile_blocks(module: nn.Module, device: torch.device, kinds: tuple[type[nn.Module], ...]) -> None:
    """Compile the repeated blocks of a network on a GPU: one short compilation per kind, not per depth."""
    if device.type == "cuda":
        for block in module.modules():
            if isinstance(block, kinds):
                block.compile(dynamic=False)


# Weights --------------------------------------------------------------------------------------------------------------

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def to_arrays(state: Mapping[str, Tensor], dtype: str) -> dict[str, np.ndarray | tuple[np.ndarray, str]]:
    """Tensors as the checkpoint writer takes them; floating ones in `dtype` (F32, F16 or BF16)."""
    arrays: dict[str, np.ndarray | tuple[np.ndarray, str]] = {}
    for name, tensor in state.items():
        value = tensor.detach().cpu().contiguous()
        if value.is_floating_point():
            value = value.to(_DTYPES[dtype])
        arrays[name] = (value.view(torch.uint16).numpy(), "BF16") if value.dtype == torch.bfloat16 else value.numpy()
    return arrays


def save_weights(folder: Path, state: Mapping[str, Tensor], dtype: str = "BF16", part_bytes: int | None = None) -> None:
    """Write `model.safetensors` into a folder, or parts of at most about `part_bytes` with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = to_arrays(state, dtype)
    if part_bytes is None:
        write_checkpoint(folder / "model.safetensors", arrays)
        return
    parts: list[list[str]] = [[]]
    filled = 0
    for name, value in arrays.items():
        size = (value[0] if isinstance(value, tuple) else value).nbytes
        if filled + size > part_bytes and parts[-1]:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    for file, part in zip(names, parts, strict=True):
        write_checkpoint(folder / file, {name: arrays[name] for name in part})
    where = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    index = {"metadata": {}, "weight_map": where}
    atomic_write_bytes(folder / "model.safetensors.index.json", json.dumps(index).encode())


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load what `save_weights` wrote, casting to the module's dtypes."""
    with Checkpoint.open(folder) as checkpoint:
        state = {name: tensor_from(checkpoint, name).clone() for name in checkpoint.names}
    module.load_state_dict(state)
