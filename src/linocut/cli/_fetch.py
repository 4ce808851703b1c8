"""Fetching a model from the hub where a command names one that is not here yet."""

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
    with sigterm_interrupts(), Bar("fetching") as bar:
        fetch.download(repository, wanted, store, bar.update)
    store.publish(wanted)
