"""`linocut bench image`: wall seconds and peak memory of whole processes that draw a PNG, ours and others', and the
seconds of a step within them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click

from linocut.cli.generate import Size

OURS, KNOWN_PROMPT, SDCPP = "linocut", "linocut, known prompt", "stable-diffusion.cpp"
ARMS = (OURS, KNOWN_PROMPT, "torch int8", "torch bf16", "torch fp32", SDCPP)
PROMPT = "a red apple and two blue cups on a wooden table"
SDCPP_PACKAGE = "stable_diffusion_cpp"


@click.command()
@click.argument("model")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Where weights for the others are made, and found again. At klein's size: 7.2 GB for torch int8, "
              "14 GB for torch bf16 and fp32, 2.9 GB for stable-diffusion.cpp.")
@click.option("--size", type=Size(), default="512x512", show_default=True, help="Picture.")
@click.option("--steps", type=click.IntRange(1, 100), default=4, show_default=True)
@click.option("--arm", "arms", multiple=True, type=click.Choice(ARMS),
              help="May be repeated; default: all that are installed.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads; all cores by default.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Also write the results to this JSON file; rounds that are in it already are not run again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(model: str, work: Path | None, size: tuple[int, int], steps: int, arms: tuple[str, ...], rounds: int,
            threads: int | None, output: Path | None, as_json: bool) -> None:
    """Draw with MODEL, a folder or 'embedded', in fresh processes, and do the same with other programs.

    'linocut bench synthetic' makes a model of klein's shapes. torch int8 loads weights that were quantized beforehand;
    stable-diffusion.cpp is the package stable-diffusion-cpp-python with TQ2_0 weights. All others get random weights.
    Files are read once before each process starts, so that they come from the system's cache if it has room. Peak
    memory is the system's count for the process, mapped files included.
    """
    from linocut.cli._progress import Bar
    from linocut.cli._signals import sigterm_interrupts
    from linocut.cli.bench import report
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
    settings = {"size": list(size), "steps": steps, "encoding": report.encoding(folder)}
    done = Rounds("image", threads, settings, output)
    with Bar("measuring") as bar, sigterm_interrupts(), tempfile.TemporaryDirectory(prefix="linocut-bench-") as made:
        wanted = [(number, arm) for number in range(rounds) for arm in chosen if done.missing([arm], number)]
        for count, (number, arm) in enumerate(wanted):
            bar.update(count, len(wanted), arm)
            found = _run(arm, model, folder, work, Path(made), size, steps, threads)
            done.add(f"{arm}/peak_rss", number, found.peak)
            done.add(f"{arm}/step", number, statistics.median(found.steps))
            done.add(arm, number, found.seconds)
    content = done.content()
    click.echo(json.dumps(content, indent=1)) if as_json else _print(content)


class _Found(NamedTuple):
    """What one process took: wall seconds, peak resident bytes, seconds of each step."""

    seconds: float
    peak: int
    steps: list[float]


def _run(arm: str, model: str, folder: Any, work: Path | None, made: Path, size: tuple[int, int], steps: int,
         threads: int) -> _Found:
    """Draw a picture in one process."""
    picture = made / "picture.png"
    picture.unlink(missing_ok=True)
    environment = os.environ | {"LINOCUT_CACHE": str(made / "cache")}
    if arm in (OURS, KNOWN_PROMPT):
        command = ["linocut", "generate", PROMPT, "--model", model, "--size", f"{size[0]}x{size[1]}",
                   "--steps", str(steps), "--seed", "0", "--threads", str(threads), "--output", str(picture), "--json"]
        if arm == OURS:
            command.append("--no-prompt-cache")
        elif not (made / "cache").exists():  # once, so that the prompt is known
            _measure([*command, "--steps", "1"], environment)
            picture.unlink()
    else:
        assert work is not None
        module, precision = ("sdcpp", []) if arm == SDCPP else ("torch_draw", [arm.removeprefix("torch ")])
        weights = work / {"torch int8": "torch-int8", SDCPP: "sdcpp"}.get(arm, "torch-bf16")
        weights.mkdir(parents=True, exist_ok=True)
        made_by = importlib.import_module(f"linocut.cli.bench.{module}").write_weights
        made_by(folder, weights, *([arm == "torch int8"] if precision else []))
        _read(weights)
        command = [f"linocut.cli.bench.{module}", *precision, model, str(weights), str(picture),
                   *map(str, (*size, steps, threads))]
    _read(folder.root)
    seconds, peak, said = _measure(command, environment)
    assert picture.exists()
    if "timings" not in said:
        return _Found(seconds, peak, said["steps"])
    # Each phase begins the system's high-water mark anew to find its own peak, so what is left of it is the last one's.
    return _Found(seconds, max(peak, *(phase["peak_rss"] for phase in said["timings"].values())),
                  said["timings"]["denoise"]["steps"])


def _read(folder: Path) -> None:
    """Read all files of a folder, so that the system has them in its cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def _measure(command: list[str], environment: dict[str, str]) -> tuple[float, int, dict[str, Any]]:
    """Run a module: wall seconds, peak resident bytes, and the JSON that it prints last; UsageError if it fails."""
    from linocut.errors import UsageError

    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as said:
        start = time.monotonic()
        child = subprocess.Popen([sys.executable, "-m", *command], stdout=printed, stderr=said, env=environment)
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
            raise UsageError(f"{' '.join(command[:2])} ended with {child.returncode}: {lines[-1] if lines else ''}")
        printed.seek(0)
        text = printed.read().decode(errors="replace")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), _last_json(text)


def _last_json(text: str) -> dict[str, Any]:
    """The JSON object that output ends with; libraries may have printed before it."""
    for start in (found.start() for found in re.finditer(r"^\{", text, re.MULTILINE)):
        try:
            return dict(json.loads(text[start:]))
        except ValueError:
            continue
    raise ValueError("no JSON was printed")


def _print(content: dict[str, Any]) -> None:
    results, (width, height) = content["results"], content["settings"]["size"]
    click.echo(f"{width}x{height}, {content['settings']['steps']} steps, {content['settings']['encoding']}, "
               f"{content['machine']['threads']} threads, process to PNG: median (least to most)")
    for arm in (name for name in results if "/" not in name):
        found, peak, step = (results[arm + what] for what in ("", "/peak_rss", "/step"))
        click.echo(f"{arm:<24}{found['median']:>8.1f} s  ({found['min']:.1f}-{found['max']:.1f})  "
                   f"peak {peak['median'] / 1e9:.2f} GB  a step {step['median']:.2f} s  "
                   + (f"{found['median'] / results[OURS]['median']:.2f} times {OURS}" if OURS in results else ""))
