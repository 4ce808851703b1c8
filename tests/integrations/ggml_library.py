"""The real ggml, from the package libggml-python, by ctypes: its decoders, its products, its reader of GGUF files."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import libggml
import numpy as np

_FOLDER = Path(libggml.__file__).parent / "lib64"
_BASE = ctypes.CDLL(str(_FOLDER / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
_CPU = ctypes.CDLL(str(_FOLDER / "libggml-cpu.so"))


class _Traits(Structure):
    _fields_ = [("name", c_char_p), ("weights", c_int64), ("interleave", c_int64), ("nbytes", c_size_t),
                ("quantized", c_bool), ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
                ("from_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64))]


class _CpuTraits(Structure):
    _fields_ = [("from_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
                ("dot", ctypes.CFUNCTYPE(None, c_int, *[c_void_p, c_size_t] * 3, c_int)),
                ("dot_type", c_int), ("rows", c_int64)]


class _GGUFParams(Structure):
    _fields_ = [("no_alloc", c_bool), ("context", c_void_p)]


def _declare(library: ctypes.CDLL, name: str, result: object, *arguments: object) -> None:
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments)


_declare(_BASE, "ggml_get_type_traits", POINTER(_Traits), c_int)
_declare(_CPU, "ggml_get_type_traits_cpu", POINTER(_CpuTraits), c_int)
_declare(_BASE, "gguf_init_from_file", c_void_p, c_char_p, _GGUFParams)
_declare(_BASE, "gguf_free", None, c_void_p)
for _name, _result in (("n_tensors", c_int64), ("data_offset", c_size_t)):
    _declare(_BASE, f"gguf_get_{_name}", _result, c_void_p)
for _name, _result in (("name", c_char_p), ("type", c_int), ("offset", c_size_t), ("size", c_size_t)):
    _declare(_BASE, f"gguf_get_tensor_{_name}", _result, c_void_p, c_int64)
_CPU.ggml_cpu_init()


def traits(number: int) -> tuple[str, int, int]:
    """(name, weights of a block, bytes of a block) of a type."""
    found = _BASE.ggml_get_type_traits(number).contents
    return found.name.decode(), found.weights, found.nbytes


def decode(rows: np.ndarray, number: int, width: int) -> np.ndarray:
    """float32 [o, width] of rows of blocks, uint8 [o, row bytes]."""
    out = np.empty((len(rows), width), dtype=np.float32)
    for row, target in zip(np.ascontiguousarray(rows), out, strict=True):
        _BASE.ggml_get_type_traits(number).contents.to_float(row.ctypes.data, target.ctypes.data, width)
    return out


def multiply(rows: np.ndarray, number: int, x: np.ndarray) -> np.ndarray:
    """float32 [o] = rows @ x, with x float32 [width] rounded as ggml's CPU products round it for this type."""
    kernel = _CPU.ggml_get_type_traits_cpu(number).contents
    _, weights, nbytes = traits(kernel.dot_type)
    rounded = np.zeros(x.size // weights * nbytes, dtype=np.uint8)
    _CPU.ggml_get_type_traits_cpu(kernel.dot_type).contents.from_float(x.ctypes.data, rounded.ctypes.data, x.size)
    out = np.empty(len(rows), dtype=np.float32)
    for index, row in enumerate(np.ascontiguousarray(rows)):
        one = c_float()
        kernel.dot(x.size, ctypes.addressof(one), 0, row.ctypes.data, 0, rounded.ctypes.data, 0, 1)
        out[index] = one.value
    return out


def tensors(path: Path) -> dict[str, tuple[int, int, int]]:
    """{name: (type, offset in the file, bytes)} as ggml reads a GGUF file. Raises ValueError if it does not."""
    context = c_void_p()
    file = _BASE.gguf_init_from_file(str(path).encode(), _GGUFParams(True, ctypes.addressof(context)))
    if not file:
        raise ValueError(f"ggml does not read {path}")
    try:
        start = _BASE.gguf_get_data_offset(file)
        return {_BASE.gguf_get_tensor_name(file, i).decode(): (
                    _BASE.gguf_get_tensor_type(file, i), start + _BASE.gguf_get_tensor_offset(file, i),
                    _BASE.gguf_get_tensor_size(file, i)) for i in range(_BASE.gguf_get_n_tensors(file))}
    finally:
        _BASE.gguf_free(file)
