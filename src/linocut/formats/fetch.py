"""Fetching the files of a model from the hub: only those that are needed, resumable to the byte, checked before they
get their names.

A file's bytes are appended to `....incomplete`, whatever interrupts that, and an interrupted one goes on where it
stopped, in this process or in another. A finished one is compared with the hub's checksum (SHA-256 of large files,
git's SHA-1 of small ones). In the cache, which is the library's own and has its layout, a model gets its snapshot only
when all of its files are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, BinaryIO, Protocol

from linocut import __version__
from linocut.errors import Cancelled, FormatError, HubError, LinocutError, UsageError
from linocut.formats.header import strict_json
from linocut.formats.hub import RemoteFile, Repository, failure, look, status_of, text_taps
from linocut.formats.layouts import needed_files
from linocut.formats.writer import WriteError, atomic_write_bytes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["CacheStore", "FolderStore", "Store", "check", "check_room", "choose", "download", "fetch", "free_bytes",
           "read_start", "remaining", "take_cached"]

OnProgress = Callable[[int, int, str], None]
_THREADS = 4
_ATTEMPTS = 4  # connections in a row that bring nothing new
_SPARE_DISK = 64 << 20
_MAX_JSON = 100_000_000
_TRY_AGAIN = (408, 425, 429)
_TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2")


class Store(Protocol):
    """Where files of a repository are kept, below `root`."""

    root: Path

    def place(self, file: RemoteFile) -> Path:
        """Where the file lies when it is finished; until then `....incomplete` beside it."""

    def publish(self, files: Sequence[RemoteFile]) -> Path:
        """Give finished files their names; returns the model's folder."""


class CacheStore:
    """The library's own cache (HF_HOME, HF_HUB_CACHE), so that other programs find the model, too."""

    def __init__(self, repository: Repository) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE

        self.repository = repository
        self.root = Path(HF_HUB_CACHE).expanduser() / f"models--{repository.id.replace('/', '--')}"

    @property
    def snapshot(self) -> Path:
        """The model's folder, once it is published."""
        return self.root / "snapshots" / self.repository.commit

    def place(self, file: RemoteFile) -> Path:
        return self.root / "blobs" / file.etag

    def publish(self, files: Sequence[RemoteFile]) -> Path:
        """Link the files into the snapshot of their commit, and note what the revision stands for."""
        snapshot = self.snapshot
        # The index last: without it a folder is no model.
        for file in sorted(files, key=lambda file: file.path == "model_index.json"):
            pointer, blob = snapshot / file.path, self.place(file)
            if pointer.exists():
                continue
            pointer.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                pointer.unlink()  # a link whose target was removed
            try:
                pointer.symlink_to(os.path.relpath(blob, pointer.parent))
            except FileExistsError:
                pass  # another process was quicker
            except OSError:  # no links on this file system
                shutil.copyfile(blob, pointer)
        if self.repository.revision != self.repository.commit:
            ref = self.root / "refs" / self.repository.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(ref, self.repository.commit.encode())
        return snapshot


class FolderStore:
    """A plain folder with the repository's own names."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def place(self, file: RemoteFile) -> Path:
        return self.root / file.path

    def publish(self, files: Sequence[RemoteFile]) -> Path:
        """Nothing to do: the files have their names."""
        return self.root


def fetch(name: str, on_progress: OnProgress | None = None) -> Path:
    """Fetch what is missing of a model on the hub into the cache; returns its folder.

    on_progress(bytes done, bytes in all, file); without it a bar of the library on terminals. Raises
    ModelNotFoundError where there is none to be had, HubError for a lost connection, FormatError for bytes that are
    not those that the hub names, UsageError and WriteError for a disk that cannot hold them.
    """
    repository = look(name)
    store = CacheStore(repository)
    wanted = choose(repository, store)
    check_room(store, wanted)
    download(repository, wanted, store, on_progress)
    return store.publish(wanted)


def choose(repository: Repository, store: Store, optional: bool = False) -> list[RemoteFile]:
    """The files that a model needs. What decides that (index files) is fetched into `store`.

    Raises UsageError if the repository holds no model, FormatError for an index that asks for what is not there.
    """
    files = repository.files

    def read(name: str) -> Mapping[str, Any]:
        return _read_json(repository, files[name], store)

    index = read("model_index.json") if "model_index.json" in files else {}
    taps = text_taps(index, Path(f"{repository.id}/model_index.json"))
    try:
        names = needed_files(files.keys(), taps, read, optional)
    except UsageError as error:
        raise UsageError(f"{repository.name}: {error}") from None
    missing = [name for name in names if name not in files]
    if missing:
        raise FormatError("an index names files that the repository lacks", path=repository.name,
                          expected=missing[0], found=f"{len(missing)} missing")
    return [files[name] for name in names]


def _read_json(repository: Repository, file: RemoteFile, store: Store) -> dict[str, Any]:
    where = f"{repository.id}/{file.path}"
    if file.size > _MAX_JSON:
        raise FormatError("file is too long", path=where, expected=f"at most {_MAX_JSON} bytes", found=file.size)
    download(repository, [file], store, lambda done, total, name: None)
    value = strict_json(store.place(file).read_bytes(), where, "file")
    if not isinstance(value, dict):
        raise FormatError("file has the wrong form", path=where, expected="a JSON object", found=type(value).__name__)
    return value


# ---- what is there ---------------------------------------------------------------------------------------------------

def _incomplete(place: Path) -> Path:
    return place.with_name(place.name + ".incomplete")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _is_there(file: RemoteFile, store: Store) -> bool:
    place = store.place(file)
    return place.is_file() and _size(place) == file.size


def remaining(store: Store, files: Sequence[RemoteFile], cache: Store | None = None) -> int:
    """Bytes that are still to be fetched; with `cache`, without those that `take_cached` would copy from it."""
    once = {store.place(file): file for file in files}.values()
    return sum(file.size - min(file.size, _size(_incomplete(store.place(file))))
               for file in once if not _is_there(file, store) and not (cache and _is_there(file, cache)))


def free_bytes(place: Path) -> int:
    """Free bytes of the disk that a folder lies on, or will lie on."""
    while not place.is_dir() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def check_room(store: Store, files: Sequence[RemoteFile]) -> None:
    """Raise UsageError if the disk cannot hold what is still to be fetched."""
    needed = remaining(store, files)
    free = free_bytes(store.root)
    if needed and free < needed + _SPARE_DISK:
        raise UsageError(f"{store.root.parent}: not enough room on the disk ({needed / 1e9:.2f} GB needed, "
                         f"{free / 1e9:.2f} GB free); free some, or choose another place with HF_HOME or --to")


# ---- fetching --------------------------------------------------------------------------------------------------------

def download(repository: Repository, files: Sequence[RemoteFile], store: Store,
             on_progress: OnProgress | None = None) -> None:
    """Fetch the files that are not in `store` yet, several at a time. Raises as `fetch` does.

    Any exception, KeyboardInterrupt included, leaves what was fetched for the next time.
    """
    once = list({store.place(file): file for file in files}.values())
    missing = sorted((file for file in once if not _is_there(file, store)), key=lambda file: -file.size)
    done = {file.path: file.size for file in once}
    total = sum(done.values())
    done |= {file.path: min(file.size, _size(_incomplete(store.place(file)))) for file in missing}
    stop = Event()
    if not missing:
        return
    todo: SimpleQueue[RemoteFile] = SimpleQueue()
    results: SimpleQueue[BaseException | None] = SimpleQueue()

    def work() -> None:
        with contextlib.suppress(Empty):
            while not stop.is_set():
                file = todo.get_nowait()
                try:
                    _fetch_file(repository, file, store.place(file), done, stop)
                    results.put(None)
                except BaseException as error:
                    results.put(error)

    for file in missing:
        todo.put(file)
    # Daemons, since a thread that waits for a silent server would hold up Ctrl-C for a minute.
    threads = [Thread(target=work, daemon=True) for _ in range(min(_THREADS, len(missing)))]
    with _bar(total, on_progress) as report:
        try:
            for thread in threads:
                thread.start()
            left = len(missing)
            while left:
                with contextlib.suppress(Empty):
                    error = results.get(timeout=0.1)
                    left -= 1
                    if error is not None:
                        raise error
                # The largest of those under way: the names of small ones would only flicker.
                report(sum(done.values()), total,
                       next((file.path for file in missing if done[file.path] < file.size), ""))
        finally:
            stop.set()
            for thread in threads:
                thread.join(0.5)


def _fetch_file(repository: Repository, file: RemoteFile, place: Path, done: dict[str, int], stop: Event) -> None:
    """Fetch one file, or the rest of it, and check it."""
    partial = _incomplete(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for again in (True, False):
            with _locked(partial, stop) as target:
                if place.is_file() and _size(place) == file.size:  # another process was quicker
                    partial.unlink()
                    return
                begun = target.seek(0, os.SEEK_END)
                if begun > file.size:
                    target.truncate(begun := target.seek(0))
                _receive(repository, file, target, done, stop)
                target.flush()
                os.fsync(target.fileno())
                found = _checksum(target, file, stop)
                if found == file.etag:
                    os.replace(partial, place)
                    return
                done[file.path] = 0
                partial.unlink()
            if not (again and begun):  # an older beginning may have been at fault, so that the whole is tried once
                raise FormatError("does not match the hub's checksum", path=f"{repository.id}/{file.path}",
                                  expected=file.etag, found=found, advice="nothing of it was kept; run the command "
                                  "again, and if that does not help, ask who published it")
    except OSError as error:
        if isinstance(error, LinocutError):
            raise
        raise WriteError(place, error) from error


def _receive(repository: Repository, file: RemoteFile, target: BinaryIO, done: dict[str, int], stop: Event) -> None:
    """Append the bytes that are missing at the end of `target`, over as many connections as that takes."""
    idle = 0
    while (begun := target.seek(0, os.SEEK_END)) < file.size:
        try:
            for position in _stream(repository, file, target, begun, file.size):
                done[file.path] = position
                if stop.is_set():
                    raise Cancelled("interrupted")
        except Exception as error:
            if not _may_pass(error):
                if status_of(error) is None:
                    raise
                raise HubError(f"{repository.id}/{file.path}: {failure(error)}") from error
            now = target.seek(0, os.SEEK_END)
            idle = 0 if now > begun else idle + 1
            if idle > _ATTEMPTS:
                raise HubError(f"{repository.id}/{file.path}: the connection was lost with {now / 1e6:,.1f} of "
                               f"{file.size / 1e6:,.1f} MB here; run the same command again, it goes on there"
                               ) from error
            if stop.wait(_pause(idle)):
                raise Cancelled("interrupted") from None
        else:
            if target.tell() < file.size:  # the server was content with less
                break
    found = target.seek(0, os.SEEK_END)
    if found != file.size:
        raise FormatError("has not the size that the hub names", path=f"{repository.id}/{file.path}",
                          expected=file.size, found=found, advice="run the command again")
    done[file.path] = file.size


def _may_pass(error: BaseException) -> bool:
    """Whether the network, or a server in trouble, is to blame, so that trying again makes sense."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in _TRY_AGAIN
    return isinstance(error, ConnectionError | TimeoutError) or any(
        kind.__module__.partition(".")[0] in _TRANSPORTS for kind in type(error).__mro__)


def _pause(attempts: int) -> float:
    """Seconds to wait after so many connections that brought nothing."""
    return min(8.0, 0.5 * (1 << attempts))


def _stream(repository: Repository, file: RemoteFile, target: BinaryIO, begun: int, end: int) -> Iterator[int]:
    """Write the bytes from `begun` up to `end` of a file to `target`, which stands at `begun`; yields where it is.

    If a server sends the whole file instead of a range, `target` begins anew. Bytes past `end` are not waited for.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    # The hub's own address each time and not that of its storage, which it redirects to: that one expires. The client
    # does not pass the token on to another host. Compressed on the way, a file could not be resumed by its bytes.
    url = hf_hub_url(repository.id, file.path, revision=repository.commit)
    headers = build_hf_headers(library_name="linocut", library_version=__version__) | {"Accept-Encoding": "identity"}
    if begun or end < file.size:
        headers["Range"] = f"bytes={begun}-{end - 1 if end < file.size else ''}"
    with get_session().stream("GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        if begun and response.status_code == 200:
            target.truncate(begun := target.seek(0))
        position = begun
        for chunk in response.iter_bytes():
            target.write(chunk)
            position += len(chunk)
            yield position
            if position >= end:
                return


@contextlib.contextmanager
def _locked(path: Path, stop: Event) -> Iterator[BinaryIO]:
    """A file opened for appending by one process at a time; the others wait."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        _lock(file, stop)
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
        file.close()  # the process that we waited for has renamed or removed it
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # on a full disk what is buffered cannot be written; it comes again
            file.close()


def _lock(file: BinaryIO, stop: Event) -> None:
    while fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if stop.wait(0.2):
                file.close()
                raise Cancelled("interrupted") from None
        except OSError:  # a file system without locks
            return


def _checksum(file: BinaryIO, expected: RemoteFile, stop: Event) -> str:
    digest = hashlib.sha256() if expected.sha256 else hashlib.sha1(f"blob {expected.size}\0".encode(),
                                                                   usedforsecurity=False)
    file.seek(0)
    while block := file.read(1 << 22):
        digest.update(block)
        if stop.is_set():
            raise Cancelled("interrupted")
    return digest.hexdigest()


def take_cached(repository: Repository, files: Sequence[RemoteFile], store: Store) -> None:
    """Copy what is in the library's cache, and check it as if it had just been fetched."""
    cache = CacheStore(repository)
    taken = []
    for file in files:
        place = store.place(file)
        if _is_there(file, cache) and not place.exists() and _size(_incomplete(place)) < file.size:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(cache.place(file), _incomplete(place))
            except OSError as error:
                raise WriteError(place, error) from error
            taken.append(file)
    download(repository, taken, store, lambda done, total, name: None)


def check(files: Sequence[RemoteFile], store: Store, on_progress: OnProgress | None = None) -> None:
    """Compare files that were fetched before with the hub's checksums. Raises FormatError at the first that differs."""
    done, total = 0, sum(file.size for file in files)
    for file in files:
        place = store.place(file)
        with open(place, "rb") as opened:
            found = _checksum(opened, file, Event())
        if found != file.etag:
            raise FormatError("does not match the hub's checksum", path=place, expected=file.etag, found=found,
                              advice=f"it was damaged on this disk; remove it and pull again ({file.path})")
        done += file.size
        if on_progress is not None:
            on_progress(done, total, file.path)


def read_start(repository: Repository, file: RemoteFile, store: Store, count: int) -> bytes:
    """The first bytes of a file, at most `count`, from `store` if they are there. Raises HubError."""
    count = min(count, file.size)
    if _is_there(file, store):
        with open(store.place(file), "rb") as opened:
            return opened.read(count)
    data = io.BytesIO()
    try:
        for attempt in range(_ATTEMPTS):
            try:
                for _ in _stream(repository, file, data, data.seek(0, os.SEEK_END), count):
                    pass
                break
            except Exception as error:
                if attempt == _ATTEMPTS - 1 or not _may_pass(error):
                    raise
                time.sleep(_pause(attempt))
    except Exception as error:
        raise HubError(f"{repository.id}/{file.path}: {failure(error)}") from error
    return data.getvalue()[:count]


@contextlib.contextmanager
def _bar(total: int, on_progress: OnProgress | None) -> Iterator[OnProgress]:
    """`on_progress`, or a bar of the library's kind on terminals."""
    if on_progress is not None or not sys.stderr.isatty():
        yield on_progress or (lambda done, total, name: None)
        return
    from huggingface_hub.utils import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="fetching the model") as bar:
        yield lambda done, total, name: bar.update(done - bar.n) and None
