"""gemlite's packs: `M.W_q` (slots, transposed), `M.scales`, `M.zeros`, `M.metadata`, `M.orig_shape`.

W_q is [N / e, O] with e codes of a row in each byte, least significant first; scales and zeros are [N / 128, O] and
hold what MLX calls scales and biases: weight = code * scale + zero (W_group_mode 4). Other modes and widths, and rows
of a single group, which gemlite stores otherwise, are refused. Source: gemlite 0.5 and 0.6, described in its own
words here.

metadata: scaled activations, bits, group size, mask of a code, codes a byte, dtypes of input, output, sums and scales,
channel scale mode, W_group_mode, contiguous. dtypes are 0 for float32 and 1 for float16.
"""

from __future__ import annotations

import numpy as np

from linocut.errors import FormatError
from linocut.formats.header import printable
from linocut.formats.packed import GROUP_SIZE, PackedTensor
from linocut.formats.slots import BITS, affine_parts, check_groups, from_affine, to_slots
from linocut.formats.unpacked import unpacked_output
from linocut.formats.weight import Block, Output, TensorFile, Weight, Weights, as_float32, dense_weight

__all__ = ["gemlite_output", "gemlite_weights", "is_gemlite"]

_PARTS = ("W_q", "scales", "zeros", "metadata", "orig_shape")
_ENCODINGS = {1: "binary", 2: "ternary"}
_ALL_PARTS = (*_PARTS, "meta_scale")  # a scalar that newer versions add


def is_gemlite(file: TensorFile) -> bool:
    """True if a file holds gemlite's packs."""
    return any(name.endswith(".W_q") for name in file.names)


def gemlite_weights(file: TensorFile, exact: bool = True) -> Weights:
    """The weights of a file of packs. Without `exact` scales are rounded to float16 where they have to be."""
    known = set(file.names)
    modules = [name.removesuffix(".W_q") for name in file.names if name.endswith(".W_q")]
    found = {}
    for module in modules:
        for part in _PARTS:
            if f"{module}.{part}" not in known:
                raise FormatError("a part of a gemlite pack is missing", tensor=printable(f"{module}.{part}"),
                                  expected=" ".join(_PARTS), found="nothing")
        found[module] = _weight(file, module, exact)
    parts = {f"{module}.{part}" for module in modules for part in _ALL_PARTS}
    return found | {name: dense_weight(file, name) for name in file.names if name not in parts}


def _weight(file: TensorFile, module: str, exact: bool) -> Weight:
    meta = file.array(f"{module}.metadata").reshape(-1).tolist()
    shape = file.array(f"{module}.orig_shape").reshape(-1).tolist()
    scales, zeros, codes = (file.info(f"{module}.{part}") for part in ("scales", "zeros", "W_q"))
    bits = meta[1] if len(meta) >= 12 else 0
    expected = [bits, GROUP_SIZE, (1 << bits) - 1, 8 // bits, 4] if bits in _ENCODINGS else []
    if len(meta) < 12 or [meta[i] for i in (1, 2, 3, 4, 10)] != expected or codes.dtype != "U8":
        raise FormatError("a gemlite pack of this form is not read", tensor=printable(f"{module}.metadata"),
                          expected="1 or 2 bits in groups of 128, bytes, W_group_mode 4", found=meta[:12])
    encoding = _ENCODINGS[bits]
    if len(shape) != 2 or codes.shape != (shape[1] // (8 // bits), shape[0]) or shape[1] % GROUP_SIZE \
            or scales.shape != zeros.shape or scales.dtype != zeros.dtype:
        raise FormatError("parts of a gemlite pack do not fit each other", tensor=printable(module),
                          expected=f"W_q for {shape}", found=f"{list(codes.shape)}, {list(scales.shape)}")
    o, n = shape
    check_groups(encoding, (o, n), scales.shape[::-1])

    def rows(first: int, last: int) -> Block:
        slots = np.ascontiguousarray(file.array(f"{module}.W_q")[:, first:last].T)
        factors, offsets = (as_float32(np.ascontiguousarray(file.array(f"{module}.{part}")[:, first:last].T),
                                       scales.dtype) for part in ("scales", "zeros"))
        return from_affine(slots, encoding, factors, offsets, exact)

    def release() -> None:
        for part in _PARTS:
            file.release(f"{module}.{part}")

    return Weight(encoding, (o, n), rows, release)


def gemlite_output(name: str, weight: Weight) -> Output:
    """How a weight lies in a file of packs: sums in float32, whatever GPU will run it; four and eight bits dense."""
    if weight.kind not in _ENCODINGS.values():
        return unpacked_output(name, weight)
    o, n = weight.matrix
    bits = BITS[weight.kind]
    if n == GROUP_SIZE:
        raise FormatError("gemlite stores rows of a single group in another form", tensor=name,
                          expected="256 in-features or more", found=n, advice="leave this layer dense")
    meta = np.array([0, bits, GROUP_SIZE, (1 << bits) - 1, 8 // bits, 1, 1, 0, 1, 0, 4, 1], dtype=np.int32)

    def encode(block: Block) -> tuple[np.ndarray, ...]:
        assert isinstance(block, PackedTensor)
        factors, offsets = affine_parts(block, None)
        if factors.size and float(factors.max()) > 65504:
            raise FormatError("twice the scale does not fit float16", tensor=name,
                              expected="a scale of at most 32752", found=float(factors.max()) / 2)
        return (to_slots(block).T, factors.astype(np.float16).T, offsets.astype(np.float16).T, meta,
                np.array([o, n], dtype=np.int32))

    return Output(((f"{name}.W_q", "U8", (n * bits // 8, o)), (f"{name}.scales", "F16", (n // GROUP_SIZE, o)),
                   (f"{name}.zeros", "F16", (n // GROUP_SIZE, o)), (f"{name}.metadata", "I32", (12,)),
                   (f"{name}.orig_shape", "I32", (2,))), encode, axis=1)
