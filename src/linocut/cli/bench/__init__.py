"""`linocut bench`: how fast and how small, each number beside others' in one run.

All but `synthetic` run their arms in turn, round after round, and report medians with the least and the most, because
machines are never quiet. Results are JSON files that say on what machine and with which versions they were measured.
"""

import click

from linocut.cli import LazyGroup

SUBCOMMANDS: dict[str, tuple[str, str]] = {
    "kernels": ("linocut.cli.bench.kernels:command", "Packed products against the int8 peak and against torch's."),
    "stages": ("linocut.cli.bench.stages:command", "Reading a prompt, a step, decoding: against torch."),
    "image": ("linocut.cli.bench.image:command", "From a cold process to a PNG, against others."),
    "memory": ("linocut.cli.bench.memory:command", "A process's memory over time, beside torch in bfloat16."),
    "plot": ("linocut.cli.bench.plot:command", "Draw results as a picture."),
    "synthetic": ("linocut.cli.bench.synthetic:command", "Make a model of random weights; draw with it and measure."),
}


@click.group(cls=LazyGroup, table=SUBCOMMANDS, no_args_is_help=True)
def command() -> None:
    """Measure speed and memory, each number beside other programs' in one run."""
