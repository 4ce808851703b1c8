"""linocut: diffusion transformers with binary and ternary weights.

Importing this package loads neither torch nor numpy; public names are resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "Pipeline": "linocut.pipeline.generate",
    "LinocutError": "linocut.errors",
}
__all__ = ["LinocutError", "Pipeline", "__version__"]

if TYPE_CHECKING:
    from linocut.errors import LinocutError
    from linocut.pipeline.generate import Pipeline


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'linocut' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
