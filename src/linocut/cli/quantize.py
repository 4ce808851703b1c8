"""`linocut quantize`: a dense model becomes a binary or ternary one, without training data, or with prompts alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from linocut.cli._fetch import bring
from linocut.cli._progress import Bar
from linocut.cli._signals import sigterm_interrupts

if TYPE_CHECKING:
    from linocut.quantize.stream import MakeTable, Report, Solver

# The steps of `train.ptq.ladder`, written out since that waits for torch.
METHODS = ("absmean", "exact", "folds", "gptq", "descent", "reconstruct")


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--encoding", type=click.Choice(["ternary", "binary"]), help="Values of the big weights. "
              "Needed unless a policy file says it.")
@click.option("--policy", "policy_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Which layers get which encoding (TOML or JSON); without it, FLUX.2's block linears.")
@click.option("--method", type=click.Choice(METHODS), help="How weights are rounded, from the plainest to the best; "
              "the last three need --prompts. Default: exact without prompts, reconstruct with them.")
@click.option("--prompts", "prompts_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Prompts to look at the model with, one a line; the last fifth of them only measures.")
@click.option("--calibrate", type=click.IntRange(2, 100_000), default=64, show_default=True, metavar="N",
              help="How many of the prompts, spread over the file.")
@click.option("--device", metavar="NAME", help="What methods with prompts compute on; a GPU if there is one.")
@click.option("--text-encoder", type=click.Choice(["affine4", "keep"]), default="affine4", show_default=True,
              help="Four bits, cut after the last layer in use; or as it is.")
@click.option("--edges", type=click.Choice(["keep", "int8", "affine4"]), default="keep", show_default=True,
              help="What embeds text and latents and makes the velocity: as it is, in eight bits (24 MB less at "
              "klein's size) or in four (35 MB less, and other pictures).")
@click.option("--tie-scales", is_flag=True, help="One scale for every 256 weights instead of 128, which GGUF's TQ1_0 "
              "and TQ2_0 can hold; pictures are a little worse.")
@click.option("--timestep-table", is_flag=True, help="Evaluate what depends on the noise level alone for the usual "
              "sizes and the model's number of steps, and make the weights that do it an optional file.")
@click.option("--force", is_flag=True, help="Replace the model at DST if there is one.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Rounding threads; all cores by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(source: str, destination: Path, encoding: str | None, policy_file: Path | None, method: str | None,
            prompts_file: Path | None, calibrate: int, device: str | None, text_encoder: str, edges: str,
            tie_scales: bool, timestep_table: bool, force: bool, threads: int | None, as_json: bool) -> None:
    """Quantize model SRC into the folder DST.

    SRC is a model folder, a name on the Hugging Face hub (klein-4b, org/name), a transformer's folder, or one
    .safetensors file of a transformer in diffusers' or the original FLUX.2 naming. The work can be stopped at any time
    and leaves nothing at DST; the same command goes on where it stopped.

    With --prompts the model draws them, and every block is rounded so that what comes out of it changes little; the
    report then says how far layers and velocity are from those of SRC on prompts that were not looked at.

    \b
    linocut quantize klein-4b klein-ternary --encoding ternary
    linocut quantize klein-4b klein-ternary --encoding ternary --prompts prompts.txt
    """
    from linocut.errors import UsageError
    from linocut.quantize.policy import Policy
    from linocut.quantize.stream import quantize_folder
    from linocut.quantize.workplace import check_destination

    make_table: MakeTable | None = None
    if timestep_table:
        from linocut.pipeline.schedule import make_timestep_table

        make_table = make_timestep_table
    if policy_file is None and encoding is None:
        raise UsageError("say --encoding ternary or --encoding binary, or pass a --policy file")
    policy = None if policy_file is None else Policy.from_file(policy_file, encoding)
    if edges != "keep":
        if policy is not None:
            raise UsageError("--edges adds to the preset; in a policy file write a rule of your own")
        policy = Policy.preset("flux2", encoding or "ternary").with_edges(edges)
    check_destination(destination.expanduser().absolute(), force)  # before gigabytes are fetched
    solver = _solver(method, prompts_file, calibrate, device)
    bring(source)
    try:
        with sigterm_interrupts(), Bar("quantizing") as bar:
            report = quantize_folder(source, destination, encoding or "ternary", policy, text_encoder, force, threads,
                                     bar.update, make_table, tie_scales, solver)
    except KeyboardInterrupt:
        click.echo(f"stopped; nothing was written at {destination}, the same command goes on where it stopped",
                   err=True)
        click.get_current_context().exit(130)
    if as_json:
        import json

        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print_report(report)


def _solver(method: str | None, prompts_file: Path | None, calibrate: int, device: str | None) -> Solver | None:
    """What rounds block by block; None for the plain rounding of each weight."""
    if prompts_file is None and method in (None, "exact"):
        return None
    import torch

    from linocut.train.loop import chosen_device
    from linocut.train.ptq.ladder import BEST, CalibrationSettings, method_named, read_prompts
    from linocut.train.ptq.solver import BlockSolver

    prompts = () if prompts_file is None else read_prompts(prompts_file, calibrate)
    where = chosen_device(device) if prompts or device else torch.device("cpu")
    return BlockSolver(method_named(method or BEST), CalibrationSettings(prompts), where)


def _print_report(report: Report) -> None:
    packed = [tensor for tensor in report.of("transformer") if tensor.encoding != "dense"]
    wide = max([len(tensor.name) for tensor in packed], default=0)
    outputs = any(tensor.output_error is not None for tensor in packed)
    click.echo(f"{'transformer layer':<{wide}}  {'shape':>12}  {'encoding':<8}  {'MB':>7}  bits/weight  relative error"
               + ("  of outputs" if outputs else ""))
    for tensor in packed:
        shape = "x".join(map(str, tensor.shape))
        click.echo(f"{tensor.name:<{wide}}  {shape:>12}  {tensor.encoding:<8}  {tensor.nbytes / 1e6:>7.2f}"
                   f"  {tensor.bits_per_weight:>11.3f}  {tensor.relative_error:>14.4f}"
                   + ("" if tensor.output_error is None else f"  {tensor.output_error:>10.4f}"))
    click.echo()
    for component in dict.fromkeys(tensor.component for tensor in report.tensors):
        totals = report.totals(component)
        click.echo(
            f"{component}: {totals['packed_layers']} packed and {totals['dense_tensors']} dense tensors, "
            f"{totals['tensor_bytes']:,} bytes ({totals['source_bytes'] / max(1, totals['tensor_bytes']):.2f} times "
            f"smaller), {totals['bits_per_weight']:.3f} bits per weight, relative error of the packed weights "
            f"{totals['relative_error']:.4f}")
    if "velocity_error" in report.solving:
        by_step = " ".join(f"{error:.3f}" for error in report.solving["velocity_error"])
        click.echo(f"method {report.solving['method']}: velocity off by {by_step} of its size at the steps of the "
                   f"sampler, on {report.solving['held_out']} prompts that were not looked at")
    if report.timestep_table:
        click.echo(f"timestep table: {report.timestep_table:,} bytes; it makes the file of timestep_weights optional, "
                   "which only other numbers of steps need")
    again = f", {report.resumed} tensors taken over from an earlier run" if report.resumed else ""
    click.echo(f"wrote {report.destination} in {report.seconds:.1f} s{again}")
