"""`linocut bench plot`: results of the other benchmarks as a picture, one panel for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

COLOURS = {"binary": "#12355b", "ternary": "#d72638", "affine4": "#d72638", "linocut": "#d72638",
           "linocut, known prompt": "#f49d37", "torch fp32": "#b8bec8", "torch bf16": "#8a94a6",
           "torch int8": "#4a5568", "stable-diffusion.cpp": "#3f8f6b"}


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="The picture to write: .png, .svg or .pdf.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def command(results: tuple[Path, ...], output: Path, force: bool) -> None:
    """Draw RESULTS, files that 'kernels', 'stages', 'image' or 'memory' wrote with -o. Needs matplotlib."""
    from linocut.cli.bench import report
    from linocut.errors import UsageError

    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("matplotlib is not installed; pip install 'linocut[plot]'") from None
    if output.exists() and not force:
        raise UsageError(f"{output} exists; choose another name or add --force")
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{output}: expected a name that ends with .png, .svg or .pdf")
    panels: list[tuple[str, Any]] = []
    machines = []
    for path in results:
        content = report.read(path)
        machines.append(content["machine"])
        panels += _panels(content, path)
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    for axes, (kind, data) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        {"kernels": _draw_kernels, "lines": _draw_lines, "bars": _draw_bars}[kind](axes, data)
    described = dict.fromkeys(f"{each['processor']}, {each['threads']} threads" for each in machines)
    figure.suptitle("; ".join(described), fontsize=9, color="#444444")
    figure.savefig(output, dpi=150)
    click.echo(str(output))


def _panels(content: dict[str, Any], path: Path) -> list[tuple[str, Any]]:
    """What to draw of a document: kernels by kind of weights, all else as bars."""
    from linocut.errors import UsageError

    kind, results = content["kind"], content["results"]
    if kind == "kernels":
        groups: dict[bool, list[dict[str, Any]]] = {}
        for m in dict.fromkeys(row["m"] for row in results):
            for text in (False, True):
                rows = [row for row in results if row["m"] == m and ("affine4" in row["gops"]) == text]
                groups.setdefault(text, []).extend(rows[-1:])  # all shapes together, where there are several
        return [("kernels", ("text encoder, affine4" if text else "transformer", rows))
                for text, rows in groups.items() if rows]
    size = "x".join(map(str, content["settings"]["size"]))
    if kind == "stages":
        return [("bars", (f"{stage}, {size}", {name.partition("/")[2]: found for name, found in results.items()
                                               if name.startswith(stage + "/")}))
                for stage in dict.fromkeys(name.partition("/")[0] for name in results)]
    if kind == "image":
        title = f"picture of {size}, {content['settings']['steps']} steps"
        return [("bars", (title, {name: found for name, found in results.items() if "/" not in name}))]
    if kind == "memory":
        title = f"resident memory, picture of {size}, {content['settings']['encoding']}"
        return [("lines", (title, results))]
    raise UsageError(f"{path}: there is no plot of {kind!r}")


def _draw_kernels(axes: Any, data: tuple[str, list[dict[str, Any]]]) -> None:
    """GOP/s over the number of tokens, a line for each arm, the int8 peak dashed."""
    title, rows = data
    tokens = [row["m"] for row in rows]
    for name in rows[0]["gops"]:
        found = [row["gops"][name] for row in rows]
        axes.plot(tokens, [each["median"] for each in found], marker="o", label=name, color=COLOURS.get(name))
        axes.fill_between(tokens, [each["min"] for each in found], [each["max"] for each in found], alpha=0.15,
                          color=COLOURS.get(name), linewidth=0)
    if any(row["peak"]["median"] for row in rows):
        axes.plot(tokens, [row["peak"]["median"] for row in rows], "k--", linewidth=1, label="int8 peak")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, list(map(str, tokens)))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("GOP/s")
    axes.set_title(title)
    axes.legend(fontsize=7)


def _draw_lines(axes: Any, data: tuple[str, dict[str, Any]]) -> None:
    """Memory over time as a share of the whole, a line for each arm; their seconds are in the legend."""
    title, found = data
    for name, each in found.items():
        times, values = zip(*each["rss"], strict=True)
        axes.plot([when / each["seconds"] for when in times], [value / 1e9 for value in values],
                  color=COLOURS.get(name), label=f"{name}: mean {each['mean'] / 1e9:.2f} GB, {each['seconds']:.0f} s")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the run's time")
    axes.set_ylabel("GB")
    axes.set_title(title)
    axes.legend(fontsize=7)


def _draw_bars(axes: Any, data: tuple[str, dict[str, Any]]) -> None:
    """Seconds, a bar for each arm, from the least to the most as a thin line."""
    title, found = data
    names = list(found)[::-1]
    medians = [found[name]["median"] for name in names]
    spread = [[found[name]["median"] - found[name]["min"] for name in names],
              [found[name]["max"] - found[name]["median"] for name in names]]
    bars = axes.barh(names, medians, xerr=spread, color=[COLOURS.get(name, "#888888") for name in names],
                     error_kw={"elinewidth": 1, "ecolor": "#222222"})
    axes.bar_label(bars, [f" {median:.3g} s" for median in medians], fontsize=8, padding=3)
    axes.set_xlim(right=1.25 * max(each["max"] for each in found.values()))
    axes.set_xlabel("seconds")
    axes.set_title(title)
