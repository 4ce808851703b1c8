"""`linocut pull`: a model from the hub, after saying what it will take. Needs no torch."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from linocut.cli import printable
from linocut.cli._fetch import verify, withdrawn_if_it_fails
from linocut.cli._progress import Bar
from linocut.cli._signals import sigterm_interrupts

if TYPE_CHECKING:
    from linocut.formats.fetch import Store
    from linocut.formats.hub import RemoteFile, Repository
    from linocut.pipeline.forecast import Forecast


@click.command()
@click.argument("name", metavar="NAME")
@click.option("--to", "destination", type=click.Path(path_type=Path), metavar="DIR",
              help="A plain folder instead of the Hugging Face cache.")
@click.option("--optional", is_flag=True, help="Also what a model works without: the weights beside a timestep table, "
              "for other numbers of steps.")
@click.option("--verify", is_flag=True, help="Check also what was fetched before: every file, every tensor.")
@click.option("--dry-run", is_flag=True, help="Only say what it would take.")
@click.option("--force", is_flag=True, help="Replace the model at DIR if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(name: str, destination: Path | None, optional: bool, verify: bool, dry_run: bool, force: bool,
            as_json: bool) -> None:
    """Fetch the model NAME from the Hugging Face hub: klein-4b, bonsai-binary, bonsai-ternary or org/name[@revision].

    Only the files that the model needs are fetched, and compared with the hub's checksums. It can be stopped at any
    time; the same command goes on where it stopped. Afterwards other commands take the same NAME, without a network.

    \b
    linocut pull klein-4b
    linocut pull org/name@v1 --to models/name
    """
    from linocut.errors import UsageError

    if force and destination is None:
        raise UsageError("--force is for --to DIR; in the cache nothing is ever replaced")
    pull = Pull(name, destination, optional, verify, quiet=as_json)
    try:
        report = pull.look() if dry_run else pull.run(force)
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on where it stopped", err=True)
        click.get_current_context().exit(130)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    elif not dry_run:
        for line in _done(report):
            click.echo(printable(line))


class Pull:
    """One invocation."""

    def __init__(self, name: str, destination: Path | None, optional: bool, verify: bool, quiet: bool) -> None:
        self.name, self.optional, self.verify, self.quiet = name, optional, verify, quiet
        self.destination = None if destination is None else destination.expanduser().absolute()

    def look(self) -> dict[str, Any]:
        """Say what it would take; nothing but configs and headers is fetched, and nothing is kept."""
        from tempfile import TemporaryDirectory

        from linocut.formats import fetch, hub
        from linocut.quantize.workplace import begun

        repository = hub.look(self.name)
        cache = fetch.CacheStore(repository)
        with TemporaryDirectory(prefix="linocut-pull-") as temporary:
            configs = fetch.FolderStore(Path(temporary))
            wanted = fetch.choose(repository, configs, self.optional)
            if self.destination is None:
                return self._forecast(repository, wanted, configs, fetch.remaining(cache, wanted), cache.root)
            work = begun(self.destination, self._identity(repository)) or Path(temporary, "nothing")
            left = fetch.remaining(fetch.FolderStore(work), wanted, cache)
            return self._forecast(repository, wanted, configs, left, self.destination)

    def run(self, force: bool) -> dict[str, Any]:
        from linocut.formats import fetch, hub
        from linocut.quantize.workplace import check_destination, publish, workplace

        if self.destination is not None:
            check_destination(self.destination, force)
        try:
            repository = hub.look(self.name)
        except hub.OfflineError:
            root = hub.cached(self.name)
            if root is None or self.destination is not None:
                raise
            return {"name": self.name, "path": str(root), "offline": True, "fetched_bytes": 0,
                    "verified": verify(root, self.name, every=True) if self.verify else None}
        with ExitStack() as stack:
            store: fetch.Store = fetch.CacheStore(repository)
            known = self.destination is None and hub.is_whole(fetch.CacheStore(repository).snapshot)
            if self.destination is not None:
                work = stack.enter_context(workplace(self.destination, self._identity(repository)))
                store = fetch.FolderStore(work)
            stack.enter_context(sigterm_interrupts())
            wanted = fetch.choose(repository, store, self.optional)
            if self.destination is not None:
                fetch.check_room(store, wanted)  # copies take room, too
                fetch.take_cached(repository, wanted, store)
            missing = fetch.remaining(store, wanted)
            report = self._forecast(repository, wanted, store, missing, self.destination or store.root)
            fetch.check_room(store, wanted)
            with Bar("fetching") as bar:
                fetch.download(repository, wanted, store, bar.update)
            if self.verify:
                with Bar("checking") as bar:
                    fetch.check(wanted, store, bar.update)
            root = store.publish(wanted)
            report |= {"fetched_bytes": missing, "path": str(root), "verified": None}
            if self.verify or missing or not known:
                if self.destination is None:
                    stack.enter_context(withdrawn_if_it_fails(root, new=not known))
                report["verified"] = verify(root, self.name, self.verify)
            if self.destination is not None:
                publish(root, self.destination, force)
                report["path"] = str(self.destination)
        return report

    def _identity(self, repository: Repository) -> str:
        """What a folder under way is for: another choice of files begins anew."""
        return f"{repository.id} {repository.commit}{' with optional files' if self.optional else ''}"

    def _forecast(self, repository: Repository, wanted: list[RemoteFile], configs: Store, left: int,
                  place: Path) -> dict[str, Any]:
        """What it will take, with `left` bytes to fetch to `place`: shown, and as the beginning of the report."""
        from linocut.formats import fetch
        from linocut.pipeline.budget import available_bytes
        from linocut.pipeline.forecast import forecast

        found = forecast(repository, wanted, configs)
        free = fetch.free_bytes(place)
        report = {"name": self.name, "repository": repository.id, "revision": repository.revision,
                  "commit": repository.commit, "bytes": sum(file.size for file in wanted), "missing_bytes": left,
                  "free_bytes": free, "left_out_bytes": sum(file.size for file in repository.files.values()) - sum(
                      file.size for file in wanted),
                  "files": [{"path": file.path, "size": file.size, "sha256": file.sha256, "git": file.blob}
                            for file in wanted], **found.to_dict()}
        if not self.quiet:
            for line in _forecast_lines(report, found, place.parent, available_bytes()):
                click.echo(printable(line))
        return report


def _forecast_lines(report: dict[str, Any], found: Forecast, place: Path, free_memory: int | None) -> list[str]:
    from linocut.pipeline.memory import gigabytes as show

    kind = {"linocut": ", ".join(found.encodings), "dense": "dense", "": ""}.get(found.form, f"in {found.form}")
    lines = [f"{report['repository']}, revision {report['revision']} ({report['commit'][:10]})"]
    lines += [f"  {part:<14}{show(size):>10}" + (f"   {kind}" if part == "transformer" else "")
              for part, size in report["parts"].items()]
    if report["left_out_bytes"] >= 10**6:
        lines.append(f"  {'left out':<14}{show(report['left_out_bytes']):>10}   not needed")
    lines.append(f"  {'to fetch':<14}{show(report['missing_bytes']):>10}   {show(report['free_bytes'])} are free in "
                 f"{place}")
    plan = found.plan
    if plan is None:
        return [*lines, f"  {'memory':<14}{'?':>10}   {found.why_not}"]
    have = "" if free_memory is None else f", {show(free_memory)} are free"
    return [*lines, f"  {'memory':<14}{show(plan.peak):>10}   to draw {plan.width}x{plan.height}{have}"]


def _done(report: dict[str, Any]) -> list[str]:
    name, path, verified = report["name"], report["path"], report["verified"]
    if report.get("offline"):
        lines = ["offline, so the hub was not asked for a newer one"]
    elif report["fetched_bytes"]:
        lines = [f"fetched {report['fetched_bytes']:,} bytes; the bytes of {len(report['files'])} files have the hub's "
                 "checksums"]
    else:
        lines = ["everything was here already"]
    if verified and verified["tensors"]:
        lines.append(f"verified: values of {verified['tensors']:,} tensors, {verified['hashes']:,} hashes")
    return [*lines, path, *_next(report, name)]


def _next(report: dict[str, Any], name: str) -> list[str]:
    """The command that a user most likely wants next."""
    form = report.get("form")
    name = name if Path(report["path"]).name == report.get("commit") else report["path"]
    if form == "linocut":
        return [f'next: linocut generate "a red fox" --model {name}']
    if form == "dense":
        return [f"next: linocut quantize {name} FOLDER --encoding ternary"]
    return [f"next: linocut convert {name} FOLDER --to linocut   (--lossy if it asks for that)"] if form else []
