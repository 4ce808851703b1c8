"""Models on the Hugging Face hub: names, lists of files, and what is in the local cache already.

Only `look` asks the network. Fetching is in `formats.fetch`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linocut import __version__
from linocut.errors import FormatError, HubError, LinocutError, ModelNotFoundError
from linocut.formats.header import printable, strict_json
from linocut.formats.layouts import file_names, needed_files

__all__ = ["ALIASES", "OfflineError", "RemoteFile", "Repository", "cached", "failure", "hub_id", "is_whole", "look",
           "read_json", "status_of", "text_taps"]

ALIASES = {
    "klein-4b": "black-forest-labs/FLUX.2-klein-4B",
    # of the forms that Bonsai is published in, the smallest to fetch, and whole: text encoder and tokenizer included
    "bonsai-binary": "prism-ml/bonsai-image-binary-4B-mlx-1bit",
    "bonsai-ternary": "prism-ml/bonsai-image-ternary-4B-mlx-2bit",
}
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"(?!/)(?!.*(?:\.\.|//))[\w./-]{1,120}(?<!/)")
_COMMIT, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_MAX_FILES = 100_000
_TIMEOUT = 20.0  # seconds for the list of files


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `sha256` is of its bytes, for large files; `blob` is git's SHA-1, of small ones."""

    path: str
    size: int
    blob: str
    sha256: str | None

    @property
    def etag(self) -> str:
        """What names the bytes: the hub's ETag, and the file's name in the cache."""
        return self.sha256 or self.blob


@dataclass(frozen=True)
class Repository:
    """A repository at one commit. `revision` is what was asked for (a branch, tag or commit)."""

    id: str
    revision: str
    commit: str
    files: dict[str, RemoteFile]

    @property
    def name(self) -> str:
        """The name by which commands take it."""
        return self.id if self.revision == "main" else f"{self.id}@{self.revision}"


class OfflineError(ModelNotFoundError):
    """The hub cannot be asked, so only what is in the cache can be had."""


def hub_id(name: str) -> tuple[str, str] | None:
    """(repository, revision) that a name means: an alias or `org/name`, either with `@revision`; None for others."""
    repository, at, revision = name.partition("@")
    repository = ALIASES.get(repository, repository)
    if not _ID.fullmatch(repository) or (at and not _REVISION.fullmatch(revision)):
        return None
    return repository, revision or "main"


def look(name: str) -> Repository:
    """Ask the hub what a repository holds: one request. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are honoured.

    Raises ModelNotFoundError if there is none to be had (no such repository or revision, gated, offline), HubError for
    an answer that makes no sense.
    """
    found = hub_id(name)
    if found is None:
        raise ModelNotFoundError(f"{name!r} is no name on the hub (expected org/name, org/name@revision, or one of "
                                 f"{', '.join(ALIASES)})")
    repository, revision = found
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ModelNotFoundError("huggingface_hub is not installed; fetching models needs it") from None
    api = HfApi(library_name="linocut", library_version=__version__)
    try:
        info = api.model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT)
        siblings = list(info.siblings or ())[: _MAX_FILES + 1]
    except Exception as error:  # the library's errors differ between versions
        reason = failure(error)
        kind = OfflineError if reason.startswith("offline") else ModelNotFoundError
        raise kind(f"{repository}: {reason}") from error
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha) or len(siblings) > _MAX_FILES:
        raise HubError(f"{repository}: the hub's answer makes no sense (expected a commit and at most {_MAX_FILES} "
                       f"files, found {printable(str(info.sha))} and {len(siblings)})")
    files = [_remote_file(repository, entry) for entry in siblings]
    return Repository(repository, revision, info.sha, {file.path: file for file in files})


def _remote_file(repository: str, entry: Any) -> RemoteFile:
    """An entry of the hub's list, whose names become names on this disk: so none that leads elsewhere passes."""
    path, size, blob, lfs = entry.rfilename, entry.size, entry.blob_id, entry.lfs
    sha256 = None if lfs is None else lfs["sha256"] if isinstance(lfs, Mapping) else lfs.sha256
    parts = path.split("/") if isinstance(path, str) else [".."]
    if (any(part in ("", ".", "..") or not part.isprintable() or "\\" in part or ":" in part for part in parts)
            or type(size) is not int or size < 0 or not isinstance(blob, str) or not _COMMIT.fullmatch(blob)
            or (sha256 is not None and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)))):
        raise HubError(f"{repository}: the hub lists a file that makes no sense (expected a relative path, a size and "
                       f"checksums, found {printable(str(path))}, {printable(str(size))})")
    return RemoteFile(path, size, blob, sha256)


def cached(name: str) -> Path | None:
    """The folder of a hub name in the local cache if all that the model needs is there, else None. Asks no network."""
    found = hub_id(name)
    if found is None:
        return None
    try:
        from huggingface_hub import snapshot_download

        root = Path(snapshot_download(found[0], revision=found[1], local_files_only=True,
                                      allow_patterns=["model_index.json"]))
    except Exception:  # not there, in the words of whatever version
        return None
    return root if is_whole(root) else None


def is_whole(root: Path) -> bool:
    """Whether a folder that may have been fetched in part holds a whole model."""
    names = file_names(root)
    try:
        index = read_json(root / "model_index.json") if "model_index.json" in names else {}
        needed = needed_files(names, text_taps(index, root), lambda name: read_json(root / name))
    except (LinocutError, OSError):
        return False
    parts = {name.partition("/")[0].partition("-")[0] for name in needed}
    if any("/tokenizer/" in name for name in needed):  # inside the text encoder's folder
        parts.add("tokenizer")
    listed = {part for part in ("text_encoder", "tokenizer", "vae") if index.get(part)}
    return set(needed) <= names and listed <= {part.partition(".")[0] for part in parts}


def text_taps(index: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    """The layers of the text encoder that a model with this `model_index.json` uses."""
    from linocut.formats.folder import read_settings

    return tuple(read_settings(dict(index), path)["text_taps"])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises FormatError."""
    value = strict_json(path.read_bytes(), path, "file")
    if not isinstance(value, dict):
        raise FormatError("file has the wrong form", path=path, expected="a JSON object", found=type(value).__name__)
    return value


# By name, since versions of the library keep them in different places; the first that fits, special before general.
_FAILURES = {
    "GatedRepoError": "its authors ask you to accept their terms on the hub first, then log in with 'hf auth login' or "
                      "set HF_TOKEN",
    "RepositoryNotFoundError": "the hub has no such repository, or it is private and you are not logged in",
    "RevisionNotFoundError": "the hub's repository has no such revision",
    "EntryNotFoundError": "the hub's repository has no such file",
    "IncompleteSnapshotError": "offline, and only a part of it is in the cache",
    "OfflineModeIsEnabled": "offline (HF_HUB_OFFLINE is set) and not in the cache",
    "LocalEntryNotFoundError": "offline (the hub cannot be reached) and not in the cache",
    "ConnectError": "offline (the hub cannot be reached) and not in the cache",
    "ConnectTimeout": "offline (the hub does not answer) and not in the cache",
    "ReadTimeout": "offline (the hub does not answer) and not in the cache",
    "JSONDecodeError": "what answers is no hub (expected JSON); look at HF_ENDPOINT, and at proxies",
}
_STATUSES = {401: "the hub does not accept your token; log in again with 'hf auth login', or set or unset HF_TOKEN",
             403: "the hub does not let you do this; look at the rights of your token",
             429: "the hub asks to be left alone for a while; try again in some minutes",
             413: "the hub finds it too large"}


def failure(error: BaseException, what: str = "not in the cache, and it could not be fetched") -> str:
    """Why the hub did not do as it was asked, in a few words; `what` failed, if nothing is known of the reason."""
    kinds = {kind.__name__ for kind in (*type(error).__mro__, *type(error.__cause__).__mro__)}
    for kind, reason in _FAILURES.items():
        if kind in kinds:
            return reason
    status = status_of(error)
    if status in _STATUSES:
        return _STATUSES[status]
    if status is not None and status >= 500:
        return f"the hub has trouble of its own (status {status}); try again later"
    text = " ".join(str(error).split())
    if len(text) > 160:
        text = text[:160].rpartition(" ")[0] + " ..."
    return f"{what} ({type(error).__name__}{': ' if text else ''}{text})"


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error of the library, if any."""
    for each in (error, error.__cause__):
        status = getattr(getattr(each, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None
