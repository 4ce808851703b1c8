"""Putting a model on the Hugging Face hub: checked first, in one commit, and never over a card that somebody edited."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from linocut import __version__
from linocut.errors import HubError, ModelNotFoundError, UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.fetch import FolderStore, download
from linocut.formats.folder import ModelFolder
from linocut.formats.hub import Repository, failure, hub_id, is_whole, look, status_of
from linocut.formats.layouts import LICENSES, file_names, place_of
from linocut.formats.weight import weights_of
from linocut.integrations.card import Facts, Part, facts_of, is_ours, write_card
from linocut.integrations.recognize import open_model

__all__ = ["Upload", "prepare", "publish"]

CARD = "README.md"
_SUFFIXES = (".safetensors", ".gguf", ".json", ".txt", ".jinja", ".md", ".toml", ".png", ".webp", ".jpg", ".jpeg")


@dataclass
class Upload:
    """What would be put where. `files` are relative names, with the card; `left_out` are files that are not taken."""

    root: Path
    repository: str
    card: str
    facts: Facts
    files: dict[str, Path] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    verified: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all files and the card."""
        return sum(path.stat().st_size for path in self.files.values()) + len(self.card.encode())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"folder": str(self.root), "repository": self.repository, "bytes": self.nbytes,
                "files": {CARD: len(self.card.encode()), **{name: path.stat().st_size for name, path
                                                            in self.files.items()}},
                "left_out": self.left_out, "verified_tensors": self.verified}


def prepare(root: Path, repository: str, *, card: Path | None = None, replace_card: bool = False,
            report: dict[str, Any] | None = None, base_model: str = "", license: str = "",
            verify: bool = True) -> Upload:
    """Check a model folder and say what would be put on the hub; asks no network.

    Every tensor is checked against its SHA-256 where there is one, and its values. `card` is a file to take as the
    card; without it one is written, unless the folder holds one that was not written here or was edited. Raises
    UsageError for that, for a folder that holds no whole model, and for weights that are not taken (pickles);
    FormatError for a damaged one.
    """
    found = hub_id(repository)
    if found is None or "@" in repository or found[0] != repository:
        raise UsageError(f"{repository!r} is no name of a repository (expected org/name, where org is you or yours)")
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder; expected a model folder, such as 'linocut quantize' makes")
    if not is_whole(root):
        raise UsageError(f"{root}: holds no whole model (expected model_index.json, transformer, text_encoder, "
                         "tokenizer and vae as the index lists them)")
    parts, facts_from, weights, verified = _networks(root, verify)
    facts = facts_of(root, parts, *facts_from, base_model=base_model, license=license)
    upload = Upload(root, repository, _card(root, repository, facts, card, replace_card, report), facts,
                    verified=verified)
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not path.is_file() or name == CARD:
            continue
        if any(part.startswith(".") for part in name.split("/")) or not _is_taken(path):
            upload.left_out.append(name)
        else:
            upload.files[name] = path
    behind = sorted(path.relative_to(root).as_posix() for path in set(weights) - set(upload.files.values()))
    if behind:
        raise UsageError(f"{root}: weights would not be taken along (expected .safetensors or .gguf files, found "
                         f"{', '.join(behind)}); convert it first: linocut convert {root} FOLDER --to linocut")
    return upload


def _networks(root: Path, verify: bool) -> tuple[list[Part], tuple[Any, Any, Any], list[Path], int]:
    """The networks of a folder in any form; (index, settings, metadata); their files; the number of tensors verified.
    """
    parts, files, verified = [], list[Path](), 0
    if place_of("transformer", file_names(root)) == "transformer":
        folder = ModelFolder.open(root)
        index, settings = folder.index, folder.settings
        metadata: dict[str, str] = {}
        for name, checkpoint in folder.weight_files().items():
            with checkpoint:
                form = "linocut" if checkpoint.packed else "dense"
                parts.append(Part.of(name, form, weights_of(checkpoint), checkpoint.files))
                files += checkpoint.files
                metadata = metadata or dict(checkpoint.metadata)
                if verify:
                    checkpoint.verify()
                    verified += len(checkpoint)
        return parts, (index, settings, metadata), files, verified
    model = open_model(root)
    try:
        for name, component in model.components.items():
            parts.append(Part.of(name, component.form, component.weights, component.files))
            files += component.files
            if verify:
                component.verify()
                verified += len(component.weights)
    finally:
        model.close()
    with Checkpoint.open(root / "vae") as checkpoint:
        parts.append(Part.of("vae", "dense", weights_of(checkpoint), checkpoint.files))
        files += checkpoint.files
        verified += len(checkpoint) if verify and checkpoint.verify() >= 0 else 0
    return parts, (model.index, model.settings, {}), files, verified


def _is_taken(path: Path) -> bool:
    return path.suffix in _SUFFIXES or any(path.match(pattern) for pattern in LICENSES)


def _card(root: Path, repository: str, facts: Facts, card: Path | None, replace: bool,
          report: dict[str, Any] | None) -> str:
    if card is not None:
        if report is not None:
            raise UsageError("--card gives the whole card, and --report writes into a new one; choose one")
        try:
            return card.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{card}: cannot be read as text ({error})") from None
    own = root / CARD
    if own.is_file() and not replace and not is_ours(own.read_text(encoding="utf-8", errors="replace")):
        raise UsageError(f"{own}: not as linocut wrote it, so somebody cares about it; pass --card {own} to publish "
                         "it, or --replace-card to publish a new one in its place")
    return write_card(facts, repository, report)


def publish(upload: Upload, *, given_card: bool = False, replace_card: bool = False, private: bool = False,
            message: str = "") -> dict[str, Any]:
    """Put it on the hub in one commit, making the repository if there is none; returns url, commit and `also_there`.

    A card on the hub that was not written here, or was edited there, is replaced only by one that the user gave
    (`given_card`), or with `replace_card`. Raises UsageError for that, HubError for all that the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise HubError("not logged in to the hub; run 'hf auth login', or set HF_TOKEN to a token that may write")
    api = HfApi(library_name="linocut", library_version=__version__)
    there = _there(upload.repository)
    if there is not None and not given_card and not replace_card:
        _check_card(there)
    operations = [CommitOperationAdd(CARD, upload.card.encode())]
    operations += [CommitOperationAdd(name, str(path)) for name, path in upload.files.items()]
    try:
        with _quiet_library(bars=sys.stderr.isatty()):
            api.create_repo(upload.repository, private=True if private else None, exist_ok=True)
            # What was looked at is what is written over: a change in between is refused by the hub.
            done = api.create_commit(upload.repository, operations, commit_message=message or "Put the model here",
                                     parent_commit=there.commit if there is not None else None)
    except Exception as error:  # the library's errors differ between versions
        if status_of(error) == 412:
            raise HubError(f"{upload.repository}: somebody changed it meanwhile; look at it, and run the same command "
                           "again") from error
        reason = failure(error, "it could not be put there").replace(" and not in the cache", "")
        raise HubError(f"{upload.repository}: {reason}") from error
    others = sorted(set(there.files) - set(upload.files) - {CARD, ".gitattributes"}) if there is not None else []
    return {"url": f"{api.endpoint}/{upload.repository}", "commit": done.oid, "also_there": others}


@contextlib.contextmanager
def _quiet_library(bars: bool) -> Iterator[None]:
    """Without the library's warnings, which we say in our own words, nor its bars where nobody watches."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    before = logging.get_verbosity()
    ours = not bars and not are_progress_bars_disabled() and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    logging.set_verbosity_error()
    if ours:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if ours:
            enable_progress_bars()


def _there(repository: str) -> Repository | None:
    try:
        return look(repository)
    except ModelNotFoundError as error:
        cause = error.__cause__ or error
        if type(cause).__name__ == "RepositoryNotFoundError":
            return None  # none yet, or it is not this user's: making it will tell
        # All else leaves open whether there is a card that must not be lost.
        reason = failure(cause, "it could not be looked at").replace(" and not in the cache", "")
        raise HubError(f"{repository}: {reason}") from error


def _check_card(there: Repository) -> None:
    file = there.files.get(CARD)
    if file is None:
        return
    with TemporaryDirectory(prefix="linocut-card-") as temporary:
        store = FolderStore(Path(temporary))
        download(there, [file], store, lambda done, total, name: None)
        text = store.place(file).read_text(encoding="utf-8", errors="replace")
    if not is_ours(text):
        raise UsageError(f"{there.id}: its {CARD} was edited, or was never linocut's; pass --card FILE with the card "
                         "that you want, or --replace-card to lose that one")
