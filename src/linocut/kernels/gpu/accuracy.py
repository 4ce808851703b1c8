"""How much rounding the products on a GPU may do: the user's say, and the routes that it allows. Imports no Triton."""

import os

from linocut.errors import UsageError

VARIABLE = "LINOCUT_GPU_ACCURACY"
DEFAULT = "fast"
"""Costs the embedded models less than a point of GenEval (benchmarks/gpu_loss.py, docs/gpu.md)."""
KIND = {"packed": "int8", "unpacked": "int8", "rows": "rows", "folded": "rows", "fp8": "fp8", "blocks": "fp8",
        "library": "float", "fused": "float"}
"""The routes of a product (routes.py), and the activations that each reads."""
EXACT = ("packed", "unpacked", "library", "fused")
"""Routes whose pictures differ from the CPU's by no more than rounding of activations to int8 does."""
LEVELS = {"exact": EXACT, "rows": (*EXACT, "rows"), "fast": tuple(KIND)}
"""Routes that may be chosen, by the value of the variable."""


def level() -> str:
    """The level asked for by `LINOCUT_GPU_ACCURACY`, else the default."""
    asked = os.environ.get(VARIABLE, "").strip() or DEFAULT
    if asked not in LEVELS:
        raise UsageError(f"{VARIABLE} must be one of {', '.join(LEVELS)} (found {asked!r})")
    return asked
