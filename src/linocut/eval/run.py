"""Runs a benchmark: every arm draws every prompt, a detector looks, and each verdict becomes a line in a file.

The folder of a run holds `run.json` (what is compared, and how), `prompts.jsonl`, and per arm `results*.jsonl` and the
pictures that were kept. A run that was cut goes on where it stopped; shards (every n-th prompt) may run at the same
time, and on different machines if their folders are joined afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linocut.errors import FormatError, UsageError
from linocut.eval.prompts import Metadata, fingerprint, seed_of, write_prompts
from linocut.eval.rules import judge

if TYPE_CHECKING:
    from PIL.Image import Image

    from linocut.eval.arms import Arm
    from linocut.eval.detector import Detector, Sight

DESCRIPTION, PROMPTS, RESULTS, KEPT = "run.json", "prompts.jsonl", "results", "pictures"
KEEP = ("none", "failures", "all")
_CHUNK = 32  # pictures drawn before the detector looks at them
_LARGEST_KEPT = 512  # pixels of the longer side of a picture that is kept to look at
OnPicture = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Shard:
    """The part `index` of `count`: prompts number index, index + count, ..."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of "I/N", counting from 0. Raises UsageError."""
        first, _, second = text.partition("/")
        if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
            raise UsageError(f"a shard is I/N with I from 0 to N - 1, as in 0/4 (found {text!r})")
        return cls(int(first), int(second))

    @property
    def file(self) -> str:
        return f"{RESULTS}.jsonl" if self.count == 1 else f"{RESULTS}-{self.index}-of-{self.count}.jsonl"


def describe(root: Path, prompts: Sequence[Metadata], facts: dict[str, Any]) -> None:
    """Write what a run is about, or check that it is the same run that lies in the folder.

    `facts` have "detector", "images" and "arms" (label to facts); arms may be added later. Raises UsageError if another
    run lies there.
    """
    from linocut.formats.writer import atomic_write_bytes

    wanted: dict[str, Any] = {"prompts": fingerprint(prompts), "count": len(prompts)} | facts
    path = root / DESCRIPTION
    if path.exists():
        there = read_description(root)
        for key in wanted:
            if key != "arms" and key in there and there[key] != wanted[key]:
                raise UsageError(f"{root}: holds another run ({key} was {there[key]!r}, now {wanted[key]!r}); choose "
                                 "another folder, or delete it to begin anew")
        for label, arm in there["arms"].items():
            if label in wanted["arms"] and wanted["arms"][label] != arm:
                raise UsageError(f"{root}: {label} was another model or drew otherwise ({arm}, now "
                                 f"{wanted['arms'][label]}); choose another label (LABEL=MODEL) or folder")
        wanted["arms"] = there["arms"] | wanted["arms"]
    root.mkdir(parents=True, exist_ok=True)
    write_prompts(root / PROMPTS, prompts)
    atomic_write_bytes(path, (json.dumps(wanted, indent=1) + "\n").encode())


def read_description(root: Path) -> dict[str, Any]:
    """What `describe` wrote. Raises UsageError if there is none."""
    try:
        found: dict[str, Any] = json.loads((root / DESCRIPTION).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{root}: no run in this folder ({DESCRIPTION} cannot be read: {error}); run "
                         "'linocut eval geneval' first") from error
    return found


def evaluate(arm: Arm, detector: Detector, prompts: Sequence[Metadata], images: int, root: Path,
             shard: Shard | None = None, keep: str = "failures", on_picture: OnPicture | None = None) -> int:
    """Draw and judge what is not done yet of an arm's shard. Returns how many pictures that were."""
    shard = shard or Shard()
    folder = root / arm.label
    folder.mkdir(parents=True, exist_ok=True)
    mine = range(shard.index, len(prompts), shard.count)
    done = {(line["prompt"], line["image"]) for line in results(root, arm.label)}
    todo = [(number, image) for number in mine for image in range(images)
            if (prompts[number]["prompt"], image) not in done]
    file = folder / shard.file
    cut_torn_line(file)
    with file.open("a", encoding="utf-8") as lines:
        for done_now, (number, image, picture, sight) in enumerate(_look(arm, detector, prompts, todo), 1):
            line = _line(prompts[number], image, sight, detector)
            if keep == "all" or (keep == "failures" and not line["correct"]):
                _keep(picture, folder / KEPT / f"{number:05d}-{image}.webp")
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            lines.flush()  # so that a cut costs no more than a chunk
            if on_picture is not None:
                on_picture(done_now, len(todo), arm.label)
    return len(todo)


def _look(arm: Arm, detector: Detector, prompts: Sequence[Metadata],
          todo: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, Image, Sight]]:
    from linocut.eval.arms import Shot

    drawn = arm.draw([Shot(prompts[number]["prompt"], seed_of(prompts[number]["prompt"], image))
                      for number, image in todo])
    for start in range(0, len(todo), _CHUNK):
        part = todo[start:start + _CHUNK]
        pictures = [next(drawn) for _ in part]
        for (number, image), picture, sight in zip(part, pictures, detector.look(pictures), strict=True):
            yield number, image, picture, sight


def _line(metadata: Metadata, image: int, sight: Sight, detector: Detector) -> dict[str, Any]:
    """One line of results: the verdict, and of the classes that the prompt names what was found."""
    verdict = judge(metadata, sight.found, sight.colours, detector.thresholds)
    named = {entry["class"] for entry in [*metadata["include"], *metadata.get("exclude", ())]}
    told = [{"class": each.name, "score": round(each.score, 3), "box": [round(side, 1) for side in each.box]}
            for each in sight.found if each.name in named or each.score > detector.thresholds.of(metadata["tag"])]
    return {"prompt": metadata["prompt"], "tag": metadata["tag"], "image": image,
            "seed": seed_of(metadata["prompt"], image), "correct": verdict.correct,
            "reason": "; ".join(verdict.reasons), "found": told}


def results(root: Path, label: str) -> list[dict[str, Any]]:
    """All lines of an arm, from all of its files; a torn last line (the run was cut) is passed over.

    Raises FormatError for a file that holds anything else.
    """
    lines: list[dict[str, Any]] = []
    for file in sorted((root / label).glob(f"{RESULTS}*.jsonl")):
        lines += read_results(file)
    return lines


def read_results(file: Path) -> list[dict[str, Any]]:
    """The lines of one file of results."""
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(file.read_text("utf-8").splitlines(keepends=True), 1):
        if not text.endswith("\n"):
            break
        try:
            line = json.loads(text)
            line["prompt"], line["image"], line["tag"], line["correct"]
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"line {number} is no line of results", path=file, found=repr(error),
                              advice="delete the file; the same command makes it again") from error
        lines.append(line)
    return lines


def cut_torn_line(file: Path) -> None:
    """Remove a last line that was not written to its end."""
    if file.is_file():
        data = file.read_bytes()
        if data and not data.endswith(b"\n"):
            with file.open("r+b") as torn:
                torn.truncate(data.rfind(b"\n") + 1)


def _keep(picture: Image, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    small = picture.copy()
    small.thumbnail((_LARGEST_KEPT, _LARGEST_KEPT))
    small.save(path, quality=85)
