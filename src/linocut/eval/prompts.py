"""Prompts to judge by: files in GenEval's metadata form, and how sure a benchmark of so many prompts can be.

A line is `{"tag": ..., "include": [{"class", "count", "color"?, "position"?}, ...], "exclude"?: [...], "prompt": ...}`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from linocut.errors import UsageError
from linocut.eval.rules import GENEVAL_TASKS

RELATIONS = ("left of", "right of", "above", "below")
PROMPTS, IMAGES = 553, 4  # GenEval's own numbers
Metadata = dict[str, Any]


def read_prompts(path: Path) -> list[Metadata]:
    """Read and check a metadata file.

    Raises UsageError that names the line for anything that is not metadata, and for a prompt that comes twice.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a readable file of prompts: {error}") from error
    found: list[Metadata] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            metadata = json.loads(line)
            _check(metadata)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UsageError(f"{path}, line {number}: not a line of GenEval's metadata: {error!r}") from None
        if metadata["prompt"] in seen:
            raise UsageError(f"{path}: lines {seen[metadata['prompt']]} and {number} hold the same prompt; "
                             "leave one out, since both would be drawn from the same noise")
        seen[metadata["prompt"]] = number
        found.append(metadata)
    if not found:
        raise UsageError(f"{path}: no prompts in it")
    return found


def _check(metadata: Metadata) -> None:
    if metadata["tag"] not in GENEVAL_TASKS:
        raise ValueError(f"tag must be one of {', '.join(GENEVAL_TASKS)}, found {metadata['tag']!r}")
    if not isinstance(metadata["prompt"], str) or not metadata["prompt"].strip():
        raise ValueError("the prompt is empty")
    include: list[dict[str, Any]] = metadata["include"]
    if not include:
        raise ValueError("nothing to include")
    for index, entry in enumerate([*include, *metadata.get("exclude", ())]):
        if not isinstance(entry["class"], str) or not isinstance(entry["count"], int) or entry["count"] < 1:
            raise ValueError(f"a class and a count of 1 or more are needed, found {entry}")
        if "position" in entry:
            relation, target = entry["position"]
            if relation not in RELATIONS or not 0 <= target < min(index, len(include)):
                raise ValueError(f"position must be a relation and the index of an entry before, found "
                                 f"{entry['position']}")


def refuse_unknown(prompts: Sequence[Metadata], classes: Collection[str], colours: Collection[str]) -> None:
    """Raise UsageError if a prompt asks for a class or a colour that is not among those that a detector knows."""
    for metadata in prompts:
        for entry in [*metadata["include"], *metadata.get("exclude", ())]:
            for key, known in (("class", classes), ("color", colours)):
                if key in entry and entry[key] not in known:
                    raise UsageError(f"{metadata['prompt']!r}: the detector knows no {key} {entry[key]!r}, only "
                                     f"{len(known)} others; take prompts and detector of the same world (see 'linocut "
                                     "eval prompts')")


def write_prompts(path: Path, prompts: Sequence[Metadata]) -> None:
    """Write a metadata file."""
    from linocut.formats.writer import atomic_write_bytes

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in prompts).encode())


def fingerprint(prompts: Sequence[Metadata]) -> str:
    """Twelve hexadecimal digits that tell one list of prompts from another."""
    return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()[:12]


def seed_of(prompt: str, image: int) -> int:
    """The seed of picture number `image` of a prompt, the same for every model: 62 bits of a hash."""
    return int.from_bytes(hashlib.sha256(f"{image}/{prompt}".encode()).digest()[:8], "big") >> 2


def expected_error(prompts: int, images: int, rate: float = 0.9, alike: float = 0.3) -> float:
    """Standard error of the mean of the six task means to expect, in shares of 1.

    `prompts` are spread evenly over the tasks, each with `images` pictures that are right with probability `rate`; the
    outcomes of pictures of one prompt correlate by `alike`.
    """
    return float((rate * (1 - rate) / (prompts * images) * (1 + (images - 1) * alike)) ** 0.5)


def expected_difference_error(prompts: int, images: int, discordant: float = 0.06, alike: float = 0.15) -> float:
    """As `expected_error`, of the difference between two models on the same prompts and noise.

    `discordant`: the share of pairs of pictures that are judged differently.
    """
    return float((discordant / (prompts * images) * (1 + (images - 1) * alike)) ** 0.5)
