"""What this machine is: the facts that `linocut doctor` and the server show. Needs no torch."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

FLAGS_OF_INTEREST = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl",
                     "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve")


def facts() -> dict[str, Any]:
    """Operating system, processor, memory in bytes, Python."""
    import psutil

    memory = psutil.virtual_memory()
    model, flags = _processor()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"system": platform.platform(), "processor": model, "architecture": platform.machine(),
            "logical_cores": os.cpu_count() or 1, "usable_cores": usable, "cpu_features": flags,
            "memory_bytes": memory.total, "memory_available_bytes": memory.available,
            "memory_limit_bytes": _cgroup_limit(), "python": platform.python_version(), "executable": sys.executable}


def _processor() -> tuple[str, list[str]]:
    """Model name and the instruction sets that matter here, from /proc where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown", []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    found = set(fields.get("flags", fields.get("Features", "")).split())
    name = fields.get("model name") or platform.processor() or "unknown"
    return name, [flag for flag in FLAGS_OF_INTEREST if flag in found]


def _cgroup_limit() -> int | None:
    """Memory limit of the container in bytes, if there is one below the machine's own memory."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal() and int(text) < 1 << 60:
            return int(text)
    return None
