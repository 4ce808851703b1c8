"""The prompt cache: text features on disk, so that a prompt that was read before needs no text encoder.

An entry is one safetensors file named by a SHA-256 over everything that decides the features: the prompt in its
template, the SHA-256s of the encoder's tensors, its config, the tokenizer, and what computes (dtype, kernel, versions,
processor). Features are kept in the very dtype in which the encoder gave them, so a picture drawn from the cache is the
same bit for bit. An entry carries its own SHA-256; one that is damaged or cut off counts as absent and is replaced.

Prompts are private: only the owner can read the folder, and neither names nor files hold text. Several processes may
share the folder: an entry appears whole, by renaming, or not at all. The oldest entries leave when the size bound is
reached. Nothing here ever stops a picture: what cannot be read is computed, what cannot be written is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linocut.errors import LinocutError, UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.folder import ModelFolder
from linocut.formats.header import Plan

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""Part of every key: raised when the encoder's code gives other bits from the same weights."""
DEFAULT_MEGABYTES = 512
_SUFFIX = ".safetensors"
_PARTIAL = ".partial"
_ABANDONED_SECONDS = 3600.0
_NAME = "features"


@dataclass(frozen=True)
class Place:
    """Where entries lie, how many bytes they may take together, and why nothing is kept (None: all is well)."""

    folder: Path
    limit: int
    why_not: str | None = None

    def entries(self) -> list[tuple[Path, os.stat_result]]:
        """All entries with their facts, the one that was used longest ago first."""
        found = []
        with contextlib.suppress(OSError):
            for path in self.folder.glob("*" + _SUFFIX):
                with contextlib.suppress(OSError):  # another process may have removed it just now
                    found.append((path, path.stat()))
        return sorted(found, key=lambda entry: entry[1].st_mtime_ns)

    def unwritable(self) -> str | None:
        """Why nothing could be kept here now, or None."""
        nearest = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not nearest.is_dir():
            return f"{nearest} is not a folder"
        if not os.access(nearest, os.W_OK | os.X_OK):
            return f"{nearest} cannot be written to"
        if nearest == self.folder and not _private(self.folder):
            return f"{nearest} belongs to somebody else"
        return None

    def make_room(self, nbytes: int) -> None:
        """Remove the oldest entries until `nbytes` more fit, and what killed processes left half-written."""
        entries = self.entries()
        total = nbytes + sum(facts.st_size for _, facts in entries)
        for path, facts in entries:
            if total <= self.limit:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= facts.st_size
        for path in self.folder.glob("*" + _PARTIAL):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()


def place() -> Place:
    """The cache of this user: `$LINOCUT_CACHE/prompts`, else `$XDG_CACHE_HOME/linocut/prompts`, else under ~/.cache.

    `LINOCUT_PROMPT_CACHE` is its largest size in MB; 0 turns it off. UsageError if it is no such number. The folder is
    not made before something is kept.
    """
    asked = os.environ.get("LINOCUT_PROMPT_CACHE", "").strip() or str(DEFAULT_MEGABYTES)
    if not asked.isdecimal():
        raise UsageError(f"LINOCUT_PROMPT_CACHE must be a size in MB, or 0 for no prompt cache (found {asked!r})")
    own, shared = os.environ.get("LINOCUT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(own).expanduser() if own else Path(shared or "~/.cache").expanduser() / "linocut"
    except RuntimeError:
        return Place(Path("prompts"), 0, "this user has no home folder; set LINOCUT_CACHE")
    limit = int(asked) * 10**6
    return Place(root / "prompts", limit, None if limit else "LINOCUT_PROMPT_CACHE=0")


def encoder_identity(model: ModelFolder) -> dict[str, Any] | None:
    """What of a model decides text features; None if its encoder's files carry no hashes, which a cache needs.

    Only configs, headers and tokenizer.json are read.
    """
    with model.checkpoint("text_encoder") as checkpoint:
        if any(name not in checkpoint.sha256 for name in checkpoint.names):
            return None
        weights = checkpoint.fingerprint()
    tokenizer = hashlib.sha256((model.path("tokenizer") / "tokenizer.json").read_bytes()).hexdigest()
    settings = {name: model.settings[name] for name in ("text_length", "text_taps")}
    return {"weights": weights, "config": model.config("text_encoder"), "tokenizer": tokenizer, **settings}


@dataclass(frozen=True)
class Entry:
    """Features [1, T, E] of one prompt; `tokens` that it needs and `characters` of it that the encoder read."""

    features: Tensor
    tokens: int
    characters: int


class PromptCache:
    """Entries for one encoder computing in one way: `identity` is whatever decides the features but the prompt."""

    def __init__(self, place: Place, identity: dict[str, Any]) -> None:
        self.place = place
        self._identity = json.dumps({**identity, "format": FORMAT}, sort_keys=True)

    def path(self, text: str) -> Path:
        """File of a prompt; `text` is the prompt inside its template."""
        digest = hashlib.sha256(self._identity.encode())
        digest.update(b"\0" + text.encode())
        return self.place.folder / (digest.hexdigest() + _SUFFIX)

    def get(self, text: str) -> Entry | None:
        """The entry of a prompt; None if there is none that is whole."""
        import torch

        path = self.path(text)
        try:
            if not _private(self.place.folder):
                return None
            with Checkpoint.open(path) as checkpoint:
                # the key inside, too: a whole entry under another one's name is as wrong as a damaged one
                if checkpoint.metadata["key"] != path.stem or checkpoint.hash_tensor(_NAME) != checkpoint.sha256[_NAME]:
                    return None
                features = torch.from_numpy(checkpoint.array(_NAME).copy())
                if checkpoint.info(_NAME).dtype == "BF16":
                    features = features.view(torch.bfloat16)
                tokens, characters = (int(checkpoint.metadata[key]) for key in ("tokens", "characters"))
            os.utime(path)  # used now: the last to leave
        except (LinocutError, OSError, ValueError, KeyError):
            return None
        return Entry(features, tokens, characters)

    def put(self, text: str, entry: Entry) -> bool:
        """Keep an entry; False if that was not possible (no space, no permission, larger than the bound)."""
        import torch

        features = entry.features.detach().cpu().contiguous()
        dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[features.dtype]
        data = memoryview(features.view(torch.uint8).numpy().reshape(-1).data)
        path = self.path(text)
        facts = {"key": path.stem, "tokens": str(entry.tokens), "characters": str(entry.characters)}
        header = Plan([(_NAME, dtype, features.shape)], facts, {}).header({_NAME: hashlib.sha256(data).hexdigest()})
        nbytes = len(header) + len(data)
        partial = None
        try:
            _make_private(self.place.folder)
            if nbytes > self.place.limit or not _private(self.place.folder):
                return False
            self.place.make_room(nbytes)
            # No fsync: what a power cut leaves behind fails its hash.
            descriptor, partial = tempfile.mkstemp(suffix=_PARTIAL, dir=self.place.folder)  # mode 0600
            with open(descriptor, "wb") as file:
                file.write(header)
                file.write(data)
            os.replace(partial, path)
        except OSError:
            if partial is not None:
                with contextlib.suppress(OSError):
                    os.unlink(partial)
            return False
        return True


def _make_private(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)


def _private(folder: Path) -> bool:
    """Whether only this user can read and write the folder; access of others to one's own folder is taken away."""
    facts = folder.stat()
    if not hasattr(os, "geteuid"):  # Windows: the user's profile is private by its place
        return True
    if facts.st_uid != os.geteuid():
        return False
    if stat.S_IMODE(facts.st_mode) & 0o077:
        folder.chmod(0o700)
    return True
