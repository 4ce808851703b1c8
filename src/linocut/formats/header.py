"""The header of a safetensors file, read as a security boundary and written so that hashes can be patched in later.

A file is 8 bytes of header length (little endian), that many bytes of JSON, then the tensors' bytes. `parse_header`
trusts nothing: a header must describe the data region completely, without gaps, overlaps or lies about sizes.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from linocut.errors import FormatError
from linocut.formats.packed import ENCODINGS, GROUP_SIZE, layout

__all__ = ["DATA_ALIGNMENT", "DTYPES", "FORMAT_VERSION", "HEADER_CAP", "PackedEntry", "Plan", "TensorInfo",
           "parse_header", "strict_json"]

FORMAT_VERSION = 1
HEADER_CAP = 100_000_000  # bytes of JSON; the limit that the safetensors project sets
TENSOR_CAP = 250_000
DATA_ALIGNMENT = 64
# bits per element; F4 and F6 exist in newer files and may only be described, not read
DTYPES = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}
_MAX_DIMS = 32
# Objects, lists and commas in one JSON text: 12 for each of the most tensors. Parsing one takes up to some 200 bytes of
# memory, so without a cap a header of 100 MB could take gigabytes.
_MAX_PIECES = 12 * TENSOR_CAP
_LIMIT = 2**63
_SHA = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor. `offset` counts from the start of the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def count(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class PackedEntry:
    """Encoding and logical shape (O, N) of a packed weight."""

    encoding: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Header:
    """A parsed header: tensors in the order of their bytes, metadata, packed weights and hashes by name."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    packed: dict[str, PackedEntry]
    sha256: dict[str, str]
    native: bool  # written in our format (metadata has the key "linocut")
    nbytes: int  # bytes before the data


def strict_json(data: bytes | str, path: object, what: str) -> Any:
    """Parse JSON as UTF-8, refusing duplicate keys, NaN, and nesting, numbers or counts made to exhaust the parser."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = sorted(key for key, _ in pairs)
            twice = next(a for a, b in pairwise(names) if a == b)
            raise FormatError(f"{what} names {printable(twice)} twice", path=path, expected="unique names",
                              found="a duplicate")
        return result

    def refuse(token: str) -> None:
        raise FormatError(f"{what} is not valid JSON", path=path, expected="JSON", found=token)

    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        pieces = sum(map(text.count, "{[,"))
        if pieces > _MAX_PIECES:
            raise FormatError(f"{what} has too many parts", path=path,
                              expected=f"at most {_MAX_PIECES} braces, brackets and commas", found=pieces)
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except FormatError:
        raise
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} is not UTF-8", path=path, expected="UTF-8 JSON",
                          found=f"byte 0x{error.object[error.start]:02x} at {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not valid JSON", path=path, expected="JSON",
                          found=str(error).split("\n")[0][:100]) from None


def printable(name: str) -> str:
    """A name from a file, quoted, shortened and without control characters, fit for a terminal."""
    return ascii(name if len(name) <= 120 else name[:117] + "...")


def _fail(problem: str, path: object, tensor: str | None = None, expected: object = None, found: object = None,
          advice: str | None = None) -> FormatError:
    quoted = None if tensor is None else tensor if tensor.isprintable() and len(tensor) <= 120 else printable(tensor)
    return FormatError(problem, path=path, tensor=quoted, expected=expected, found=found, advice=advice)


def header_length(start: bytes, file_size: int, path: object) -> int:
    """The header length from the first 9 bytes of a file, after refusing what is not safetensors at all."""
    disguises = {b"\x80": "a Python pickle, which could run code", b"PK\x03\x04": "a zip archive (a PyTorch pickle)",
                 b"GGUF": "a GGUF file", b"\x89HDF": "an HDF5 file"}
    for magic, what in disguises.items():
        # the length of a real header may begin with any of these bytes, but then its JSON follows
        if start.startswith(magic) and start[8:9] != b"{":
            raise _fail("this is not a safetensors file", path, expected="safetensors", found=what)
    if file_size < 8 or len(start) < 8:
        raise _fail("file is too short for a safetensors header", path, expected="at least 8 bytes",
                    found=f"{file_size} bytes")
    (length,) = struct.unpack("<Q", start[:8])
    if length > HEADER_CAP:
        raise _fail("header is too long", path, expected=f"at most {HEADER_CAP} bytes", found=f"{length} bytes",
                    advice="this is probably not a safetensors file")
    if length < 2 or 8 + length > file_size:
        raise _fail("header is cut off", path, expected=f"a header of {length} bytes", found=f"{file_size - 8} bytes")
    return int(length)


def parse_header(data: bytes, file_size: int, path: object) -> Header:
    """Check the JSON `data` of a file of `file_size` bytes and return what it describes.

    Raises FormatError that names the tensor, what was expected and what was found.
    """
    if data[:1] != b"{":
        raise _fail("header is not a JSON object", path, expected="'{'", found=ascii(data[:1].decode("latin-1")))
    raw = strict_json(data, path, "header")
    metadata = _metadata(raw.pop("__metadata__", {}), path)
    base = 8 + len(data)
    if len(raw) > TENSOR_CAP:
        raise _fail("header names too many tensors", path, expected=f"at most {TENSOR_CAP}", found=len(raw))
    tensors = {name: _tensor(name, entry, base, path) for name, entry in raw.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    position = base
    for name, info in ordered.items():
        if info.offset != position:
            kind = "overlaps the one before it" if info.offset < position else "leaves a gap before it"
            raise _fail(f"tensor {kind}", path, name, expected=f"data at {position - base}",
                        found=f"data at {info.offset - base}")
        position += info.nbytes
    if position != file_size:
        problem = "file is cut off" if position > file_size else "file holds bytes that belong to no tensor"
        last = next(reversed(ordered)) if ordered else None
        raise _fail(problem, path, last, expected=f"{position} bytes", found=f"{file_size} bytes")
    packed = _packed(metadata, ordered, path)
    native = "linocut" in metadata
    if native:
        for name, info in ordered.items():
            step = max(1, DTYPES[info.dtype] // 8)
            if info.offset % step:
                raise _fail("data is not aligned", path, name, expected=f"a multiple of {step}", found=info.offset)
    return Header(ordered, metadata, packed, _hashes(metadata, ordered, path), native, base)


def _metadata(raw: Any, path: object) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise _fail("__metadata__ has the wrong form", path, expected="an object of strings",
                    found=type(raw).__name__ if not isinstance(raw, dict) else "a value that is no string")
    return raw


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LIMIT


def _tensor(name: str, entry: Any, base: int, path: object) -> TensorInfo:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise _fail("tensor name is not valid text", path, expected="UTF-8", found=printable(name)) from None
    if not name:
        raise _fail("a tensor has no name", path, expected="a name", found="''")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        found = printable(str(sorted(entry))) if isinstance(entry, dict) else type(entry).__name__
        raise _fail("tensor entry has the wrong form", path, name, expected="dtype, shape, data_offsets", found=found)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _fail("unknown dtype", path, name, expected="one of " + " ".join(DTYPES), found=printable(str(dtype)))
    if not isinstance(shape, list) or not all(map(_natural, shape)) or len(shape) > _MAX_DIMS:
        raise _fail("shape has the wrong form", path, name, expected=f"up to {_MAX_DIMS} integers from 0 to 2^63 - 1",
                    found=printable(str(shape)))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)) or offsets[0] > offsets[1]:
        raise _fail("data_offsets have the wrong form", path, name, expected="[begin, end], 0 <= begin <= end",
                    found=printable(str(offsets)))
    bits = extent = DTYPES[dtype]
    for size in shape:
        bits *= size
        extent *= size or 1  # an empty tensor may not hide dimensions that no array can have
    if bits % 8 or extent // 8 >= _LIMIT:
        raise _fail("shape describes an impossible size", path, name, expected="whole bytes, fewer than 2^63",
                    found=printable(str(shape)))
    if bits // 8 != offsets[1] - offsets[0]:
        raise _fail(f"{dtype} {shape} does not fit its data", path, name, expected=f"{bits // 8} bytes",
                    found=f"{offsets[1] - offsets[0]} bytes")
    return TensorInfo(dtype, tuple(shape), base + offsets[0], bits // 8)


def _packed(metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo], path: object) -> dict[str, PackedEntry]:
    if "linocut" not in metadata:
        return {}
    raw = strict_json(metadata["linocut"], path, "metadata 'linocut'")
    if not isinstance(raw, dict) or type(raw.get("version")) is not int or not isinstance(raw.get("packed"), dict):
        raise _fail("metadata 'linocut' has the wrong form", path, expected='{"version": 1, "packed": {...}}',
                    found=printable(str(raw)))
    if raw["version"] != FORMAT_VERSION:
        raise _fail("unknown version of the packed format", path, expected=FORMAT_VERSION, found=raw["version"],
                    advice="update linocut" if raw["version"] > FORMAT_VERSION else None)
    packed = {}
    for module, entry in raw["packed"].items():
        encoding = entry.get("encoding") if isinstance(entry, dict) else None
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(encoding, str) or encoding not in ENCODINGS:
            raise _fail("unknown encoding of a packed weight", path, module, expected=" | ".join(ENCODINGS),
                        found=printable(str(encoding)))
        if (not isinstance(shape, list) or len(shape) != 2 or not all(map(_natural, shape))
                or shape[0] == 0 or shape[1] == 0 or shape[1] % GROUP_SIZE):
            raise _fail("packed weight has an impossible shape", path, module,
                        expected=f"[O, N], N a multiple of {GROUP_SIZE}", found=printable(str(shape)))
        for suffix, dtype, part_shape in layout(encoding, (shape[0], shape[1])):
            info = tensors.get(f"{module}.{suffix}")
            if info is None or (info.dtype, info.shape) != (dtype, part_shape):
                found = "no such tensor" if info is None else f"{info.dtype} {list(info.shape)}"
                raise _fail(f"does not fit a {encoding} weight of shape {shape}", path, f"{module}.{suffix}",
                            expected=f"{dtype} {list(part_shape)}", found=found)
        for suffix in ("weight",) if encoding == "affine4" else ("weight", "zeros"):
            if f"{module}.{suffix}" in tensors:
                raise _fail(f"tensor contradicts the {encoding} weight of the same name", path, f"{module}.{suffix}",
                            expected="no such tensor", found=tensors[f"{module}.{suffix}"].dtype)
        packed[module] = PackedEntry(encoding, (shape[0], shape[1]))
    return packed


def _hashes(metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo], path: object) -> dict[str, str]:
    if "linocut" not in metadata or "sha256" not in metadata:
        return {}  # other programs may use the key "sha256" for something else
    raw = strict_json(metadata["sha256"], path, "metadata 'sha256'")
    if not isinstance(raw, dict) or not all(isinstance(v, str) and _SHA.fullmatch(v) for v in raw.values()):
        raise _fail("metadata 'sha256' has the wrong form", path, expected="tensor name -> 64 hex digits",
                    found=printable(str(raw)[:80]))
    for name in raw:
        if name not in tensors:
            raise _fail("metadata 'sha256' names a tensor that does not exist", path, name, expected="a tensor",
                        found="nothing")
    return raw


class Plan:
    """Where every tensor of a file to be written goes. The header's length does not depend on the hashes' values."""

    def __init__(self, tensors: Iterable[tuple[str, str, Iterable[int]]], metadata: Mapping[str, str],
                 packed: Mapping[str, tuple[str, tuple[int, int]]]) -> None:
        declared: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, dtype, shape in tensors:
            if name in declared:
                raise FormatError("tensor is declared twice", tensor=name, expected="unique names", found="a duplicate")
            declared[name] = (dtype, tuple(int(size) for size in shape))
        self.packed = {module: PackedEntry(encoding, (int(shape[0]), int(shape[1])))
                       for module, (encoding, shape) in packed.items()}
        for module, entry in self.packed.items():
            for suffix, dtype, part_shape in layout(entry.encoding, entry.shape):
                declared.setdefault(f"{module}.{suffix}", (dtype, part_shape))
        for name, (dtype, _) in declared.items():
            if DTYPES.get(dtype, 0) < 8:
                raise FormatError("cannot write this dtype", tensor=name, expected="a dtype of whole bytes",
                                  found=dtype)
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise FormatError("metadata must be strings", expected="str: str", found=f"{key!r}: {value!r}")
        self.metadata = dict(metadata)
        # falling alignment keeps every offset a multiple of its element size; names make the file deterministic
        order = sorted(declared, key=lambda name: (-DTYPES[declared[name][0]], name))
        position, relative = 0, {}
        for name in order:
            dtype, shape = declared[name]
            nbytes = DTYPES[dtype] // 8
            for size in shape:
                nbytes *= size
            relative[name] = (dtype, shape, position, nbytes)
            position += nbytes
        self.data_nbytes = position
        self._relative = relative
        self.header_nbytes = len(self.header({}))
        self.tensors = {name: TensorInfo(dtype, shape, self.header_nbytes + begin, nbytes)
                        for name, (dtype, shape, begin, nbytes) in relative.items()}
        self.file_nbytes = self.header_nbytes + self.data_nbytes
        # the reader's own checks are the definition of what may be written
        parse_header(self.header({})[8:], self.file_nbytes, "plan")

    def header(self, sha256: Mapping[str, str]) -> bytes:
        """Length and JSON, padded with spaces to a multiple of 64 bytes; unknown hashes are written as zeros."""
        packed = {module: {"encoding": entry.encoding, "shape": list(entry.shape)}
                  for module, entry in sorted(self.packed.items())}
        metadata = {"format": "pt"} | dict(sorted(self.metadata.items())) | {
            "linocut": _dumps({"version": FORMAT_VERSION, "packed": packed}),
            "sha256": _dumps({name: sha256.get(name, "0" * 64) for name in self._relative}),
        }
        entries = {name: {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + nbytes]}
                   for name, (dtype, shape, begin, nbytes) in self._relative.items()}
        text = _dumps({"__metadata__": metadata} | entries).encode("utf-8")
        length = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
        if length > HEADER_CAP:
            raise FormatError("header would be too long", expected=f"at most {HEADER_CAP} bytes", found=length)
        return struct.pack("<Q", length) + text.ljust(length)


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
