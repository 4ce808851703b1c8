"""`linocut bench memory`: the memory of a whole process over time while it draws, ours beside torch's in bfloat16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from linocut.cli.bench.image import OURS, PROMPT
from linocut.cli.generate import Size

TORCH = "torch bf16"
ARMS = (OURS, TORCH)
PHASES = ("start", "encode", "denoise", "decode", "end")
POINTS = 400
_ROWS, _COLUMNS = 12, 72


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Where weights for torch are made, and found again (klein: 14 GB); without it, ours alone.")
@click.option("--size", type=Size(), default="512x512", show_default=True, help="Picture.")
@click.option("--steps", type=click.IntRange(1, 100), default=4, show_default=True)
@click.option("--max-memory", metavar="SIZE", help="As in 'linocut generate'.")
@click.option("--arm", "arms", multiple=True, type=click.Choice(ARMS), help="May be repeated; default: all.")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads; all cores by default.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Also write the results to this JSON file; arms that are in it already are not run again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables and plots.")
def command(model: Path, work: Path | None, size: tuple[int, int], steps: int, max_memory: str | None,
            arms: tuple[str, ...], threads: int | None, output: Path | None, as_json: bool) -> None:
    """Draw with the model folder MODEL in a fresh process and watch its memory from outside.

    Counted is everything that the system counts: Python, torch, libraries, mapped weights. RSS is sampled every 20 ms,
    PSS as often as it does not disturb. torch computes the same networks in bfloat16 from a file of random weights,
    one network after another. Linux only.
    """
    from linocut.cli._progress import Bar
    from linocut.cli._signals import sigterm_interrupts
    from linocut.cli.bench import report
    from linocut.errors import UsageError
    from linocut.formats.folder import ModelFolder

    if not Path("/proc/self/smaps_rollup").exists():
        raise UsageError("memory over time is counted as Linux lists it in /proc, which is not here")
    if work is None and TORCH in arms:
        raise UsageError("say --work DIR, where weights for torch shall be made")
    folder = ModelFolder.open(model)
    threads = threads or len(os.sched_getaffinity(0))
    chosen = arms or (ARMS if work is not None else ARMS[:1])
    settings = {"size": list(size), "steps": steps, "max_memory": max_memory, "encoding": report.encoding(folder),
                "timestep_table": folder.timestep_table() is not None}
    content = report.document("memory", threads, settings, {})
    if output is not None and output.exists():
        before = report.read(output, "memory")
        if before["settings"] != settings or before["machine"] != content["machine"]:
            raise UsageError(f"{output} holds results of other settings or of another machine; name another file")
        content["results"] = before["results"]
    with Bar("measuring") as bar, sigterm_interrupts(), tempfile.TemporaryDirectory(prefix="linocut-bench-") as made:
        for count, arm in enumerate(chosen):
            bar.update(count, len(chosen), arm)
            if arm not in content["results"]:
                line, planned = _command(arm, folder, work, Path(made), size, steps, threads, max_memory)
                content["results"][arm] = {**measure(line), "planned_peak": planned}
                if output is not None:
                    report.write(output, content)
    click.echo(json.dumps(content, indent=1)) if as_json else _print(content)


def _command(arm: str, folder: Any, work: Path | None, made: Path, size: tuple[int, int], steps: int, threads: int,
             max_memory: str | None) -> tuple[list[str], int | None]:
    """The arguments of Python for a process that draws and prints its phases, and the peak that is planned for it."""
    picture = str(made / f"{len(list(made.iterdir()))}.png")
    if arm == TORCH:
        from linocut.cli.bench.torch_draw import write_weights

        assert work is not None
        weights = work / "torch-bf16"
        weights.mkdir(parents=True, exist_ok=True)
        write_weights(folder, weights, False)
        return ["-m", "linocut.cli.bench.torch_draw", "bf16", str(folder.root), str(weights), picture,
                *map(str, (*size, steps, threads))], None
    from linocut.pipeline import budget
    from linocut.pipeline.memory import Planner

    limit = None if max_memory is None else budget.parse_bytes(max_memory)
    planned = budget.fit(Planner(folder), *size, limit=limit).peak
    return ["-m", "linocut", "generate", PROMPT, "--model", str(folder.root), "--size", f"{size[0]}x{size[1]}",
            "--steps", str(steps), "--seed", "0", "--threads", str(threads), "--output", picture, "--no-prompt-cache",
            "--json", *([] if max_memory is None else ["--max-memory", max_memory])], planned


def measure(arguments: list[str]) -> dict[str, Any]:
    """Run Python with these arguments and watch it; it prints JSON with `spans` of its phases.

    Seconds, mean and peak of RSS and PSS in bytes, the same of RSS per phase, and RSS over time.
    """
    from linocut.cli.bench.watch import Watch
    from linocut.errors import UsageError

    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        child = subprocess.Popen([sys.executable, *arguments], stdout=said, stderr=complained)
        try:
            with Watch(child.pid) as watch:
                child.wait()
        except BaseException:
            child.kill()
            raise
        if child.returncode:
            complained.seek(0)
            lines = complained.read().decode(errors="replace").strip().splitlines()
            raise UsageError(f"{arguments[1]} ended with {child.returncode}: {lines[-1] if lines else ''}")
        said.seek(0)
        printed = json.loads(said.read())
    rss, pss = watch.rss, watch.pss
    spans = _spans(printed, rss.times[0], rss.times[-1])
    phases = {}
    for name, (start, end) in spans.items():
        some = rss.between(start, end)
        if not some.values:  # shorter than the time between samples
            some = rss.at(end)
        phases[name] = {"seconds": round(end - start, 3), "mean": some.mean, "peak": some.peak}
    # Our phases know the system's high-water marks, hence of peaks between samples. What the system tells a parent of
    # its child (ru_maxrss) begins with what the parent itself held when it made the child.
    marks = [timing["peak_rss"] for timing in printed.get("timings", {}).values()]
    return {"seconds": round(rss.times[-1] - rss.times[0], 3), "mean": rss.mean, "peak": max([rss.peak, *marks]),
            "pss_mean": pss.mean, "pss_peak": pss.peak,
            "samples": [len(rss.values), len(pss.values)], "phases": phases, "rss": rss.thinned(POINTS)}


def _spans(printed: dict[str, Any], first: float, last: float) -> dict[str, tuple[float, float]]:
    """Start and end of each phase; what comes before and after them are phases too."""
    found = printed["spans"] if "spans" in printed else {name: timing["spans"][0]
                                                         for name, timing in printed["timings"].items()}
    starts = [first, *(found[name][0] for name in PHASES[1:4]), found["decode"][1]]
    return {name: (start, end) for name, start, end in zip(PHASES, starts, [*starts[1:], last + 1e-6], strict=True)}


def _print(content: dict[str, Any]) -> None:
    settings = content["settings"]
    width, height = settings["size"]
    click.echo(f"{width}x{height}, {settings['steps']} steps, {settings['encoding']}, "
               f"{content['machine']['threads']} threads; MB of resident memory, the whole process")
    for arm, found in content["results"].items():
        planned = f", planned {found['planned_peak'] / 1e6:.0f}" if found["planned_peak"] else ""
        click.echo(f"\n{arm}: mean {found['mean'] / 1e6:.0f}, peak {found['peak'] / 1e6:.0f}{planned}; PSS mean "
                   f"{found['pss_mean'] / 1e6:.0f}, peak {found['pss_peak'] / 1e6:.0f}; {found['seconds']:.1f} s")
        for name, phase in found["phases"].items():
            click.echo(f"  {name:<8}{phase['seconds']:>8.1f} s  mean {phase['mean'] / 1e6:>6.0f}  "
                       f"peak {phase['peak'] / 1e6:>6.0f}")
        click.echo(plot(found["rss"], found["phases"]))


def plot(points: list[Any], phases: dict[str, Any]) -> str:
    """RSS over time in characters, with the phases below."""
    end = sum(phase["seconds"] for phase in phases.values()) or 1.0
    highest = max(value for _, value in points)
    heights = [0] * _COLUMNS
    for when, value in points:
        place = min(_COLUMNS - 1, int(when / end * _COLUMNS))
        heights[place] = max(heights[place], value)
    for place in range(1, _COLUMNS):  # nothing was sampled there
        heights[place] = heights[place] or heights[place - 1]
    lines = []
    for row in range(_ROWS, 0, -1):
        label = f"{highest * row / _ROWS / 1e6:>7.0f} "
        lines.append(label + "".join("█" if height >= highest * (row - 0.5) / _ROWS else " " for height in heights))
    below, start = [" "] * _COLUMNS, 0.0
    for name, phase in phases.items():
        place = min(_COLUMNS - 1, int(start / end * _COLUMNS))
        width = max(1, round(phase["seconds"] / end * _COLUMNS))
        for offset, letter in enumerate(("|" + name)[:width]):
            if place + offset < _COLUMNS:
                below[place + offset] = letter
        start += phase["seconds"]
    return "\n".join([*lines, " " * 8 + "".join(below).rstrip(), f"{'':8}0 s{f'{end:.0f} s':>{_COLUMNS - 3}}"])
