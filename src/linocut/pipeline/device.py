"""On what a picture is computed when nobody says, and whether what somebody says is possible. Imports no torch.

"cpu" and "cuda" are torch's, with the kernels of this project; "mlx" is the GPU of an Apple machine through mlx
(`linocut.mlx`). On "mps", and on "cuda" where torch is built for ROCm, torch alone computes: rightly, in little memory,
a block of decoded rows at a time, and not fast.
"""

import os
import platform
import re
import sys
from dataclasses import dataclass

from linocut.errors import UsageError
from linocut.mlx import runtime

VARIABLE = "LINOCUT_DEVICE"


@dataclass(frozen=True)
class Choice:
    """A device ("cpu", "cuda", "cuda:1", "mps", "mlx") and the reason for it. `automatic`: nobody asked for it."""

    name: str
    reason: str
    automatic: bool = False


def choose(asked: str = "auto", max_memory: object = None) -> Choice:
    """The device for `asked`: itself, or for "auto" that of `LINOCUT_DEVICE`, or else the best that is known to work.

    On Apple silicon that is mlx where it is installed, unless something is asked for that only the CPU path does.
    Everywhere else it is the CPU. Raises UsageError for an unknown device and for mlx where it is missing.
    """
    variable = os.environ.get(VARIABLE, "").strip()
    if asked == "auto" and variable and variable != "auto":
        return Choice(_checked(variable, max_memory), f"asked for by {VARIABLE}={variable}")
    if asked != "auto":
        return Choice(_checked(asked, max_memory), "asked for")
    if not (sys.platform == "darwin" and platform.machine() == "arm64"):
        return Choice("cpu", "the default; mlx is chosen by itself on Apple silicon alone, a CUDA device never", True)
    reason = runtime.why_not()
    if reason is not None:
        return Choice("cpu", f"the GPU of this machine is used through mlx, and {reason}", True)
    kernel = os.environ.get("LINOCUT_KERNEL", "").strip()
    if kernel not in ("", "auto"):
        return Choice("cpu", f"LINOCUT_KERNEL={kernel} asks for a kernel of the CPU", True)
    if max_memory is not None:
        return Choice("cpu", "memory is limited, and only the CPU path keeps to limits", True)
    return Choice("mlx", f"Apple silicon, with mlx {runtime.version()}", True)


def _checked(name: str, max_memory: object) -> str:
    if not re.fullmatch(r"cpu|mlx|mps|cuda(:\d{1,3})?", name):
        raise UsageError(f"device must be auto, cpu, cuda, cuda:N, mps or mlx (found {name!r})")
    if name in ("mlx", "mps") and max_memory is not None:
        raise UsageError(f"a memory limit can be kept on the CPU and on CUDA devices only (found device {name}); leave "
                         "out one of them")
    if name == "mlx":
        reason = runtime.why_not()
        if reason is not None:
            raise UsageError(f"device mlx was asked for, and {reason}")
    return name
