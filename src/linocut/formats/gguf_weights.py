"""Weights in GGUF files: which type holds what, and how tensors of each type are read and written.

Binary weights are Q1_0, ternary ones Q2_0, TQ1_0 or TQ2_0, four-bit ones Q4_1, eight-bit ones Q8_0. Other tensors keep
their float type or become Q8_0. Names are left as they are; `formats.renaming` changes them.
"""

from __future__ import annotations

import numpy as np

from linocut.errors import FormatError
from linocut.formats.ggml import FLOATS, TYPES, dequantize_q8, quantize_q8, read_block, write_block, write_q8
from linocut.formats.gguf import HASHES, GGUFFile, GGUFTensor
from linocut.formats.header import printable
from linocut.formats.packed import PackedTensor
from linocut.formats.weight import Block, Output, Weight, Weights, as_float32, to_bfloat16
from linocut.formats.writer import NUMPY_DTYPES

__all__ = ["DENSE_TYPES", "TERNARY_TYPES", "gguf_output", "gguf_weights"]

TERNARY_TYPES = ("Q2_0", "TQ1_0", "TQ2_0")
DENSE_TYPES = ("keep", "F16", "BF16", "F32", "Q8_0")
_WIDER = {("F16", "F32"), ("BF16", "F32")}  # conversions that lose nothing


def gguf_weights(file: GGUFFile, exact: bool = True) -> Weights:
    """The weights of a GGUF file; packed ones lose the `.weight` of their name, as everywhere here.

    Q4_1 is a four-bit weight of ours in files of ours, otherwise it is read as float32, as Q8_0 is everywhere.
    """
    found: Weights = {}
    for name, tensor in file.tensors.items():
        if tensor.kind.name in FLOATS:
            found[name] = _dense(file, name, tensor)
            continue
        if len(tensor.shape) != 2 or not name.endswith(".weight"):
            raise FormatError(f"{tensor.kind.name} is read for the weights of linear layers only", path=file.path,
                              tensor=printable(name), expected="a matrix", found=list(tensor.shape))
        if tensor.kind.name == "Q8_0" or (tensor.kind.name == "Q4_1" and HASHES not in file.metadata):
            found[name] = _decoded(file, name, tensor)
        else:
            found[name.removesuffix(".weight")] = _packed(file, name, tensor, exact)
    return found


def _dense(file: GGUFFile, name: str, tensor: GGUFTensor) -> Weight:
    kind = tensor.kind.name

    def rows(first: int, last: int) -> Block:
        whole: np.ndarray = file.data(name).reshape(-1).view(np.dtype(NUMPY_DTYPES[kind])).reshape(tensor.shape)
        return whole[first:last]

    return Weight(kind, tensor.shape, rows, lambda: file.release(name))


def _packed(file: GGUFFile, name: str, tensor: GGUFTensor, exact: bool) -> Weight:
    def rows(first: int, last: int) -> Block:
        return read_block(file.data(name)[first:last], tensor.kind.name, tensor.shape[1], exact)

    return Weight(tensor.kind.encoding, tensor.shape, rows, lambda: file.release(name))


def _decoded(file: GGUFFile, name: str, tensor: GGUFTensor) -> Weight:
    width = tensor.shape[1]

    def rows(first: int, last: int) -> Block:
        data = file.data(name)[first:last]
        return dequantize_q8(data, width) if tensor.kind.name == "Q8_0" else _dequantize_q4(data, width)

    return Weight("F32", tensor.shape, rows, lambda: file.release(name),
                  requantize="affine4" if tensor.kind.name == "Q4_1" else "")


def _dequantize_q4(data: np.ndarray, width: int) -> np.ndarray:
    blocks = data.reshape(len(data), width // 32, 20)
    d, m = (np.ascontiguousarray(blocks[:, :, i : i + 2]).view("<f2").astype(np.float32) for i in (0, 2))
    codes = np.concatenate([blocks[:, :, 4:] & 15, blocks[:, :, 4:] >> 4], axis=2)
    weights: np.ndarray = codes * d + m
    return weights.reshape(len(data), width)


def gguf_output(name: str, weight: Weight, ternary: str = "Q2_0", dense: str = "keep") -> Output:
    """How a weight lies in a GGUF file: the part's dtype is a type of ggml, and blocks are bytes.

    Raises FormatError for what no type holds, while writing too: two scales where TQ1_0 and TQ2_0 have room for one.
    """
    if weight.kind == "int8":
        return _eight_bits(name, weight)
    if weight.packed:
        kind = {"binary": "Q1_0", "ternary": ternary, "affine4": "Q4_1"}[weight.kind]

        def encode(block: Block) -> tuple[np.ndarray, ...]:
            assert isinstance(block, PackedTensor)
            try:
                return (write_block(block, kind),)
            except FormatError as error:
                raise FormatError(str(error), tensor=name) from None

        note = "" if kind != "Q4_1" else ("four-bit weights become Q4_1: the same codes, scales and zero points, but "
                                          "other programs compute with offsets rounded to float16")
        return Output(((f"{name}.weight", kind, weight.shape),), encode, note=note)
    return _dense_output(name, weight, dense)


def _eight_bits(name: str, weight: Weight) -> Output:
    def encode(block: Block) -> tuple[np.ndarray, ...]:
        assert isinstance(block, PackedTensor)
        return (write_q8(block),)

    return Output(((f"{name}.weight", "Q8_0", weight.shape),), encode,
                  back=lambda block: dequantize_q8(encode(block)[0], weight.matrix[1]),
                  note="eight-bit weights become Q8_0: the same codes and scales, which are read as float32 values")


def _dense_output(name: str, weight: Weight, wanted: str) -> Output:
    shape = weight.shape or (1,)
    if weight.kind not in FLOATS:
        raise FormatError("GGUF files for image models hold no tensors of this dtype", tensor=name,
                          expected=" ".join(FLOATS), found=weight.kind)
    kind = weight.kind if wanted == "keep" or len(weight.shape) < 2 or weight.kind == "I32" else wanted
    if kind == "Q8_0" and weight.shape[-1] % TYPES["Q8_0"].weights:
        kind = weight.kind

    def convert(block: Block) -> np.ndarray:
        assert isinstance(block, np.ndarray)
        if kind == weight.kind:
            return block
        values = as_float32(block, weight.kind)
        if kind == "Q8_0":
            return quantize_q8(values.reshape(-1, weight.shape[-1]))
        with np.errstate(over="ignore"):
            return to_bfloat16(values) if kind == "BF16" else values.astype(NUMPY_DTYPES[kind])

    def encode(block: Block) -> tuple[np.ndarray, ...]:
        return (np.ascontiguousarray(convert(block)).reshape(-1).view(np.uint8),)

    part = ((name, kind, shape),)
    if kind == weight.kind:
        return Output(part, encode)
    if (weight.kind, kind) in _WIDER:
        return Output(part, encode, back=convert)

    def back(block: Block) -> Block:
        return dequantize_q8(convert(block), weight.shape[-1]) if kind == "Q8_0" else convert(block)

    return Output(part, encode, back=back, loss=f"dense tensors are rounded from {weight.kind} to {kind}")
