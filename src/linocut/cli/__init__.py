"""The command line: a lazy group of commands, and the one place where an error becomes a line and an exit code.

Only click is imported here, so `linocut --help` and shell completion answer in a blink; a command's module is imported
when that command runs, and heavy libraries inside the command's body. Exit codes: 0 done, 1 a check failed or a bug,
2 a mistake that the user can mend, 130 interrupted.
"""

import contextlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from linocut import __version__
from linocut.errors import Cancelled, LinocutError

# name -> (module:attribute, one line of help). The help is written here so that listing commands imports none of them.
COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("linocut.cli.generate:command", "Draw pictures from prompts."),
    "serve": ("linocut.cli.serve:command", "Open the web studio and the HTTP API."),
    "pull": ("linocut.cli.pull:command", "Fetch a model from the Hugging Face hub."),
    "push": ("linocut.cli.push:command", "Put a model on the Hugging Face hub, with a model card."),
    "quantize": ("linocut.cli.quantize:command", "Turn a model folder into a binary or ternary one."),
    "convert": ("linocut.cli.convert:command", "Convert a model from and to the forms of other programs."),
    "inspect": ("linocut.cli.inspect:command", "List a model's tensors, sizes and bits per weight; verify them."),
    "doctor": ("linocut.cli.doctor:command", "Check this machine, its libraries and every kernel."),
    "plan": ("linocut.cli.plan:command", "Predict size on disk and peak memory before loading."),
    "bench": ("linocut.cli.bench:command", "Measure speed and memory, beside other programs."),
    "eval": ("linocut.cli.eval:command", "Judge models by GenEval's rules, and compare them picture by picture."),
    "train": ("linocut.cli.train:command", "Train or distil a model from a recipe."),
    "completions": ("linocut.cli.completions:command", "Print a completion script for bash, zsh or fish."),
}
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class LazyGroup(click.Group):
    """A click group that imports a command's module when the command is asked for, not when it is listed.

    `table` is like `COMMANDS`.
    """

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        module, _, attribute = self.table[cmd_name][0].partition(":")
        return getattr(import_module(module), attribute)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print an empty line of its own first
            raise Cancelled("interrupted") from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.table.items()])

    def resolve_command(self, ctx: click.Context,
                        args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.table:
            from difflib import get_close_matches
            near = get_close_matches(args[0], self.table, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"see '{ctx.command_path} --help'"
            raise click.UsageError(f"no command {args[0]!r}; {advice}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]},
             no_args_is_help=False, invoke_without_command=True)
@click.version_option(__version__, "-V", "--version", prog_name="linocut")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Diffusion transformers with binary and ternary weights: draw, quantize, train, inspect.

    \b
    linocut generate "two red apples and a blue cup"
    linocut plan embedded --size 256x256
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def error_line(error: BaseException) -> str:
    """Return one printable line for an error: its message without line breaks, control characters or a traceback."""
    if isinstance(error, click.ClickException):
        text = error.format_message()
    elif isinstance(error, OSError) and not isinstance(error, LinocutError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, MemoryError):
        text = "out of memory; choose a smaller size (see 'linocut plan')"
    else:
        text = str(error) or type(error).__name__
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """Text that came from a file, without characters that could play with the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _fail(line: str, code: int) -> NoReturn:
    with contextlib.suppress(OSError):  # the terminal may have gone away; the exit code still tells
        click.echo(line, err=True)
    raise SystemExit(code)


def _close_pipe() -> NoReturn:
    """Leave quietly when the reader of our output went away (`linocut inspect | head`)."""
    # Python flushes stdout at exit; without a real file behind it that flush would print a second error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(141)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; user errors end as `error: <one line>` with code 2.

    Set `LINOCUT_DEBUG=1` to see the traceback of such an error instead.
    """
    # Threads that spin at every barrier halve the speed as soon as another program runs, and gain nothing otherwise.
    # The OpenMP runtime reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The name of a file need not be valid text; printing it shall not end in a traceback after all the work is done.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        result: object = cli.main(list(arguments) if arguments is not None else None, prog_name="linocut",
                          standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort, Cancelled):
        # A terminal has just shown ^C; what we say begins on a line of its own.
        _fail("\ninterrupted" if sys.stderr.isatty() else "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        _close_pipe()
    except (click.ClickException, LinocutError, OSError, MemoryError) as error:
        if os.environ.get("LINOCUT_DEBUG"):
            raise
        line = error_line(error)
        if isinstance(error, click.UsageError) and error.ctx is not None and "--help" not in line:
            line += f" (see '{error.ctx.command_path} --help')"
        _fail(f"error: {line}", EXIT_USAGE)
    # In this mode click hands back the code of `ctx.exit(code)`, or whatever the command returned.
    raise SystemExit(result if isinstance(result, int) else 0)
