"""Which linear layer gets which encoding: ordered rules over module names, serializable, with named presets.

A rule is a regular expression that must match a whole module path (`transformer_blocks.0.attn.to_q`, no `.weight`)
and an encoding, or "dense" to keep the layer as it is. The first rule that matches decides; a layer that no rule
matches stays dense. Every decision carries its reason, which `linocut quantize` reports.

The file form (TOML or JSON) is what `linocut quantize --policy FILE` reads and what a packed model's
`transformer/config.json` stores:

    name = "my-dit"
    [[rules]]
    pattern = 'blocks\\.\\d+\\.(attn|mlp)\\..*'
    encoding = "ternary"          # may be left out: then --encoding fills it in
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linocut.errors import PolicyError
from linocut.formats.packed import ENCODINGS, GROUP_SIZE

DENSE = "dense"
CHOICES = (*ENCODINGS, DENSE)
FLUX2_PRESETS = ("flux2", "flux2-embedded", "flux2-compact")
PRESETS = (*FLUX2_PRESETS, "qwen3")

_FLUX2_PACKED = (
    r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
    r"transformer_blocks\.\d+\.(ff|ff_context)\.linear_(in|out)",
    r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
)
# Computed once per step from the timestep alone: small models spend most of their dense bytes here.
_FLUX2_MODULATIONS = r"(double_stream_modulation_(img|txt)|single_stream_modulation|norm_out)\.linear"
_FLUX2_TIME = r"time_guidance_embed\.timestep_embedder\.linear_2"
_FLUX2_EDGES = r"context_embedder|x_embedder|proj_out"
_QWEN3_PACKED = (
    r"(model\.)?layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    r"(model\.)?embed_tokens",
)
_FLUX2_DENSE = re.compile(
    r"time_guidance_embed\.(timestep|guidance)_embedder\.linear_[12]|double_stream_modulation_(img|txt)\.linear"
    r"|single_stream_modulation\.linear|x_embedder|context_embedder|norm_out\.linear|proj_out"
)


@dataclass(frozen=True)
class Rule:
    """`encoding` for every module whose whole path matches `pattern`."""

    pattern: str
    encoding: str
    _regex: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.encoding not in CHOICES:
            raise PolicyError(f"rule {self.pattern!r}: unknown encoding {self.encoding!r}; "
                              f"choose from {', '.join(CHOICES)}")
        try:
            object.__setattr__(self, "_regex", re.compile(self.pattern))
        except re.error as error:
            raise PolicyError(f"rule {self.pattern!r} is no regular expression: {error}") from error

    def matches(self, name: str) -> bool:
        """Whether the whole module path matches."""
        return self._regex.fullmatch(name) is not None


@dataclass(frozen=True)
class Policy:
    """Ordered rules. `name` is a preset's name or free text; presets know how many layers they must pick."""

    rules: tuple[Rule, ...]
    name: str = "custom"

    @classmethod
    def preset(cls, name: str, encoding: str) -> Policy:
        """A named preset.

        "flux2": klein's 100 linears. "flux2-embedded": also the time layers, in affine4. "flux2-compact": the
        modulations as the blocks, since all that they ever see is one curve of noise levels; and the layers before and
        after the blocks in int8. "qwen3": linears and embedding of a text encoder.
        """
        if encoding not in ENCODINGS:
            raise PolicyError(f"unknown encoding {encoding!r}; choose from {', '.join(ENCODINGS)}")
        if name not in PRESETS:
            raise PolicyError(f"unknown policy preset {name!r}; choose from {', '.join(PRESETS)}")
        patterns = _QWEN3_PACKED if name == "qwen3" else _FLUX2_PACKED
        rules = [Rule(pattern, encoding) for pattern in patterns]
        if name == "flux2-embedded":
            rules += [Rule(pattern, "affine4") for pattern in (_FLUX2_MODULATIONS, _FLUX2_TIME)]
        elif name == "flux2-compact":
            rules += [Rule(_FLUX2_MODULATIONS, encoding), Rule(_FLUX2_TIME, "affine4"), Rule(_FLUX2_EDGES, "int8")]
        return cls(tuple(rules), name)

    def with_edges(self, encoding: str) -> Policy:
        """This policy with `encoding` for what stands before and after FLUX.2's blocks, which presets leave dense."""
        return Policy((*self.rules, Rule(_FLUX2_EDGES, encoding)), self.name)

    def decide(self, name: str, shape: tuple[int, ...]) -> tuple[str, str]:
        """(encoding, reason) for one weight; `name` is the module path, `shape` the weight's shape (O, N)."""
        if len(shape) != 2:
            return DENSE, f"{len(shape)} dimensions, only matrices are packed"
        for rule in self.rules:
            if rule.matches(name):
                if rule.encoding == DENSE:
                    return DENSE, f"rule {rule.pattern}"
                if shape[1] % GROUP_SIZE or not shape[0]:
                    return DENSE, f"{shape[1]} inputs are no multiple of {GROUP_SIZE}"
                return rule.encoding, f"rule {rule.pattern}"
        return DENSE, "no rule matches"

    def plan(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, str]]:
        """Decide for every weight of a model ({module path: shape}); raises PolicyError if the picture is wrong.

        The FLUX.2 presets must match 12 linears per double and 2 per single block and leave exactly the 9 others
        (klein: 100 and 9) so that a renamed or missing layer is noticed. Any policy must match something.
        """
        decisions = {name: self.decide(name, shape) for name, shape in shapes.items()}
        if self.name in FLUX2_PRESETS:
            self._check_flux2({name for name, shape in shapes.items() if len(shape) == 2})
        elif not any(rule.matches(name) for name in shapes for rule in self.rules):
            sample = ", ".join(list(shapes)[:3])
            raise PolicyError(f"policy {self.name!r} matches no weight of this model (it has for example {sample})")
        return decisions

    def _check_flux2(self, names: set[str]) -> None:
        double = {name.split(".")[1] for name in names if name.startswith("transformer_blocks.")}
        single = {name.split(".")[1] for name in names if name.startswith("single_transformer_blocks.")}
        packed = [re.compile(pattern) for pattern in _FLUX2_PACKED]
        matched = sum(any(pattern.fullmatch(name) for pattern in packed) for name in names)
        dense = sorted(name for name in names if not any(pattern.fullmatch(name) for pattern in packed))
        # Models with a guidance embedding (FLUX.2 dev) have two more time linears than klein.
        expected_dense = 11 if any(".guidance_embedder." in name for name in names) else 9
        expected = 12 * len(double) + 2 * len(single)
        strangers = [name for name in dense if not _FLUX2_DENSE.fullmatch(name)]
        if matched != expected or len(dense) != expected_dense or strangers or not matched:
            detail = f"; not known: {', '.join(strangers[:3])}" if strangers else ""
            raise PolicyError(
                f"preset {self.name!r} does not fit this model: expected {expected} block linears and "
                f"{expected_dense} others for {len(double)} double and {len(single)} single blocks, found {matched} "
                f"and {len(dense)}{detail}; write a policy file and pass it with --policy")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, TOML and `quantization_config`."""
        return {"name": self.name, "rules": [{"pattern": r.pattern, "encoding": r.encoding} for r in self.rules]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], encoding: str | None = None) -> Policy:
        """Inverse of `to_dict`; `encoding` fills rules that name none. Raises PolicyError on anything unexpected."""
        if not isinstance(data, Mapping):
            raise PolicyError(f"a policy is a table with `rules`, found {type(data).__name__}")
        unknown = sorted(set(data) - {"name", "rules"})
        if unknown:
            raise PolicyError(f"unknown key {unknown[0]!r} in policy; known keys are name, rules")
        entries, name = data.get("rules"), data.get("name", "custom")
        if not isinstance(entries, list) or not entries or not isinstance(name, str):
            raise PolicyError("a policy needs a non-empty list `rules` and, if any, a text `name`")
        return cls(tuple(cls._rule(entry, encoding) for entry in entries), name)

    @staticmethod
    def _rule(entry: Any, encoding: str | None) -> Rule:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("pattern"), str):
            raise PolicyError(f"each rule needs a text `pattern`, found {entry!r}")
        unknown = sorted(set(entry) - {"pattern", "encoding"})
        if unknown:
            raise PolicyError(f"unknown key {unknown[0]!r} in rule {entry['pattern']!r}; known: pattern, encoding")
        chosen = entry.get("encoding", encoding)
        if not isinstance(chosen, str):
            raise PolicyError(f"rule {entry['pattern']!r} names no encoding; add one or pass --encoding")
        return Rule(entry["pattern"], chosen)

    def to_json(self) -> str:
        """The policy as a JSON document."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_toml(self) -> str:
        """The policy as a TOML document."""
        lines = [f"name = {_toml_string(self.name)}"]
        for rule in self.rules:
            lines += ["", "[[rules]]", f"pattern = {_toml_string(rule.pattern)}",
                      f"encoding = {_toml_string(rule.encoding)}"]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_file(cls, path: str | Path, encoding: str | None = None) -> Policy:
        """Read a `.toml` or `.json` policy file."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            data = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
        except OSError as error:
            raise PolicyError(f"{path}: cannot read the policy file: {error.strerror or error}") from error
        except (UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
            raise PolicyError(f"{path}: not a TOML or JSON policy file: {error}") from error
        try:
            return cls.from_dict(data, encoding)
        except PolicyError as error:
            raise PolicyError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the policy as TOML, or as JSON if the name ends in `.json`."""
        path = Path(path)
        path.write_text(self.to_json() if path.suffix.lower() == ".json" else self.to_toml(), encoding="utf-8")


def _toml_string(text: str) -> str:
    # A JSON string is a TOML basic string, but for DEL and (with ASCII escapes) surrogate pairs.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
