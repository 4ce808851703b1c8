"""Who computes GPTQ's inner loops on a device, and why."""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from linocut.formats.packed import GROUP_SIZE
from linocut.kernels.gpu import runtime
from linocut.quantize.columns import Columns, TorchColumns


def columns_for(device: torch.device) -> Columns:
    """Triton's where its kernels run, else torch's; both give the same bits."""
    if why_not_triton(str(device)) is not None:
        return TorchColumns()
    from linocut.kernels.gpu.columns import TritonColumns

    return TritonColumns()


def why_not_triton(device: str) -> str | None:
    """None if Triton computes the loops on this device ("cuda", "cuda:1", "cpu" ...), else the reason."""
    asked = os.environ.get("LINOCUT_KERNEL", "").strip()
    if asked in ("reference", "generic"):
        return f"the kernel {asked} is asked for"
    return runtime.why_not(device) or _why_broken(device)


@lru_cache(maxsize=8)
def _why_broken(device: str) -> str | None:
    """Triton compiles at a first launch, which may fail where it lacks a compiler: better now than after hours."""
    from linocut.kernels.gpu.columns import TritonColumns

    block = torch.ones(1, GROUP_SIZE, device=device)
    try:
        TritonColumns().propagate(block, block[:, :1], torch.eye(GROUP_SIZE, device=device), "ternary")
    except Exception as error:
        return f"Triton failed: {type(error).__name__}: {error}"[:300]
    return None
