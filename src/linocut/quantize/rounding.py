"""Data-free rounding of weights to groups of each encoding, and the straight-through form for training.

Shape letters: O out-features (rows), N in-features (columns), G groups along N, g weights in a group
(128, or 64 for affine4). Weights keep the units of the source; all arithmetic is float32.

Every scale is rounded to FP16 and clamped to [2^-24, 65504] *before* codes are derived from it or an error is
measured, so what is optimised here is what a packed file decodes to. A binary 0 becomes +1; a ternary group without
a kept weight gets the smallest scale and all zeros.

Methods:
- `absmean` is BitNet's (scale mean|w|, every weight to the nearest value): in no respect better than the others, the
  baseline that they are measured against.
- `exact` is the optimum for the weights as they are: for ternary the argmax over k of S_k^2 / k, where S_k sums the k
  largest magnitudes (the threshold that results is always half the scale); for affine4 a search over clipped ranges and
  their neighbours, whose squared error is within one percent of the best that any scale and zero point give.
- `tied` is the cheap closed form that the training forward pass uses (ternary: threshold 0.75 mean|w| with the
  least-squares scale; affine4: min/max). A trained student must be stored with it, or its weights would change.
Binary and int8 (a scale of max|w| / 127) have one way only.

With `groups_per_scale` 2, neighbouring binary or ternary groups get one scale, solved over both as if they were one
group: what formats with a scale per 256 weights hold. The last of an odd number of groups keeps a scale of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from torch import Tensor

from linocut.errors import FormatError, UsageError
from linocut.formats.packed import (
    AFFINE_GROUP_SIZE,
    ENCODINGS,
    GROUP_SIZE,
    MAX_SCALE,
    MIN_SCALE,
    PackedTensor,
    dequantize,
    group_size,
    pack,
)

TERNARY_THRESHOLD = 0.75
METHODS = ("absmean", "exact", "tied")
FAKE_METHODS = ("tied", "absmean")
# Fractions of a group's range that the affine4 search tries; clipping the tails often lowers the squared error.
_AFFINE_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# What it then tries around the best of these: factors of the scale and steps of the zero point, coarse and then fine.
_AFFINE_NEIGHBOURS = (((0.97, 1.0, 1.03), (-1.0, 0.0, 1.0)), ((0.985, 1.015), (0.0,)))
# Weights per block when a whole tensor is rounded: float32 temporaries of 2 MiB stay in cache, memory stays flat.
_BLOCK_WEIGHTS = 1 << 19


def round_scale(scale: Tensor) -> Tensor:
    """Round positive float32 scales to the nearest FP16 value (ties to even) in [2^-24, 65504], as float32.

    Done in float32 and int32 arithmetic: compilers are free to drop a float32 -> float16 -> float32 round trip, and
    then a compiled training step would see other scales than the exported file holds.
    """
    scale = scale.clamp(MIN_SCALE, MAX_SCALE)
    bits = scale.view(torch.int32)
    normal = ((bits + (0xFFF + ((bits >> 13) & 1))) & -0x2000).view(torch.float32)
    subnormal = (scale + 0.5) - 0.5  # in [0.5, 1) float32 has the step 2^-24 of FP16's subnormals
    return torch.where(scale < 2.0**-14, subnormal, normal)


def quantize_binary(w: Tensor, groups_per_scale: int = 1) -> tuple[Tensor, Tensor]:
    """Nearest binary weights: values int8 [O, N] of -1/+1 and scales float32 [O, G] = mean|w| of each group, or of
    `groups_per_scale` neighbours together."""
    return _solve(w, _binary, groups_per_scale)


def quantize_ternary(w: Tensor, method: str = "exact", groups_per_scale: int = 1) -> tuple[Tensor, Tensor]:
    """Ternary weights: values int8 [O, N] of -1/0/+1 and scales float32 [O, G]; least squares if method is exact."""
    solvers = {"absmean": _ternary_absmean, "exact": _ternary_exact, "tied": _ternary_tied}
    return _solve(w, solvers[_check_method(method)], groups_per_scale)


def quantize_affine4(w: Tensor, method: str = "exact") -> tuple[Tensor, Tensor, Tensor]:
    """4-bit weights w = (code - zero) * scale: codes uint8 [O, N], scales float32 [O, G], zeros uint8 [O, G]."""
    grouped = _grouped(w, AFFINE_GROUP_SIZE)
    signed, scales, zeros = _affine_range(grouped) if _check_method(method) == "tied" else _affine_search(grouped)
    codes = (signed + zeros).to(torch.uint8).view(w.shape)
    return codes, scales.squeeze(-1), zeros.squeeze(-1).to(torch.uint8)


def quantize_int8(w: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit weights w = code * scale: codes int8 [O, N] in -127..127 and scales float32 [O, G] = max|w| / 127."""
    values, scales = _int8(_grouped(w, GROUP_SIZE))
    return values.to(torch.int8).view(w.shape), scales.squeeze(-1)


def quantize_tensor(w: Tensor, encoding: str, method: str = "exact", name: str | None = None,
                    groups_per_scale: int = 1) -> PackedTensor:
    """Round a weight [O, N] and pack it into the file layout, in row blocks with flat memory.

    `method="tied"` stores exactly the values of `fake_quantize(w, encoding)`. `groups_per_scale` has no meaning for
    affine4 and int8. `name` only serves error messages. Raises FormatError for NaN or infinite weights and for an N
    that is no multiple of the group size.
    """
    _check_encoding(encoding)
    _check_method(method)
    if w.ndim != 2:
        raise FormatError("only matrices can be packed", tensor=name, expected="2 dimensions", found=tuple(w.shape))
    blocks = []
    rows = max(1, _BLOCK_WEIGHTS // max(1, w.shape[1]))
    for start in range(0, w.shape[0], rows):
        block = w.detach()[start : start + rows].float()
        if block.numel() and not bool(torch.isfinite(block.abs().max())):  # max hands a NaN on
            raise FormatError("weights are not all finite", tensor=name, expected="finite values", found="NaN or inf",
                              advice="the source is damaged or was saved from a diverged run")
        zeros = None
        if encoding == "binary":
            values, scales = quantize_binary(block, groups_per_scale)
        elif encoding == "ternary":
            values, scales = quantize_ternary(block, method, groups_per_scale)
        elif encoding == "int8":
            values, scales = quantize_int8(block)
        else:
            values, scales, zeros = quantize_affine4(block, method)
        blocks.append(pack(values.cpu().numpy(), scales.cpu().numpy(), encoding,
                           zeros=None if zeros is None else zeros.cpu().numpy()))
    return _stack(blocks, (w.shape[0], w.shape[1]))


def relative_error(w: Tensor, packed: PackedTensor) -> float:
    """Relative squared error |w - q|^2 / |w|^2 of a packed tensor against its source (0.0 for an all-zero source)."""
    error, energy = squared_error(w, packed)
    return error / energy if energy else 0.0


def squared_error(w: Tensor, packed: PackedTensor) -> tuple[float, float]:
    """(|w - q|^2, |w|^2) summed in float64: the two numbers add up over row blocks and layers."""
    rows = max(1, _BLOCK_WEIGHTS // max(1, packed.shape[1]))
    error = energy = 0.0
    for start in range(0, packed.shape[0], rows):
        stop = min(start + rows, packed.shape[0])
        block = w.detach()[start:stop].float().cpu()
        difference = block - torch.from_numpy(dequantize(packed, slice(start, stop)))
        error += float((difference * difference).sum(dtype=torch.float64))
        energy += float((block * block).sum(dtype=torch.float64))
    return error, energy


def fake_quantize(w: Tensor, encoding: str, eps: float | Tensor = 0.0, clip: float | None = None,
                  method: str = "tied") -> Tensor:
    """The quantized weights as a differentiable function of w [O, N], for training (any device, torch.compile).

    Forward: q + eps * (w - q), with q the rounding by `method`: "tied" or, which differs for ternary alone, "absmean".
    At eps 0 the result is bit for bit what `quantize_tensor(w, encoding, method)` decodes to (for float32 w). Annealing
    eps from about 0.5 to 0 keeps weights from getting stuck in the dead zone. Backward: straight through, i.e. the
    identity; with `clip` the gradient is cut where |w| > clip * scale. Computed in float32, returned in w's dtype.
    """
    _check_encoding(encoding)
    if method not in FAKE_METHODS:
        raise UsageError(f"weights are trained with the rounding {' or '.join(FAKE_METHODS)}, not {method!r}")
    with torch.no_grad():
        grouped = _grouped(w, group_size(encoding))
        if encoding == "binary":
            values, scales = _binary(grouped)
        elif encoding == "ternary":
            values, scales = _ternary_tied(grouped) if method == "tied" else _ternary_absmean(grouped)
        elif encoding == "int8":
            values, scales = _int8(grouped)
        else:
            values, scales, _ = _affine_range(grouped)
        q = values * scales
        inside = None if clip is None else (grouped.abs() <= clip * scales).view(w.shape)
        if isinstance(eps, Tensor) or eps != 0.0:
            q = q + eps * (grouped - q)
        q = q.view(w.shape).to(w.dtype)
    # Nothing, with the gradient of w. No autograd.Function: torch 2.11 compiles one that reads a module's weight to a
    # gradient of zero.
    nothing = w - w.detach()
    return q + (nothing if inside is None else nothing * inside)


def _check_encoding(encoding: str) -> str:
    if encoding not in ENCODINGS:
        raise UsageError(f"unknown encoding {encoding!r}; choose from {', '.join(ENCODINGS)}")
    return encoding


def _check_method(method: str) -> str:
    if method not in METHODS:
        raise UsageError(f"unknown rounding method {method!r}; choose from {', '.join(METHODS)}")
    return method


def _check_groups(w: Tensor, size: int) -> None:
    if w.ndim != 2 or w.shape[1] % size:
        raise FormatError("a packed weight is a matrix of whole groups", expected=f"[O, a multiple of {size}]",
                          found=list(w.shape), advice="leave this layer dense")


def _grouped(w: Tensor, size: int) -> Tensor:
    """View w [O, N] as float32 groups [O, G, g]."""
    _check_groups(w, size)
    return w.float().reshape(w.shape[0], w.shape[1] // size, size)


def _solve(w: Tensor, solver: Callable[[Tensor], tuple[Tensor, Tensor]],
           groups_per_scale: int) -> tuple[Tensor, Tensor]:
    """(values, scales) of the groups of w; as many neighbours as fit share a scale, what is left over does not."""
    _check_groups(w, GROUP_SIZE)
    together = GROUP_SIZE * groups_per_scale
    even = w.shape[-1] - w.shape[-1] % together
    parts = [(w[:, :even], together)] if even else []
    parts += [(w[:, even:], GROUP_SIZE)] if even < w.shape[1] or not even else []
    values, scales = [], []
    for part, size in parts:
        codes, scale = solver(_grouped(part, size))
        values.append(codes.to(torch.int8).view(part.shape))
        scales.append(scale.squeeze(-1).repeat_interleave(size // GROUP_SIZE, dim=1))
    return (values[0], scales[0]) if len(parts) == 1 else (torch.cat(values, 1), torch.cat(scales, 1))


def _binary(g: Tensor) -> tuple[Tensor, Tensor]:
    scales = round_scale(g.abs().mean(-1, keepdim=True))
    return torch.where(g >= 0, 1.0, -1.0), scales


def _ternary_absmean(g: Tensor) -> tuple[Tensor, Tensor]:
    scales = round_scale(g.abs().mean(-1, keepdim=True))
    return (g / scales).round().clamp(-1.0, 1.0), scales


def _ternary_tied(g: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = g.abs()
    keep = magnitude > TERNARY_THRESHOLD * magnitude.mean(-1, keepdim=True)
    kept = (magnitude * keep).sum(-1, keepdim=True)
    scales = round_scale(kept / keep.sum(-1, keepdim=True).clamp_min(1))
    return g.sign() * keep, scales


def _ternary_exact(g: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = g.abs()
    sums = _descending(magnitude).cumsum(-1)
    counts = torch.arange(1, g.shape[-1] + 1, dtype=torch.float32, device=g.device)
    best = (sums * sums / counts).argmax(-1, keepdim=True)
    scales = round_scale(sums.gather(-1, best) / (best + 1))
    # At the optimum the threshold is half the scale. Taking it from the *stored* scale keeps the codes nearest even
    # where rounding or clamping moved the scale. A group of weights below 2^-25 becomes all zeros, and only such a
    # group does: its scale is the smallest already.
    return g.sign() * (magnitude > 0.5 * scales), scales


def _descending(magnitude: Tensor) -> Tensor:
    """Sort each group by falling magnitude."""
    if magnitude.device.type != "cpu":
        return magnitude.sort(-1, descending=True).values
    # torch's CPU sort also carries indices; numpy's plain sort is about 20 times faster.
    ascending = torch.from_numpy(np.sort(-magnitude.numpy(), axis=-1))
    return ascending.neg_()


def _int8(g: Tensor) -> tuple[Tensor, Tensor]:
    scales = round_scale(g.abs().amax(-1, keepdim=True) / 127.0)
    return (g / scales).round().clamp(-127.0, 127.0), scales


def _affine_range(g: Tensor, shrink: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(codes - zero, scales, zeros) as float32, from the range of each group times `shrink`; 0 is always exact."""
    low = g.amin(-1, keepdim=True).clamp(max=0.0) * shrink
    high = g.amax(-1, keepdim=True).clamp(min=0.0) * shrink
    scales = round_scale((high - low) / 15.0)
    zeros = (-low / scales).round().clamp(0.0, 15.0)
    return _nearest(g, scales, zeros), scales, zeros


def _nearest(g: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return torch.minimum(torch.maximum((g / scales).round(), -zeros), 15.0 - zeros)


def _affine_search(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best of several clipped ranges per group, then of its neighbours, then a least-squares step of the scale."""
    first = _affine_range(g)
    best: tuple[Tensor, ...] = (*first, _squared(g, first[0], first[1]))
    for shrink in _AFFINE_SHRINKS[1:]:
        best = _better(g, best, _affine_range(g, shrink))
    for factors, steps in _AFFINE_NEIGHBOURS:
        _, scales, zeros, _ = best
        for factor, step in product(factors, steps):
            if (factor, step) != (1.0, 0.0):
                best = _better(g, best, _affine_at(g, scales * factor, (zeros + step).clamp(0.0, 15.0)))
    signed, _, zeros, _ = best
    refined = (g * signed).sum(-1, keepdim=True) / signed.square().sum(-1, keepdim=True).clamp_min(1.0)
    signed, scales, zeros, _ = _better(g, best, _affine_at(g, refined, zeros))
    return signed, scales, zeros


def _affine_at(g: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales = round_scale(scales)
    return _nearest(g, scales, zeros), scales, zeros


def _better(g: Tensor, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    error = _squared(g, new[0], new[1])
    wins = error < old[3]
    return tuple(torch.where(wins, fresh, kept) for fresh, kept in zip((*new, error), old, strict=True))


def _squared(g: Tensor, signed: Tensor, scales: Tensor) -> Tensor:
    return (signed * scales).sub_(g).square_().sum(-1, keepdim=True)


def _stack(blocks: list[PackedTensor], shape: tuple[int, int]) -> PackedTensor:
    """Join row blocks into one packed tensor."""
    if len(blocks) == 1:
        return blocks[0]
    zeros = None if blocks[0].zeros is None else np.concatenate([block.zeros for block in blocks])
    return PackedTensor(blocks[0].encoding, shape, np.concatenate([block.codes for block in blocks]),
                        np.concatenate([block.scales for block in blocks]), zeros)
