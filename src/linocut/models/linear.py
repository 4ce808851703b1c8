"""Layers that hold packed weights, layers that train towards them, and layers that keep a dense weight as stored.

A packed layer is a plain module with the buffers `codes`, `scales` and, for affine4, `zeros`; `linocut.kernels`
computes with them. Nothing here knows a network; `linocut.models.convert` puts these layers into one.

Shape letters: N in-features, O out-features, V embedding rows, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linocut.errors import FormatError
from linocut.formats.packed import PackedTensor, layout
from linocut.kernels import dispatch
from linocut.kernels.blocked import SCRATCH_BYTES, block_rows
from linocut.kernels.fusible import MULTIPLIED
from linocut.kernels.problem import PackedWeight, checked
from linocut.quantize.rounding import fake_quantize, quantize_tensor

_DTYPES = {"U8": torch.uint8, "F16": torch.float16}


class _Packed(nn.Module):
    """Buffers of one packed weight [O, N]. They keep their dtypes when the model is cast: a cast would lose bits."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, shape: tuple[int, int], encoding: str) -> None:
        super().__init__()
        self.encoding, self.shape = encoding, shape
        self.register_buffer("zeros", None)
        for suffix, dtype, size in layout(encoding, shape):
            self.register_buffer(suffix, torch.zeros(size, dtype=_DTYPES[dtype]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def set_packed(self, packed: PackedTensor) -> None:
        """Take over the arrays of `packed` without copying them."""
        if packed.encoding != self.encoding or packed.shape != self.shape:
            raise FormatError("a packed weight does not fit its layer", expected=f"{self.encoding} {list(self.shape)}",
                              found=f"{packed.encoding} {list(packed.shape)}")
        for suffix, array in packed.parts().items():
            setattr(self, suffix, torch.from_numpy(array))

    def to_packed(self) -> PackedTensor:
        """The weight as arrays for a file; they share memory with the buffers if those are on the CPU."""
        parts = {suffix: getattr(self, suffix).cpu().numpy() for suffix, _, _ in layout(self.encoding, self.shape)}
        return PackedTensor(self.encoding, self.shape, **parts)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight [O, N] as floats: for tests and small layers."""
        return dispatch.dequantize(self.codes, self.scales, self.zeros, self.encoding, self.shape[1], dtype)

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, encoding={self.encoding!r}"


class PackedLinear(_Packed):
    """y = x @ W.T with W [O, N] in any encoding of `formats.packed`. No bias. Gradients flow to x only."""

    def __init__(self, in_features: int, out_features: int, encoding: str) -> None:
        super().__init__((out_features, in_features), encoding)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_packed(cls, packed: PackedTensor) -> PackedLinear:
        """A layer over the arrays of `packed`, which are not copied."""
        with torch.device("meta"):
            layer = cls(packed.shape[1], packed.shape[0], packed.encoding)
        layer.set_packed(packed)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return dispatch.linear(x, self.codes, self.scales, self.zeros, self.encoding)


class PackedEmbedding(_Packed):
    """Rows of a packed table [V, D]; only the rows asked for are decoded, into `dtype` (float32 unless cast)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, encoding: str = "affine4") -> None:
        super().__init__((num_embeddings, embedding_dim), encoding)
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, torch.float32

    @classmethod
    def from_packed(cls, packed: PackedTensor) -> PackedEmbedding:
        """A layer over the arrays of `packed`, which are not copied."""
        with torch.device("meta"):
            layer = cls(*packed.shape, encoding=packed.encoding)
        layer.set_packed(packed)
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedEmbedding:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # follow .to(dtype), which the buffers do not
        return self

    def forward(self, ids: Tensor) -> Tensor:
        rows = dispatch.dequantize(self.codes, self.scales, self.zeros, self.encoding, self.embedding_dim, self.dtype,
                                   rows=ids.reshape(-1))
        return rows.view(*ids.shape, self.embedding_dim)


def packed_weight(layer: nn.Module) -> PackedWeight:
    """The weight of a packed layer as kernels take it; no copy."""
    if not isinstance(layer, PackedLinear):
        raise TypeError(f"a packed layer is needed (expected PackedLinear, found {type(layer).__name__})")
    return checked(layer.codes, layer.scales, layer.zeros, layer.encoding, layer.in_features)


def dense_layer(network: nn.Module) -> str | None:
    """Path of the first Linear in `network` that is dense or in an encoding that is none of `MULTIPLIED`, or None."""
    return next((name for name, module in network.named_modules() if isinstance(module, nn.Linear)
                 or (isinstance(module, PackedLinear) and module.encoding not in MULTIPLIED)), None)


class _Annealed:
    """`eps` as a float that can change between compiled steps: it lives in a buffer, so no value is compiled in."""

    _eps: Tensor
    _eps_value: float

    @property
    def eps(self) -> float:
        """Share of the latent weight in the forward pass: 0 is fully quantized, 1 is dense."""
        return self._eps_value

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps_value = float(value)
        self._eps.fill_(self._eps_value)


class FakeQuantLinear(_Annealed, nn.Linear):
    """A Linear that computes with its weight quantized, while the optimizer moves the latent weight behind it.

    `encoding` names what the weight is rounded to, `eps` mixes the latent weight in (see `_Annealed.eps`), and `clip`
    (in scales, None for none) cuts the gradient of weights that lie further out. See `quantize.rounding.fake_quantize`.
    """

    method = "tied"
    """How weights are rounded, of `quantize.rounding.FAKE_METHODS`."""

    def __init__(self, in_features: int, out_features: int, encoding: str, eps: float = 0.0,
                 clip: float | None = None) -> None:
        super().__init__(in_features, out_features, bias=False)
        self._prepare(encoding, eps, clip)

    @classmethod
    def from_linear(cls, linear: nn.Linear, encoding: str, eps: float = 0.0,
                    clip: float | None = None) -> FakeQuantLinear:
        """Wrap the weight of `linear`; the Parameter object stays the same, so optimizers keep working."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, encoding, eps, clip)
        layer.weight = linear.weight
        layer._eps = torch.tensor(float(eps), device=linear.weight.device)
        return layer

    def _prepare(self, encoding: str, eps: float, clip: float | None) -> None:
        self.encoding, self.clip, self._eps_value = encoding, clip, float(eps)
        self.register_buffer("_eps", torch.tensor(float(eps)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, fake_quantize(self.weight, self.encoding, self._eps, self.clip, self.method))

    def to_packed(self) -> PackedTensor:
        """What the forward pass at eps 0 computes with, packed."""
        return quantize_tensor(self.weight, self.encoding, self.method)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, encoding={self.encoding!r}, eps={self.eps:g}"


class FakeQuantEmbedding(_Annealed, nn.Embedding):
    """The same for a table of embeddings: the rows that are looked up come from the quantized table."""

    encoding: str

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, encoding: str, eps: float = 0.0) -> FakeQuantEmbedding:
        """Wrap the table of `embedding`; the Parameter object stays the same."""
        with torch.device("meta"):
            layer = cls(embedding.num_embeddings, embedding.embedding_dim)
        layer.weight, layer.encoding, layer._eps_value = embedding.weight, encoding, float(eps)
        layer.register_buffer("_eps", torch.tensor(float(eps), device=embedding.weight.device), persistent=False)
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, fake_quantize(self.weight, self.encoding, self._eps))

    def to_packed(self) -> PackedTensor:
        """What the forward pass at eps 0 looks up in, packed."""
        return quantize_tensor(self.weight, self.encoding, method="tied")


class StoredLinear(nn.Linear):
    """A Linear whose weight stays in the dtype of its file (a view of the map) and computes in the dtype of x.

    Big weights are cast a block of rows at a time, so that no float32 copy of them ever exists.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, None if self.bias is None else self.bias.to(x.dtype)
        if weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, weight, bias)
        if weight.numel() * x.element_size() <= SCRATCH_BYTES:
            return F.linear(x, weight.to(x.dtype), bias)
        step = block_rows(self.in_features, x.element_size())
        y = torch.cat([F.linear(x, rows.to(x.dtype)) for rows in weight.split(step)], dim=-1)
        return y if bias is None else y + bias


class StoredEmbedding(nn.Embedding):
    """A table that stays in the dtype of its file; the rows looked up are cast to `dtype`."""

    def __init__(self, *args: Any, dtype_out: torch.dtype = torch.float32, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dtype_out = dtype_out

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.dtype_out)
