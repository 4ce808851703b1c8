"""The ways of a packed product on a GPU, each with what it takes and what it costs in accuracy.

| route    | activations | weights                            | product            | error beside the activations'     |
|----------|-------------|------------------------------------|--------------------|-----------------------------------|
| packed   | int8        | decoded in the product             | Triton, int8       | none                              |
| unpacked | int8        | int8 in scratch                    | Triton, int8       | none                              |
| rows     | rows        | int8 in scratch                    | Triton, int8       | none                              |
| folded   | rows        | int8 in scratch, scales in 7 bits  | Triton, int8       | scales: 0.4 % of a row's largest |
| fp8      | fp8         | FP8 in scratch                     | Triton, FP8        | none                              |
| blocks   | fp8         | FP8 in scratch                     | torch's, FP8 1x128 | none                              |
| library  | float       | bfloat16 or float16 in scratch     | torch's            | rounding of weights               |
| fused    | float       | decoded in the product             | Triton, floats     | none                              |

Activations alone cost, on normally distributed values: int8 0.6 %, rows 0.9 %, FP8 2.6 % of the norm of a result.
Scratch is shared by all layers: a weight is unpacked, multiplied and forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linocut.errors import KernelError
from linocut.formats.packed import GROUP_SIZE
from linocut.kernels.gpu import decode, gemm, runtime
from linocut.kernels.gpu.accuracy import KIND
from linocut.kernels.gpu.activations import Activations
from linocut.kernels.gpu.gemm import Tile
from linocut.kernels.problem import PackedWeight

FEW_TOKENS = 128
DECODING = ("packed", "fused")
"""Routes that decode weights for every block of tokens anew."""
LIBRARY_ROWS = 9216
"""Rows of W that are decoded to floats at a time: 57 MB at klein's width."""


@dataclass(frozen=True)
class Route:
    """A way of computing y = x @ W.T, by name, with the tile of its product if that is Triton's."""

    name: str
    tile: Tile | None = None

    @property
    def kind(self) -> str:
        """The activations that it reads."""
        return KIND[self.name]


@dataclass(frozen=True)
class Shape:
    """M tokens, N in-features, O out-features of an encoding."""

    m: int
    n: int
    o: int
    encoding: str


def why_not(name: str, shape: Shape, device: str) -> str | None:
    """None if the route `name` can run this shape on this device, else the reason."""
    reason = runtime.why_not(device)
    if reason is not None:
        return reason
    if shape.encoding not in ("binary", "ternary"):
        return f"{shape.encoding} weights are decoded (expected binary or ternary)"
    if name != "library" and runtime.why_no_products(device) is not None:
        return runtime.why_no_products(device)
    if KIND[name] == "fp8" and runtime.capability(device) < runtime.FP8:
        return "FP8 needs compute capability 8.9"
    if name == "blocks":
        if runtime.capability(device)[0] != runtime.COPY_ENGINE[0]:
            return "torch's FP8 products in blocks need compute capability 9.0"
        if (runtime.interpreted() or not hasattr(F, "scaled_mm")
                or "out" not in torch.ops.aten._scaled_mm_v2.overloads()):
            return "torch has no scaled_mm here (expected torch 2.10 or newer, with CUDA)"
        if shape.m % 4 or shape.o % 16:
            return "scales must lie at multiples of 16 bytes (expected M a multiple of 4 and O of 16)"
    return None


def tiles(name: str, shape: Shape, device: str) -> list[Tile | None]:
    """Tiles worth a measurement for a route, likely best first, as far as this GPU has the shared memory for them.
    Chosen by the registers that ptxas reports: none spills."""
    if name in ("blocks", "library"):
        return [None]
    found, limit = _tiles(name, shape, device), runtime.shared_memory(device)
    return [tile for tile in found if tile.shared_bytes <= limit] or [min(found, key=lambda tile: tile.shared_bytes)]


def _tiles(name: str, shape: Shape, device: str) -> list[Tile]:
    few = shape.m <= FEW_TOKENS
    if name == "fused":
        return [Tile(16 if shape.m <= 16 else 32, 64, 4, 4, 1), Tile(64, 128, 8, 3)]
    if name == "packed":
        return [Tile(16 if shape.m <= 16 else 32, 64, 4, 4, 1), Tile(64, 64, 4, 3), Tile(32, 128, 8, 3)]
    if runtime.capability(device) < runtime.COPY_ENGINE:
        return [Tile(64, 64, 4, 3)] if few else [Tile(128, 128, 8, 3), Tile(64, 128, 4, 3), Tile(128, 64, 4, 3)]
    if few:
        return [Tile(64, 64, 4, 4, bulk=True), Tile(64, 128, 4, 4, bulk=True)]
    if name == "folded":
        return [Tile(128, 256, 8, 4, bulk=True), Tile(256, 128, 8, 4, bulk=True), Tile(128, 128, 8, 3, bulk=True),
                Tile(128, 128, 4, 3, bulk=True), Tile(128, 256, 8, 3, 16, bulk=True), Tile(128, 128, 8, 4)]
    return [Tile(128, 128, 8, 4, bulk=True), Tile(64, 128, 4, 3, bulk=True), Tile(128, 64, 4, 3, bulk=True),
            Tile(64, 64, 4, 4, bulk=True, registers=128), Tile(256, 64, 8, 3, bulk=True), Tile(128, 128, 8, 3)]


class Scratch:
    """Memory for one weight at a time, as large as the largest that came by. Not for two streams at once."""

    def __init__(self, device: torch.device | str, nbytes: int = 0) -> None:
        self._bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._bytes.numel()

    def take(self, *wanted: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
        """Tensors of these shapes and dtypes, side by side, each from a multiple of 256 bytes on."""
        sizes = [-(-torch.Size(shape).numel() * dtype.itemsize // 256) * 256 for shape, dtype in wanted]
        if sum(sizes) > self.nbytes:
            self._bytes = torch.empty(sum(sizes), dtype=torch.uint8, device=self._bytes.device)
        taken, first = [], 0
        for (shape, dtype), size in zip(wanted, sizes, strict=True):
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            taken.append(self._bytes[first : first + nbytes].view(dtype).view(shape))
            first += size
        return taken


def scratch_bytes(name: str, n: int, o: int) -> int:
    """Bytes that a route takes of the scratch for W[O, N]."""
    if name in DECODING:
        return 0
    if name == "library":
        return min(o, LIBRARY_ROWS) * n * 2
    return o * n + 4 * o * (1 if name == "folded" else n // GROUP_SIZE) + 512


def run(route: Route, act: Activations, weight: PackedWeight, out: Tensor, scratch: Scratch) -> None:
    """out[M, O] = act @ W.T by `route`. `out` is bfloat16, float16 or float32; its rows may lie apart."""
    if act.kind != route.kind or act.n != weight.n:
        raise KernelError(f"activations do not fit the product (expected {route.kind} with N = {weight.n}, found "
                          f"{act.kind} with N = {act.n})")
    o, n, groups = weight.o, weight.n, weight.n // GROUP_SIZE
    if not act.m or not o:
        return
    if route.name == "library":
        _library(act.values, weight, out, scratch)
    elif route.name in DECODING:
        assert route.tile is not None
        gemm.packed_product(act, weight, out, route.tile)
    elif route.name == "folded":
        values, scales = scratch.take(((o, n), torch.int8), ((o,), torch.float32))
        decode.fold(weight, values, scales)
        _product(route, act, values, scales, out)
    else:
        dtype = torch.float8_e4m3fn if route.kind == "fp8" else torch.int8
        values, scales = scratch.take(((o, n), dtype), ((groups, o), torch.float32))
        decode.unpack(weight, values, scales)
        if route.name == "blocks":
            _blocks(act, values, scales, out)
        else:
            _product(route, act, values, scales, out)


def _product(route: Route, act: Activations, values: Tensor, scales: Tensor, out: Tensor) -> None:
    assert route.tile is not None
    gemm.product(act, values, scales, out, route.tile)


def _library(x: Tensor, weight: PackedWeight, out: Tensor, scratch: Scratch) -> None:
    for start in range(0, weight.o, LIBRARY_ROWS):
        rows = weight.rows(start, min(start + LIBRARY_ROWS, weight.o))
        (decoded,) = scratch.take(((rows.o, rows.n), x.dtype))
        decode.decode(rows, decoded)
        part = out[:, start : start + rows.o]
        if out.dtype == x.dtype:
            torch.mm(x, decoded.t(), out=part)
        else:
            part.copy_(x @ decoded.t())


def _blocks(act: Activations, values: Tensor, scales: Tensor, out: Tensor) -> None:
    """torch's product with a scale per 128 values of both operands."""
    recipe: Any = F.ScalingType.BlockWise1x128
    assert act.scales is not None
    scaled_product(act.values, values, act.scales.contiguous().t(), scales.t(), recipe, out)


def scaled_product(a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, recipe: Any, out: Tensor) -> None:
    """`torch.nn.functional.scaled_mm` of a[M, N] and b[O, N], which has no `out`; the operator behind it has.

    To copy the widest product of klein would take a fifth of its time, and memory that nothing else needs.
    """
    straight = out.dtype == torch.bfloat16 and out.is_contiguous()
    into = out if straight else torch.empty(out.shape, dtype=torch.bfloat16, device=out.device)
    torch.ops.aten._scaled_mm_v2.out(a, b.t(), [a_scales], [recipe.value], [], [b_scales], [recipe.value], [], None,
                                     torch.bfloat16, out=into)
    if not straight:
        out.copy_(into)
