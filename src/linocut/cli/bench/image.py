"""`linocut bench image`: wall seconds and peak memory of whole processes that draw a PNG, ours and others'."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from linocut.cli.generate import Size

OURS, KNOWN_PROMPT, TORCH, SDCPP = "linocut", "linocut, known prompt", "torch int8", "stable-diffusion.cpp"
ARMS = (OURS, KNOWN_PROMPT, TORCH, SDCPP)
PROMPT = "a red apple and two blue cups on a wooden table"
SDCPP_PACKAGE = "stable_diffusion_cpp"


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Where weights for the others are made, and found again. At klein's size: 7.2 GB for torch, 2.9 GB "
              "for stable-diffusion.cpp.")
@click.option("--size", type=Size(), default="512x512", show_default=True, help="Picture.")
@click.option("--steps", type=click.IntRange(1, 100), default=4, show_default=True)
@click.option("--arm", "arms", multiple=True, type=click.Choice(ARMS),
              help="May be repeated; default: all that are installed.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads; all cores by default.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Also write the results to this JSON file; rounds that are in it already are not run again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(model: Path, work: Path | None, size: tuple[int, int], steps: int, arms: tuple[str, ...], rounds: int,
            threads: int | None, output: Path | None, as_json: bool) -> None:
    """Draw with the model folder MODEL in fresh processes, and do the same with other programs.

    'linocut bench synthetic' makes a model of klein's shapes. torch loads int8 weights that were quantized beforehand;
    stable-diffusion.cpp is the package stable-diffusion-cpp-python with TQ2_0 weights. Both get random weights. Files
    are in the system's cache. Peak memory is the system's count for the process, mapped files included.
    """
    from linocut.cli._progress import Bar
    from linocut.cli._signals import sigterm_interrupts
    from linocut.cli.bench.rounds import Rounds
    from linocut.errors import UsageError
    from linocut.formats.folder import ModelFolder

    folder = ModelFolder.open(model)
    installed = importlib.util.find_spec(SDCPP_PACKAGE) is not None
    if SDCPP in arms and not installed:
        raise UsageError("stable-diffusion.cpp is not installed; pip install stable-diffusion-cpp-python")
    chosen = arms or tuple(arm for arm in ARMS if (arm != SDCPP or installed) and (work or arm.startswith(OURS)))
    if work is None and not all(arm.startswith(OURS) for arm in chosen):
        raise UsageError("say --work DIR, where weights for the others shall be made")
    threads = threads or len(os.sched_getaffinity(0))
    settings = {"size": list(size), "steps": steps, "encoding": _encoding(folder)}
    done = Rounds("image", threads, settings, output)
    with Bar("measuring") as bar, sigterm_interrupts(), tempfile.TemporaryDirectory(prefix="linocut-bench-") as made:
        wanted = [(number, arm) for number in range(rounds) for arm in chosen if done.missing([arm], number)]
        for count, (number, arm) in enumerate(wanted):
            bar.update(count, len(wanted), arm)
            seconds, peak = _run(arm, folder, work, Path(made), size, steps, threads)
            done.add(arm, number, seconds)
            done.add(f"{arm}/peak_rss", number, peak)
    content = done.content()
    click.echo(json.dumps(content, indent=1)) if as_json else _print(content)


def _encoding(folder: Any) -> str:
    with folder.checkpoint("transformer") as checkpoint:
        return next((entry.encoding for entry in checkpoint.packed.values() if entry.encoding != "affine4"), "dense")


def _run(arm: str, folder: Any, work: Path | None, made: Path, size: tuple[int, int], steps: int,
         threads: int) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of one process that draws."""
    picture = made / "picture.png"
    picture.unlink(missing_ok=True)
    environment = os.environ | {"LINOCUT_CACHE": str(made / "cache")}
    if arm in (OURS, KNOWN_PROMPT):
        command = [sys.executable, "-m", "linocut", "generate", PROMPT, "--model", str(folder.root), "--size",
                   f"{size[0]}x{size[1]}", "--steps", str(steps), "--seed", "0", "--threads", str(threads), "--output",
                   str(picture)]
        if arm == OURS:
            command.append("--no-prompt-cache")
        elif not (made / "cache").exists():  # once, so that the prompt is known
            _measure([*command, "--steps", "1", "--force"], environment)
            picture.unlink()
        return _measure(command, environment)
    assert work is not None
    module, place = ("torch_int8", work / "torch") if arm == TORCH else ("sdcpp", work / "sdcpp")
    place.mkdir(parents=True, exist_ok=True)
    importlib.import_module(f"linocut.cli.bench.{module}").write_weights(folder, place)
    command = [sys.executable, "-m", f"linocut.cli.bench.{module}", str(folder.root), str(place), str(picture),
               *map(str, (*size, steps, threads))]
    seconds, peak = _measure(command, environment)
    assert picture.exists()
    return seconds, peak


def _measure(command: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Wall seconds of a command and its peak resident bytes; UsageError with the end of what it said if it fails."""
    from linocut.errors import UsageError

    with tempfile.TemporaryFile() as said:
        start = time.monotonic()
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        seconds = time.monotonic() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            raise UsageError(f"{' '.join(command[1:4])} ended with {child.returncode}: {lines[-1] if lines else ''}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _print(content: dict[str, Any]) -> None:
    results, (width, height) = content["results"], content["settings"]["size"]
    click.echo(f"{width}x{height}, {content['settings']['steps']} steps, {content['settings']['encoding']}, "
               f"{content['machine']['threads']} threads, process to PNG: median (least to most)")
    for arm in (name for name in results if not name.endswith("/peak_rss")):
        found, peak = results[arm], results[f"{arm}/peak_rss"]["median"]
        ratio = found["median"] / results[OURS]["median"] if OURS in results else 1.0
        click.echo(f"{arm:<24}{found['median']:>8.1f} s  ({found['min']:.1f}-{found['max']:.1f})  "
                   f"peak {peak / 1e9:.2f} GB  {ratio:.2f} times {OURS}")
