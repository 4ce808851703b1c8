"""`linocut plan`: predict size on disk and peak memory, from configs and file headers alone. Needs no torch."""

import json
from typing import TYPE_CHECKING

import click

from linocut.cli._fetch import bring
from linocut.cli.generate import Size

if TYPE_CHECKING:
    from linocut.pipeline.memory import Ways

PHASES = {"encode": "read the prompt", "denoise": "draw", "decode": "develop"}


@click.command()
@click.argument("model", default="embedded")
@click.option("--size", type=Size(), help="Size of the picture, such as 512x768. Default: the model's.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
              help="Number format of the computation.")
@click.option("--max-memory", metavar="SIZE", help="Most memory of the process, such as 2GB; or an error.")
@click.option("--device", default="cpu", show_default=True, metavar="NAME",
              help="cpu, or cuda (cuda:1, ...) for a plan of the GPU's memory.")
@click.option("-n", "--num-images", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="Pictures of one prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(model: str, size: tuple[int, int] | None, dtype: str, max_memory: str | None, device: str, num_images: int,
            as_json: bool) -> None:
    """Predict what drawing with MODEL takes: bytes on disk, and peak memory in each phase.

    Nothing is loaded. Peaks are upper estimates of resident memory on a CPU, mapped weights included, or of the memory
    of a GPU. With --max-memory the plan is the quickest one within that, as 'linocut generate --max-memory' draws it.
    """
    from linocut.errors import UsageError
    from linocut.formats.folder import ModelFolder
    from linocut.pipeline import budget, memory
    from linocut.pipeline.device import choose

    bring(model)
    folder = ModelFolder.open(model)
    width, height = folder.settings["default_size"] if size is None else size
    chosen = choose(device).name
    if chosen != "cpu" and not chosen.startswith("cuda"):
        raise UsageError(f"memory is planned for the CPU and for CUDA devices (found device {chosen})")
    planner, free = budget.planner_for(folder, chosen), budget.available_on(chosen)
    if max_memory is None:
        plan = planner.plan(width, height, dtype=dtype, pictures=num_images)
    else:
        plan = budget.fit(planner, width, height, limit=budget.parse_bytes(max_memory), dtype=dtype,
                          pictures=num_images)
    if as_json:
        click.echo(json.dumps({**plan.to_dict(), "available": free}, indent=2))
        return
    show = memory.gigabytes
    click.echo(f"{plan.model}, {width}x{height}, {dtype}" + ("" if chosen == "cpu" else f", memory of {chosen}"))
    click.echo("\non disk")
    for name, count in plan.to_dict()["disk"].items():
        click.echo(f"  {name:<16}{show(count):>10}")
    click.echo("\npeak memory")
    for phase in plan.phases:
        click.echo(f"  {PHASES[phase.name]:<16}{show(phase.peak):>10}   weights {show(phase.weights)}, activations "
                   f"{show(phase.activations)}, scratch {show(phase.scratch)}, kept {show(phase.held)}, "
                   f"process {show(phase.base)}")
    click.echo(f"  {'highest':<16}{show(plan.peak):>10}" + (f"   ({show(free)} are free)" if free is not None else ""))
    click.echo(f"\n{ways_in_words(plan.ways, chosen)}")


def ways_in_words(ways: "Ways", device: str) -> str:
    """How the networks run on a device, in a sentence."""
    parts = ["networks stay loaded between pictures" if ways.keep_loaded else "networks are opened one after another"]
    if ways.stream:
        parts.append("blocks of the transformer leave memory when they are done" if device == "cpu" else
                     "layers of the text encoder are on the GPU while they run")
    if ways.rows is not None:
        parts.append(f"{ways.rows} tokens go through a block at a time")
    parts.append("the picture is decoded in one piece" if ways.tile is None else
                 f"the picture is decoded in strips of {ways.tile} rows")
    return "; ".join(parts)
