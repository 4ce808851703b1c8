"""The two pickles that published CUDA models hold, read by torch's restricted loader, which makes tensors and nothing
else.

`state_dict.pt` (gemlite) and `qmodel.pt` (HQQ) are never written here: what comes out is safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linocut.errors import FormatError, ModelNotFoundError
from linocut.formats.header import TensorInfo, printable
from linocut.formats.hqq import hqq_weight
from linocut.formats.weight import Weights, dense_weight

_DTYPES = {torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16",
           torch.float32: "F32"}


class Pickle:
    """Named tensors of a pickle, with what `formats.weight.TensorFile` asks for."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path, self._tensors = path, dict(tensors)
        for name, tensor in self._tensors.items():
            if tensor.dtype not in _DTYPES:
                raise FormatError("cannot read this dtype", path=path, tensor=printable(name),
                                  expected=" ".join(_DTYPES.values()), found=tensor.dtype)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape."""
        tensor = self._tensors[name]
        return TensorInfo(_DTYPES[tensor.dtype], tuple(tensor.shape), 0, tensor.numel() * tensor.element_size())

    def array(self, name: str) -> np.ndarray:
        """The tensor; BF16 as uint16."""
        tensor = self._tensors[name]
        return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def release(self, name: str) -> None:
        """The system lets go of mapped pages by itself."""


def load(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle. Raises FormatError for one that holds more than tensors and plain data."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: no such file") from None
    except Exception as error:  # the unpickler raises whatever the damage leads to
        raise FormatError("is no pickle of tensors, or one that would run code", path=path,
                          expected="a dictionary of tensors", found=str(error).split("\n")[0][:120]) from None
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise FormatError("the pickle has the wrong form", path=path, expected="a dictionary with names",
                          found=type(loaded).__name__)
    return loaded


def state_dict(path: Path) -> Pickle:
    """A pickle of named tensors, such as gemlite's `state_dict.pt`."""
    loaded = load(path)
    for name, tensor in loaded.items():
        if not isinstance(tensor, Tensor):
            raise FormatError("the pickle holds something that is no tensor", path=path, tensor=printable(name),
                              expected="a tensor", found=type(tensor).__name__)
    return Pickle(path, loaded)


def hqq_weights(path: Path) -> Weights:
    """The weights of HQQ's `qmodel.pt`: {module: {"W_q": ..., "scale": ..., ...} or {"weight": ...}}."""
    found: Weights = {}
    for module, entry in load(path).items():
        if not isinstance(entry, dict):
            raise FormatError("a module of the pickle has the wrong form", path=path, tensor=printable(module),
                              expected="a dictionary", found=type(entry).__name__)
        tensors = {key: value for key, value in entry.items() if isinstance(value, Tensor)}
        if "W_q" not in entry:
            dense = Pickle(path, {f"{module}.{key}": value for key, value in tensors.items()})
            found |= {name: dense_weight(dense, name) for name in dense.names}
            continue
        shape = entry.get("shape")
        if not {"W_q", "scale", "zero"} <= set(tensors) or not isinstance(shape, (list, tuple)) or len(shape) != 2 \
                or not all(type(size) is int and size > 0 for size in shape):
            raise FormatError("a quantized module has the wrong form", path=path, tensor=printable(module),
                              expected="W_q, scale, zero and a shape of two numbers", found=sorted(map(str, entry)))
        weight = hqq_weight(module, tensors["W_q"].numpy(), tensors["scale"].float().numpy(),
                            tensors["zero"].float().numpy(), (shape[0], shape[1]), entry)
        found[module if weight.packed else f"{module}.weight"] = weight
    return found
