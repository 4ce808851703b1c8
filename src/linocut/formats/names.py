"""Names of FLUX.2 tensors: Black Forest Labs' single file presented under diffusers' names.

The original file fuses q, k and v by rows and orders the halves of the final modulation (shift, scale); diffusers keeps
three tensors and (scale, shift). Groups of quantization run along a row, so splitting rows changes no group.
Source: the conversion script of diffusers (`convert_flux2_to_diffusers.py`), described in its own words here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from linocut.errors import FormatError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.header import PackedEntry, TensorInfo, printable
from linocut.formats.packed import PackedTensor

__all__ = ["RULES", "BFLCheckpoint", "Source", "bfl_plan", "is_bfl", "is_timestep", "open_flux2"]

_PREFIX = "model.diffusion_model."
_MARKS = ("double_stream_modulation_img.lin.weight", "img_in.weight")
# pattern of an original name -> names here; three names are equal parts by rows, "~" swaps the two halves of the rows
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"img_in\.weight", ("x_embedder.weight",)),
    (r"txt_in\.weight", ("context_embedder.weight",)),
    (r"time_in\.in_layer\.weight", ("time_guidance_embed.timestep_embedder.linear_1.weight",)),
    (r"time_in\.out_layer\.weight", ("time_guidance_embed.timestep_embedder.linear_2.weight",)),
    (r"guidance_in\.in_layer\.weight", ("time_guidance_embed.guidance_embedder.linear_1.weight",)),
    (r"guidance_in\.out_layer\.weight", ("time_guidance_embed.guidance_embedder.linear_2.weight",)),
    (r"double_stream_modulation_(img|txt)\.lin\.weight", (r"double_stream_modulation_\1.linear.weight",)),
    (r"single_stream_modulation\.lin\.weight", ("single_stream_modulation.linear.weight",)),
    (r"double_blocks\.(\d+)\.img_attn\.qkv\.weight",
     tuple(rf"transformer_blocks.\1.attn.to_{part}.weight" for part in "qkv")),
    (r"double_blocks\.(\d+)\.txt_attn\.qkv\.weight",
     tuple(rf"transformer_blocks.\1.attn.add_{part}_proj.weight" for part in "qkv")),
    (r"double_blocks\.(\d+)\.img_attn\.proj\.weight", (r"transformer_blocks.\1.attn.to_out.0.weight",)),
    (r"double_blocks\.(\d+)\.txt_attn\.proj\.weight", (r"transformer_blocks.\1.attn.to_add_out.weight",)),
    (r"double_blocks\.(\d+)\.img_attn\.norm\.query_norm\.scale", (r"transformer_blocks.\1.attn.norm_q.weight",)),
    (r"double_blocks\.(\d+)\.img_attn\.norm\.key_norm\.scale", (r"transformer_blocks.\1.attn.norm_k.weight",)),
    (r"double_blocks\.(\d+)\.txt_attn\.norm\.query_norm\.scale", (r"transformer_blocks.\1.attn.norm_added_q.weight",)),
    (r"double_blocks\.(\d+)\.txt_attn\.norm\.key_norm\.scale", (r"transformer_blocks.\1.attn.norm_added_k.weight",)),
    (r"double_blocks\.(\d+)\.img_mlp\.0\.weight", (r"transformer_blocks.\1.ff.linear_in.weight",)),
    (r"double_blocks\.(\d+)\.img_mlp\.2\.weight", (r"transformer_blocks.\1.ff.linear_out.weight",)),
    (r"double_blocks\.(\d+)\.txt_mlp\.0\.weight", (r"transformer_blocks.\1.ff_context.linear_in.weight",)),
    (r"double_blocks\.(\d+)\.txt_mlp\.2\.weight", (r"transformer_blocks.\1.ff_context.linear_out.weight",)),
    (r"single_blocks\.(\d+)\.linear1\.weight", (r"single_transformer_blocks.\1.attn.to_qkv_mlp_proj.weight",)),
    (r"single_blocks\.(\d+)\.linear2\.weight", (r"single_transformer_blocks.\1.attn.to_out.weight",)),
    (r"single_blocks\.(\d+)\.norm\.query_norm\.scale", (r"single_transformer_blocks.\1.attn.norm_q.weight",)),
    (r"single_blocks\.(\d+)\.norm\.key_norm\.scale", (r"single_transformer_blocks.\1.attn.norm_k.weight",)),
    (r"final_layer\.linear\.weight", ("proj_out.weight",)),
    (r"final_layer\.adaLN_modulation\.1\.weight", ("~norm_out.linear.weight",)),
)
_COMPILED = tuple((re.compile(f"(?:{re.escape(_PREFIX)})?{pattern}"), targets) for pattern, targets in RULES)


_TIMESTEP = re.compile(r"(time_guidance_embed|double_stream_modulation_(img|txt)|single_stream_modulation|norm_out)"
                       r"(\..*)?")


def is_timestep(name: str) -> bool:
    """True for a module or tensor (diffusers' name) of a FLUX.2 transformer that sees the noise level alone."""
    return _TIMESTEP.fullmatch(name) is not None


@dataclass(frozen=True)
class Source:
    """Where a diffusers tensor lies in an original file: rows [first, first + shape[0]) of `name`."""

    name: str
    first: int
    shape: tuple[int, ...]
    swap: bool = False  # the two halves of the rows change places

    def apply(self, array: np.ndarray) -> np.ndarray:
        """The tensor from the original array: a view of its rows, or a copy where halves are swapped."""
        rows = array[self.first : self.first + self.shape[0]]
        if not self.swap:
            return rows
        half = self.shape[0] // 2
        return np.concatenate([rows[half:], rows[:half]])


def is_bfl(names: Iterable[str]) -> bool:
    """True if these are the names of a FLUX.2 transformer in the original single-file form."""
    known = set(names)
    return any(all(prefix + mark in known for mark in _MARKS) for prefix in ("", _PREFIX))


def _match(name: str) -> tuple[re.Match[str], tuple[str, ...]]:
    for pattern, targets in _COMPILED:
        match = pattern.fullmatch(name)
        if match:
            return match, targets
    raise FormatError("not a tensor of a FLUX.2 single file", tensor=printable(name),
                      expected="a name that the conversion knows", found=printable(name))


def bfl_plan(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Source]:
    """Original names and shapes -> {diffusers name: Source}. Raises FormatError for a name that no rule knows."""
    plan: dict[str, Source] = {}
    for name, shape in shapes.items():
        match, targets = _match(name)
        swap = targets[0].startswith("~")
        parts = 2 if swap else len(targets)
        if not shape or shape[0] % parts:
            raise FormatError("rows do not divide into equal parts", tensor=name,
                              expected=f"a multiple of {parts} rows", found=list(shape))
        rows = shape[0] // len(targets)
        for index, target in enumerate(targets):
            new = match.expand(target.removeprefix("~"))
            if new in plan:
                raise FormatError("two tensors of the file become one", tensor=new, expected="one source",
                                  found=f"{plan[new].name} and {name}")
            plan[new] = Source(name, index * rows, (rows, *shape[1:]), swap)
    return plan


class BFLCheckpoint:
    """A dense single-file checkpoint under diffusers' names; it has the reading side of `Checkpoint`.

    `array` gives row views of fused tensors without copying, and a copy of the one tensor whose halves are swapped.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        if checkpoint.packed:
            raise FormatError("packed weights under original names are not supported", path=checkpoint.path,
                              expected="dense tensors", found=f"{len(checkpoint.packed)} packed weights")
        self.source = checkpoint
        self.path = checkpoint.path
        self.metadata = checkpoint.metadata
        self.packed: dict[str, PackedEntry] = {}
        self.plan = bfl_plan({name: checkpoint.info(name).shape for name in checkpoint.names})
        self._users: dict[str, set[str]] = {}
        for name, source in self.plan.items():
            self._users.setdefault(source.name, set()).add(name)
        self._released: set[str] = set()

    @classmethod
    def open(cls, path: Path | str) -> BFLCheckpoint:
        """Open a single file in the original naming."""
        return cls(Checkpoint.open(path))

    @property
    def names(self) -> list[str]:
        """diffusers names, in the order of the file's bytes."""
        return list(self.plan)

    def __contains__(self, name: object) -> bool:
        return name in self.plan

    def __iter__(self) -> Iterator[str]:
        return iter(self.plan)

    def __len__(self) -> int:
        return len(self.plan)

    def _find(self, name: str) -> Source:
        source = self.plan.get(name)
        if source is None:
            raise FormatError("no such tensor", path=self.path, tensor=printable(name), expected="a stored tensor",
                              found=f"{len(self.plan)} others")
        return source

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape, offset and bytes; for a swapped tensor the offset is that of the unswapped rows."""
        source = self._find(name)
        whole = self.source.info(source.name)
        row = whole.nbytes // max(1, whole.shape[0])
        return TensorInfo(whole.dtype, source.shape, whole.offset + source.first * row, row * source.shape[0])

    def array(self, name: str) -> np.ndarray:
        """The tensor as numpy array (BF16 as uint16)."""
        source = self._find(name)
        return source.apply(self.source.array(source.name))

    def packed_tensor(self, module: str) -> PackedTensor:
        """There are none: raises FormatError."""
        return self.source.packed_tensor(module)

    def release(self, name: str) -> None:
        """Let the pages of a tensor leave memory; a fused one goes when its last part is released."""
        source = self._find(name)
        self._released.add(name)
        if self._users[source.name] <= self._released:
            self._released -= self._users[source.name]
            self.source.release(source.name)

    def fingerprint(self) -> str:
        """As `Checkpoint.fingerprint`, of the original file."""
        return self.source.fingerprint()

    @property
    def tensor_nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.source.tensor_nbytes

    def close(self) -> None:
        """Let go of the file."""
        self.source.close()

    def __enter__(self) -> BFLCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def open_flux2(path: Path | str) -> Checkpoint | BFLCheckpoint:
    """Open FLUX.2 transformer weights in either naming; the result always speaks diffusers' names."""
    checkpoint = Checkpoint.open(path)
    return BFLCheckpoint(checkpoint) if is_bfl(checkpoint.names) else checkpoint
