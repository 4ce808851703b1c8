"""The same weights under other programs' names: FLUX.2's original single file, and llama.cpp's text encoders.

Renaming works on weights of any kind. Joining q, k and v or swapping halves moves whole rows, and groups run along a
row, so codes and scales stay as they are. `formats.names` holds the rules for FLUX.2.
"""

from __future__ import annotations

import re

from linocut.errors import FormatError
from linocut.formats.header import printable
from linocut.formats.names import RULES, bfl_plan
from linocut.formats.packed import ENCODINGS
from linocut.formats.weight import Block, Weight, Weights, join

__all__ = ["from_bfl", "from_llama", "is_llama", "to_bfl", "to_llama"]

_LLAMA = (
    (r"embed_tokens", "token_embd"), (r"norm", "output_norm"),
    (r"layers\.(\d+)\.self_attn\.([qkv])_proj", r"blk.\1.attn_\2"),
    (r"layers\.(\d+)\.self_attn\.o_proj", r"blk.\1.attn_output"),
    (r"layers\.(\d+)\.self_attn\.([qk])_norm", r"blk.\1.attn_\2_norm"),
    (r"layers\.(\d+)\.input_layernorm", r"blk.\1.attn_norm"),
    (r"layers\.(\d+)\.post_attention_layernorm", r"blk.\1.ffn_norm"),
    (r"layers\.(\d+)\.mlp\.(gate|up|down)_proj", r"blk.\1.ffn_\2"),
)


def _inverse(pattern: str, target: str) -> tuple[str, str]:
    """The rule that undoes "pattern becomes target": where a pattern has groups, the target has \\1, \\2."""
    groups = iter(re.findall(r"\([^)]*\)", pattern))
    inverse = re.sub(r"\\(\d)", lambda found: "\0", target)
    back = re.escape(inverse).replace("\0", "{}").format(*groups) if "\0" in inverse else re.escape(inverse)
    counter = iter(range(1, 10))
    return back, re.sub(r"\([^)]*\)", lambda found: f"\\{next(counter)}", pattern).replace(r"\.", ".")


# diffusers name -> (original name, which part of how many, halves swapped)
_TO_BFL = tuple((*_inverse(pattern, target.removeprefix("~")), index, len(targets), target.startswith("~"))
                for pattern, targets in RULES for index, target in enumerate(targets))
_FROM_LLAMA = tuple(_inverse(pattern, target) for pattern, target in _LLAMA)


def _tensor_name(name: str, weight: Weight) -> str:
    return f"{name}.weight" if weight.packed else name


def _own_name(name: str, kind: str) -> str:
    return name.removesuffix(".weight") if kind in ENCODINGS else name


def from_bfl(weights: Weights) -> Weights:
    """Weights of a FLUX.2 single file under diffusers' names. Raises FormatError for a name that is none of its."""
    stored = {_tensor_name(name, weight): weight for name, weight in weights.items()}
    found: Weights = {}
    for name, source in bfl_plan({name: weight.shape for name, weight in stored.items()}).items():
        whole = stored[source.name]
        rows = source.shape[0]
        found[_own_name(name, whole.kind)] = _swap(whole) if source.swap else _part(whole, source.first, rows)
    return found


def to_bfl(weights: Weights) -> Weights:
    """Inverse of `from_bfl`. Raises FormatError for names that are no FLUX.2 transformer's, and where q, k and v are
    packed in different encodings, for which a single file has no room."""
    found: Weights = {}
    parts: dict[str, dict[int, Weight]] = {}
    for name, weight in weights.items():
        full = _tensor_name(name, weight)
        rule = next((rule for rule in _TO_BFL if re.fullmatch(rule[0], full)), None)
        if rule is None:
            raise FormatError("not a tensor of a FLUX.2 transformer", tensor=printable(full),
                              expected="a name that the conversion knows", found=printable(full))
        pattern, target, index, count, swap = rule
        original = re.sub(pattern, target, full)
        if count == 1:
            found[_own_name(original, weight.kind)] = _swap(weight) if swap else weight
            continue
        parts.setdefault(original, {})[index] = weight
        if len(parts[original]) == count:
            joined = _joined(original, [parts[original][i] for i in range(count)])
            found[_own_name(original, joined.kind)] = joined
    for original, some in parts.items():
        if len(some) != 3:
            raise FormatError("a part of a fused tensor is missing", tensor=original, expected="q, k and v",
                              found=f"{len(some)} of them")
    return found


def is_llama(names: list[str]) -> bool:
    """True if these are llama.cpp's names of a text encoder."""
    return "token_embd.weight" in names or "token_embd" in names


def to_llama(weights: Weights) -> Weights:
    """Weights of a Qwen3 (names as Qwen3Model's, `model.` or not) under llama.cpp's names; a head is left out."""
    return _renamed(weights, _LLAMA, r"(model\.)?", "not a tensor of a Qwen3 text encoder")


def from_llama(weights: Weights) -> Weights:
    """Inverse of `to_llama`."""
    kept = {name: weight for name, weight in weights.items() if name.removesuffix(".weight") != "output"}
    return _renamed(kept, _FROM_LLAMA, "()", "not a tensor of a Qwen3 text encoder as llama.cpp names it")


def _renamed(weights: Weights, rules: tuple[tuple[str, str], ...], prefix: str, problem: str) -> Weights:
    found: Weights = {}
    for name, weight in weights.items():
        full = _tensor_name(name, weight)
        if full == "lm_head.weight":
            continue
        module = re.sub(f"^{prefix}", "", full.removesuffix(".weight"))
        for pattern, target in rules:
            match = re.fullmatch(pattern, module)
            if match:
                new = match.expand(target)
                found[new if weight.packed else f"{new}.weight"] = weight
                break
        else:
            raise FormatError(problem, tensor=printable(full), expected="a name that the conversion knows",
                              found=printable(full))
    return found


def _part(whole: Weight, begin: int, rows: int) -> Weight:
    if rows == whole.shape[0]:
        return whole
    return Weight(whole.kind, (rows, *whole.shape[1:]), lambda first, last: whole.rows(begin + first, begin + last),
                  whole.release, whole.requantize)


def _swap(whole: Weight) -> Weight:
    half = whole.shape[0] // 2

    def rows(first: int, last: int) -> Block:
        blocks = []
        if first < half:
            blocks.append(whole.rows(half + first, half + min(last, half)))
        if last > half:
            blocks.append(whole.rows(max(first, half) - half, last - half))
        return join(blocks)

    return Weight(whole.kind, whole.shape, rows, whole.release, whole.requantize)


def _joined(name: str, parts: list[Weight]) -> Weight:
    first = parts[0]
    for part in parts:
        if (part.kind, part.shape) != (first.kind, first.shape):
            raise FormatError("parts of a fused tensor differ", tensor=name, expected=f"{first.kind} {first.shape}",
                              found=f"{part.kind} {part.shape}")
    size = first.shape[0]

    def rows(begin: int, end: int) -> Block:
        blocks = []
        for index, part in enumerate(parts):
            low, high = max(begin - index * size, 0), min(end - index * size, size)
            if low < high:
                blocks.append(part.rows(low, high))
        return join(blocks)

    def release() -> None:
        for part in parts:
            part.release()

    return Weight(first.kind, (size * len(parts), *first.shape[1:]), rows, release)
