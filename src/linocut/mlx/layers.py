"""Weights out of a checkpoint, and the layers that compute with them on mlx.

A network asks a `Source` for each tensor by its own name; names and shapes are checked then, while bytes are read when
a layer first runs. Packed weights become mlx's words layer by layer: binary ones are our own bytes, five trits a byte
become two-bit slots. All of it is exact, since scales are copied or doubled and never fitted.

Shape letters: N in-features, O out-features, V embedding rows, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from linocut.errors import FormatError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.names import BFLCheckpoint, is_bfl
from linocut.formats.packed import PackedTensor, group_size, unpack, unpack_zeros
from linocut.formats.slots import BITS, affine_parts, join_pairs, to_slots
from linocut.formats.weight import Weight, Weights, named, row_blocks, weights_of

_LARGEST = 65504.0  # of float16


class Source:
    """The weights of one network under the network's names; each is taken once and must have the shape of the config.

    `rename` gives the network's name of a checkpoint's tensor, or None for one that it has no use for. With `keep`
    layers hold their weights once they have been read; without, they read them each time and hold nothing. `dtype` is
    that of the activations. A FLUX.2 single file with the original names is accepted.
    """

    def __init__(self, checkpoint: Checkpoint | BFLCheckpoint, dtype: mx.Dtype, keep: bool = True,
                 rename: Callable[[str], str | None] = lambda name: name) -> None:
        if isinstance(checkpoint, Checkpoint) and is_bfl(checkpoint.names):
            checkpoint = BFLCheckpoint(checkpoint)
        self.dtype, self.keep = dtype, keep
        self._left: Weights = {}
        for name, weight in named(checkpoint.path, weights_of(checkpoint)).items():
            renamed = rename(f"{name}.weight" if weight.packed else name)
            if renamed is not None:
                self._left[renamed] = weight

    def take(self, name: str, shape: tuple[int, ...]) -> Weight:
        """The weight `name`, not yet read. Raises FormatError if it is missing or has another shape."""
        weight = self._left.pop(name, None)
        if weight is None:
            raise FormatError("tensor is missing", tensor=name, expected=list(shape), found="nothing",
                              advice="is this the checkpoint of another model, or an incomplete download?")
        if weight.shape != shape:
            raise FormatError("tensor has another shape than the config says", tensor=name, expected=list(shape),
                              found=list(weight.shape))
        return weight

    def array(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype | None = None) -> mx.array:
        """A small dense tensor, read at once and cast; default dtype: that of the activations."""
        weight = self.take(name, shape)
        if weight.packed:
            raise FormatError("packed weight for something that is no Linear and no Embedding", tensor=name)
        array = _dense(weight).astype(self.dtype if dtype is None else dtype)
        mx.eval(array)  # what is left to compute belongs to the stream of this thread
        return array

    def finish(self) -> None:
        """Raise FormatError if there are tensors that nobody asked for."""
        if self._left:
            raise FormatError(f"tensor is not part of this network ({len(self._left)} in all)",
                              tensor=min(self._left), advice="is this the checkpoint of another model?")


def to_mlx(array: np.ndarray, kind: str = "") -> mx.array:
    """A numpy array as an array of mlx, copied; with `kind` "BF16" its uint16 values are bfloat16 bits."""
    copied = mx.array(array)
    return copied.view(mx.bfloat16) if kind == "BF16" else copied


def _dense(weight: Weight) -> mx.array:
    """A dense tensor in the dtype that it is stored in."""
    rows = weight.rows(0, weight.shape[0] if weight.shape else 1)
    assert isinstance(rows, np.ndarray)
    array = to_mlx(rows, weight.kind)
    mx.eval(array)
    weight.release()
    return array


# ------------------------------------------------------------------------------------------------------ packed

class Packed(NamedTuple):
    """A weight [O, N] as mlx takes it: words uint32 [O, N bits / 32], weight = code * scale + bias per group."""

    words: mx.array
    scales: mx.array
    biases: mx.array
    group: int
    bits: int

    def matmul(self, x: mx.array) -> mx.array:
        """x [..., N] @ W.T in x's dtype. Four-bit weights, whose offsets 16 bits do not hold, compute in float32."""
        y = mx.quantized_matmul(x, self.words, self.scales, self.biases, transpose=True, group_size=self.group,
                                bits=self.bits)
        return y.astype(x.dtype)

    def dequantize(self) -> mx.array:
        """float32 [O, N], exactly."""
        return mx.dequantize(self.words, self.scales.astype(mx.float32), self.biases.astype(mx.float32),
                             group_size=self.group, bits=self.bits)


def pack(packed: PackedTensor, dtype: mx.Dtype = mx.float32) -> Packed:
    """Rows of a packed weight as mlx takes them for activations of `dtype`."""
    words, scales, biases, bits = _recoded(packed)
    return _as_mlx(packed.encoding, [words], [scales], [biases], bits, dtype)


def _read_packed(weight: Weight, dtype: mx.Dtype) -> Packed:
    """A packed weight out of its file, re-coded some rows at a time."""
    blocks = []
    for first, last in row_blocks(weight.shape):
        rows = weight.rows(first, last)
        assert isinstance(rows, PackedTensor)
        blocks.append(_recoded(rows))
    weight.release()
    words, scales, biases, bits = zip(*blocks, strict=True)
    return _as_mlx(weight.kind, words, scales, biases, bits[0], dtype)


def _recoded(packed: PackedTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(words, scales float32, biases float32, bits)."""
    if packed.encoding == "binary" and why_not_one_bit() is not None:
        codes = (unpack(packed) + np.int8(1)).view(np.uint8)  # 0 and 2: a ternary weight without zeros
        scales = packed.scales.astype(np.float32)
        return join_pairs(codes).view("<u4"), scales, -scales, 2
    zeros = unpack_zeros(packed) if packed.encoding == "affine4" else None
    return np.ascontiguousarray(to_slots(packed)).view("<u4"), *affine_parts(packed, zeros), BITS[packed.encoding]


def _as_mlx(encoding: str, words: Any, scales: Any, biases: Any, bits: int, dtype: mx.Dtype) -> Packed:
    joined, factors, offsets = (np.concatenate(parts) for parts in (words, scales, biases))
    kept = mx.float32
    if encoding != "affine4" and (not factors.size or float(factors.max()) <= _LARGEST):
        # Stored in 16 bits, and exactly so unless activations are bfloat16, to which weights are then rounded too.
        kept = mx.bfloat16 if dtype == mx.bfloat16 else mx.float16
    packed = Packed(mx.array(joined), mx.array(factors).astype(kept), mx.array(offsets).astype(kept),
                    group_size(encoding), bits)
    mx.eval(packed.words, packed.scales, packed.biases)
    return packed


@lru_cache(maxsize=1)
def why_not_one_bit() -> str | None:
    """None if this mlx multiplies by 1-bit weights rightly here, else the reason; binary weights then take two bits."""
    words = np.array([[0x0F0F0F0F] * 4] * 32, dtype=np.uint32)
    scales = np.full((32, 1), 2.0, dtype=np.float32)
    try:
        y = mx.quantized_matmul(mx.arange(128, dtype=mx.float32)[None], mx.array(words), mx.array(scales),
                                mx.array(-scales / 2), transpose=True, group_size=128, bits=1)
        mx.eval(y)
    except (ValueError, RuntimeError) as error:
        return f"this mlx has no product with 1-bit weights ({str(error).splitlines()[0][:100]})"
    expected = sum(k if k % 8 < 4 else -k for k in range(128))
    found = np.array(y)
    return None if (found == expected).all() else f"1-bit products are wrong (expected {expected}, found {found[0, 0]})"


# ------------------------------------------------------------------------------------------------------ layers

class Linear:
    """y = x @ W.T (+ bias) with W [O, N] packed or dense; called with x [..., N], gives x's dtype."""

    def __init__(self, source: Source, name: str, inputs: int, outputs: int, bias: bool = False) -> None:
        self._weight, self._source = source.take(f"{name}.weight", (outputs, inputs)), source
        self._bias = source.array(f"{name}.bias", (outputs,)) if bias else None
        self._held: Packed | mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        weight = self.read() if self._held is None else self._held
        if self._source.keep:
            self._held = weight
        y = weight.matmul(x) if isinstance(weight, Packed) else (x @ weight.T).astype(x.dtype)
        return y if self._bias is None else y + self._bias

    def read(self) -> Packed | mx.array:
        """The weight as it is multiplied, out of its file."""
        return _read_packed(self._weight, self._source.dtype) if self._weight.packed else _dense(self._weight)


class Embedding:
    """Rows of a table [V, D], packed or dense. Only the rows asked for are read."""

    def __init__(self, source: Source, name: str, rows: int, width: int) -> None:
        self._weight, self._dtype = source.take(f"{name}.weight", (rows, width)), source.dtype

    def __call__(self, ids: np.ndarray) -> mx.array:
        """[T, D] for token ids int [T]."""
        # One read per different token: prompts have few, and most rows of a prompt are padding.
        different, places = np.unique(ids, return_inverse=True)
        rows = mx.concatenate([self._row(int(token)) for token in different])
        mx.eval(rows)
        self._weight.release()
        return rows[mx.array(places.reshape(-1))]

    def _row(self, token: int) -> mx.array:
        row = self._weight.rows(token, token + 1)
        if isinstance(row, PackedTensor):
            return pack(row).dequantize().astype(self._dtype)
        return to_mlx(row, self._weight.kind).astype(self._dtype)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / rms(x) * weight over the last axis, computed in float32 and returned so."""
    return mx.fast.rms_norm(x.astype(mx.float32), weight.astype(mx.float32), eps)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x)."""
    return x * mx.sigmoid(x)


def heads(x: mx.array, width: int) -> mx.array:
    """[B, S, H K] to [B, H, S, K] with heads of K = `width` channels."""
    return x.reshape(*x.shape[:2], -1, width).transpose(0, 2, 1, 3)


def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    """Attention of q [B, H, S, K] to k and v of H or fewer heads, as [B, S, H K]. `mask` is True where it may look."""
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
    return y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1)
