"""The hidden folder in which a model is made, and what is checked before and after: nothing half-made gets a name."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from linocut.errors import LinocutError, UsageError
from linocut.formats.checkpoint import WriteError, atomic_write_bytes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_IDENTITY, _LOCK, _LOGS = "source.json", "lock", "*.jsonl"
_SPARE_DISK = 16 << 20


def check_destination(dst: Path, force: bool) -> None:
    """Refuse a destination that exists; with `force`, one that is no model folder."""
    if not dst.parent.is_dir():
        raise UsageError(f"{dst.parent}: no such folder; make it first")
    if not (dst.exists() or dst.is_symlink()):
        return
    if not force:
        raise UsageError(f"{dst}: exists already; choose another name or pass --force to replace it")
    if dst.is_symlink() or not dst.is_dir() or not ((dst / "model_index.json").is_file() or not any(dst.iterdir())):
        raise UsageError(f"{dst}: --force replaces only model folders, and this is none; choose another name")


def check_apart(source: Path, dst: Path) -> None:
    """Refuse a destination inside its source or around it."""
    origin, target = source.resolve(), dst.resolve()
    if origin == target or target in origin.parents or origin in target.parents:
        raise UsageError(f"{dst}: source and destination lie inside one another; choose another destination")


@contextlib.contextmanager
def workplace(dst: Path, identity: str) -> Iterator[Path]:
    """The hidden folder `.NAME.partial`, locked against a second run, emptied if it was begun for something else."""
    work = dst.with_name(f".{dst.name}.partial")
    try:
        work.mkdir(exist_ok=True)
        marker = work / _IDENTITY
        if not marker.exists() and {path.name for path in work.iterdir()} - {_LOCK}:
            raise UsageError(f"{work}: in the way, and not made by this program; move it")
        with open(work / _LOCK, "w", encoding="utf-8") as lock:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UsageError(f"{dst}: another process is writing it") from None
            if not marker.exists() or marker.read_text(encoding="utf-8") != identity:
                _empty(work)
                atomic_write_bytes(marker, identity.encode())
            yield work
    except OSError as error:
        if isinstance(error, LinocutError):
            raise
        raise WriteError(dst, error) from error


def begun(dst: Path, identity: str) -> Path | None:
    """The folder that `workplace` would go on with, or None if it would begin with an empty one."""
    work = dst.with_name(f".{dst.name}.partial")
    marker = work / _IDENTITY
    return work if marker.is_file() and marker.read_text(encoding="utf-8") == identity else None


def _empty(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def check_disk(work: Path, weights: int, carried: list[Path]) -> None:
    """Refuse to begin what the disk cannot hold: `weights` bytes and those carried files that cannot be linked."""
    device = work.stat().st_dev
    needed = weights + sum(file.stat().st_size for file in carried
                           if not _linkable(file) or file.stat().st_dev != device)
    present = sum(path.stat().st_blocks * 512 for path in work.rglob("*.safetensors*") if path.is_file())
    free = shutil.disk_usage(work).free
    if free < needed - present + _SPARE_DISK:
        raise UsageError(f"{work.parent}: not enough room on the disk ({needed / 1e9:.2f} GB needed, "
                         f"{(free + present) / 1e9:.2f} GB free); free some or choose another place")


def carry(file: Path, target: Path) -> None:
    """Put a file of the source at `target`: weights by hard link where that can be, all else as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.unlink()
    if _linkable(file):
        with contextlib.suppress(OSError):
            os.link(file.resolve(), target)
            return
    shutil.copyfile(file, target)


def _linkable(file: Path) -> bool:
    # Small text files are copied: an editor that writes in place would change the source as well.
    return file.suffix == ".safetensors"


def publish(work: Path, dst: Path, force: bool) -> None:
    """Give the finished folder its name, replacing an older model only when the new one is complete."""
    check_destination(dst, force)  # it may have appeared meanwhile
    old = dst.with_name(f".{dst.name}.old-{os.getpid()}")
    if dst.exists():
        os.rename(dst, old)
    os.rename(work, dst)
    # Only now, so that a run killed here finds everything it needs, on one side of the renaming or the other.
    for path in [*dst.glob(_LOGS), dst / _LOCK, dst / _IDENTITY]:
        path.unlink()
    shutil.rmtree(old, ignore_errors=True)
