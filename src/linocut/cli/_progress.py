"""Progress on stderr, and only on a terminal: the line of `linocut generate`, and a plain bar for other long work."""

import sys
from types import TracebackType
from typing import Any

import click

_LABELS = {"encode": "reading the prompt", "denoise": "drawing", "decode": "developing"}


class Display:
    """A Rich progress bar that does nothing where nobody watches (pipes, CI, --json)."""

    def __init__(self, pictures: int, steps: int, quiet: bool = False) -> None:
        self.pictures, self.steps = pictures, steps
        self._bar: Any = None
        self._task: Any = None
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn(),
                                 console=Console(stderr=True), transient=True)

    def __enter__(self) -> "Display":
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def phase(self, text: str) -> None:
        """Show a phase of unknown length."""
        if self._bar is not None:
            self._bar.update(self._task, description=text, total=None)

    def update(self, progress: Any) -> None:
        """Show a `linocut.pipeline.run.Progress`."""
        if self._bar is None:
            return
        text = _LABELS[progress.phase]
        if progress.steps:
            text += f", step {progress.step + 1} of {progress.steps}"
        if self.pictures > 1:
            text = f"picture {progress.picture + 1} of {self.pictures}: {text}"
        self._bar.update(self._task, description=text, total=progress.total, completed=progress.done)

    def line(self, text: str, err: bool = False) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None and (err or sys.stdout.isatty()):
            from rich.text import Text

            self._bar.console.print(Text(text)) if err else self._bar.console.print(Text(text), soft_wrap=True)
        else:
            click.echo(text, err=err)


class Bar:
    """A bar for work of known size, such as bytes or weights; silent where stderr is no terminal."""

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
                             TextColumn("{task.description}", style="dim", markup=False), transient=True,
                             console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("opening", total=None)

    def update(self, done: int, total: int, name: str) -> None:
        """Show that `done` of `total` is done, and what is in hand."""
        self._bar.update(self._task, completed=done, total=total, description=name)

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._bar.stop()
