"""Dense tensors whose values are -s, +s or -s, 0, +s in each group of 128: packed weights in ordinary form.

Such "unpacked" files run in any program. Going there keeps every value; coming back, the values alone say what the
codes and scales are, but for which encoding a ternary weight without a zero had: files of ours say so in their
metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from linocut.errors import FormatError
from linocut.formats.packed import ENCODINGS, GROUP_SIZE, PackedTensor, dequantize, pack
from linocut.formats.weight import Block, Output, Weight, Weights, as_float32, dense_output

__all__ = ["METADATA_KEY", "find_encoding", "metadata", "pack_values", "packed_again", "unpacked_output"]

METADATA_KEY = "linocut.unpacked"
_BITS = {"affine4": "four", "int8": "eight"}
_SAMPLE = 16  # rows that tell what a tensor is


def find_encoding(values: np.ndarray) -> str | None:
    """"binary" or "ternary" if float32 rows [o, N] are of that form, else None. Zeros make it ternary."""
    if values.ndim != 2 or not values.size or values.shape[1] % GROUP_SIZE:
        return None
    magnitude = np.abs(values.reshape(values.shape[0], -1, GROUP_SIZE))
    scale = magnitude.max(axis=2, keepdims=True)
    if not np.isfinite(scale).all() or not scale.any():
        return None
    zero = magnitude == 0
    if not (zero | (magnitude == scale)).all():
        return None
    return "ternary" if zero.any() else "binary"


def pack_values(values: np.ndarray, encoding: str, exact: bool = True) -> PackedTensor:
    """float32 [o, N] of the form of `find_encoding` as a packed weight. Raises FormatError if they are not."""
    groups = values.reshape(values.shape[0], -1, GROUP_SIZE)
    scale = np.abs(groups).max(axis=2)
    codes = (values > 0).view(np.int8) - (values < 0).view(np.int8)  # by value: there may be a -0.0
    allowed = np.abs(groups) == scale[:, :, None]
    if encoding == "ternary":
        allowed |= groups == 0
    else:
        allowed &= groups != 0
    if not allowed.all():
        row, group, place = np.argwhere(~allowed)[0]
        zero = " or 0" if encoding == "ternary" else ""
        raise FormatError(f"weight {group * GROUP_SIZE + place} of row {row} fits no {encoding} group",
                          expected=f"plus or minus {float(scale[row, group])}{zero}",
                          found=float(groups[row, group, place]))
    return pack(codes, scale, encoding, exact=exact)


def packed_again(weights: Weights, hints: Mapping[str, Any], exact: bool = True) -> Weights:
    """Dense weights with those that are of packed form read as packed ones.

    `hints` is the file's metadata; without ours, the first rows of each matrix tell what it is.
    """
    known = _hints(hints)
    found: Weights = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        encoding = None
        if module != name and len(weight.shape) == 2 and weight.kind in ("F16", "BF16", "F32") \
                and weight.shape[1] % GROUP_SIZE == 0 and not weight.requantize:
            encoding = known.get(module) if known is not None else find_encoding(
                _values(weight, 0, min(_SAMPLE, weight.shape[0])))
        found[module if encoding else name] = _packed(weight, encoding, exact) if encoding else weight
    return found


def _hints(metadata: Mapping[str, Any]) -> dict[str, str] | None:
    text = metadata.get(METADATA_KEY)
    if not isinstance(text, str):
        return None
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or not all(value in ENCODINGS[:2] for value in table.values()):
        raise FormatError(f"metadata {METADATA_KEY!r} has the wrong form",
                          expected="binary or ternary for each module", found=str(text)[:80])
    return table


def metadata(weights: Weights) -> dict[str, str]:
    """What a file says of the weights that it holds in unpacked form."""
    table = {name: weight.kind for name, weight in weights.items() if weight.kind in ENCODINGS[:2]}
    return {METADATA_KEY: json.dumps(table, separators=(",", ":"))}


def _values(weight: Weight, first: int, last: int) -> np.ndarray:
    block = weight.rows(first, last)
    assert isinstance(block, np.ndarray)
    return as_float32(block, weight.kind)


def _packed(weight: Weight, encoding: str, exact: bool) -> Weight:
    def rows(first: int, last: int) -> Block:
        return pack_values(_values(weight, first, last), encoding, exact)

    return Weight(encoding, weight.shape, rows, weight.release)


def unpacked_output(name: str, weight: Weight) -> Output:
    """How a weight lies in a dense file: binary and ternary in float16, which holds them exactly, else as it is.

    Weights of four and eight bits take float32, in which their values are exact; their codes do not come back.
    """
    if not weight.packed:
        return dense_output(name, weight)
    dtype = "F16" if weight.kind in ENCODINGS[:2] else "F32"

    def encode(block: Block) -> tuple[np.ndarray, ...]:
        assert isinstance(block, PackedTensor)
        values = dequantize(block)
        return (values if dtype == "F32" else values.astype(np.float16),)

    if dtype == "F16":
        return Output(((f"{name}.weight", dtype, weight.shape),), encode)
    note = f"{_BITS[weight.kind]}-bit weights become float32 values, which are equal, but do not become codes again"
    return Output(((f"{name}.weight", dtype, weight.shape),), encode, back=lambda block: encode(block)[0], note=note)
