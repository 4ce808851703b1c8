"""What a model on the hub will take, before it is fetched: bytes per part, and memory by the planner.

The planner reads configs and headers alone, and nothing else is fetched for it: it is given a folder of the same names,
with files that are as long as the real ones and hold nothing but their headers (and so take no room on the disk).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from linocut.errors import FormatError, LinocutError
from linocut.formats.fetch import FolderStore, Store, download, read_start
from linocut.formats.folder import ModelFolder
from linocut.formats.header import HEADER_CAP
from linocut.formats.hub import RemoteFile, Repository
from linocut.formats.layouts import place_of
from linocut.pipeline.memory import Plan, Planner

_START = 1 << 18  # bytes fetched of a file at first: most headers are shorter
_PARTS = ("transformer", "text_encoder", "vae", "tokenizer")


@dataclass(frozen=True)
class Forecast:
    """parts: bytes of each part of the model. form: "linocut", "dense", or the place of another program's weights;
    empty if it could not be told.

    encodings: those of the transformer's packed weights. plan: what drawing at the model's own size takes; or None,
    and `why_not` says why there is none.
    """

    parts: dict[str, int]
    form: str
    encodings: tuple[str, ...]
    plan: Plan | None
    why_not: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"parts": self.parts, "form": self.form, "encodings": list(self.encodings),
                "plan": None if self.plan is None else self.plan.to_dict(), "why_not": self.why_not}


def forecast(repository: Repository, files: Sequence[RemoteFile], store: Store) -> Forecast:
    """Foretell what a model takes; fetches its configs into `store` and reads the headers of its weights.

    Raises as `fetch.download` does, and FormatError for a header that is not sound.
    """
    place = place_of("transformer", [file.path for file in files]) or ""
    if place != "transformer":
        return Forecast(_parts(files), place, (), None, "known when it is in linocut's form")
    with TemporaryDirectory(prefix="linocut-forecast-") as temporary:
        root = Path(temporary)
        try:
            _frame(repository, files, store, root)
        except OSError as error:
            if isinstance(error, LinocutError):
                raise
            return Forecast(_parts(files), "", (), None, f"no room for a plan in {root.parent} ({error.strerror})")
        folder = ModelFolder(root, repository.name)
        with folder.checkpoint("transformer") as checkpoint:
            encodings = tuple(sorted({entry.encoding for entry in checkpoint.packed.values()}))
        form = "linocut" if encodings else "dense"
        try:
            width, height = folder.settings["default_size"]
            return Forecast(_parts(files), form, encodings, Planner(folder).plan(width, height), "")
        except LinocutError as error:  # no whole model; its bytes can be had all the same
            return Forecast(_parts(files), form, encodings, None, str(error).replace(f"{root}{os.sep}", ""))


def _parts(files: Sequence[RemoteFile]) -> dict[str, int]:
    sizes = dict.fromkeys((*_PARTS, "other"), 0)
    for file in files:
        first = file.path.split("/")[0]
        name = next((part for part in _PARTS if first == part or first.startswith((f"{part}-", f"{part}."))), "other")
        sizes[name] += file.size
    return {name: size for name, size in sizes.items() if size}


def _frame(repository: Repository, files: Sequence[RemoteFile], store: Store, root: Path) -> None:
    """Write configs, and files of the right length with the right header, to `root`."""
    configs = [file for file in files if file.path.endswith(".json") and not file.path.startswith("tokenizer/")]
    download(repository, configs, store, lambda done, total, name: None)
    for file in files:
        target = FolderStore(root).place(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file in configs:
            target.write_bytes(store.place(file).read_bytes())
            continue
        with open(target, "wb") as frame:
            if file.path.endswith(".safetensors"):
                frame.write(_header(repository, file, store))
            frame.truncate(file.size)


def _header(repository: Repository, file: RemoteFile, store: Store) -> bytes:
    start = read_start(repository, file, store, _START)
    if len(start) < 8:
        raise FormatError("file is too short for a safetensors header", path=f"{repository.id}/{file.path}",
                          expected="at least 8 bytes", found=len(start))
    (length,) = struct.unpack("<Q", start[:8])
    if length > HEADER_CAP or 8 + length > file.size:
        raise FormatError("this is not a safetensors file", path=f"{repository.id}/{file.path}",
                          expected=f"a header of at most {min(HEADER_CAP, file.size)} bytes", found=length)
    return (start if 8 + length <= len(start) else read_start(repository, file, store, 8 + length))[:8 + length]
