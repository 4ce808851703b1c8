"""Which number format the autoencoder decodes pictures in on a CPU, and why. Imports no torch: the planner asks too."""

import importlib
import os


def has_amx() -> bool:
    """Whether convolutions and matrix products of torch's libraries go by AMX, for which they copy what they read."""
    try:
        return bool(dict(importlib.import_module("linocut._native").cpu_features()).get("amxbf16"))
    except ImportError:
        return False


def decoder_dtype() -> tuple[str, str]:
    """("bfloat16" or "float32", the reason): bfloat16 where the processor multiplies it faster than float32.

    Decoded in bfloat16 a picture is 48 dB or more from the float32 one (measured on klein's shapes with random weights
    and on the embedded model), which costs the embedded autoencoder 0.02 dB against the true picture.
    """
    if os.environ.get("LINOCUT_KERNEL", "").strip() == "reference":
        return "float32", "LINOCUT_KERNEL=reference asks for the plainest computation"
    try:
        features = dict(importlib.import_module("linocut._native").cpu_features())
    except ImportError:
        return "float32", "the C++ module, which knows this CPU's instructions, is missing"
    if features.get("avx512bf16"):
        return "bfloat16", "this CPU has AVX-512 BF16: twice as fast as float32, in half of the memory"
    return "float32", "this CPU has no AVX-512 BF16, without which bfloat16 is no faster"
