"""MLX's affine weights: `M.weight` (uint32 slots), `M.scales` and `M.biases`, with weight = code * scale + bias.

A binary weight has scale 2 s and bias -s, a ternary one s and -s, both exact in the dtype of s. Four-bit weights
(groups of 64) have s and -zero s, eight-bit ones s and -128 s, exact in float32. Source: mlx's documentation of
`mx.dequantize`, and Bonsai's published files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from linocut.errors import FormatError
from linocut.formats.header import printable
from linocut.formats.packed import PackedTensor, group_size, groups, unpack_zeros
from linocut.formats.slots import BITS, affine_parts, check_groups, from_affine, to_slots
from linocut.formats.weight import Block, Output, TensorFile, Weight, Weights, as_float32, dense_output, dense_weight

__all__ = ["is_mlx", "mlx_output", "mlx_quantization", "mlx_weights", "quantization"]


def is_mlx(file: TensorFile) -> bool:
    """True if a file holds weights in MLX's form."""
    return any(_is_packed(file, name) for name in file.names)


def _is_packed(file: TensorFile, name: str) -> bool:
    return name.endswith(".weight") and file.info(name).dtype == "U32" and f"{name[:-7]}.scales" in file.names


def quantization(*configs: Mapping[str, Any]) -> dict[str, Any]:
    """The table with "bits" and "group_size" of the first config that has one, at its top or under "quantization".

    As mlx-lm does it, the table may hold tables of the same form for single layers, by their module path.
    """
    for config in configs:
        for table in (config, config.get("quantization"), config.get("quantization_config")):
            if isinstance(table, Mapping) and type(table.get("bits")) is int and type(table.get("group_size")) is int:
                return dict(table)
    raise FormatError("nothing says how many bits MLX's weights have",
                      expected='"bits" and "group_size" in quantization_config.json or config.json', found="neither")


def mlx_quantization(weights: Weights) -> dict[str, Any]:
    """The table for a file of these weights: the most frequent encoding, and layers of another one by name."""
    kinds = {name: weight.kind for name, weight in weights.items() if weight.packed}
    if not kinds:
        return {}
    common = max(sorted(set(kinds.values())), key=list(kinds.values()).count)
    return _table(common) | {name: _table(kind) for name, kind in sorted(kinds.items()) if kind != common}


def _table(encoding: str) -> dict[str, int]:
    return {"bits": BITS[encoding], "group_size": group_size(encoding)}


def _encoding(module: str, table: Mapping[str, Any]) -> str:
    own = table.get(module, table)
    bits, group = (own.get("bits"), own.get("group_size")) if isinstance(own, Mapping) else (None, None)
    for encoding in BITS:
        if _table(encoding) == {"bits": bits, "group_size": group}:
            return encoding
    raise FormatError("MLX weights of this form are not read", tensor=printable(module),
                      expected="1, 2 or 8 bits in groups of 128, or 4 of 64", found=f"{bits} bits in groups of {group}")


def mlx_weights(file: TensorFile, table: Mapping[str, Any], exact: bool = True) -> Weights:
    """The weights of a file in MLX's form, whose `quantization` is `table`.

    Without `exact` scales are rounded to float16 where they have to be. Raises FormatError for another number of bits
    or size of group than ours, and on reading for values that are not.
    """
    known = set(file.names)
    found: Weights = {}
    parts: set[str] = set()
    for name in file.names:
        if _is_packed(file, name):
            module = name.removesuffix(".weight")
            if f"{module}.biases" not in known:
                raise FormatError("a part of an MLX weight is missing", tensor=printable(f"{module}.biases"),
                                  expected="offsets beside the scales", found="nothing")
            parts |= {name, f"{module}.scales", f"{module}.biases"}
            weight = _weight(file, module, _encoding(module, table), exact)
            found[module if weight.packed else name] = weight
    return found | {name: dense_weight(file, name) for name in file.names if name not in parts}


def _weight(file: TensorFile, module: str, encoding: str, exact: bool) -> Weight:
    info, scales, biases = (file.info(f"{module}.{part}") for part in ("weight", "scales", "biases"))
    if len(info.shape) != 2 or scales.shape != biases.shape or scales.dtype != biases.dtype:
        raise FormatError("parts of an MLX weight do not fit each other", tensor=printable(module),
                          expected="a matrix with scales and biases alike",
                          found=f"{list(info.shape)}, {list(scales.shape)}, {list(biases.shape)}")
    o, n = info.shape[0], info.shape[1] * 32 // BITS[encoding]
    check_groups(encoding, (o, n), scales.shape)

    def parts(first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        slots = np.ascontiguousarray(file.array(f"{module}.weight")[first:last]).view(np.uint8)
        factors, offsets = (as_float32(file.array(f"{module}.{part}")[first:last], scales.dtype)
                            for part in ("scales", "biases"))
        return slots, factors, offsets

    def release() -> None:
        for part in ("weight", "scales", "biases"):
            file.release(f"{module}.{part}")

    if encoding == "affine4" and not _is_ours(*parts(0, o)):
        def values(first: int, last: int) -> np.ndarray:
            slots, factors, offsets = parts(first, last)
            codes = np.stack([slots & 15, slots >> 4], axis=2).reshape(last - first, -1, group_size(encoding))
            weights: np.ndarray = codes * factors[:, :, None] + offsets[:, :, None]
            return weights.reshape(last - first, n)

        return Weight("F32", (o, n), values, release, requantize="affine4")

    def rows(first: int, last: int) -> Block:
        return from_affine(*_with(parts(first, last), encoding), exact=exact)

    return Weight(encoding, (o, n), rows, release)


def _with(parts: tuple[np.ndarray, np.ndarray, np.ndarray],
          encoding: str) -> tuple[np.ndarray, str, np.ndarray, np.ndarray]:
    return parts[0], encoding, parts[1], parts[2]


def _is_ours(slots: np.ndarray, factors: np.ndarray, offsets: np.ndarray) -> bool:
    """True if four-bit weights are (code - zero) s with a whole zero and a float16 s throughout."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        zeros = np.where(factors != 0, np.rint(-offsets / factors), 0)
        return bool(((zeros >= 0) & (zeros <= 15) & (zeros * factors == -offsets)
                     & (factors.astype(np.float16) == factors)).all())


def mlx_output(name: str, weight: Weight) -> Output:
    """How a weight lies in a file of MLX's: dense ones as they are; scales in float16, or float32 from four bits on."""
    if not weight.packed:
        return dense_output(name, weight)
    o, n = weight.matrix
    dtype = "F32" if weight.kind in ("affine4", "int8") else "F16"
    groups_ = (o, groups(weight.kind, n))

    def encode(block: Block) -> tuple[np.ndarray, ...]:
        assert isinstance(block, PackedTensor)
        zeros = unpack_zeros(block) if block.encoding == "affine4" else None
        factors, offsets = affine_parts(block, zeros)
        if dtype == "F16":
            if factors.size and float(factors.max()) > 65504:
                raise FormatError("twice the scale does not fit float16, in which MLX takes it", tensor=name,
                                  expected="a scale of at most 32752", found=float(factors.max()) / 2)
            factors, offsets = factors.astype(np.float16), offsets.astype(np.float16)
        return np.ascontiguousarray(to_slots(block)).view("<u4"), factors, offsets

    return Output(((f"{name}.weight", "U32", (o, n * BITS[weight.kind] // 32)), (f"{name}.scales", dtype, groups_),
                   (f"{name}.biases", dtype, groups_)), encode)

