"""Whether the blocks of a network run fused in C++ (kernels/fused.py), and why not: from facts, without torch.

So the planner can ask before anything is loaded, and the networks ask the same question again when they run.
"""

import importlib
import os
import re

from linocut.formats.checkpoint import Checkpoint

HEAD_WIDTHS = (32, 64, 96, 128)
HIDDEN_SLICE = 1024
"""Hidden units that `gated_mlp` best computes at a time: enough rows of weights for the threads to share, and what they
give for klein's 1536 tokens at 512 px, 6 MB, stays in the cache."""
MULTIPLIED = ("binary", "ternary", "affine4")
"""Encodings whose weights are multiplied as they are stored. int8 is for layers at the edges of a network, whose
activations are better not rounded; its weights are decoded."""
ON_GPU = ("binary", "ternary")
"""Those that a fused step on a GPU takes (`models.flux2_gpu`)."""
_IN_BLOCKS = re.compile(r"(blocks|layers)\.\d+\..*\.weight")


def why_not(head_width: int, dense: str | None, device: str = "cpu", asked: str | None = None) -> str | None:
    """None if blocks with heads of this width can run fused, else the reason.

    `dense` names one of their Linears that is not packed in one of `MULTIPLIED`, if there is one; `asked` the kernel
    asked for (default: `LINOCUT_KERNEL`).
    """
    asked = asked or os.environ.get("LINOCUT_KERNEL", "").strip() or "auto"
    if asked not in ("auto", "int8"):
        return f"the kernel {asked} is asked for, which works layer by layer"
    if device != "cpu":
        return f"runs on the CPU, the model is on {device}"
    if dense is not None:
        return f"{dense} is not binary, ternary or affine4"
    if head_width not in HEAD_WIDTHS:
        return f"heads have {head_width} channels, and attention takes {', '.join(map(str, HEAD_WIDTHS))}"
    try:
        importlib.import_module("linocut._native")
    except ImportError:
        return "the C++ module is missing"
    return None


def attention_bytes() -> int:
    """Bytes of a value of q, k and v as the attention reads them here: 2 where the CPU multiplies bfloat16, else 4."""
    try:
        module = importlib.import_module("linocut._native")
    except ImportError:
        return 4
    asked = os.environ.get("LINOCUT_ATTENTION", "").strip()
    for name, _, reason in module.attention_variants():
        if not reason and asked in ("", name):
            return 2 if module.attention_dtype(name) == "bfloat16" else 4
    return 4


def dense_in_blocks(checkpoint: Checkpoint, encodings: tuple[str, ...] = MULTIPLIED) -> str | None:
    """The first matrix in a block of the network that a checkpoint holds dense or in none of these encodings; None if
    there is none."""
    decoded = [f"{name}.weight" for name, entry in checkpoint.packed.items() if entry.encoding not in encodings]
    dense = [name for name in checkpoint.names if len(checkpoint.info(name).shape) == 2]
    return next(filter(_IN_BLOCKS.search, [*decoded, *dense]), None)
