"""Changes of a FLUX.2 block's weights that leave what the block computes as it is and round with less error.

Two pairs of layers meet in a product that can be split otherwise:
- *values and output*: attention only averages values over tokens, so the values of a head may be turned by any
  orthogonal matrix R [K, K] if the output layer turns them back. R is found by iterative quantization (Gong & Lazebnik
  2011): round the turned weights, turn the weights towards what they were rounded to, and again. A head is as wide as a
  group, so the output layer's groups are turned each by its own R. In a double block values of both streams mix in the
  attention: one R serves to_v, add_v_proj, to_out and to_add_out.
- *up and down*: a SwiGLU's hidden channel j may be made a_j times larger by the up rows if the down columns make it
  smaller again. With a_j the mean magnitude of the down column, columns of very different size no longer share a group.
  A row's own factor goes into its scales.

Nothing in between (layer norm, SwiGLU, the norms of q and k) lets other layers be turned.

Shape letters: O out-features, D width, H heads, K head width, M MLP width.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from linocut.formats.packed import GROUP_SIZE
from linocut.quantize.rounding import quantize_binary, quantize_ternary

_ITERATIONS = 32  # of the better of two starts, which this many show:
_TRIALS = 8
_NEWTON = 12


def fold_block(weights: MutableMapping[str, Tensor], encodings: Mapping[str, str], head_width: int) -> list[str]:
    """Fold the layers of one block, in place; names are those inside a block, such as "attn.to_v".

    `weights` are float [O, N] of all Linears of the block, `encodings` says which of them will be binary or ternary:
    a pair is folded only if all its layers are. Returns the folds made: "values", "hidden", "hidden of the text".
    """
    if "attn.to_qkv_mlp_proj" in weights:
        return _fold_single(weights, encodings, head_width)
    made = []
    values, outputs = ("attn.to_v", "attn.add_v_proj"), ("attn.to_out.0", "attn.to_add_out")
    kinds = {encodings.get(name) for name in (*values, *outputs)}
    if head_width == GROUP_SIZE and len(kinds) == 1 and kinds <= {"binary", "ternary"}:
        turn = head_rotations([weights[name] for name in outputs], str(kinds.pop()))
        for value, output in zip(values, outputs, strict=True):
            weights[value] = turn_rows(weights[value], turn)
            weights[output] = turn_columns(weights[output], turn)
        made.append("values")
    for stream, name in (("ff", "hidden"), ("ff_context", "hidden of the text")):
        up, down = f"{stream}.linear_in", f"{stream}.linear_out"
        if {encodings.get(up), encodings.get(down)} <= {"binary", "ternary"}:
            size = hidden_sizes(weights[down])
            weights[up] = _scale_rows(weights[up], size, weights[up].shape[0] - len(size))
            weights[down] = weights[down] / size
            made.append(name)
    return made


def _fold_single(weights: MutableMapping[str, Tensor], encodings: Mapping[str, str], head_width: int) -> list[str]:
    into, out = "attn.to_qkv_mlp_proj", "attn.to_out"
    kinds = {encodings.get(into), encodings.get(out)}
    if not kinds <= {"binary", "ternary"}:
        return []
    width = weights[out].shape[0]
    rows, columns = weights[into].clone(), weights[out].clone()
    made = ["hidden"]
    if head_width == GROUP_SIZE:
        turn = head_rotations([columns[:, :width]], str(encodings[out]))
        rows[2 * width : 3 * width] = turn_rows(rows[2 * width : 3 * width], turn)
        columns[:, :width] = turn_columns(columns[:, :width], turn)
        made.insert(0, "values")
    size = hidden_sizes(columns[:, width:])
    columns[:, width:] /= size
    weights[into], weights[out] = _scale_rows(rows, size, len(rows) - len(size)), columns
    return made


def head_rotations(outputs: Sequence[Tensor], encoding: str) -> Tensor:
    """One orthogonal matrix per head, [H, K, K], that makes all `outputs` [O, H * K] round with the least error.

    Starts from the Hadamard matrix and from none; what comes out better is taken head by head, so that no head ever
    rounds worse than it did.
    """
    stacked = torch.cat([weight.float() for weight in outputs])
    heads = stacked.unflatten(1, (-1, GROUP_SIZE)).transpose(0, 1).contiguous()  # [H, O, K]
    starts = (torch.eye(GROUP_SIZE, device=heads.device), _hadamard(GROUP_SIZE).to(heads.device))
    first, second = (_improve(heads, start.expand(len(heads), -1, -1), encoding, _TRIALS) for start in starts)
    better = (_turned_error(heads, second, encoding) < _turned_error(heads, first, encoding))[:, None, None]
    return _improve(heads, torch.where(better, second, first), encoding, _ITERATIONS - _TRIALS)


def _improve(heads: Tensor, turn: Tensor, encoding: str, iterations: int) -> Tensor:
    for _ in range(iterations):
        turn = _nearest_rotation(heads.transpose(1, 2) @ _rounded(heads @ turn, encoding))
    return turn


def _turned_error(heads: Tensor, turn: Tensor, encoding: str) -> Tensor:
    turned = heads @ turn
    return (turned - _rounded(turned, encoding)).square().sum((1, 2))


def turn_rows(weight: Tensor, turn: Tensor) -> Tensor:
    """The rows of a layer that makes values [H * K, N], each head's turned so that v becomes v @ R."""
    heads = weight.unflatten(0, (-1, GROUP_SIZE))
    turned: Tensor = turn.transpose(1, 2).to(weight.dtype) @ heads
    return turned.flatten(0, 1)


def turn_columns(weight: Tensor, turn: Tensor) -> Tensor:
    """The columns of the layer that reads them [O, H * K]: W @ R head by head."""
    heads = weight.unflatten(1, (-1, GROUP_SIZE)).transpose(0, 1)
    turned: Tensor = heads @ turn.to(weight.dtype)
    return turned.transpose(0, 1).flatten(1)


def hidden_sizes(down: Tensor) -> Tensor:
    """Factors a [M] of the hidden channels: mean magnitudes of the columns of `down` [D, M], with geometric mean 1."""
    size = down.abs().float().mean(0)
    size = size.clamp_min(1e-3 * float(size.mean()) + 1e-30)
    return (size / size.log().mean().exp()).to(down.dtype)


def _scale_rows(weight: Tensor, size: Tensor, first: int) -> Tensor:
    result = weight.clone()
    result[first:] *= size[:, None]
    return result


def _rounded(heads: Tensor, encoding: str) -> Tensor:
    flat = heads.flatten(0, 1)
    values, scales = quantize_binary(flat) if encoding == "binary" else quantize_ternary(flat)
    return (values.float() * scales).view(heads.shape)


def _nearest_rotation(matrices: Tensor) -> Tensor:
    """The orthogonal matrices U V^T of matrices U S V^T, by Newton's iteration (Higham 1986): products and inverses of
    many at once, which a GPU is good at, as it is not at singular values. What does not converge is decomposed."""
    eye = torch.eye(matrices.shape[-1], device=matrices.device)
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    for _ in range(_NEWTON):
        inverse = torch.linalg.inv_ex(x).inverse.transpose(1, 2)
        scale = (inverse.norm(dim=(1, 2), keepdim=True) / x.norm(dim=(1, 2), keepdim=True)).sqrt()
        x = 0.5 * (scale * x + inverse / scale)
        off = (x.transpose(1, 2) @ x - eye).abs().amax((1, 2))
        if float(off.max()) < 1e-4:
            break
    failed = ~(off < 1e-4)
    if bool(failed.any()):
        left, _, right = torch.linalg.svd(matrices[failed].double().cpu())
        x[failed] = (left @ right).to(x)
    polished: Tensor = 1.5 * x - 0.5 * x @ (x.transpose(1, 2) @ x)  # the last digits
    return polished


def _hadamard(size: int) -> Tensor:
    result = torch.ones(1, 1)
    while len(result) < size:
        result = torch.cat([torch.cat([result, result], 1), torch.cat([result, -result], 1)])
    scaled: Tensor = result / size**0.5
    return scaled
