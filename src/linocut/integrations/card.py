"""The model card of a folder: what is in it, how it was made, how to draw with it. Markdown with YAML before it.

A card that was written here ends with a checksum of itself, so that one that somebody edited is known and left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from linocut.errors import FormatError, UsageError
from linocut.formats.header import strict_json
from linocut.formats.hub import hub_id, read_json
from linocut.formats.packed import layout
from linocut.formats.weight import Weights

__all__ = ["Facts", "Part", "facts_of", "is_ours", "read_report", "write_card"]

TASK = "text-to-image"
_SEAL = re.compile(r"\n<!-- written by linocut push; sha256 of all before this line: ([0-9a-f]{64}) -->\n\Z")
_DTYPE_BYTES = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}
_LICENSE_TEXTS = (("apache-2.0", r"Apache License\s+Version 2\.0"), ("mit", r"\bMIT License\b"))
_OWN_KEYS = ("format", "linocut", "sha256")


@dataclass(frozen=True)
class Part:
    """A network's numbers. `packed` maps an encoding to (layers, weights, bytes with scales)."""

    name: str
    form: str
    packed: dict[str, tuple[int, int, int]]
    dense_values: int
    file_bytes: int

    @property
    def weights(self) -> int:
        return self.dense_values + sum(count for _, count, _ in self.packed.values())

    @classmethod
    def of(cls, name: str, form: str, weights: Weights, files: Sequence[Path]) -> Part:
        """Count the weights of a network."""
        packed: dict[str, tuple[int, int, int]] = {}
        for weight in weights.values():
            if weight.packed:
                parts = layout(weight.kind, weight.matrix)
                layers, count, nbytes = packed.get(weight.kind, (0, 0, 0))
                packed[weight.kind] = (layers + 1, count + weight.count,
                                       nbytes + sum(_DTYPE_BYTES[dtype] * prod(shape) for _, dtype, shape in parts))
        dense = sum(weight.count for weight in weights.values() if not weight.packed)
        return cls(name, form, packed, dense, sum(file.stat().st_size for file in files))


@dataclass(frozen=True)
class Facts:
    """What a card tells of a model. The first part is the transformer; texts are empty where nothing is known.

    policy: that of the transformer's quantization_config. metadata: what its file says of itself.
    """

    parts: tuple[Part, ...]
    settings: Mapping[str, Any]
    policy: Mapping[str, Any]
    metadata: Mapping[str, str]
    base_model: str
    license: str
    license_file: str

    @property
    def encodings(self) -> list[str]:
        """Encodings of the transformer's packed weights, the one with most weights first."""
        packed = self.parts[0].packed
        return sorted(packed, key=lambda name: -packed[name][1])


def facts_of(root: Path, parts: Sequence[Part], index: Mapping[str, Any], settings: Mapping[str, Any],
             metadata: Mapping[str, str], base_model: str = "", license: str = "") -> Facts:
    """Gather what the card tells of the model folder `root`.

    `base_model` and `license` (as the hub calls it) win over what the files say. Raises UsageError for a base model
    that is no id on the hub.
    """
    if base_model and hub_id(base_model) is None:
        raise UsageError(f"--base-model {base_model!r} is no name on the hub (expected org/name)")
    found = hub_id(base_model or str(settings.get("base_model") or index.get("_name_or_path") or ""))
    name, file = _license(root)
    config = root / "transformer" / "config.json"
    quantization = read_json(config).get("quantization_config") if config.is_file() else None
    policy = quantization.get("policy") if isinstance(quantization, dict) else None
    return Facts(tuple(parts), settings, policy if isinstance(policy, dict) else {},
                 {key: value for key, value in sorted(metadata.items()) if key not in _OWN_KEYS},
                 found[0] if found else "", license or name, file)


def _license(root: Path) -> tuple[str, str]:
    """(id, file) of the licence that lies with a model; empty if there is none, "other" for one that is not known."""
    for path in sorted(path for path in root.glob("LICENSE*") if path.is_file()):
        text = path.read_text(encoding="utf-8", errors="replace")[:4000]
        return next((known for known, words in _LICENSE_TEXTS if re.search(words, text)), "other"), path.name
    return "", ""


# ---- the card --------------------------------------------------------------------------------------------------------

def write_card(facts: Facts, repository: str, report: Mapping[str, Any] | None = None) -> str:
    """The text of README.md for `repository` (org/name), with scores if there is a report of `linocut eval`."""
    sections = [_about(facts, repository), _contents(facts), _recipe(facts), _usage(facts, repository),
                _scores(report) if report is not None else "", _licence(facts)]
    text = f"---\n{_front_matter(facts, repository)}\n---\n\n" + "\n".join(part for part in sections if part)
    return f"{text}\n<!-- written by linocut push; sha256 of all before this line: {_hash(text)} -->\n"


def is_ours(text: str) -> bool:
    """Whether a card was written here and not changed since."""
    text = text.replace("\r\n", "\n")
    seal = _SEAL.search(text)
    return seal is not None and seal[1] == _hash(text[: seal.start()])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _front_matter(facts: Facts, repository: str) -> str:
    from huggingface_hub import ModelCardData

    form = facts.parts[0].form
    more: dict[str, Any] = {}
    if facts.base_model:
        more |= {"base_model": facts.base_model, "base_model_relation": "quantized"}
    if facts.license:
        more["license"] = facts.license
    if facts.license == "other":
        more |= {"license_name": "see-the-file", "license_link": facts.license_file or "LICENSE"}
    library = {"linocut": "linocut", "dense": "diffusers", "unpacked": "diffusers"}.get(form, "linocut")
    tags = ["linocut", *facts.encodings, TASK, "flux2", *([form] if form not in ("linocut", "dense") else [])]
    return ModelCardData(library_name=library, pipeline_tag=TASK, tags=tags, **more).to_yaml()


def _about(facts: Facts, repository: str) -> str:
    kind = " and ".join(facts.encodings) or "dense"
    base = f" made from [{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else ""
    width, height = facts.settings["default_size"]
    guidance = facts.settings["default_guidance"]
    return (f"# {repository.partition('/')[2]}\n\nA text-to-image model with {kind} weights{base}: FLUX.2's "
            f"architecture, {width}x{height} pixels in {facts.settings['default_steps']} steps"
            f"{'' if facts.settings['is_distilled'] else f', not distilled (guidance {guidance:g})'}.\n")


def _contents(facts: Facts) -> str:
    lines = ["## What is in it", "", "| part | form | weights | of them dense | bytes of files | bits per weight |",
             "|---|---|---:|---:|---:|---:|"]
    for part in facts.parts:
        kinds = ", ".join(part.packed) or "dense"
        form = kinds if part.form in ("linocut", "dense") else f"{kinds} ({part.form})"
        count = max(1, part.weights)
        lines.append(f"| {part.name} | {form} | {part.weights:,} | {100 * part.dense_values / count:.2f} % | "
                     f"{part.file_bytes:,} | {8 * part.file_bytes / count:.3f} |")
    total = sum(part.file_bytes for part in facts.parts)
    lines += [f"| all |  | {sum(part.weights for part in facts.parts):,} |  | {total:,} |  |", ""]
    for encoding, (layers, weights, nbytes) in facts.parts[0].packed.items():
        lines.append(f"- {encoding}: {layers} layers of the transformer, {weights:,} weights, "
                     f"{8 * nbytes / weights:.3f} bits a weight in linocut's form, scales included")
    if facts.parts[0].packed:
        lines.append("- dense: everything else")
    return "\n".join(lines) + "\n"


def _recipe(facts: Facts) -> str:
    rules = facts.policy.get("rules")
    if not isinstance(rules, list) and not facts.metadata:
        return ""
    lines = ["## How it was made", ""]
    if isinstance(rules, list):
        lines += [f"Policy `{_plain(facts.policy.get('name', ''))}`: the first pattern that a layer's name matches "
                  "says its encoding; the other layers are dense.", "", "| layers | encoding |", "|---|---|"]
        lines += [f"| `{_plain(rule.get('pattern', ''))}` | {_plain(rule.get('encoding', ''))} |"
                  for rule in rules if isinstance(rule, dict)]
        lines.append("")
    lines += [f"- {_plain(key)}: {_plain(value)}" for key, value in facts.metadata.items()]
    return "\n".join(lines).rstrip() + "\n"


def _plain(value: object) -> str:
    """A text from a file in a cell of a table: one line, without what would end the cell or the code."""
    text = " ".join(str(value).split())
    text = text if len(text) <= 400 else text[:396] + " ..."
    return text.replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def _usage(facts: Facts, repository: str) -> str:
    form = facts.parts[0].form
    lines = ["## How to draw", ""]
    if form not in ("linocut", "dense"):
        return "\n".join([*lines, f"The files are in the form `{form}`. linocut reads them after", "",
                          f"    linocut convert {repository} FOLDER --to linocut\n"])
    lines += ["With linocut, on a CPU, in little memory, offline after the download:", "",
              f"    linocut pull {repository}",
              f"    linocut generate \"two red apples and a blue cup\" --model {repository}", "", "```python",
              "import linocut", "", f"pipe = linocut.Pipeline.from_pretrained(\"{repository}\")",
              "pipe(\"two red apples and a blue cup\", seed=1).images[0].save(\"apples.png\")", "```", ""]
    if form == "linocut":
        lines += ["Plain diffusers does not know this format: it says \"Unknown quantization type\" unless "
                  "`import linocut.integrations.diffusers` came before loading.", "",
                  "Each tensor's SHA-256 lies in its file; `linocut pull` checks them, and so does "
                  f"`linocut inspect {repository} --verify`.", ""]
    return "\n".join(lines)


def _licence(facts: Facts) -> str:
    where = f" ([{facts.license_file}]({facts.license_file}))" if facts.license_file else ""
    if not facts.license:
        return ""
    kept = f" The terms of {facts.base_model} hold for what is made from it." if facts.base_model else ""
    return f"## Licence\n\n{facts.license}{where}.{kept}\n"


# ---- scores ----------------------------------------------------------------------------------------------------------

def read_report(path: Path) -> dict[str, Any]:
    """The report of `linocut eval` (report.json, or the folder of a run). Raises UsageError, FormatError."""
    path = path / "report.json" if path.is_dir() else path
    try:
        report = strict_json(path.read_bytes(), path, "file")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); expected the report.json of 'linocut eval'"
                         ) from None
    scores = report.get("scores") if isinstance(report, dict) else None
    if not isinstance(scores, dict) or not scores:
        raise FormatError("is no report of 'linocut eval'", path=path, expected='an object with "scores"',
                          found=json.dumps(report)[:60])
    try:
        _scores(report)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError("is a report of another form", path=path, expected="scores with tasks and overall",
                          found=f"{type(error).__name__}: {error}") from None
    return dict(report)


def _scores(report: Mapping[str, Any]) -> str:
    tasks = list(dict.fromkeys(task for row in report["scores"].values() for task in row["tasks"]))
    pictures = f"{int(report['count'])} prompts x {int(report['images'])} images"
    lines = ["## Scores", "", f"GenEval's rules, {pictures}, judged by {_plain(report['detector'])}; percent, mean of "
             "the tasks with its standard error:", "",
             "| model | " + " | ".join(_plain(task).replace("_", " ") for task in tasks) + " | mean |",
             "|---" + "|---:" * (len(tasks) + 1) + "|"]
    for label, row in report["scores"].items():
        cells = [f"{100 * row['tasks'][task]['mean']:.2f}" if task in row["tasks"] else "" for task in tasks]
        overall = row["overall"]
        lines.append(f"| {_plain(label)} | " + " | ".join(cells)
                     + f" | {100 * overall['value']:.2f} ± {100 * overall['standard_error']:.2f} |")
    for each in report.get("comparisons", []):
        difference = each["difference"]
        lines += ["", f"{_plain(each['second'])} against {_plain(each['first'])}: {100 * difference['value']:+.2f} "
                  f"points, 95 % interval [{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}]."]
    return "\n".join(lines) + "\n"
