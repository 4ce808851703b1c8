"""Writing model files so that nothing half-written ever carries the final name.

A file is built as `<path>.partial` and renamed when complete and on disk. `TensorWriter` fills a preallocated file
tensor by tensor in any order; its journal lets an interrupted run go on where it stopped. `CheckpointWriter` is the one
for safetensors.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from linocut.errors import FormatError, LinocutError
from linocut.formats.header import PackedEntry, Plan, TensorInfo
from linocut.formats.packed import PackedTensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["CheckpointWriter", "FilePlan", "TensorWriter", "WriteError", "atomic_write_bytes", "write_checkpoint"]

NUMPY_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "uint16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64",
    "U64": "uint64", "F8_E5M2": "uint8", "F8_E4M3": "uint8", "F8_E8M0": "uint8", "F8_E4M3FNUZ": "uint8",
    "F8_E5M2FNUZ": "uint8",
}
_FROM_NUMPY = {np.dtype(value): key for key, value in reversed(NUMPY_DTYPES.items()) if not key.startswith("F8")
               and key != "BF16"}
_BLOCK = 1 << 24  # bytes hashed and written at a time


class WriteError(LinocutError, OSError):
    """A file could not be written: full disk, missing folder, no permission, size limit."""

    def __init__(self, path: object, error: OSError) -> None:
        hints = {errno.ENOSPC: "free some space or choose another place", errno.EDQUOT: "the disk quota is used up",
                 errno.EFBIG: "the file is larger than this system allows"}
        hint = hints.get(error.errno or 0)
        super().__init__(f"cannot write {path}: {error.strerror or error}" + (f"; {hint}" if hint else ""))
        self.errno = error.errno


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` completely or not at all; an older file stays until the new one is on disk."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise WriteError(target, error) from error
        raise
    _sync_folder(target.parent)


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    if not hasattr(os, "pwrite"):
        os.lseek(fd, offset, os.SEEK_SET)
    while data:
        written = os.pwrite(fd, data, offset) if hasattr(os, "pwrite") else os.write(fd, data)
        data, offset = data[written:], offset + written


class FilePlan(Protocol):
    """What a file to be written holds and where; its header is as long whatever the hashes' values."""

    tensors: dict[str, TensorInfo]
    packed: dict[str, PackedEntry]
    header_nbytes: int
    file_nbytes: int

    def header(self, sha256: Mapping[str, str]) -> bytes:
        """All bytes before the tensors'; unknown hashes are written as zeros."""


class TensorWriter:
    """Writes one file whose tensors are all declared beforehand, in its `plan`.

    With `resume`, tensors that an earlier run finished are found again (their hashes are checked) and `done` is true
    for them. Used as a context manager, success closes; an exception keeps the partial file if `resume` was asked for
    and removes it otherwise.
    """

    def __init__(self, path: str | os.PathLike[str], plan: FilePlan, resume: bool = False) -> None:
        self.path = Path(path)
        self.plan = plan
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.journal = self.path.with_name(self.path.name + ".partial.journal")
        self._resume = resume
        self._hashes: dict[str, str] = {}
        self._fd = -1
        self._owned = False  # the partial file is ours to remove
        self._log: Any = None
        try:
            self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            self._lock()
            self._owned = True
            fresh = not (resume and self._recover())
            if fresh:
                self._hashes.clear()
                os.ftruncate(self._fd, 0)
                self._preallocate()
                _write_at(self._fd, memoryview(self.plan.header({})), 0)
            self._log = open(self.journal, "w" if fresh else "a", encoding="utf-8")  # noqa: SIM115
            if fresh:
                self._note({"plan": self._fingerprint()})
        except BaseException as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
            self._release(remove=full or not resume)
            if isinstance(error, OSError) and not isinstance(error, LinocutError):
                raise WriteError(self.path, error) from error
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return  # a file system without locks
            os.close(self._fd)
            self._fd = -1
            raise WriteError(self.path, OSError(error.errno, "another process is writing this file")) from None

    def _preallocate(self) -> None:
        """Claim the whole size now, so that a full disk is noticed before the work and not after it."""
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._fd, 0, self.plan.file_nbytes)
                return
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        os.ftruncate(self._fd, self.plan.file_nbytes)

    def _fingerprint(self) -> str:
        return hashlib.sha256(self.plan.header({})).hexdigest()

    def _note(self, entry: dict[str, str]) -> None:
        self._log.write(json.dumps(entry) + "\n")
        self._log.flush()

    def _recover(self) -> bool:
        """Read the journal of an earlier run; False if there is none for this very plan."""
        try:
            lines = self.journal.read_text(encoding="utf-8").splitlines()
            entries = []
            for line in lines:
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    break  # the last line of a killed run
            if not entries or entries[0] != {"plan": self._fingerprint()}:
                return False
            if os.fstat(self._fd).st_size != self.plan.file_nbytes:
                return False
            for entry in entries[1:]:
                name, digest = entry.get("name"), entry.get("sha256")
                # a power cut can lose bytes that the journal already counts, so look before trusting it
                if name in self.plan.tensors and self._hash_stored(name) == digest:
                    self._hashes[name] = digest
        except (OSError, AttributeError, TypeError):
            return False
        # begin a fresh line whatever the killed run left, and forget entries whose bytes were lost
        text = "".join(json.dumps(entry) + "\n" for entry in
                       [{"plan": self._fingerprint()}, *({"name": n, "sha256": h} for n, h in self._hashes.items())])
        atomic_write_bytes(self.journal, text.encode())
        return True

    def _hash_stored(self, name: str) -> str:
        info, digest = self.plan.tensors[name], hashlib.sha256()
        with open(self.partial, "rb") as file:
            file.seek(info.offset)
            left = info.nbytes
            while left:
                block = file.read(min(left, _BLOCK))
                if not block:
                    return ""
                digest.update(block)
                left -= len(block)
        return digest.hexdigest()

    def _names(self, name: str) -> list[str]:
        if name in self.plan.tensors:
            return [name]
        parts = (f"{name}.{suffix}" for suffix in ("codes", "scales", "zeros"))
        return [part for part in parts if part in self.plan.tensors]

    def done(self, name: str) -> bool:
        """True if this tensor, or every part of this packed weight, is written."""
        names = self._names(name)
        return bool(names) and all(part in self._hashes for part in names)

    @property
    def missing(self) -> list[str]:
        """Names of the tensors that are not written yet."""
        return [name for name in self.plan.tensors if name not in self._hashes]

    def write(self, name: str, array: np.ndarray | PackedTensor) -> None:
        """Write one tensor, or all parts of a packed weight. BF16 and F8 data come as uint16 and uint8 arrays."""
        if isinstance(array, PackedTensor):
            entry = self.plan.packed.get(name)
            if entry is None or (entry.encoding, entry.shape) != (array.encoding, array.shape):
                raise FormatError("packed weight differs from what was declared", path=self.path, tensor=name,
                                  expected=entry, found=f"{array.encoding} {list(array.shape)}")
            for suffix, part in array.parts().items():
                self.write(f"{name}.{suffix}", part)
            return
        info = self._info(name)
        array = np.asarray(array)
        if array.shape != info.shape:
            raise FormatError("tensor differs from what was declared", path=self.path, tensor=name,
                              expected=f"shape {list(info.shape)}", found=f"shape {list(array.shape)}")
        self.write_chunks(name, [array])

    def write_chunks(self, name: str, chunks: Iterable[np.ndarray]) -> None:
        """Write one tensor as consecutive pieces (for instance ranges of rows), for tensors larger than memory."""
        info = self._info(name)
        dtype = np.dtype(NUMPY_DTYPES[info.dtype])
        digest, position, end = hashlib.sha256(), info.offset, info.offset + info.nbytes
        for chunk in chunks:
            chunk = np.asarray(chunk)
            if chunk.dtype != dtype:
                raise FormatError("tensor differs from what was declared", path=self.path, tensor=name,
                                  expected=f"{dtype} for {info.dtype}", found=chunk.dtype)
            data = memoryview(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
            if position + len(data) > end:
                raise FormatError("tensor differs from what was declared", path=self.path, tensor=name,
                                  expected=f"{info.nbytes} bytes", found="more")
            for first in range(0, len(data), _BLOCK):
                block = data[first : first + _BLOCK]
                digest.update(block)
                try:
                    _write_at(self._fd, block, position)
                except OSError as error:
                    raise WriteError(self.path, error) from error
                position += len(block)
        if position != end:
            raise FormatError("tensor differs from what was declared", path=self.path, tensor=name,
                              expected=f"{info.nbytes} bytes", found=f"{position - info.offset} bytes")
        self._hashes[name] = digest.hexdigest()
        try:
            self._note({"name": name, "sha256": self._hashes[name]})
        except OSError as error:
            raise WriteError(self.journal, error) from error

    def _info(self, name: str) -> Any:
        if self._fd < 0:
            raise FormatError("writer is closed", path=self.path, tensor=name)
        info = self.plan.tensors.get(name)
        if info is None:
            raise FormatError("tensor was not declared", path=self.path, tensor=name, expected="a declared name",
                              found=name)
        return info

    def close(self) -> None:
        """Patch the hashes into the header, bring everything to disk and give the file its name."""
        if self._fd < 0:
            return
        missing = self.missing
        if missing:
            raise FormatError(f"{len(missing)} tensors were declared but not written", path=self.path,
                              tensor=missing[0], expected="written", found="missing")
        header = self.plan.header(self._hashes)
        if len(header) != self.plan.header_nbytes:
            raise AssertionError("the header changed its length")
        try:
            _write_at(self._fd, memoryview(header), 0)
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            os.replace(self.partial, self.path)
        except OSError as error:
            raise WriteError(self.path, error) from error
        self._owned = False
        self._log.close()
        with contextlib.suppress(OSError):
            self.journal.unlink()
        _sync_folder(self.path.parent)

    def _release(self, remove: bool) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.close()
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
        owned, self._owned = self._owned, False
        if remove and owned:
            for path in (self.partial, self.journal):
                with contextlib.suppress(OSError):
                    path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is not None:
            self._release(remove=not self._resume)
            return
        try:
            self.close()
        except BaseException:
            self._release(remove=not self._resume)
            raise


class CheckpointWriter(TensorWriter):
    """Writes one safetensors file.

    tensors: (name, safetensors dtype, shape); the parts of the weights in `packed` ({module: (encoding, (O, N))}) are
    added by themselves.
    """

    def __init__(self, path: str | os.PathLike[str], tensors: Iterable[tuple[str, str, Iterable[int]]],
                 metadata: Mapping[str, str] | None = None,
                 packed: Mapping[str, tuple[str, tuple[int, int]]] | None = None, resume: bool = False) -> None:
        super().__init__(path, Plan(tensors, metadata or {}, packed or {}), resume)


def write_checkpoint(path: str | os.PathLike[str],
                     tensors: Mapping[str, np.ndarray | PackedTensor | tuple[np.ndarray, str]],
                     metadata: Mapping[str, str] | None = None) -> None:
    """Write a whole file at once, atomically.

    tensors: name -> array; module path -> PackedTensor; or name -> (array, dtype) where numpy lacks the dtype, for
    instance (uint16 array, "BF16").
    """
    declared, packed = [], {}
    data: dict[str, np.ndarray | PackedTensor] = {}
    for name, value in tensors.items():
        if isinstance(value, PackedTensor):
            packed[name] = (value.encoding, value.shape)
            data[name] = value
            continue
        array, dtype = value if isinstance(value, tuple) else (value, None)
        array = np.asarray(array)
        dtype = dtype or _FROM_NUMPY.get(array.dtype)
        if dtype is None or dtype not in NUMPY_DTYPES:
            raise FormatError("cannot store this dtype", path=path, tensor=name, expected=" ".join(NUMPY_DTYPES),
                              found=dtype or array.dtype)
        declared.append((name, dtype, array.shape))
        data[name] = array
    with CheckpointWriter(path, declared, metadata, packed) as writer:
        for name in data:
            writer.write(name, data[name])
