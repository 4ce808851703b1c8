"""Networks need not begin from nothing: weights of a packed model of the same shape are a start.

Rounded weights draw nearly as well as those they came from and have the same scale, so a teacher that starts from them
has its composition and drawing from the first step on, and grows into a larger vocabulary from there. A student goes on
from the codes of another one. That carries training over from one run to the next through the model that was
published, without keeping gigabytes beside it.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from linocut.errors import FormatError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.packed import dequantize
from linocut.models.convert import tensor_from
from linocut.models.text_encoder import PromptTokenizer
from linocut.train.calibrate import latent_weights
from linocut.train.export import FOLDERS
from linocut.train.monitor import coded_layers
from linocut.train.painter import Painter
from linocut.train.weights import load_transformer

_TRAINED = 0.5  # margin of a code that training has found, and not a rounding
_EMBEDDING = "embed_tokens.weight"
_BLOCK = re.compile(r"(?:single_)?transformer_blocks\.\d+\.")
_ADDS = re.compile(r"attn\.(?:to_out|to_add_out)(?:\.0)?\.weight$|ff(?:_context)?\.linear_out\.weight$")


@torch.no_grad()
def start_from(painter: Painter, tokenizer: PromptTokenizer, folder: Path) -> None:
    """Set the painter's weights to those of a model folder, packed or dense.

    Its tokenizer may be another one: tokens that both have keep their embedding, all others begin at random as ever. It
    may have fewer blocks: those that the painter has more, last of their kind, begin as the identity, and the painter
    draws what the model drew. Raises FormatError that names the tensor if a shape differs.
    """
    _copy(painter.transformer, folder / "transformer", {})
    with Checkpoint.open(folder / "text_encoder") as checkpoint:
        old = _dense(checkpoint, _EMBEDDING)
    rows = _embeddings(painter.text_encoder.embed_tokens.weight, tokenizer,
                       PromptTokenizer.from_folder(folder / "tokenizer", tokenizer.length), old)
    _copy(painter.text_encoder, folder / "text_encoder", {_EMBEDDING: rows})


@torch.no_grad()
def start_student(transformer: nn.Module, folder: Path, encoding: str) -> None:
    """Set a student's latent weights, so far its teacher's, to those of another student.

    `folder` has latent weights that a training stage left, or is a packed model. Of that the codes, scales and dense
    tensors are taken. A latent weight lies on its code's side of the threshold, at least half of that away from it, and
    there in the order of the teacher's weights. Raises FormatError that names the tensor if its shape or its encoding
    is another one.
    """
    if (folder / "model.safetensors").is_file():
        load_transformer(transformer, folder)
        return
    folder /= FOLDERS[encoding] if (folder / FOLDERS[encoding]).is_dir() else "transformer"
    coded = {name for name in coded_layers(transformer) if transformer.get_submodule(name).encoding == encoding}
    with Checkpoint.open(folder) as checkpoint:
        for name in sorted(coded):
            found = checkpoint.packed[name].encoding if name in checkpoint.packed else "dense"
            if found != encoding:
                raise FormatError("layer has another encoding than the student", path=folder, tensor=name,
                                  expected=encoding, found=found, advice="start from a student of the same encoding")
        for name, target in transformer.state_dict().items():
            value, module = _fitting(checkpoint, name, target, folder).to(target.device), name.removesuffix(".weight")
            if module in coded:
                scales = torch.from_numpy(checkpoint.packed_tensor(module).scales.astype("float32")).to(target.device)
                value = latent_weights(target, value.sign(), scales, encoding, _TRAINED)
            target.copy_(value)


def _copy(module: nn.Module, folder: Path, instead: dict[str, Tensor]) -> None:
    with Checkpoint.open(folder) as checkpoint:
        known = {_block(name) for name in (*checkpoint, *checkpoint.packed)}
        for name, target in module.state_dict().items():
            if _block(name) not in known:  # a new block, which adds nothing yet
                if _ADDS.search(name):
                    target.zero_()
                continue
            target.copy_(instead[name] if name in instead else _fitting(checkpoint, name, target, folder))


def _block(name: str) -> str:
    """What a tensor belongs to: its block, or else nothing."""
    found = _BLOCK.match(name)
    return found.group() if found else ""


def _fitting(checkpoint: Checkpoint, name: str, target: Tensor, folder: Path) -> Tensor:
    value = _dense(checkpoint, name)
    if value.shape != target.shape:
        raise FormatError("tensor has another shape than the recipe's network", path=folder, tensor=name,
                          expected=list(target.shape), found=list(value.shape),
                          advice="start from a model of the same shape, or from nothing")
    return value


def _dense(checkpoint: Checkpoint, name: str) -> Tensor:
    module = name.removesuffix(".weight")
    if module in checkpoint.packed:
        return torch.from_numpy(dequantize(checkpoint.packed_tensor(module)))
    return tensor_from(checkpoint, name).float()


def _embeddings(fresh: Tensor, tokenizer: PromptTokenizer, before: PromptTokenizer, old: Tensor) -> Tensor:
    """Embeddings [vocabulary, width] for the tokens of `tokenizer`: from `old`, the rows of `before`, or `fresh`."""
    rows, known = fresh.detach().float().cpu().clone(), before.tokenizer.get_vocab()
    for token, index in tokenizer.tokenizer.get_vocab().items():
        if token in known:
            rows[index] = old[known[token]]
    return rows
