"""Long comparisons, round after round, kept in a file so that an interrupted one goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linocut.cli.bench import report
from linocut.cli.bench.arms import summary
from linocut.errors import UsageError


class Rounds:
    """Numbers of arms by round. A number is kept in the file at once; arms that have one are not measured again."""

    def __init__(self, kind: str, threads: int, settings: dict[str, Any], path: Path | None) -> None:
        self.path = path
        self._document = report.document(kind, threads, settings, {})
        self._samples: dict[str, list[Any]] = {}
        if path is not None and path.exists():
            before = report.read(path, kind)
            for what in ("settings", "machine", "versions", "commit"):
                if before.get(what) != self._document[what]:
                    raise UsageError(f"{path} holds results of other {what} (expected {self._document[what]}, found "
                                     f"{before.get(what)}); name another file, or remove it")
            self._samples = {name: found["samples"] for name, found in before["results"].items()}

    def missing(self, names: list[str], number: int) -> list[str]:
        """Those of `names` that have no number for round `number` (from 0) yet."""
        return [name for name in names if len(self._samples.get(name, [])) <= number]

    def add(self, name: str, number: int, value: float) -> None:
        """Keep the number of an arm in a round, unless there is one."""
        samples = self._samples.setdefault(name, [])
        if len(samples) == number:
            samples.append(value)
        if self.path is not None:
            report.write(self.path, self.content())

    def content(self) -> dict[str, Any]:
        """The document with a summary of each arm."""
        return self._document | {"results": {name: summary(samples) for name, samples in self._samples.items()}}
