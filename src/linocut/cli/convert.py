"""`linocut convert`: a model from any form that is known to another, checked bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from linocut.cli import printable
from linocut.cli._fetch import bring
from linocut.cli._progress import Bar
from linocut.cli._signals import sigterm_interrupts

if TYPE_CHECKING:
    from linocut.integrations.convert import Report

_LISTED = 8  # tensors named one by one before the rest is counted


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Choice(["linocut", "diffusers", "bfl", "gguf", "mlx", "gemlite"]),
              help="The form to write.")
@click.option("--lossy", is_flag=True, help="Allow what the form cannot hold exactly, and say what was lost.")
@click.option("--ternary-type", type=click.Choice(["Q2_0", "TQ1_0", "TQ2_0"]), default="Q2_0", show_default=True,
              help="GGUF: type of ternary weights; TQ1_0 and TQ2_0 need scales that neighbouring groups share.")
@click.option("--dense-type", type=click.Choice(["keep", "F16", "BF16", "F32", "Q8_0"]), default="keep",
              show_default=True, help="GGUF: type of the other matrices.")
@click.option("--force", is_flag=True, help="Replace the model at DST if there is one.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads; all cores by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(source: str, destination: Path, to: str, lossy: bool, ternary_type: str, dense_type: str, force: bool,
            threads: int | None, as_json: bool) -> None:
    """Convert model SRC to the form of another program, or from one, in the folder DST.

    SRC is a model's name, here or on the Hugging Face hub, its folder, or one file of a transformer; what it is, is
    recognized from its tensors. What was written is read back and compared with the source, codes and scales bit for
    bit. The work can be stopped at any time and leaves nothing at DST; the same command goes on where it stopped.

    \b
    linocut convert embedded embedded-gguf --to gguf
    linocut convert bonsai-ternary bonsai --to linocut --lossy
    """
    from linocut.integrations.convert import convert
    from linocut.integrations.targets import Options
    from linocut.quantize.workplace import check_destination

    check_destination(destination.expanduser().absolute(), force)  # before gigabytes are fetched
    bring(source)
    try:
        with sigterm_interrupts(), Bar("converting") as bar:
            report = convert(source, destination, to, lossy=lossy, force=force,
                             options=Options(ternary_type, dense_type), threads=threads, on_progress=bar.update)
    except KeyboardInterrupt:
        click.echo(f"stopped; nothing was written at {destination}, the same command goes on where it stopped",
                   err=True)
        click.get_current_context().exit(130)
    if as_json:
        import json

        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report)


def _print(report: Report) -> None:
    click.echo(f"{report.source_form} -> {report.form}: {report.packed} packed weights and {report.dense} dense "
               f"tensors, {report.nbytes:,} bytes in {report.seconds:.1f} s")
    for note in report.notes:
        click.echo(f"note: {note}")
    for loss in report.losses[:_LISTED]:
        click.echo(printable(f"lost: {loss}"))
    if len(report.losses) > _LISTED:
        click.echo(f"lost: {len(report.losses) - _LISTED} more of this kind (--json lists all)")
    what = "as they were rounded" if report.losses else "equal to the source, bit for bit"
    click.echo(f"read back {report.verified} weights: all {what}")
    click.echo(f"wrote {report.destination}"
               + (f", {report.resumed} weights taken over from an earlier run" if report.resumed else ""))
