"""Whether mlx is there and new enough, what it computes on, and memory that it holds back.

`why_not` asks without importing mlx; everything else imports it.
"""

from __future__ import annotations

import importlib.util
import platform
import re
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from linocut.errors import UsageError

NEEDED = "0.32.4"
"""The first release that was found to multiply by 1-bit weights (0.32.0 refuses them)."""
_PACKAGE = "'mlx[cpu]'" if platform.system() == "Linux" else "mlx"
INSTALL = f"pip install 'linocut[mlx]' (or {_PACKAGE})"


def version() -> str | None:
    """The installed version of mlx, or None."""
    try:
        return installed_version("mlx") if importlib.util.find_spec("mlx.core") is not None else None
    except (PackageNotFoundError, ModuleNotFoundError):
        return None


def why_not() -> str | None:
    """None if mlx is installed and new enough, else the reason. Does not import it."""
    found = version()
    if found is None:
        return f"mlx is not installed; {INSTALL}"
    if _numbers(found) < _numbers(NEEDED):
        return f"mlx is too old (expected {NEEDED} or newer, found {found}); {INSTALL}"
    return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def require() -> None:
    """Import mlx, or raise UsageError that says why it cannot be used and what to do."""
    reason = why_not()
    if reason is None:
        try:
            importlib.import_module("mlx.core")
        except ImportError as error:
            reason = f"mlx cannot be imported ({error}); {INSTALL}"
    if reason is not None:
        raise UsageError(reason)


def on_gpu() -> bool:
    """True on a GPU; False for mlx's CPU build, which is there for tests and slow."""
    import mlx.core as mx

    return bool(mx.default_device().type == mx.gpu)


def device_name() -> str:
    """What mlx computes on, such as "Apple M2", or "cpu x86_64"."""
    import mlx.core as mx

    return str(mx.device_info().get("device_name", "gpu")) if on_gpu() else f"cpu {platform.machine()}"


def give_memory_back() -> None:
    """Return buffers that mlx keeps for reuse to the system."""
    import mlx.core as mx

    mx.clear_cache()
