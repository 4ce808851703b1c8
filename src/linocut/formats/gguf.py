"""GGUF files: the container, read as a security boundary and written tensor by tensor.

A file is a magic number, counts, metadata of typed values, one description per tensor (name, dimensions innermost
first, type number, offset) and the tensors' bytes, each at a multiple of the alignment (source: ggml's docs/gguf.md).
What a type number means is decided together with the bytes that the tensors really take: 40 to 42 were given out more
than once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from linocut.errors import FormatError, ModelNotFoundError
from linocut.formats.ggml import TYPES, BlockType, row_nbytes
from linocut.formats.header import HEADER_CAP, TENSOR_CAP, TensorInfo, printable

__all__ = ["GGUFFile", "GGUFPlan", "GGUFTensor"]

ALIGNMENT = 32
HASHES = "linocut.sha256"
_MAGIC, _VERSION, _STRING, _ARRAY, _MAX_DIMS = b"GGUF", 3, 8, 9, 4
# type number of a metadata value -> struct format
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_PAIRS = 100_000
_BLOCK = 1 << 24  # bytes hashed at a time
_BY_NUMBER = {kind.number: kind for kind in TYPES.values()}
# Numbers that were given out more than once, and what has been found under them, today's meaning first.
_CLASHING = {40: ("Q1_0/32",), 41: ("Q1_0", "Q1_0/32"), 42: ("Q2_0", "PQ2_0", "Q1_0")}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: its type, shape (outermost first), offset from the start of the file and bytes."""

    kind: BlockType
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the innermost dimension."""
        return row_nbytes(self.kind, self.shape[-1])


class _Cursor:
    """Bytes read one after the other, never beyond their end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position = data, path, 0
        self.end = min(len(data), HEADER_CAP)

    def take(self, fmt: str) -> Any:
        size = struct.calcsize("<" + fmt)
        self.skip(size)
        return struct.unpack_from("<" + fmt, self.data, self.position - size)[0]

    def skip(self, size: int) -> None:
        if size > self.end - self.position:
            raise FormatError("header is cut off or too long", path=self.path,
                              expected=f"{size} bytes at {self.position}", found=f"{self.end} bytes in all")
        self.position += size

    def text(self) -> str:
        size = self.take("Q")
        self.skip(size)
        raw = self.data[self.position - size : self.position]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError("a name or text is not UTF-8", path=self.path, expected="UTF-8",
                              found=ascii(raw[:40])) from None

    def value(self, kind: int) -> Any:
        """A metadata value; of an array only its length, since nobody here needs more."""
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise FormatError("metadata of an unknown type", path=self.path, expected="0..12", found=kind)
        of, count = self.take("I"), self.take("Q")
        if of in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[of]))
        elif of == _STRING:
            for _ in range(count):  # each takes 8 bytes at least, so a false count ends soon
                self.skip(self.take("Q"))
        else:
            raise FormatError("metadata holds an array that is not read", path=self.path,
                              expected="an array of numbers or texts", found=f"of type {of}")
        return count


class GGUFFile:
    """An opened and checked GGUF file: `metadata`, `tensors` in the order of their bytes, and rows as views.

    `sha256` holds the tensors' hashes if the file is one of ours. Raises ModelNotFoundError or FormatError.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.nbytes = os.fstat(file.fileno()).st_size
                if self.nbytes < 24:
                    raise FormatError("file is too short for a GGUF header", path=path, expected="at least 24 bytes",
                                      found=f"{self.nbytes} bytes")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ModelNotFoundError(f"{path}: no such file") from None
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror or error}", path=path) from None
        cursor = _Cursor(self._map, self.path)
        if self._map[:4] != _MAGIC:
            raise FormatError("this is not a GGUF file", path=path, expected="GGUF", found=ascii(self._map[:4]))
        cursor.skip(4)
        version = cursor.take("I")
        if version not in (2, 3):
            raise FormatError("unknown version of GGUF (or a big-endian file)", path=path, expected="2 or 3",
                              found=version)
        count, pairs = cursor.take("Q"), cursor.take("Q")
        if count > TENSOR_CAP or pairs > _MAX_PAIRS:
            raise FormatError("header names too much", path=path,
                              expected=f"at most {TENSOR_CAP} tensors and {_MAX_PAIRS} values",
                              found=f"{count} and {pairs}")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.text()
            if key in self.metadata:
                raise FormatError("metadata has a key twice", path=path, expected="unique keys", found=printable(key))
            self.metadata[key] = cursor.value(cursor.take("I"))
        self.tensors = self._tensors(cursor, count)
        self.sha256 = self._hashes()

    def _tensors(self, cursor: _Cursor, count: int) -> dict[str, GGUFTensor]:
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment % 8 or alignment > 1 << 20:
            raise FormatError("impossible alignment", path=self.path, expected="a multiple of 8", found=alignment)
        described: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(count):
            name, dims = cursor.text(), cursor.take("I")
            if name in described or not name:
                raise FormatError("a tensor's name is empty or there twice", path=self.path, expected="unique names",
                                  found=printable(name))
            if not 1 <= dims <= _MAX_DIMS:
                raise FormatError("impossible number of dimensions", path=self.path, tensor=printable(name),
                                  expected=f"1 to {_MAX_DIMS}", found=dims)
            shape = tuple(reversed([cursor.take("Q") for _ in range(dims)]))
            number, offset = cursor.take("I"), cursor.take("Q")
            if offset % alignment or not all(1 <= size < 1 << 40 for size in shape):
                raise FormatError("impossible shape or offset", path=self.path, tensor=printable(name),
                                  expected=f"positive sizes at a multiple of {alignment}",
                                  found=f"{list(shape)} at {offset}")
            described[name] = (number, shape, offset)
        base = -(-cursor.position // alignment) * alignment
        order = sorted(described, key=lambda name: described[name][2])
        room: dict[str, int] = {}
        for name, after in zip(order, [*order[1:], None], strict=True):
            end = self.nbytes - base if after is None else described[after][2]
            room[name] = end - described[name][2]
        kinds = self._kinds(described, room, alignment)
        found = {}
        expected = 0
        for name in order:
            number, shape, offset = described[name]
            nbytes = _nbytes(kinds[number], shape)
            if offset != expected:
                raise FormatError("tensor overlaps another or leaves a gap", path=self.path, tensor=printable(name),
                                  expected=f"data at {expected}", found=f"data at {offset}")
            if not _fits(nbytes, room[name], alignment):
                raise FormatError(f"{kinds[number].name} {list(shape)} does not fit its data", path=self.path,
                                  tensor=printable(name), expected=f"{nbytes} bytes", found=f"{room[name]} bytes")
            expected = offset + -(-nbytes // alignment) * alignment
            found[name] = GGUFTensor(kinds[number], shape, base + offset, nbytes)
        return found

    def _kinds(self, described: Mapping[str, tuple[int, tuple[int, ...], int]], room: Mapping[str, int],
               alignment: int) -> dict[int, BlockType]:
        """What each type number in use means. Where that is not certain, the bytes of all its tensors decide."""
        kinds = {}
        for number in {entry[0] for entry in described.values()}:
            of_number = {name: entry[1] for name, entry in described.items() if entry[0] == number}
            candidates = [TYPES[name] for name in _CLASHING.get(number, ())] or [
                kind for kind in (_BY_NUMBER.get(number),) if kind is not None]
            if not candidates:
                raise FormatError("a tensor is of a type that is not read", path=self.path,
                                  tensor=printable(next(iter(of_number))), expected=", ".join(TYPES),
                                  found=f"type number {number}")
            fitting = [kind for kind in candidates
                       if all(shape[-1] % kind.weights == 0 and _fits(_nbytes(kind, shape), room[name], alignment)
                              for name, shape in of_number.items())]
            kinds[number] = (fitting or candidates)[0]
            for name, shape in of_number.items():
                if shape[-1] % kinds[number].weights:
                    raise FormatError(f"a row does not fit {kinds[number].name}", path=self.path,
                                      tensor=printable(name), expected=f"a multiple of {kinds[number].weights}",
                                      found=shape[-1])
        return kinds

    def _hashes(self) -> dict[str, str]:
        text = self.metadata.get(HASHES)
        if not isinstance(text, str):
            return {}
        try:
            hashes = json.loads(text)
        except (ValueError, RecursionError):
            hashes = None
        if not isinstance(hashes, dict) or set(hashes) != set(self.tensors) or not all(
                isinstance(value, str) for value in hashes.values()):
            raise FormatError(f"metadata {HASHES!r} does not fit the tensors", path=self.path,
                              expected="a hash for each tensor", found="something else")
        return hashes

    def data(self, name: str) -> np.ndarray:
        """A tensor's bytes as rows, a view: uint8 [rows, row bytes]."""
        tensor = self.tensors[name]
        flat = np.frombuffer(self._map, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
        return flat.reshape(-1, tensor.row_bytes)

    def release(self, name: str) -> None:
        """Tell the system that a tensor's pages may leave memory."""
        tensor = self.tensors[name]
        begin = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and tensor.offset + tensor.nbytes > begin:
            with contextlib.suppress(OSError, ValueError):
                self._map.madvise(mmap.MADV_DONTNEED, begin, tensor.offset + tensor.nbytes - begin)

    def verify(self) -> None:
        """Check every tensor's SHA-256, if the file carries them. Raises FormatError at the first that is damaged."""
        for name, expected in self.sha256.items():
            digest = hashlib.sha256()
            tensor = self.tensors[name]
            with memoryview(self._map) as view:
                for first in range(tensor.offset, tensor.offset + tensor.nbytes, _BLOCK):
                    with view[first : min(first + _BLOCK, tensor.offset + tensor.nbytes)] as block:
                        digest.update(block)
            self.release(name)
            if digest.hexdigest() != expected:
                raise FormatError("data does not match its SHA-256", path=self.path, tensor=printable(name),
                                  expected=expected, found=digest.hexdigest(),
                                  advice="download or make the file again")

    def close(self) -> None:
        """Let go of the file. Views that are still referenced keep it mapped."""
        with contextlib.suppress(BufferError):
            self._map.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _nbytes(kind: BlockType, shape: tuple[int, ...]) -> int:
    total = kind.nbytes
    for size in shape:
        total *= size
    return total // kind.weights


def _fits(nbytes: int, room: int, alignment: int) -> bool:
    return nbytes <= room <= -(-nbytes // alignment) * alignment


class GGUFPlan:
    """Where every tensor of a GGUF file to be written goes; what `formats.writer.TensorWriter` asks of a plan.

    tensors: (name, type of ggml, shape outermost first). Values of the metadata are texts, booleans, integers
    (stored with 32 bits) or floats. The header's length does not depend on the hashes' values.
    """

    def __init__(self, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, Any]) -> None:
        self._described: dict[str, tuple[BlockType, tuple[int, ...], int]] = {}
        self._metadata = dict(metadata)
        position, sizes = 0, {}
        for name, kind, shape in tensors:
            if name in self._described:
                raise FormatError("tensor is declared twice", tensor=name, expected="unique names", found="a duplicate")
            if not 1 <= len(shape) <= _MAX_DIMS:
                raise FormatError("GGUF cannot hold this shape", tensor=name, expected=f"1 to {_MAX_DIMS} dimensions",
                                  found=list(shape))
            rows = int(np.prod(shape[:-1], dtype=np.int64))
            sizes[name] = rows * row_nbytes(TYPES[kind], shape[-1])
            self._described[name] = (TYPES[kind], shape, position)
            position += -(-sizes[name] // ALIGNMENT) * ALIGNMENT
        self.header_nbytes = len(self.header({}))
        self.file_nbytes = self.header_nbytes + position
        self.packed: dict[str, Any] = {}
        # to the writer every tensor is bytes
        self.tensors = {name: TensorInfo("U8", (size,), self.header_nbytes + self._described[name][2], size)
                        for name, size in sizes.items()}

    def header(self, sha256: Mapping[str, str]) -> bytes:
        """Everything before the data; unknown hashes are written as zeros."""
        hashes = json.dumps({name: sha256.get(name, "0" * 64) for name in self._described}, separators=(",", ":"))
        metadata = self._metadata | {HASHES: hashes}
        parts = [struct.pack("<4sIQQ", _MAGIC, _VERSION, len(self._described), len(metadata))]
        for key, value in metadata.items():
            parts += [_text(key), _value(value)]
        for name, (kind, shape, offset) in self._described.items():
            parts += [_text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind.number, offset)]
        text = b"".join(parts)
        return text.ljust(-(-len(text) // ALIGNMENT) * ALIGNMENT, b"\0")


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    return struct.pack("<Ii", 5, value) if isinstance(value, int) else struct.pack("<If", 6, value)
