"""Model folders: one name or path in, configs and checkpoints out.

A model is a folder in the Hugging Face style: `model_index.json`, `transformer/`, `text_encoder/`, `tokenizer/`,
`vae/`, `scheduler/`. It is found by the name of an embedded model, by its path, or by its name on the hub: an alias
such as `klein-4b`, or an id such as `org/name`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from linocut.errors import FormatError, ModelNotFoundError, UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.header import strict_json
from linocut.formats.hub import ALIASES, cached, hub_id
from linocut.formats.layouts import file_names, place_of
from linocut.formats.timestep_table import TABLE_FILE, WEIGHTS_FILE, TimestepTable, has_table

__all__ = ["COMPONENTS", "EMBEDDED", "ModelFolder", "from_hub", "read_settings"]

COMPONENTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
# name -> folder of its transformer; both share everything else
EMBEDDED = {"embedded": "transformer", "embedded-binary": "transformer-binary"}
VOCABULARY_FILE = "vocabulary.json"
SETTINGS_KEY = "linocut"  # of model_index.json
_CONFIG_FILES = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
_MAX_CONFIG = 10_000_000
_DEFAULTS: dict[str, Any] = {"text_length": 512, "text_taps": [9, 18, 27], "default_size": [1024, 1024],
                             "default_steps": 4, "default_guidance": 4.0, "trained_sizes": []}


def _embedded_root() -> Path:
    return Path(__file__).resolve().parent.parent / "data" / "embedded"


class ModelFolder:
    """A model on disk. Nothing but `model_index.json` is read until it is asked for."""

    def __init__(self, root: Path, name: str, transformer_dir: str = "transformer") -> None:
        self.root, self.name, self.transformer_dir = root, name, transformer_dir
        self.index = _with_settings(_read_json(root / "model_index.json"), root / transformer_dir / "config.json")
        self._settings: dict[str, Any] | None = None
        self._hash: str | None = None

    @classmethod
    def open(cls, name_or_path: str | os.PathLike[str]) -> ModelFolder:
        """Find a model: an embedded one by name, a folder by path, or one on the hub by alias or `org/name[@revision]`.

        A model that is in the local Hugging Face cache is opened without asking the network (`linocut pull` brings the
        newest); else its needed files are fetched (`formats.fetch`). HF_HOME and HF_HUB_OFFLINE are honoured. Raises
        ModelNotFoundError in one line that lists what is possible.
        """
        name = os.fspath(name_or_path)
        if name in EMBEDDED:
            root = _embedded_root()
            if not (root / "model_index.json").is_file() or not (root / EMBEDDED[name]).is_dir():
                raise ModelNotFoundError(f"model {name!r} is not part of this installation; {_possible()}")
            return cls(root, name, EMBEDDED[name])
        if not name:  # as a path it would be the current folder
            raise ModelNotFoundError(f"no model ''; {_possible()}")
        path = Path(name).expanduser()
        if path.is_dir():
            if not (path / "model_index.json").is_file():
                raise ModelNotFoundError(f"{name}: folder holds no model_index.json, so it is no model; {_possible()}")
            return cls(path, path.resolve().name)
        if path.is_file():
            raise ModelNotFoundError(f"{name}: this is a file, and a model is a folder with model_index.json; "
                                     f"{_possible()}")
        if (found := hub_id(name)) is not None:
            root = _from_hub(name)
            if not (root / "model_index.json").is_file():
                raise UsageError(f"{name}: " + (_foreign(name, "transformer", root)
                                                or "holds no model_index.json, so it is no model"))
            return cls(root, found[0] if found[1] == "main" else "@".join(found))
        raise ModelNotFoundError(f"no model {name!r}; {_possible()}")

    def path(self, component: str) -> Path:
        """Folder of a component ("transformer", "text_encoder", "tokenizer", "vae" or "scheduler")."""
        if component not in COMPONENTS:
            raise UsageError(f"unknown component {component!r} (expected one of {', '.join(COMPONENTS)})")
        path = self._folder(component)
        if component in ("transformer", "text_encoder") and not path.is_dir():
            foreign = _foreign(self.name, component, self.root)
            if foreign:
                raise UsageError(f"{self.name}: {foreign}")
        return path

    def _folder(self, component: str) -> Path:
        return self.root / (self.transformer_dir if component == "transformer" else component)

    def has(self, component: str) -> bool:
        """True if the folder of this component exists."""
        return component in COMPONENTS and self._folder(component).is_dir()

    def config(self, component: str) -> dict[str, Any]:
        """The component's JSON configuration (config.json; scheduler_config.json, tokenizer_config.json)."""
        return _read_json(self.path(component) / _CONFIG_FILES.get(component, "config.json"))

    def vocabulary(self) -> dict[str, Any] | None:
        """What a model with a small vocabulary says of it, or None (see `linocut.pipeline.vocabulary`)."""
        path = self.root / VOCABULARY_FILE
        return _read_json(path) if path.is_file() else None

    def checkpoint(self, component: str) -> Checkpoint:
        """The component's weights, opened by memory mapping."""
        return Checkpoint.open(self.path(component),
                               self.settings["text_taps"] if component == "text_encoder" else None)

    def timestep_table(self) -> TimestepTable | None:
        """The transformer's timestep table, or None if its config names none."""
        return TimestepTable.open(self.path("transformer") / TABLE_FILE) if self._has_table() else None

    def _has_table(self) -> bool:
        config = self.path("transformer") / "config.json"
        return config.is_file() and has_table(_read_json(config), config)

    def timestep_weights(self) -> Checkpoint | None:
        """The file with the transformer's layers that see the noise level alone.

        That is the transformer's own, or beside a timestep table an optional one; None if that was left out.
        """
        if not self._has_table():
            return self.checkpoint("transformer")
        file = self.path("transformer") / WEIGHTS_FILE
        return Checkpoint.open(file) if file.is_file() else None

    def weight_files(self) -> dict[str, Checkpoint]:
        """Every file of weights there is, by component; a timestep table and its weights count as components."""
        found = {part: self.checkpoint(part) for part in ("transformer", "text_encoder", "vae") if self.has(part)}
        table = self.timestep_table()
        if table is not None:
            found["timestep_table"] = table.checkpoint
            weights = self.timestep_weights()
            if weights is not None:
                found["timestep_weights"] = weights
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """How the model is used: text_length, text_taps (3 layers), default_size [w, h], default_steps,
        default_guidance (of one that is not distilled), trained_sizes ([w, h] each; none: it draws any), is_distilled.

        From the key "linocut" of model_index.json (or what diffusers keeps of it, see docs/format.md, 1.2), with
        FLUX.2-klein's values where it is silent; is_distilled is the index's own key (false if absent, as in
        FLUX.2-klein-base).
        """
        if self._settings is None:
            self._settings = read_settings(self.index, self.root / "model_index.json")
        return dict(self._settings)

    def hash(self) -> str:
        """Twelve hex digits that name the weights of all components.

        From the SHA-256s stored with them; for files of other programs from the headers and samples of each tensor.
        """
        if self._hash is None:
            digest = hashlib.sha256()
            for component, checkpoint in self.weight_files().items():
                with checkpoint:
                    if component != "timestep_weights":  # the same model with and without this optional file
                        digest.update(f"{component} {checkpoint.fingerprint()}\n".encode())
            self._hash = digest.hexdigest()[:12]
        return self._hash

    def __repr__(self) -> str:
        return f"ModelFolder({self.name!r}, root={str(self.root)!r})"


def _possible() -> str:
    return (f"possible are {', '.join((*EMBEDDED, *ALIASES))}, the path of a model folder, or a Hugging Face id like "
            "org/name")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise FormatError("file is too long", path=path, expected=f"at most {_MAX_CONFIG} bytes",
                              found=path.stat().st_size)
        value = strict_json(path.read_bytes(), path, "file")
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: no such file, so the model is incomplete") from None
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror or error}", path=path) from None
    if not isinstance(value, dict):
        raise FormatError("file has the wrong form", path=path, expected="a JSON object", found=type(value).__name__)
    return value


def _with_settings(index: dict[str, Any], transformer: Path) -> dict[str, Any]:
    """The index, with "linocut" from the transformer's quantization_config if it was written by another program."""
    if SETTINGS_KEY in index or not transformer.is_file():
        return index
    quantization = _read_json(transformer).get("quantization_config")
    settings = quantization.get("settings") if isinstance(quantization, dict) else None
    return index if settings is None else index | {SETTINGS_KEY: settings}


def read_settings(index: dict[str, Any], path: Path) -> dict[str, Any]:
    """`ModelFolder.settings` of the index in the file `path`. Raises FormatError."""
    own = index.get(SETTINGS_KEY, {})
    if not isinstance(own, dict):
        raise FormatError("key 'linocut' has the wrong form", path=path, expected="an object", found=type(own).__name__)
    settings = _DEFAULTS | own
    distilled = index.get("is_distilled", False)
    settings["is_distilled"] = distilled
    checks = {
        "text_length": ("an integer from 1 to 65536", lambda v: _integer(v, 1, 65536)),
        "text_taps": ("three rising layer numbers", lambda v: isinstance(v, list) and len(v) == 3
                      and all(_integer(x, 1, 1000) for x in v) and v[0] < v[1] < v[2]),
        "default_size": ("[width, height], multiples of 32", _is_size),
        "trained_sizes": ("a list of [width, height], multiples of 32",
                          lambda v: isinstance(v, list) and all(map(_is_size, v))),
        "default_steps": ("an integer from 1 to 1000", lambda v: _integer(v, 1, 1000)),
        "default_guidance": ("a number from 0 to 100",
                             lambda v: type(v) in (int, float) and 0 <= v <= 100),
        "is_distilled": ("true or false", lambda v: isinstance(v, bool)),
    }
    for key, (expected, holds) in checks.items():
        if not holds(settings[key]):
            raise FormatError(f"setting {key} has the wrong form", path=path, expected=expected, found=settings[key])
    return settings


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_integer(x, 32, 65536) and x % 32 == 0 for x in value)


def _integer(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def from_hub(name: str) -> Path | None:
    """Folder of a model in the hub's cache, after fetching what is missing; None if the name is not one of the hub's.

    A folder or file of that name comes first. The model may be in the form of another program.
    """
    if not name or name in EMBEDDED or Path(name).expanduser().exists() or hub_id(name) is None:
        return None
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    root = cached(name)
    if root is None:
        from linocut.formats.fetch import fetch

        try:
            root = fetch(name)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(f"no model {name!r}: {str(error).partition(': ')[2]}; {_possible()}") from error
    return root


def _foreign(name: str, component: str, root: Path) -> str:
    """What to do with a model in the form of another program; empty if it is in none."""
    place = place_of(component, file_names(root))
    return "" if place is None or place == component else (
        f"its {component} is in the form of another program ({place}), which only 'linocut convert' reads; make it "
        f"linocut's own with 'linocut convert {name} FOLDER --to linocut', and --lossy if that says so")
