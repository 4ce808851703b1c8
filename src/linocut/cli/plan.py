"""`linocut plan`: predict size on disk and peak memory, from configs and file headers alone. Needs no torch."""

import json

import click

from linocut.cli.generate import Size

PHASES = {"encode": "read the prompt", "denoise": "draw", "decode": "develop"}


@click.command()
@click.argument("model", default="embedded")
@click.option("--size", type=Size(), help="Size of the picture, such as 512x768. Default: the model's.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
              help="Number format of the computation.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(model: str, size: tuple[int, int] | None, dtype: str, as_json: bool) -> None:
    """Predict what drawing with MODEL takes: bytes on disk, and peak memory in each phase.

    Nothing is loaded. Peaks are upper estimates of resident memory on a CPU, mapped weights included.
    """
    from linocut.formats.folder import ModelFolder
    from linocut.pipeline import memory

    folder = ModelFolder.open(model)
    width, height = folder.settings["default_size"] if size is None else size
    plan = memory.plan(folder, width, height, dtype=dtype)
    free = memory.available_bytes()
    if as_json:
        click.echo(json.dumps({**plan.to_dict(), "available": free}, indent=2))
        return
    show = memory.gigabytes
    click.echo(f"{plan.model}, {width}x{height}, {dtype}")
    click.echo("\non disk")
    for name, count in plan.to_dict()["disk"].items():
        click.echo(f"  {name:<16}{show(count):>10}")
    click.echo("\npeak memory")
    for phase in plan.phases:
        click.echo(f"  {PHASES[phase.name]:<16}{show(phase.peak):>10}   weights {show(phase.weights)}, activations "
                   f"{show(phase.activations)}, scratch {show(phase.scratch)}, kept {show(phase.held)}, "
                   f"process {show(phase.base)}")
    click.echo(f"  {'highest':<16}{show(plan.peak):>10}" + (f"   ({show(free)} are free)" if free is not None else ""))
    how = "stay loaded between pictures" if plan.keep_loaded else "are opened one after another"
    click.echo(f"\nnetworks {how}; the picture is decoded "
               + ("in one piece" if plan.tile is None else f"in strips of {plan.tile} rows"))
