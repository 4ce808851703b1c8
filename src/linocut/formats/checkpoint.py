"""Model weights as memory-mapped safetensors: opened in milliseconds, never copied, never trusted.

`Checkpoint.open` checks the structure (header, names, dtypes, shapes, offsets, file length, parts of packed weights);
`Checkpoint.verify` checks the values (SHA-256 of every tensor, scales, trit bytes, finite numbers).
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from linocut.errors import FormatError, LinocutError, ModelNotFoundError
from linocut.formats.header import (
    HEADER_CAP,
    Header,
    PackedEntry,
    TensorInfo,
    header_length,
    parse_header,
    printable,
    strict_json,
)
from linocut.formats.layouts import unused_text_tensors, weight_map, weights_entry
from linocut.formats.packed import PackedTensor, layout, validate_values
from linocut.formats.writer import NUMPY_DTYPES, CheckpointWriter, WriteError, atomic_write_bytes, write_checkpoint

__all__ = ["Checkpoint", "CheckpointWriter", "PackedEntry", "TensorInfo", "WriteError", "atomic_write_bytes",
           "write_checkpoint"]

_BLOCK = 1 << 24  # bytes hashed or checked at a time


class _Shard:
    """One mapped file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.nbytes = os.fstat(file.fileno()).st_size
                length = header_length(file.read(9), self.nbytes, path)
                file.seek(8)
                self.header: Header = parse_header(file.read(length), self.nbytes, path)
                # copy-on-write: arrays are writable as torch wants them, and the file never changes
                try:
                    self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                except OSError:  # a strict system counts such a map as memory
                    self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except LinocutError:
            raise
        except FileNotFoundError:
            raise ModelNotFoundError(f"{path}: no such file") from None
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror or error}", path=path) from None


class Checkpoint:
    """The tensors of one safetensors file, or of several behind an index, as zero-copy numpy views.

    Views stay valid as long as they are referenced, also after `close`.
    """

    def __init__(self, path: Path, shards: list[_Shard]) -> None:
        self.path = path
        self._where: dict[str, _Shard] = {}
        self.packed: dict[str, PackedEntry] = {}
        self.metadata: dict[str, str] = {}
        self.sha256: dict[str, str] = {}
        self._shards = shards
        for shard in shards:
            for name in shard.header.tensors:
                if name in self._where:
                    raise FormatError("tensor lies in two files", path=path, tensor=name,
                                      expected=self._where[name].path.name, found=f"also {shard.path.name}")
                self._where[name] = shard
            self.packed |= shard.header.packed
            self.sha256 |= shard.header.sha256
            self.metadata |= shard.header.metadata

    @classmethod
    def open(cls, path: str | os.PathLike[str], taps: Sequence[int] | None = None) -> Checkpoint:
        """Open a .safetensors file, a *.safetensors.index.json, or a folder that holds either.

        With `taps`, the layers of a text encoder whose outputs are used, files of an index that hold nothing else than
        unused layers may be missing; unused tensors are then left out.
        Raises ModelNotFoundError if there is nothing, FormatError if the structure is not sound.
        """
        path = Path(path)
        if path.is_dir():
            path = _find_in_folder(path)
        if not path.exists():
            raise ModelNotFoundError(f"{path}: no such file")
        if path.name.endswith(".json"):
            return _open_index(cls, path, taps)
        return cls(path, [_Shard(path)])

    def _hide(self, names: set[str]) -> None:
        """Leave tensors out, as if no file held them."""
        self._where = {name: shard for name, shard in self._where.items() if name not in names}
        self.packed = {name: entry for name, entry in self.packed.items() if f"{name}.codes" not in names}

    @property
    def names(self) -> list[str]:
        """Names of all stored tensors, in the order of their bytes."""
        return list(self._where)

    @property
    def native(self) -> bool:
        """True if every file carries this format's metadata (hashes and packed weights)."""
        return all(shard.header.native for shard in self._shards)

    @property
    def files(self) -> list[Path]:
        """The files behind this checkpoint."""
        return [shard.path for shard in self._shards]

    @property
    def file_nbytes(self) -> int:
        """Bytes of all files."""
        return sum(shard.nbytes for shard in self._shards)

    @property
    def header_nbytes(self) -> int:
        """Bytes of all files that are not tensor data."""
        return sum(shard.header.nbytes for shard in self._shards)

    @property
    def tensor_nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.file_nbytes - self.header_nbytes

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape, offset in its file and bytes of a stored tensor."""
        return self._shard(name).header.tensors[name]

    def _shard(self, name: str) -> _Shard:
        try:
            return self._where[name]
        except KeyError:
            raise FormatError("no such tensor", path=self.path, tensor=printable(name), expected="a stored tensor",
                              found=f"{len(self._where)} others") from None

    def array(self, name: str) -> np.ndarray:
        """A view of a tensor's bytes, without a copy. BF16 comes as uint16, F8 as uint8."""
        shard = self._shard(name)
        info = shard.header.tensors[name]
        if info.dtype not in NUMPY_DTYPES:
            raise FormatError("this dtype can be listed but not read", path=shard.path, tensor=name,
                              expected=" ".join(NUMPY_DTYPES), found=info.dtype)
        dtype = np.dtype(NUMPY_DTYPES[info.dtype])
        if info.count == 0:
            return np.empty(info.shape, dtype=dtype)
        array = np.frombuffer(shard.map, dtype=dtype, count=info.count, offset=info.offset).reshape(info.shape)
        return array if array.flags.aligned else array.copy()  # only files of other programs are ever unaligned

    def packed_tensor(self, module: str) -> PackedTensor:
        """A packed weight as views of its parts."""
        entry = self.packed.get(module)
        if entry is None:
            raise FormatError("no such packed weight", path=self.path, tensor=printable(module),
                              expected="a packed weight", found=f"{len(self.packed)} others")
        parts = {suffix: self.array(f"{module}.{suffix}") for suffix, _, _ in layout(entry.encoding, entry.shape)}
        return PackedTensor(entry.encoding, entry.shape, **parts)

    def release(self, name: str) -> None:
        """Tell the system that a tensor's pages may leave memory; they are read again if they are used again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        shard = self._shard(name)
        info = shard.header.tensors[name]
        begin = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = info.offset + info.nbytes - begin
        if length > 0:
            with contextlib.suppress(OSError, ValueError):
                shard.map.madvise(mmap.MADV_DONTNEED, begin, length)

    def verify(self, on_progress: Callable[[int, int], None] | None = None) -> int:
        """Check every tensor's SHA-256 and values; returns the number of tensors whose hash was checked.

        on_progress(bytes done, bytes in all) is called as it goes. Files of other programs carry no hashes; their
        values are checked all the same. Raises FormatError at the first bad tensor.
        """
        done, total = 0, self.tensor_nbytes
        checked = 0
        for name in self.names:
            shard, info = self._where[name], self.info(name)
            expected = shard.header.sha256.get(name)
            if expected is None and shard.header.native:
                raise FormatError("no SHA-256 is stored for this tensor", path=shard.path, tensor=name,
                                  expected="64 hex digits in the metadata", found="nothing")
            if expected is not None:
                found = self.hash_tensor(name)
                if found != expected:
                    raise FormatError("data does not match its SHA-256", path=shard.path, tensor=name,
                                      expected=expected, found=found, advice="download or make the file again")
                checked += 1
            if info.dtype in ("F16", "BF16", "F32", "F64") and not self._is_part(name):
                _check_finite(self.array(name), info.dtype, shard.path, name)
            self.release(name)
            done += info.nbytes
            if on_progress is not None:
                on_progress(done, total)
        for module in self.packed:
            validate_values(self.packed_tensor(module), module)
            for suffix in ("codes", "scales"):
                self.release(f"{module}.{suffix}")
        return checked

    def _is_part(self, name: str) -> bool:
        return name.rpartition(".")[0] in self.packed and name.endswith((".codes", ".scales", ".zeros"))

    def hash_tensor(self, name: str) -> str:
        """SHA-256 of a tensor's bytes, as 64 hex digits."""
        shard = self._shard(name)
        info, digest = shard.header.tensors[name], hashlib.sha256()
        with memoryview(shard.map) as view:
            for first in range(info.offset, info.offset + info.nbytes, _BLOCK):
                with view[first : min(first + _BLOCK, info.offset + info.nbytes)] as block:
                    digest.update(block)
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """A SHA-256 that names the weights: from the stored hashes, or for other files from the header and samples.

        The samples are the first 4096 bytes of every tensor, so a large file is not read whole.
        """
        digest = hashlib.sha256()
        for name in sorted(self._where):
            shard, info = self._where[name], self.info(name)
            stored = shard.header.sha256.get(name)
            if stored is None:
                begin = info.offset
                stored = hashlib.sha256(shard.map[begin : begin + min(info.nbytes, 4096)]).hexdigest()
            digest.update(f"{name}\0{info.dtype}\0{info.shape}\0{stored}\n".encode())
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the files. Views that are still referenced keep their file mapped."""
        for shard in self._shards:
            with contextlib.suppress(BufferError):
                shard.map.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _check_finite(array: np.ndarray, dtype: str, path: Path, name: str) -> None:
    flat = array.reshape(-1)
    step = _BLOCK // max(1, flat.itemsize)
    for first in range(0, flat.size, step):
        block = flat[first : first + step]
        bad = (block & 0x7F80) == 0x7F80 if dtype == "BF16" else ~np.isfinite(block)
        if bad.any():
            index = first + int(np.argmax(bad))
            where = [int(i) for i in np.unravel_index(index, array.shape)] if array.shape else []
            raise FormatError(f"value at {where} is not finite", path=path, tensor=name, expected="a finite number",
                              found=f"0x{int(flat[index]):04x}" if dtype == "BF16" else float(flat[index]))


def _find_in_folder(folder: Path) -> Path:
    inside = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    pickles = [name for name in inside if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    found = weights_entry(str(folder), [name for name in inside if name not in pickles])
    if found is not None:
        return folder / found
    raise ModelNotFoundError(f"{folder}: no .safetensors file" + (
        f"; {pickles[0]} is a pickle, which is never opened since it could run code" if pickles else ""))


def _open_index(cls: type[Checkpoint], path: Path, taps: Sequence[int] | None) -> Checkpoint:
    if path.stat().st_size > HEADER_CAP:
        raise FormatError("index is too long", path=path, expected=f"at most {HEADER_CAP} bytes",
                          found=path.stat().st_size)
    places = weight_map(strict_json(path.read_bytes(), path, "index"), path)
    unused = unused_text_tensors(places, taps) if taps else set()
    needed = {file for name, file in places.items() if name not in unused}
    partly = any(file not in needed and not (path.parent / file).exists() for file in places.values())
    hidden = unused if partly else set()
    shards = [_Shard(path.parent / file) for file in sorted(needed if partly else set(places.values()))]
    checkpoint = cls(path, shards)
    for name, file in places.items():
        shard = checkpoint._where.get(name)
        if name not in hidden and (shard is None or shard.path.name != file):
            raise FormatError("index and files disagree", path=path, tensor=printable(name), expected=f"in {file}",
                              found="nowhere" if shard is None else f"in {shard.path.name}")
    for name, shard in checkpoint._where.items():
        if name not in places:
            raise FormatError("tensor is missing from the index", path=path, tensor=name, expected="in weight_map",
                              found=f"only in {shard.path.name}")
    checkpoint._hide(hidden)
    return checkpoint
