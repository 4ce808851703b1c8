"""`linocut completions`: print a shell completion script, made by click."""

import click

HOW_TO = {
    "bash": 'eval "$(linocut completions bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(linocut completions zsh)"   # in ~/.zshrc',
    "fish": "linocut completions fish > ~/.config/fish/completions/linocut.fish",
}


@click.command(epilog="\b\n" + "\n".join(HOW_TO.values()))
@click.argument("shell", type=click.Choice(list(HOW_TO)))
def command(shell: str) -> None:
    """Print the completion script for SHELL."""
    from click.shell_completion import get_completion_class

    from linocut.cli import cli

    completion = get_completion_class(shell)
    assert completion is not None  # click ships all three
    # `source()` of bash would first run bash to check its version; rendering the template needs no shell at hand.
    script = completion(cli, {}, "linocut", "_LINOCUT_COMPLETE")
    click.echo(script.source_template % script.source_vars())
