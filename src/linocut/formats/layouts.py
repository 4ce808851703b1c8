"""Where the parts of a model lie in the folders of all known forms, and which of a folder's files a model needs.

All of it looks at names alone (relative, with slashes), so that a repository can be judged before anything but its
list of files was fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from linocut.errors import FormatError, UsageError
from linocut.formats.header import printable

__all__ = ["CARRIED_SUFFIXES", "LICENSES", "PICKLES", "file_names", "needed_files", "place_of", "unused_text_tensors"]

PLACES = {
    "transformer": ("transformer", "transformer-packed-mflux", "transformer-gemlite-int1", "transformer-gemlite-int2"),
    "text_encoder": ("text_encoder", "text_encoder-mlx-4bit", "text_encoder-hqq-4bit"),
}
PICKLES = ("state_dict.pt", "qmodel.pt")
# Never a pickle.
CARRIED_SUFFIXES = (".safetensors", ".json", ".txt", ".jinja", ".md")
LICENSES = ("LICENSE*", "NOTICE*", "COPYING*")
INDEX_SUFFIX = ".safetensors.index.json"
STANDARD_WEIGHTS = tuple(stem + suffix for stem in ("diffusion_pytorch_model", "model")
                         for suffix in (".safetensors", INDEX_SUFFIX))
"""The weights of a folder are the first of these that is there; other files may be the same in another precision."""
_ROOT_FILES = ("model_index.json", "vocabulary.json")
_BESIDE_WEIGHTS = {"transformer": ("timestep_table.safetensors",)}
_OPTIONAL = {"transformer": ("timestep_weights.safetensors",)}
_UNREAD = ("gemlite_autotune.json", "checkpoint_manifest.json")
_LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,6})\.")

ReadJson = Callable[[str], Mapping[str, Any]]


def file_names(root: Path) -> set[str]:
    """Relative names of the files in a folder, two levels deep, without hidden ones."""
    found = [*root.glob("*"), *root.glob("*/*"), *root.glob("*/tokenizer/*")]
    names = {path.relative_to(root).as_posix() for path in found if path.is_file()}
    return {name for name in names if not name.startswith(".") and "/." not in name}


def place_of(part: str, names: Collection[str]) -> str | None:
    """The file or folder that holds the weights of the "transformer" or the "text_encoder", or None."""
    for file in (f"{part}.gguf", f"{part}.safetensors"):
        if file in names:
            return file
    for folder in PLACES[part]:
        inside = _inside(folder, names)
        if any(".safetensors" in name for name in inside) or inside & set(PICKLES):
            return folder
    return None


def needed_files(names: Collection[str], taps: Sequence[int], read: ReadJson, optional: bool = False) -> list[str]:
    """The files of a model among `names`: weights once, and none that only unused layers of the text encoder lie in.

    Args:
        taps: the text encoder's layers whose outputs are used.
        read: gives the content of an index (`....safetensors.index.json`) by its name.
        optional: also files that a model works without (`transformer/timestep_weights.safetensors`).
    Files that an index asks for are listed whether they are among `names` or not. Raises UsageError if there is no
    model among `names` (a lone transformer is none), FormatError for an index that cannot be used.
    """
    found: dict[str, None] = {}
    for part in ("transformer", "text_encoder"):
        place = place_of(part, names)
        if place is None and part == "transformer":
            raise UsageError(f"no model in a form that is known (expected transformer/ with .safetensors files, found "
                             f"{_listed(names)})")
        if place == "transformer" and _ROOT_FILES[0] not in names:
            raise UsageError("no model: transformer/ is there, but not the model_index.json that says what belongs to "
                             f"it (expected a whole model's repository or folder, found {_listed(names)})")
        if place is not None:
            found |= dict.fromkeys(_part(part, place, names, taps, read, optional))
    found |= dict.fromkeys(_part("vae", "vae", names, taps, read, False))
    text = place_of("text_encoder", names)
    tokenizer = "tokenizer" if _inside("tokenizer", names) or text is None else f"{text}/tokenizer"
    for folder, suffixes in ((tokenizer, (".json", ".txt", ".jinja")), ("scheduler", (".json",))):
        found |= dict.fromkeys(f"{folder}/{name}" for name in sorted(_inside(folder, names)) if name.endswith(suffixes))
    patterns = (*_ROOT_FILES, *LICENSES)
    found |= dict.fromkeys(name for name in sorted(names) if "/" not in name  # which * would match
                           and any(fnmatchcase(name, each) for each in patterns))
    return list(found)


def _part(part: str, place: str, names: Collection[str], taps: Sequence[int], read: ReadJson,
          optional: bool) -> list[str]:
    if place in names:  # one file; its config may lie in a folder of the part's name
        return [place, *(name for name in (f"{part}/config.json", "config.json") if name in names)]
    inside = _inside(place, names)
    wanted = [name for name in sorted(inside) if name.endswith(".json") and name not in _UNREAD
              and not name.endswith(INDEX_SUFFIX)]
    weights = weights_entry(place, inside)
    if weights is not None and weights.endswith(INDEX_SUFFIX):
        unused = unused_text_tensors if part == "text_encoder" else None
        wanted += [weights, *shards(read(f"{place}/{weights}"), f"{place}/{weights}", taps, unused)]
    elif weights is not None:
        wanted.append(weights)
    extra = _BESIDE_WEIGHTS.get(part, ()) + (_OPTIONAL.get(part, ()) if optional else ())
    wanted += [name for name in extra if name in inside and name not in wanted]
    return [f"{place}/{name}" for name in wanted]


def weights_entry(place: str, inside: Collection[str]) -> str | None:
    """The file with which reading a folder's weights begins: weights, an index or a pickle; None if there is none.

    Raises FormatError if several would do.
    """
    for name in STANDARD_WEIGHTS:
        if name in inside:
            return name
    beside = {name for names in (*_BESIDE_WEIGHTS.values(), *_OPTIONAL.values()) for name in names}
    for suffix in (INDEX_SUFFIX, ".safetensors"):
        fitting = sorted(name for name in inside if name.endswith(suffix) and name not in beside)
        if len(fitting) > 1:
            raise FormatError("folder holds several weight files", path=place, expected="one, or an index",
                              found=", ".join(map(printable, fitting[:5])), advice="name the file itself")
        if fitting:
            return fitting[0]
    return next((name for name in PICKLES if name in inside), None)


def shards(index: Mapping[str, Any], path: object, taps: Sequence[int],
           unused: Callable[[Collection[str], Sequence[int]], set[str]] | None) -> list[str]:
    """The files that an index names, but those that hold nothing but what `unused(tensor names, taps)` says."""
    places = weight_map(index, path)
    passed = set() if unused is None else unused(places, taps)
    return sorted({file for name, file in places.items() if name not in passed})


def weight_map(index: Any, path: object) -> dict[str, str]:
    """{tensor: file beside the index}, checked. Raises FormatError."""
    places = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise FormatError("index has no usable weight_map", path=path, expected="tensor name -> file name",
                          found=type(places).__name__)
    for name, file in places.items():
        if not file.endswith(".safetensors") or file.startswith(".") or any(char in file for char in "/\\:\0"):
            raise FormatError("index points outside its folder or at a foreign file", path=path,
                              tensor=printable(name), expected="a plain name of a .safetensors file beside the index",
                              found=printable(file))
    return places


def unused_text_tensors(names: Collection[str], taps: Sequence[int]) -> set[str]:
    """Tensors of a Qwen3 checkpoint that the outputs of layers `taps` (from 1) do not depend on.

    Those are the head, the layers after the last tap, and the final norm unless the last layer is a tap.
    """
    layers = {name: int(match[1]) for name in names if (match := _LAYER.match(name))}
    whole = max(layers.values(), default=0) + 1 <= max(taps)
    others = ("lm_head.",) if whole else ("lm_head.", "norm.")
    return {name for name in names
            if layers.get(name, -1) >= max(taps) or name.removeprefix("model.").startswith(others)}


def _inside(folder: str, names: Collection[str]) -> set[str]:
    """Names of the files that lie in a folder itself."""
    start = folder + "/"
    return {name[len(start):] for name in names if name.startswith(start) and "/" not in name[len(start):]}


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(map(printable, sorted(names)[:4]))
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown or "no files"
