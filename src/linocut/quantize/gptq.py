"""Rounding that looks at the layer's inputs: GPTQ with group scales, joint scale refit and coordinate descent.

The weights of a layer y = x @ W.T are rounded so that the *outputs* stay close: with H = sum of x x^T over calibration
tokens the error is tr((W - Q) H (W - Q)^T). Every result is plain codes and one scale per group of 128.

Steps (Frantar et al. 2023, "GPTQ"; Behdin et al. 2023, "QuantEase" for the coordinate descent):
1. columns are rounded in order and each one's error is passed on to the columns that follow, a group's scale being
   chosen from its weights as they stand when it is reached;
2. given the codes, the scales of a row are the exact least-squares solution, all groups at once;
3. sweeps of coordinate descent set each code to its best value given all others, with step 2 after each sweep.

Shape letters: O out-features, N in-features, G groups, g weights in a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linocut.errors import FormatError, UsageError
from linocut.formats.packed import GROUP_SIZE, MAX_SCALE, MIN_SCALE
from linocut.quantize.columns import Columns, TorchColumns
from linocut.quantize.rounding import quantize_binary, quantize_ternary, round_scale


def gptq(weight: Tensor, hessian: Tensor, encoding: str, damping: float = 0.05,
         sweeps: int = 3, columns: Columns | None = None) -> tuple[Tensor, Tensor]:
    """Round weight [O, N] against hessian [N, N] (any positive multiple of sum x x^T), both float.

    Returns values int8 [O, N] and scales float32 [O, G], rounded to what FP16 holds. `damping` is a share of the mean
    diagonal, added to it; few calibration tokens want more. `columns` computes the inner loops (torch's, unless given).
    Raises UsageError for an encoding other than binary or ternary and FormatError for shapes that do not fit or values
    that are not finite.
    """
    if encoding not in ("binary", "ternary"):
        raise UsageError(f"GPTQ rounds to binary or ternary, not {encoding!r}")
    inputs = weight.shape[1]
    if inputs % GROUP_SIZE or hessian.shape != (inputs, inputs):
        raise FormatError("weight and hessian do not fit", expected=f"N a multiple of {GROUP_SIZE} and H [N, N]",
                          found=f"{list(weight.shape)} and {list(hessian.shape)}")
    if not (bool(torch.isfinite(weight).all()) and bool(torch.isfinite(hessian).all())):
        raise FormatError("weights or hessian are not finite", expected="finite values", found="NaN or inf")
    w = weight.float()
    h = hessian.float() / hessian.diagonal().float().mean().clamp_min(1e-30)
    h = h + damping * torch.eye(inputs, device=h.device)
    columns = columns or TorchColumns()
    codes, scales = _propagate(w, h, encoding, columns)
    codes, scales = refit_scales(w, h, codes)
    for _ in range(sweeps):
        codes = _descend(w, h, codes, scales, encoding, columns)
        codes, scales = refit_scales(w, h, codes)
    return codes.to(torch.int8), scales


def outer_sum(y: Tensor, x: Tensor) -> Tensor:
    """Sum of y x^T over tokens y [n, M] and x [n, N]: float32 [M, N].

    On a CUDA GPU of what bfloat16 keeps of both, as layers there see them anyway: several times faster than float32.
    """
    if _multiplies_bfloat16(x.device):
        return torch.mm(y.bfloat16().T, x.bfloat16(), out_dtype=torch.float32)
    return y.float().T @ x.float()


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether torch has products of bfloat16 with float32 sums there: from 2.8 on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return version >= (2, 8) and torch.cuda.get_device_capability(device) >= (8, 0)


def corrected(weight: Tensor, hessian: Tensor, cross: Tensor, share: float, damping: float = 0.05) -> Tensor:
    """The weights [O, N] whose outputs on inputs x come nearest those of `weight` on other inputs y, or a share of the
    way there (0 to 1): what a layer has to round so that it makes up for rounded layers before it.

    `hessian` is the sum of x x^T, `cross` that of y x^T, with y what the layer would see if nothing were rounded.
    """
    if not share:
        return weight
    h = hessian.double()
    ridge = damping * h.diagonal().mean().clamp_min(1e-30) * torch.eye(len(h), device=h.device, dtype=h.dtype)
    step = torch.linalg.solve(h + ridge, (weight.double() @ (cross.double() - h)).T).T
    result: Tensor = weight + share * step.to(weight.dtype)
    return result


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Relative squared error of the layer's outputs over the calibration tokens."""
    w, d, h = weight.double(), (weight - quantized).double(), hessian.double()
    return float(((d @ h) * d).sum() / ((w @ h) * w).sum())


def refit_scales(w: Tensor, h: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scales [O, G] of each row given its codes, rounded to FP16; a negative scale flips its codes."""
    outputs, inputs = w.shape
    count = inputs // GROUP_SIZE
    grouped = codes.view(outputs, count, GROUP_SIZE)
    wh = (w @ h).view(outputs, count, GROUP_SIZE)
    right = (grouped * wh).sum(-1)
    left = torch.empty(outputs, count, count, device=w.device)
    for i in range(count):
        product = grouped[:, i] @ h[i * GROUP_SIZE:(i + 1) * GROUP_SIZE]
        left[:, i] = (product.view(outputs, count, GROUP_SIZE) * grouped).sum(-1)
    ridge = 1e-4 * left.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-12)
    left = left + ridge[:, None, None] * torch.eye(count, device=w.device)
    scales = torch.linalg.solve(left, right[..., None]).squeeze(-1)
    flipped = torch.where(scales[..., None] < 0, -grouped, grouped).view(outputs, inputs)
    return flipped, round_scale(scales.abs().clamp(MIN_SCALE, MAX_SCALE))


def _propagate(w: Tensor, h: Tensor, encoding: str, columns: Columns) -> tuple[Tensor, Tensor]:
    """GPTQ's pass over the columns. Returns float codes [O, N] and scales [O, G]."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h.double()))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    w, codes, scales = w.clone(), [], []
    for begin in range(0, w.shape[1], GROUP_SIZE):
        group = slice(begin, begin + GROUP_SIZE)
        block = w[:, group]
        _, scale = quantize_binary(block) if encoding == "binary" else quantize_ternary(block)
        code, errors = columns.propagate(block, scale, upper[group, group], encoding)
        w[:, group.stop:] -= errors @ upper[group, group.stop:]
        codes.append(code)
        scales.append(scale)
    return torch.cat(codes, dim=1), torch.cat(scales, dim=1)


def _descend(w: Tensor, h: Tensor, codes: Tensor, scales: Tensor, encoding: str, columns: Columns) -> Tensor:
    """One sweep: each code to its best value, given all the others."""
    codes = codes.clone()
    residual = (w - codes * scales.repeat_interleave(GROUP_SIZE, dim=1)) @ h
    for index, begin in enumerate(range(0, w.shape[1], GROUP_SIZE)):
        group = slice(begin, begin + GROUP_SIZE)
        codes[:, group], moved = columns.descend(residual[:, group], codes[:, group], scales[:, index:index + 1],
                                                 h[group, group], encoding)
        residual -= moved @ h[group]
    return codes
