"""Fetching a model from the hub where a command names one that is not here yet."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click

from linocut.cli import printable
from linocut.cli._progress import Bar
from linocut.cli._signals import sigterm_interrupts


def bring(name: str) -> None:
    """Fetch the model `name` with a bar, if it is one of the hub's and not in the cache; all else is left alone.

    What the name means, and whether there is such a model, is for `ModelFolder.open` to say.
    """
    from linocut.formats.folder import EMBEDDED
    from linocut.formats.hub import cached, hub_id

    if not name or name in EMBEDDED or hub_id(name) is None or Path(name).expanduser().exists() or cached(name):
        return
    from linocut.errors import ModelNotFoundError
    from linocut.formats import fetch
    from linocut.formats.hub import look

    try:
        repository = look(name)
    except ModelNotFoundError:
        return
    store = fetch.CacheStore(repository)
    wanted = fetch.choose(repository, store)
    fetch.check_room(store, wanted)
    size = fetch.remaining(store, wanted)
    click.echo(printable(f"{repository.name} is not here yet: fetching {size / 1e9:,.2f} GB (as 'linocut pull' does)"),
               err=True)
    with sigterm_interrupts():
        with Bar("fetching") as bar:
            fetch.download(repository, wanted, store, bar.update)
        root = store.publish(wanted)
        with withdrawn_if_it_fails(root, new=True):
            verify(root, repository.name)


def verify(root: Path, name: str, every: bool = False) -> dict[str, int]:
    """Check what the files of a model say of themselves: a SHA-256 per tensor where linocut wrote them, and the values.

    With `every`, also the values in files of other programs. Returns the numbers of tensors and of hashes.
    """
    from linocut.formats.folder import ModelFolder

    tensors = hashes = 0
    if (root / "transformer").is_dir() and (root / "model_index.json").is_file():
        for part, checkpoint in ModelFolder(root, name).weight_files().items():
            with checkpoint:
                if checkpoint.native or every:
                    with Bar(f"verifying {part}") as bar:
                        hashes += checkpoint.verify(partial(bar.update, name=""))
                    tensors += len(checkpoint)
    return {"tensors": tensors, "hashes": hashes}


@contextlib.contextmanager
def withdrawn_if_it_fails(root: Path, new: bool) -> Iterator[None]:
    """Take a model's index out of the cache if its check fails, or stops while it is new, so that no command uses it.
    """
    from linocut.errors import FormatError

    try:
        yield
    except BaseException as error:
        if new or isinstance(error, FormatError):
            (root / "model_index.json").unlink(missing_ok=True)
        raise
