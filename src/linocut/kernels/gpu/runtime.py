"""What a GPU can do of what the kernels here need, and why not. Imports no Triton, so it can be asked anywhere.

| compute capability | eight-bit products                     | decoding | library products   |
|--------------------|----------------------------------------|----------|--------------------|
| 7.5                | none: Triton has no tensor cores there | Triton   | float16            |
| 8.0, 8.6           | int8                                   | Triton   | bfloat16, float16  |
| 8.9                | int8, FP8                              | Triton   | bfloat16, float16  |
| 9.0                | int8, FP8, with the copy engine        | Triton   | also FP8 in blocks |
| 10.0 and later     | as 9.0; never measured                 | Triton   | bfloat16, float16  |
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

import torch

LEAST = (7, 5)
TENSOR_CORES = (8, 0)
FP8 = (8, 9)
COPY_ENGINE = (9, 0)
HEAD_WIDTHS = (32, 64, 128)
NEEDED = (3, 3)
"""The first Triton with the descriptors that the copy engine is used through."""


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for (`TRITON_INTERPRET=1`): kernels run on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


@lru_cache(maxsize=1)
def triton_version() -> str | None:
    """The installed version of Triton, or None."""
    try:
        return installed_version("triton") if importlib.util.find_spec("triton") is not None else None
    except (PackageNotFoundError, ModuleNotFoundError):
        return None


def why_no_triton() -> str | None:
    """None if Triton is installed and new enough, else the reason."""
    found = triton_version()
    if found is None:
        return "Triton is not installed; it comes with the CUDA builds of torch (or pip install triton)"
    if tuple(int(part) for part in found.split(".")[:2]) < NEEDED:
        return f"Triton is too old (expected {NEEDED[0]}.{NEEDED[1]} or newer, found {found}); install a newer torch"
    return None


@lru_cache(maxsize=8)
def capability(device: str = "cuda") -> tuple[int, int]:
    """Compute capability of a CUDA device; that of a H200 in the interpreter."""
    if interpreted() and not torch.cuda.is_available():
        return COPY_ENGINE
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


@lru_cache(maxsize=8)
def shared_memory(device: str = "cuda") -> int:
    """Bytes of shared memory that a program may have on a CUDA device; as many as on a H200 where there is none."""
    if not torch.cuda.is_available():
        return 227 * 1024
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 * 1024))


def on_device(tensor: torch.Tensor) -> torch.cuda.device_of:
    """A context in which Triton starts kernels on the tensor's GPU; without it, that is the first one."""
    return torch.cuda.device_of(tensor)


def there(device: str) -> bool:
    """Whether torch finds this CUDA device ("cuda", "cuda:1" ...)."""
    return torch.cuda.is_available() and (torch.device(device).index or 0) < torch.cuda.device_count()


def why_not(device: str) -> str | None:
    """None if Triton's kernels run on tensors of this device ("cuda", "cuda:1", "cpu" ...), else the reason."""
    kind = device.partition(":")[0]
    if kind == "cpu" and interpreted():
        return why_no_triton()
    if kind != "cuda":
        return f"runs on NVIDIA GPUs, the tensors are on {device}"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, where these kernels were never tried"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if why_no_triton() is not None:
        return why_no_triton()
    if not there(device):
        return f"torch finds {torch.cuda.device_count()} CUDA devices, counted from 0"
    if capability(device) < LEAST:
        return f"needs compute capability {LEAST[0]}.{LEAST[1]} (found {_dotted(capability(device))})"
    return None


def why_no_products(device: str) -> str | None:
    """As `why_not`, of products on tensor cores."""
    reason = why_not(device)
    if reason is None and capability(device) < TENSOR_CORES:
        return f"needs compute capability 8.0 (found {_dotted(capability(device))})"
    return reason


def why_not_fused(device: str, head_width: int) -> str | None:
    """As `why_no_products`, of a transformer's whole step with heads of this width (models/flux2_gpu.py)."""
    asked = os.environ.get("LINOCUT_KERNEL", "").strip() or "auto"
    if asked not in ("auto", "triton-int8"):
        return f"the kernel {asked} is asked for, which works layer by layer"
    if head_width not in HEAD_WIDTHS:
        return f"heads have {head_width} channels, and the rotation takes {', '.join(map(str, HEAD_WIDTHS))}"
    return why_no_products(device)


def _dotted(found: tuple[int, int]) -> str:
    return f"{found[0]}.{found[1]}"
