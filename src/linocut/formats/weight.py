"""A weight of a network, whatever file it lies in: its kind, its shape, and a way to read any range of its rows.

A file format is then two things: a function that lists a file's weights as `Weights`, and one that says for a weight
which tensors of a file hold it (`Output`). Nothing is read until rows are asked for, so a model of any size is
converted in the memory of a few row blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from linocut.errors import FormatError
from linocut.formats.header import TensorInfo
from linocut.formats.packed import ENCODINGS, PackedTensor, layout

__all__ = ["Block", "Output", "TensorFile", "Weight", "Weights", "as_float32", "dense_output", "dense_weight", "join",
           "named", "native_output", "row_blocks", "to_bfloat16", "weights_of"]

Block = PackedTensor | np.ndarray
"""Rows of a weight: packed, or a numpy array of its dtype (BF16 as uint16)."""
_ROW_BLOCK = 1 << 21  # weights in hand at a time


class TensorFile(Protocol):
    """What listing the weights of a file needs of it: `formats.checkpoint.Checkpoint` has it."""

    @property
    def names(self) -> list[str]:
        """Names of all stored tensors."""

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""

    def array(self, name: str) -> np.ndarray:
        """A tensor, best without a copy."""

    def release(self, name: str) -> None:
        """The tensor's pages may leave memory."""


@dataclass(frozen=True)
class Weight:
    """kind: an encoding, or the safetensors dtype of a dense tensor. rows(first, last) reads a range of its rows.

    `requantize` names the encoding that a four-bit weight of another program would have here, if its values do not fit
    ours; it is then read as F32.
    """

    kind: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], Block]
    release: Callable[[], None]
    requantize: str = ""

    @property
    def packed(self) -> bool:
        """True if rows are read as `PackedTensor`."""
        return self.kind in ENCODINGS

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of a packed weight, [O, N]."""
        return self.shape[0], self.shape[1]

    @property
    def count(self) -> int:
        """Number of values."""
        total = 1
        for size in self.shape:
            total *= size
        return total


Weights = dict[str, Weight]
"""Weights by name: a module path where they are packed, else the tensor's name (`....weight`)."""


@dataclass(frozen=True)
class Output:
    """The tensors (name, dtype, shape) that hold one weight in a file, and how a block of rows is written in each.

    Blocks are joined along `axis`. `back` turns a block of the source into what reading the file gives; it is the
    identity but where something changes. `loss` says in words what is lost; `note` what changes without loss of values.
    """

    parts: tuple[tuple[str, str, tuple[int, ...]], ...]
    encode: Callable[[Block], tuple[np.ndarray, ...]]
    axis: int = 0
    back: Callable[[Block], Block] | None = None
    loss: str = ""
    note: str = ""


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows [first, last) that together are the whole, each of some two million weights."""
    rows = shape[0] if shape else 1
    width = 1
    for size in shape[1:]:
        width *= size
    step = max(1, _ROW_BLOCK // max(1, width))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def dense_weight(file: TensorFile, name: str) -> Weight:
    """A dense tensor of a file."""
    info = file.info(name)

    def rows(first: int, last: int) -> np.ndarray:
        array = file.array(name)
        return array[first:last] if array.ndim else array

    return Weight(info.dtype, info.shape, rows, lambda: file.release(name))


def dense_output(name: str, weight: Weight) -> Output:
    """A dense tensor as it is."""
    def same(block: Block) -> tuple[np.ndarray, ...]:
        return (_array(block),)

    return Output(((name, weight.kind, weight.shape),), same)


def native_output(name: str, weight: Weight) -> Output:
    """How a weight lies in a file of ours: codes, scales and zeros, or a dense tensor as it is."""
    if not weight.packed:
        return dense_output(name, weight)

    def encode(block: Block) -> tuple[np.ndarray, ...]:
        assert isinstance(block, PackedTensor)
        return tuple(block.parts().values())

    return Output(tuple((f"{name}.{suffix}", dtype, shape) for suffix, dtype, shape
                        in layout(weight.kind, weight.matrix)), encode)


def _array(block: Block) -> np.ndarray:
    if isinstance(block, PackedTensor):
        raise TypeError("a packed block where a dense one was announced")
    return block


def weights_of(file: TensorFile) -> Weights:
    """The weights of a file of ours (a `Checkpoint`), packed ones by their module, or of any file of dense tensors."""
    entries = getattr(file, "packed", {})
    found: Weights = {}
    parts: set[str] = set()
    for module, entry in entries.items():
        suffixes = [suffix for suffix, _, _ in layout(entry.encoding, entry.shape)]
        parts.update(f"{module}.{suffix}" for suffix in suffixes)
        found[module] = _packed_weight(file, module, entry.encoding, entry.shape, suffixes)
    for name in file.names:
        if name not in parts:
            found[name] = dense_weight(file, name)
    return found


def _packed_weight(file: TensorFile, module: str, encoding: str, shape: tuple[int, int],
                   suffixes: list[str]) -> Weight:
    def rows(first: int, last: int) -> PackedTensor:
        return PackedTensor(encoding, (last - first, shape[1]),
                            **{suffix: file.array(f"{module}.{suffix}")[first:last] for suffix in suffixes})

    def release() -> None:
        for suffix in suffixes:
            file.release(f"{module}.{suffix}")

    return Weight(encoding, shape, rows, release)


def join(blocks: list[Block]) -> Block:
    """Blocks of rows as one, in order."""
    if len(blocks) == 1:
        return blocks[0]
    packed = [block for block in blocks if isinstance(block, PackedTensor)]
    if not packed:
        return np.concatenate([_array(block) for block in blocks])
    first = packed[0]
    parts = {suffix: np.concatenate([block.parts()[suffix] for block in packed]) for suffix in first.parts()}
    return PackedTensor(first.encoding, (sum(block.shape[0] for block in packed), first.shape[1]), **parts)


def as_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Values of a dense tensor of a safetensors dtype as float32, exactly. Raises FormatError if it is no float."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype not in ("F16", "F32"):
        raise FormatError("cannot read this dtype as weights", expected="F16, BF16 or F32", found=dtype)
    return array.astype(np.float32, copy=False)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Finite float32 values rounded to bfloat16 (nearest, ties to even), as uint16."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)


def named(path: Path | str, weights: Weights) -> Weights:
    """The same weights, whose errors name the file and the tensor."""
    def guard(name: str, weight: Weight) -> Weight:
        def rows(first: int, last: int) -> Block:
            try:
                return weight.rows(first, last)
            except FormatError as error:
                if error.path is not None:
                    raise
                raise FormatError(str(error), path=path, tensor=error.tensor or name) from None

        return Weight(weight.kind, weight.shape, rows, weight.release, weight.requantize)

    return {name: guard(name, weight) for name, weight in weights.items()}
