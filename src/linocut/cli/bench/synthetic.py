"""`linocut bench synthetic`: a model of a known size with random weights; draw with it, print seconds and memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from linocut.cli._progress import Bar
from linocut.cli._signals import sigterm_interrupts
from linocut.cli.generate import Size


@click.command()
@click.argument("synthetic", metavar="MODEL", type=click.Choice(["klein-4b"]))
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where to make (or find) the model folder; without it, a temporary one.")
@click.option("--encoding", type=click.Choice(["ternary", "binary", "both"]), default="ternary", show_default=True,
              help="Transformer weights; 'both' makes DIR/ternary and DIR/binary.")
@click.option("--timestep-table", is_flag=True, help="Make it with a timestep table, as 'linocut quantize' does.")
@click.option("--source", "source", type=click.Choice(["bf16"]),
              help="Make a dense model instead, as input for 'linocut quantize' (transformer only by default).")
@click.option("--parts", metavar="LIST", help="Components to make, comma separated: transformer, text_encoder, vae, "
              "tokenizer.")
@click.option("--size", type=Size(), default="256x256", show_default=True, help="Picture to draw.")
@click.option("--steps", type=click.IntRange(1, 100), default=4, show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads for drawing; all cores by default.")
@click.option("--make-only", is_flag=True, help="Make the model, do not draw.")
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
def command(synthetic: str, out: Path | None, encoding: str, timestep_table: bool, source: str | None,
            parts: str | None, size: tuple[int, int], steps: int, threads: int | None, make_only: bool,
            as_json: bool) -> None:
    """Fill the true shapes of MODEL (klein-4b) with random weights, and measure a picture of it.

    The folder is made once (deterministic, in little memory) and used again by the next run.
    """
    import json
    import tempfile

    from linocut.errors import UsageError
    from linocut.models.synthetic import KNOWN, PARTS, share_parts, write_synthetic
    from linocut.pipeline.memory import check_size
    from linocut.pipeline.schedule import make_timestep_table

    chosen = tuple(part.strip() for part in parts.split(",")) if parts else (
        ("transformer",) if source else PARTS)
    if out is None and (make_only or source):
        raise UsageError("say --out DIR, where the model shall stay")
    width, height = size
    if not make_only and not source:  # said now, not after minutes of making
        check_size(width, height)
        if not set(PARTS) <= set(chosen):
            raise UsageError(f"drawing needs all parts ({', '.join(PARTS)}); leave --parts out, or add --make-only")
    measured: list[dict[str, Any]] = []
    # A temporary model weighs gigabytes; SIGTERM may not leave it behind.
    with sigterm_interrupts(), tempfile.TemporaryDirectory(prefix="linocut-bench-") as temporary:
        root = out or Path(temporary)
        encodings = [source] if source else ["ternary", "binary"] if encoding == "both" else [encoding]
        folders = [root / name if len(encodings) > 1 else root for name in encodings]
        for name, folder in zip(encodings, folders, strict=True):
            start = time.monotonic()
            _refuse_other(folder, name, timestep_table)
            if folder != folders[0]:
                share_parts(folders[0], folder, tuple(part for part in chosen if part != "transformer"))
            with Bar("making") as bar:
                write_synthetic(folder, KNOWN[synthetic], name, chosen, bar.update,
                                make_timestep_table if timestep_table else None)
            facts = {"model": synthetic, "encoding": name, "folder": str(folder),
                     "make_seconds": round(time.monotonic() - start, 2), "bytes": _sizes(folder)}
            if not make_only and not source:
                facts |= _draw(folder, width, height, steps, threads)
            measured.append(facts)
            if not as_json:
                _print(facts)
    if as_json:
        click.echo(json.dumps(measured, indent=2))


def _refuse_other(folder: Path, encoding: str, timestep_table: bool) -> None:
    """A folder may be used again, but not for another encoding, nor with a table where there is none or without one."""
    from linocut.errors import UsageError
    from linocut.formats.checkpoint import Checkpoint
    from linocut.formats.names import is_timestep

    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if folder.exists() and any(folder.iterdir()) and not (folder / "model_index.json").exists() and not file.exists():
        known = {"transformer", "text_encoder", "vae", "tokenizer"}
        if not {path.name for path in folder.iterdir()} <= known:
            raise UsageError(f"{folder}: holds other things; choose an empty or a new folder")
    if file.exists():
        with Checkpoint.open(file) as checkpoint:
            found = next((entry.encoding for entry in checkpoint.packed.values()), "bf16")
            tabulated = not any(map(is_timestep, checkpoint))
        if tabulated != timestep_table:
            what = "holds a model with a timestep table" if tabulated else "holds a model without a timestep table"
            raise UsageError(f"{folder}: {what} already; choose another folder, or "
                             f"{'add' if tabulated else 'leave out'} --timestep-table")
        if found != encoding:
            raise UsageError(f"{folder}: holds a {found} model already; choose another folder for {encoding}")


def _sizes(folder: Path) -> dict[str, int]:
    from linocut.formats.folder import ModelFolder

    sizes = {}
    for part, checkpoint in ModelFolder.open(folder).weight_files().items():
        with checkpoint:
            sizes[part] = checkpoint.tensor_nbytes
    return sizes


def _draw(folder: Path, width: int, height: int, steps: int, threads: int | None) -> dict[str, Any]:
    """Draw one picture in this process: seconds and peak resident memory of each stage."""
    from linocut.pipeline.generate import Pipeline

    start = time.monotonic()
    pipe = Pipeline.from_pretrained(folder, threads=threads, device="cpu")
    opened = time.monotonic() - start
    with Bar("drawing") as bar:
        result = pipe("a red apple and two blue cups on a wooden table", width=width, height=height,
                      num_inference_steps=steps, seed=0,
                      on_progress=lambda p: bar.update(p.done, p.total, p.phase))
    return {"size": [width, height], "steps": steps, "kernel": result.recipe.kernel, "open_seconds": round(opened, 3),
            "draw_seconds": round(time.monotonic() - start - opened, 2), "stages": result.timings}


def _print(facts: dict[str, Any]) -> None:
    sizes = ", ".join(f"{part} {nbytes:,}" for part, nbytes in facts["bytes"].items())
    click.echo(f"{facts['model']} {facts['encoding']}: {facts['folder']}, made in {facts['make_seconds']:.1f} s\n"
               f"tensor bytes: {sizes}")
    if "stages" not in facts:
        return
    width, height = facts["size"]
    click.echo(f"{width}x{height}, {facts['steps']} steps, kernel {facts['kernel']}: {facts['draw_seconds']:.1f} s")
    click.echo(f"{'stage':<10}{'seconds':>10}{'of it loading':>16}{'peak RSS MB':>14}")
    for stage, timing in facts["stages"].items():
        click.echo(f"{stage:<10}{timing['seconds']:>10.2f}{timing['load_seconds']:>16.2f}"
                   f"{timing['peak_rss'] / 1e6:>14.0f}")
