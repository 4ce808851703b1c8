"""What every training stage shares: processes, schedules that keep to the clock, and how networks compute."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from linocut.errors import UsageError
from linocut.train.recipe import StageSettings


@dataclass(frozen=True)
class Ranks:
    """This process among its equals: one per GPU under torchrun, else the only one.

    Steps end before `deadline` (seconds since 1970); `began` is when the stage did, on the monotonic clock.
    """

    rank: int
    world: int
    device: torch.device
    deadline: float = math.inf
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, device: str | None = None, deadline: float = math.inf) -> Ranks:
        """Join torchrun's group if there is one. The device is this process's GPU, or the CPU where there is none.

        Raises UsageError for a device that does not exist.
        """
        world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        chosen = chosen_device(device, local)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            torch.backends.cudnn.benchmark = True  # shapes are few and fixed
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
        return cls(int(os.environ.get("RANK", "0")), world, chosen, deadline)

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


def leave_group() -> None:
    """End this process if it is one of a group, once all is done and written.

    Without taking anything down: a group's threads may abort a process while it ends (seen with gloo), and torchrun
    calls that a failure of the run.
    """
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def chosen_device(device: str | None, local: int = 0) -> torch.device:
    """The device that a name means (such as "cpu" or "cuda:1"); without one GPU number `local`, or else the CPU.

    Raises UsageError for a device that does not exist.
    """
    try:
        chosen = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UsageError(f"unknown device {device!r}; choose cpu, cuda or cuda:N") from None
    if chosen == torch.device("cuda"):
        chosen = torch.device("cuda", local)
    if chosen.type == "cuda" and chosen.index >= torch.cuda.device_count():
        raise UsageError(f"no device {chosen}: torch sees {torch.cuda.device_count()} CUDA GPUs here")
    return chosen


class Schedule:
    """Counts steps up to `settings.steps`, or fewer if the time does not suffice.

    The number of steps is fitted to the time again and again, so that the learning rate comes down to its end just
    before `settings.max_seconds` since the stage began, or before `ranks.deadline`. `progress` runs from 0 to 1; `rate`
    is the learning rate factor: linear warm-up, then a cosine to 1 %. `done` steps were made before a cut.
    """

    def __init__(self, settings: StageSettings, ranks: Ranks, done: int = 0) -> None:
        self.settings, self.ranks, self.steps, self.step = settings, ranks, settings.steps, done
        self._mark, self._marked = done, time.monotonic()
        self._next = done + min(10, settings.steps // 4)  # by then compilation is over
        self._fits = 0
        self.steps = int(ranks.same(done if self._left() <= 0 else settings.steps))

    def __iter__(self) -> Iterator[int]:
        while self.step < self.steps:
            yield self.step
            self.step += 1
            if self.step == self._next:
                self._fit()

    def _left(self) -> float:
        """Seconds until the steps must be over."""
        left = self.settings.max_seconds - (time.monotonic() - self.ranks.began)
        return 0.0 if stopped() else min(left, self.ranks.deadline - time.time())

    def _fit(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        now, left = time.monotonic(), self._left()
        each = max(1e-6, (now - self._marked) / max(1, self.step - self._mark))
        self._mark, self._marked = self.step, now
        if not self._fits and left > 0:  # the first steps are slow, and tell nothing about the others
            each = 0.0
        possible = self.steps if not each else self.step + max(0, int(left / each))
        self.steps = int(self.ranks.same(max(self.step, min(self.settings.steps, possible))))
        if self._fits == 1 and self.ranks.first:
            print(f"  {each * 1000:.0f} ms a step, {self.steps} of {self.settings.steps} steps", flush=True)
        self._fits += 1
        self._next = self.step + min(25, max(1, (self.steps - self.step) // 4))

    @property
    def progress(self) -> float:
        return min(1.0, self.step / max(1, self.steps))

    @property
    def rate(self) -> float:
        warm = min(1.0, (self.step + 1) / max(1, self.settings.warmup))
        constant = self.settings.constant
        falling = max(0.0, self.progress - constant) / (1 - constant)
        return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * falling)))

    @property
    def due(self) -> bool:
        """Whether the state should be saved after this step, by the first process."""
        return self.ranks.first and self.saves

    @property
    def saves(self) -> bool:
        """Whether the state should be saved after this step, by every process."""
        return self.step > 0 and self.step % self.settings.save_every == 0

    @property
    def looks(self) -> bool:
        """Whether it is time to look closer, in every process: at every `log_every`-th step and the last."""
        return self.step % self.settings.log_every == 0 or self.step == self.steps - 1

    def log(self, make: Callable[..., str], force: bool = False) -> None:
        """Print the line that `make()` gives, in the first process, at every `log_every`-th step and the last."""
        if self.ranks.first and (self.looks or force):
            seconds = time.monotonic() - self.ranks.began
            print(f"  {self.step:6d}/{self.steps} {seconds:6.0f} s  {make()}", flush=True)


_stop: list[int] = []


def stop_in_order() -> None:
    """From now on SIGTERM ends the schedule that runs, so that its stage saves what it has; a second one kills."""
    def stop(number: int, _: object) -> None:
        _stop.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        signal.signal(signal.SIGTERM, stop)


def stopped() -> bool:
    """Whether SIGTERM came."""
    return bool(_stop)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: all of it unless it is dealt out among processes (FSDP2)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic where the device has it; a CPU without such instructions stays in float32."""
    quick = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=quick)


def compile_blocks(module: nn.Module, device: torch.device, kinds: tuple[type[nn.Module], ...]) -> None:
    """Compile the repeated blocks of a network on a GPU: one short compilation per kind, not per depth."""
    if device.type == "cuda":
        # One for each shape of picture, size of batch and kind of gradient; beyond the limit torch stops compiling.
        torch._dynamo.config.cache_size_limit = 64
        for block in module.modules():
            if isinstance(block, kinds):
                block.compile(dynamic=False)


