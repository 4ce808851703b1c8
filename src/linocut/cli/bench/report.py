"""The document that a benchmark writes: what was measured, on what machine, with which versions, when."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from linocut import __version__
from linocut.errors import FormatError
from linocut.formats.folder import ModelFolder

PACKAGES = ("torch", "numpy", "stable_diffusion_cpp_python")


def machine(threads: int) -> dict[str, Any]:
    """The processor and what it can do. No names of hosts or users, no paths."""
    from linocut.pipeline.machine import facts as machine_facts

    facts = machine_facts()
    kept = ("processor", "architecture", "usable_cores", "cpu_features", "memory_bytes")
    return {key: facts[key] for key in kept} | {"threads": threads, "system": platform.system()}


def versions() -> dict[str, str]:
    """Versions of linocut, of how its C++ module was built, of Python and of the libraries compared with."""
    from linocut.cli import diagnosis

    found = {"linocut": __version__, "C++ module": diagnosis.native_module()["detail"],
             "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the clone that this runs from, "+" if it was changed since; None for an installed package."""
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True,
                              check=True)
        return done.stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):  # some other project's clone around an installed package
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def encoding(folder: ModelFolder) -> str:
    """What the transformer of a model is: "binary", "ternary" or "dense"."""
    with folder.checkpoint("transformer") as checkpoint:
        return next((entry.encoding for entry in checkpoint.packed.values()
                     if entry.encoding in ("binary", "ternary")), "dense")


def document(kind: str, threads: int, settings: dict[str, Any], results: Any) -> dict[str, Any]:
    """A whole document. `settings` are what decides the work, `results` the numbers, in seconds and bytes."""
    return {"kind": kind, "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"), "commit": commit(),
            "machine": machine(threads), "versions": versions(), "settings": settings, "results": results}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a document, replacing an older one only when the new one is whole."""
    from linocut.formats.checkpoint import atomic_write_bytes

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def read(path: Path, kind: str | None = None) -> dict[str, Any]:
    """Read a document that `write` wrote; FormatError if it is none, or not of this kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise FormatError("not a benchmark's result", path=path, expected="JSON", found=str(error)[:100]) from None
    if not isinstance(content, dict) or not {"kind", "settings", "results", "machine"} <= set(content):
        raise FormatError("not a benchmark's result", path=path, expected="a document that 'linocut bench' wrote",
                          found="other JSON")
    if kind is not None and content["kind"] != kind:
        raise FormatError("result of another benchmark", path=path, expected=kind, found=content["kind"],
                          advice="name another file")
    return content
