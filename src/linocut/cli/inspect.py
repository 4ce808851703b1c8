"""`linocut inspect`: what a model or a weight file holds, to the byte, and whether it is intact. Needs no torch."""

import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from linocut.cli import printable
from linocut.cli._fetch import bring
from linocut.errors import UsageError

if TYPE_CHECKING:
    from linocut.formats.checkpoint import Checkpoint


@click.command()
@click.argument("target", metavar="MODEL_OR_FILE", default="embedded")
@click.option("--verify", is_flag=True, help="Check the SHA-256 and the values of every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--vocabulary", is_flag=True, help="List instead what the model can draw, if its vocabulary is small.")
def command(target: str, verify: bool, as_json: bool, tensors: bool, vocabulary: bool) -> None:
    """List the tensors, sizes and bits per weight of a model (name, folder or hub id) or of a .safetensors file.

    Opening checks the structure of each file; --verify also checks every tensor's hash and values, and ends with
    exit code 2 at the first one that is damaged.
    """
    if vocabulary:
        if verify or tensors:
            raise UsageError("--vocabulary lists words instead of tensors; leave out --verify and --tensors")
        _list_vocabulary(target, as_json)
        return
    report, checkpoints = _open(target)
    try:
        for name, checkpoint in checkpoints.items():
            report["components"][name] = _describe(checkpoint, tensors)
        if verify:
            _verify(report, checkpoints, quiet=as_json)
    finally:
        for checkpoint in checkpoints.values():
            checkpoint.close()
    report["total"] = _total(list(report["components"].values()))
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(_lines(report, verify)))


def _list_vocabulary(target: str, as_json: bool) -> None:
    """Print the things a model can draw and all else that can be asked of it."""
    from linocut.formats.folder import ModelFolder
    from linocut.pipeline.vocabulary import Vocabulary

    folder = ModelFolder.open(target)
    known = Vocabulary.of(folder)
    if known is None:
        raise UsageError(f"{folder.name} has no list of its words: it was trained on free text, so ask for anything")
    if as_json:
        click.echo(json.dumps(folder.vocabulary(), indent=2, ensure_ascii=False))
        return
    lines = [f"{printable(folder.name)} draws up to {known.most} of {len(known.things)} things "
             f"(in brackets what else they are called):", ""]
    names = sorted(f"{thing.name} ({', '.join(thing.synonyms)})" if thing.synonyms else thing.name
                   for thing in known.things)
    lines += _wrapped(names, "; ")
    for name, values in known.lists.items():
        lines += ["", f"{printable(name)}:", *_wrapped(values, ", ")]
    lines += ["", f"{len(known.words):,} words are known in all; others are passed over, more or less gracefully."]
    click.echo("\n".join(lines))


def _wrapped(names: Sequence[str], mark: str) -> list[str]:
    """Names joined by `mark`, in lines of at most 100 characters."""
    return textwrap.wrap(mark.join(printable(name) for name in names), 98, initial_indent="  ",
                         subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _open(target: str) -> tuple[dict[str, Any], dict[str, "Checkpoint"]]:
    """The beginning of the report, and the checkpoints by component; a lone file is one component."""
    from linocut.formats.checkpoint import Checkpoint
    from linocut.formats.folder import ModelFolder, from_hub

    report: dict[str, Any]

    bring(target)
    root = from_hub(target)
    path = Path(target) if root is None else root
    others = _foreign(path)
    if others:
        report = {"name": target if root else path.resolve().name, "path": str(path), "components": {}}
        digest = hashlib.sha256("".join(one.fingerprint() for one in others.values()).encode())
        return report | {"hash": digest.hexdigest()[:12]}, others
    if path.is_file() or (path.is_dir() and not (path / "model_index.json").exists()):
        checkpoint = Checkpoint.open(path)
        report = {"name": path.resolve().name, "path": str(path), "hash": checkpoint.fingerprint()[:12]}
        return report | {"components": {}}, {"file" if path.is_file() else path.resolve().name: checkpoint}
    folder = ModelFolder.open(target)
    report = {"name": folder.name, "path": str(folder.root), "hash": folder.hash(), "settings": folder.settings}
    return report | {"components": {}}, folder.weight_files()


def _foreign(root: Path) -> dict[str, "Checkpoint"]:
    """The safetensors of a folder in another program's form, by the names of their folders; empty for our own form."""
    from linocut.formats.checkpoint import Checkpoint
    from linocut.formats.layouts import PLACES, file_names, place_of

    names = file_names(root) if root.is_dir() else set()
    places = {part: place_of(part, names) for part in PLACES}
    if places["transformer"] in (None, "transformer"):
        return {}
    found = [place for place in (*places.values(), "vae") if place]
    return {place: Checkpoint.open(root / place) for place in found
            if place.endswith(".safetensors") or any((root / place).glob("*.safetensors*"))}


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts block 2 before block 10. Digits are compared as text: a name from a file may hold any number."""
    parts = re.split(r"([0-9]+)", name)  # text and digits take turns
    return [(0, part) if place % 2 == 0 else (len(part.lstrip("0")), part.lstrip("0"))
            for place, part in enumerate(parts)]


def _describe(checkpoint: "Checkpoint", tensors: bool) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {}
    listed = []
    parts = {f"{module}.{suffix}" for module in checkpoint.packed for suffix in ("codes", "scales", "zeros")}
    entries = [(module, entry.encoding, list(entry.shape), entry.shape[0] * entry.shape[1],
                checkpoint.packed_tensor(module).nbytes) for module, entry in checkpoint.packed.items()]
    for name in checkpoint.names:
        if name not in parts:
            info = checkpoint.info(name)
            entries.append((name, info.dtype, list(info.shape), info.count, info.nbytes))
    for name, kind, shape, weights, nbytes in sorted(entries, key=lambda entry: _natural(entry[0])):
        total = kinds.setdefault(kind, {"tensors": 0, "weights": 0, "bytes": 0, "packed": name in checkpoint.packed})
        total["tensors"] += 1
        total["weights"] += weights
        total["bytes"] += nbytes
        listed.append({"name": name, "kind": kind, "shape": shape, "bytes": nbytes,
                       "bits_per_weight": _bits(nbytes, weights)})
    for total in kinds.values():
        total["bits_per_weight"] = _bits(total["bytes"], total["weights"])
    packed = [total for total in kinds.values() if total["packed"]]
    weights = sum(total["weights"] for total in kinds.values())
    result = {
        "files": [path.name for path in checkpoint.files], "format": "linocut" if checkpoint.native else "safetensors",
        "stored_tensors": len(checkpoint), "packed_layers": sum(total["tensors"] for total in packed),
        "packed_weights": sum(total["weights"] for total in packed), "weights": weights,
        "tensor_bytes": checkpoint.tensor_nbytes, "overhead_bytes": checkpoint.header_nbytes,
        "file_bytes": checkpoint.file_nbytes, "bits_per_weight": _bits(checkpoint.tensor_nbytes, weights),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1]["bytes"])),
    }
    if tensors:
        result["tensors"] = listed
    return result


def _bits(nbytes: int, weights: int) -> float:
    return round(8 * nbytes / weights, 4) if weights else 0.0


def _total(components: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("stored_tensors", "packed_layers", "packed_weights", "weights", "tensor_bytes", "overhead_bytes",
            "file_bytes")
    total: dict[str, Any] = {key: sum(component[key] for component in components) for key in keys}
    return total | {"bits_per_weight": _bits(total["tensor_bytes"], total["weights"])}


def _verify(report: dict[str, Any], checkpoints: dict[str, "Checkpoint"], quiet: bool) -> None:
    """Verify every checkpoint, with a progress bar on a terminal; the first damage raises FormatError."""
    bar: Any = nullcontext()
    if not quiet and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

        bar = Progress(TextColumn("verifying {task.description}", markup=False), BarColumn(), DownloadColumn(),
                       TimeElapsedColumn(), console=Console(stderr=True), transient=True)
    with bar:
        for name, checkpoint in checkpoints.items():
            advance: Callable[[int, int], None] | None = None
            if not isinstance(bar, nullcontext):
                task = bar.add_task(name, total=checkpoint.tensor_nbytes)

                def advance(done: int, total: int, task: Any = task) -> None:
                    bar.update(task, completed=done, total=total)
            hashes = checkpoint.verify(advance)
            report["components"][name]["verified"] = {"hashes": hashes, "tensors": len(checkpoint)}


def _lines(report: dict[str, Any], verify: bool) -> list[str]:
    """The report for people."""
    lines = [f"{printable(report['name'])}  (weights {report['hash']})", f"  {printable(report['path'])}"]
    if "settings" in report:
        settings = report["settings"]
        width, height = settings["default_size"]
        guided = f"not distilled: guidance {settings['default_guidance']:g}"
        lines.append(f"  {width}x{height} px, {settings['default_steps']} steps, {settings['text_length']} text "
                     f"tokens, {'distilled' if settings['is_distilled'] else guided}")
    for name, part in report["components"].items():
        lines += ["", f"{printable(name)}: {', '.join(printable(file) for file in part['files'])}"]
        rows = [(kind, f"{total['tensors']:,} {'layers' if total['packed'] else 'tensors'}", f"{total['weights']:,}",
                 f"{total['bytes']:,}", f"{total['bits_per_weight']:.4f}") for kind, total in part["kinds"].items()]
        rows.append(("all tensors", f"{part['stored_tensors']:,} stored", f"{part['weights']:,}",
                     f"{part['tensor_bytes']:,}", f"{part['bits_per_weight']:.4f}"))
        lines += _table(("", "", "weights", "bytes", "bits/weight"), rows)
        lines.append(f"  file overhead {part['overhead_bytes']:,} bytes, {part['file_bytes']:,} bytes in all")
        if "verified" in part:
            hashes, count = part["verified"]["hashes"], part["verified"]["tensors"]
            lines.append(f"  verified: values of {count:,} tensors" + (
                f", {hashes:,} hashes" if hashes else "; the file stores no hashes"))
        if "tensors" in part:
            lines += _table(("tensor", "kind", "shape", "bytes", "bits/weight"), [
                (printable(entry["name"]), entry["kind"], "x".join(map(str, entry["shape"])) or "scalar",
                 f"{entry['bytes']:,}", f"{entry['bits_per_weight']:.4f}") for entry in part["tensors"]])
    if len(report["components"]) != 1:
        total = report["total"]
        lines += ["", f"total: {total['weights']:,} weights in {total['tensor_bytes']:,} bytes of tensors "
                  f"({total['bits_per_weight']:.4f} bits per weight), {total['file_bytes']:,} bytes of files"]
    if verify:
        lines.append("all tensors are intact")
    return lines


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns padded to their widest cell; the first two to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return ["  " + "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width)
                             in enumerate(zip(row, widths, strict=True))).rstrip() for row in [head, *rows]]
