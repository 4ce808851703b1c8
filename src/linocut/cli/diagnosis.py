"""The facts that `linocut doctor` prints: each function returns plain data, ready for JSON.

Nothing is imported at the top that takes time; functions that need torch say so.
"""

import contextlib
import importlib
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import product
from typing import Any

Facts = dict[str, Any]
KERNEL_TOKENS = 320
"""Tokens of the problem that the kernel choice is shown for: 256 image tokens and 64 text tokens."""


def libraries() -> list[Facts]:
    """The package's own run-time dependencies with their installed versions (None: missing)."""
    try:
        wanted = [line.partition(";")[0].strip() for line in requires("linocut") or [] if "extra ==" not in line]
    except PackageNotFoundError:  # run from a source tree that was never installed
        wanted = ["torch", "numpy", "tokenizers", "pillow", "click", "rich", "huggingface_hub", "psutil"]
    found = []
    for requirement in wanted:
        name = requirement
        for mark in "<>=!~[ (":
            name = name.partition(mark)[0]
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = None
        found.append({"name": name, "required": requirement[len(name):].strip(), "version": installed})
    return found


def native_module() -> Facts:
    """The C++ module without importing torch: whether it loads, its build, and its variants with reasons."""
    try:
        module = importlib.import_module("linocut._native")
    except ImportError as error:
        return {"available": False,
                "detail": f"cannot be imported ({error}); drawing works without it, slower. Install a wheel that has "
                          "it, or a C++ compiler and then the package again (in a clone: make build)"}
    chosen = next((name for name, reason in module.variants() if not reason), None)
    return {"available": True, "detail": module.build_info(),
            "cpu_features": [name for name, supported in module.cpu_features() if supported],
            "decoders": [{"name": name, "why_not": reason or None, "chosen": name == chosen}
                         for name, reason in module.variants()],
            "products": _variants(module.gemm_variants(), "LINOCUT_GEMM"),
            "attention": _variants(module.attention_variants(), "LINOCUT_ATTENTION")}


def _variants(variants: list[tuple[str, str, str]], variable: str) -> list[Facts]:
    """The variants of a kernel, best first, each with what it needs and why it is or is not the one."""
    asked = os.environ.get(variable, "").strip()
    chosen = asked or next(name for name, _, reason in variants if not reason)
    why = f"asked for by {variable}" if asked else "the best that this CPU can run"
    found = []
    for name, needs, reason in variants:
        line = reason or ("chosen: " + why if name == chosen else "works; another one was asked for" if asked else
                          "works; a better one is there")
        found.append({"name": name, "needs": needs.split(), "why_not": reason or None, "reason": line,
                      "chosen": name == chosen and not reason})
    return found


def device() -> Facts:
    """What pictures are computed on where nobody says otherwise, with the reason."""
    from linocut.errors import UsageError
    from linocut.pipeline.device import choose

    try:
        choice = choose()
    except UsageError as error:
        return {"device": None, "reason": str(error)}
    return {"device": choice.name, "reason": choice.reason}


def mlx() -> Facts:
    """mlx's version, what it computes on and how it takes binary weights, or why it cannot be used. Imports it."""
    from linocut.errors import UsageError
    from linocut.mlx import runtime

    facts: Facts = {"version": runtime.version(), "why_not": None, "computes_on": None, "why_not_one_bit": None}
    try:
        runtime.require()
    except UsageError as error:
        return {**facts, "why_not": str(error)}
    from linocut.mlx.layers import why_not_one_bit

    return {**facts, "computes_on": runtime.device_name(), "why_not_one_bit": why_not_one_bit()}


def gpu() -> Facts:
    """What Triton's kernels can do on the first CUDA device, with reasons, and what was measured. Imports torch."""
    import torch

    from linocut.errors import UsageError
    from linocut.kernels.columns import why_not_triton
    from linocut.kernels.gpu import accuracy, runtime

    facts: Facts = {"triton": runtime.triton_version(), "why_not": runtime.why_not("cuda"), "capability": None,
                    "why_no_products": None, "accuracy": None, "measured": None,
                    "why_no_columns": None,
                    "weights": "packed as in the file; ternary weights are not re-coded to two bits"}
    with contextlib.suppress(UsageError):  # drawing says it
        facts["accuracy"] = accuracy.level()
    if facts["why_not"] is None and torch.cuda.is_available():
        from linocut.kernels.gpu import tuning

        table = tuning.Table.of("cuda")
        facts |= {"capability": ".".join(map(str, runtime.capability("cuda"))),
                  "why_no_products": runtime.why_no_products("cuda"), "why_no_columns": why_not_triton("cuda"),
                  "measured": {"file": str(table.path), "shapes": len(table.entries),
                               "quickest": table.quickest(accuracy.LEVELS.get(facts["accuracy"], ()))}}
    return facts


def torch_build() -> Facts:
    """Torch's version, back ends and devices. Imports torch."""
    import torch

    cuda = [{"name": torch.cuda.get_device_name(i), "memory_bytes": torch.cuda.get_device_properties(i).total_memory}
            for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if cuda:
        reason = "a CUDA device is there; --device cuda computes on it"
    elif torch.version.cuda is None:
        reason = "this torch is built for the CPU only"
    else:
        reason = f"torch is built for CUDA {torch.version.cuda}, but no usable device or driver was found"
    return {"version": torch.__version__, "cuda": torch.version.cuda, "devices": cuda,
            "reason": reason, "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "mkldnn": torch.backends.mkldnn.is_available(),
            "blas": "mkl" if torch.backends.mkl.is_available() else "other"}


def threads() -> Facts:
    """Threads that kernels use and why. Imports torch."""
    from linocut.kernels.problem import thread_count

    count, reason = thread_count()
    return {"count": count, "reason": reason}


def decoder() -> Facts:
    """The number format that pictures are decoded in on the CPU, with its reason."""
    from linocut.pipeline.decoding import decoder_dtype

    dtype, reason = decoder_dtype()
    return {"dtype": dtype, "reason": reason}


def kernel_choices() -> list[Facts]:
    """For each encoding and dtype: every candidate with its reason, and the chosen one. Imports torch."""
    import torch

    from linocut.formats.packed import ENCODINGS
    from linocut.kernels import dispatch
    from linocut.kernels.problem import Problem, thread_count

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    choices = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for encoding in ENCODINGS:
                problem = Problem(device, dtype, KERNEL_TOKENS, 3072, 9216, encoding, thread_count()[0])
                chosen = dispatch.select(problem)
                candidates = [{"name": name, "why_not": reason} for name, reason in dispatch.explain(problem)]
                asked = dispatch.requested()
                why = chosen.summary if asked == "auto" else f"asked for by LINOCUT_KERNEL={asked}"
                choices.append({"device": device, "dtype": str(dtype).removeprefix("torch."), "encoding": encoding,
                                "chosen": chosen.name, "reason": why, "candidates": candidates})
    return choices


def fused_models() -> list[Facts]:
    """Whether the blocks of the models in the package run fused, in C++ or on a GPU, or layer by layer and why.
    Imports torch."""
    import torch

    from linocut.errors import LinocutError
    from linocut.formats.folder import EMBEDDED
    from linocut.pipeline.generate import Pipeline

    found = []
    for where, name in product(["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"], EMBEDDED):
        try:
            pipe = Pipeline.from_pretrained(name, device=where)
        except LinocutError:
            continue  # `models()` reports it
        for component in ("transformer", "text_encoder"):
            reason = pipe.why_not_fused(component)
            found.append({"model": name, "component": component, "device": where, "fused": reason is None,
                          "why_not": reason})
    return found


def kernel_checks(on_check: Callable[[Facts], None] = lambda facts: None) -> list[Facts]:
    """Every kernel that can run here against the reference: klein-sized random weights, then embedded ones."""
    import torch

    from linocut.errors import LinocutError
    from linocut.formats.folder import EMBEDDED, ModelFolder
    from linocut.kernels import selfcheck
    from linocut.kernels.problem import checked

    results: list[Facts] = []

    def keep(found: Any) -> None:
        for check in found:
            results.append(check.to_dict())
            on_check(results[-1])

    keep(selfcheck.check_model_sized())
    if mlx()["why_not"] is None:
        from linocut.mlx import selfcheck as on_mlx

        keep(on_mlx.check_model_sized())
    for model in EMBEDDED:
        try:
            checkpoint = ModelFolder.open(model).checkpoint("transformer")
        except LinocutError:
            continue  # `models()` reports it
        with checkpoint:
            seen = set()
            for name, entry in checkpoint.packed.items():
                if (entry.encoding, entry.shape) in seen:
                    continue
                seen.add((entry.encoding, entry.shape))
                packed = checkpoint.packed_tensor(name)
                # Copies: the file must be free to close when the checks are done.
                codes, scales = torch.from_numpy(packed.codes.copy()), torch.from_numpy(packed.scales.copy())
                zeros = None if packed.zeros is None else torch.from_numpy(packed.zeros.copy())
                weight = checked(codes, scales, zeros, entry.encoding, entry.shape[1])
                del packed
                keep(selfcheck.check_weight(weight, f"{model}: {name}", KERNEL_TOKENS))
    return results


def prompt_cache() -> Facts:
    """Where text features are kept between runs, how many and how large they are, or why there are none."""
    from linocut.errors import UsageError
    from linocut.pipeline import embeddings

    try:
        place = embeddings.place()
    except UsageError as error:
        return {"folder": None, "entries": 0, "bytes": 0, "limit_bytes": 0, "why_not": str(error)}
    entries = place.entries()
    return {"folder": str(place.folder), "entries": len(entries), "limit_bytes": place.limit,
            "bytes": sum(facts.st_size for _, facts in entries), "why_not": place.why_not or place.unwritable()}


def models(verify: bool) -> list[Facts]:
    """The models inside the package: size and, if asked, SHA-256 and values of every tensor. Numpy only."""
    from linocut.errors import LinocutError, ModelNotFoundError
    from linocut.formats.folder import EMBEDDED, ModelFolder

    found = []
    for name in EMBEDDED:
        facts: Facts = {"name": name, "ok": True, "bytes": 0, "tensors_verified": None, "hash": None,
                        "detail": "present"}
        try:
            folder = ModelFolder.open(name)
            for component in ("transformer", "text_encoder", "vae"):
                with folder.checkpoint(component) as checkpoint:
                    facts["bytes"] += checkpoint.file_nbytes
                    if verify:
                        facts["tensors_verified"] = (facts["tensors_verified"] or 0) + checkpoint.verify()
            facts["hash"] = folder.hash()
            if verify:
                facts["detail"] = "every tensor's SHA-256 and values checked"
        except ModelNotFoundError:
            facts.update(ok=False, detail="its files are missing from this installation; install linocut again")
        except (LinocutError, OSError) as error:
            facts.update(ok=False, detail=f"damaged: {error}")
        found.append(facts)
    return found
