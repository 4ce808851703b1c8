"""What diffusers and transformers share when they run linocut's weights: the config, the files, and saving.

Both libraries build their own network, let a quantizer put packed layers into it, and hand it the tensors. The files
are opened a second time here, as linocut opens them: with every check of the format, and mapped, so that a packed
weight on the CPU is a view of its file and nothing casts or copies it.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linocut.errors import FormatError, LinocutError, UsageError
from linocut.formats.checkpoint import Checkpoint, PackedEntry, atomic_write_bytes, write_checkpoint
from linocut.formats.header import FORMAT_VERSION
from linocut.formats.packed import GROUP_SIZE
from linocut.models.convert import packed_state, place_packed, tensor_from
from linocut.models.linear import PackedEmbedding, PackedLinear
from linocut.quantize.policy import PRESETS, Policy
from linocut.quantize.stream import quantization_config

METHOD = "linocut"
_OWN_METADATA = ("linocut", "sha256")


class UnsupportedLibraryError(LinocutError, ImportError):
    """A library is missing, or of a version that this plug-in does not know."""


class Method(str, Enum):  # noqa: UP042  (the libraries ask for `.value` and compare with plain text)
    """The name under which both libraries know these weights."""

    LINOCUT = METHOD


def required(library: str, module: str, *names: str, versions: str) -> list[Any]:
    """The objects `names` of `library`'s `module`. Raises UnsupportedLibraryError that says what is there instead."""
    try:
        found = importlib.import_module(library)
        version = getattr(found, "__version__", "unknown")
    except ImportError as error:
        raise UnsupportedLibraryError(f"{library} cannot be imported ({error}); pip install '{library}{versions}'"
                                      ) from error
    try:
        holder = importlib.import_module(module)
        return [getattr(holder, name) for name in names]
    except (ImportError, AttributeError) as error:
        raise UnsupportedLibraryError(
            f"this version of {library} is not supported (expected {library}{versions} with {', '.join(names)} in "
            f"{module}, found {library} {version}: {error}); pip install '{library}{versions}'") from error


def require_accelerate() -> None:
    """Raise UnsupportedLibraryError if accelerate is missing: diffusers loads quantized models by it alone."""
    if importlib.util.find_spec("accelerate") is None:
        raise UnsupportedLibraryError("diffusers needs the package accelerate to load quantized models, and it is not "
                                      "installed; pip install accelerate")


# --- the config ------------------------------------------------------------------------------------------------------

class ConfigBase:
    """`quantization_config` of a packed network, and what to make of a dense one.

    Args:
        encoding: "ternary" or "binary" for a transformer, "affine4" for a text encoder.
        policy: which layer gets which encoding: a `Policy`, the name of a preset, or its form as plain data; default:
            the preset of FLUX.2, or of Qwen3 for "affine4". That of a packed model only tells how it was made: which
            layers are packed, its file says.
        settings: how the model is used (key "linocut" of model_index.json), kept here when diffusers saves it.
    """

    def __init__(self, encoding: str | None = None, policy: Policy | str | Mapping[str, Any] | None = None,
                 settings: Mapping[str, Any] | None = None) -> None:
        self.quant_method = Method.LINOCUT
        self.entry = quantization_config(_policy(encoding, policy))
        if settings is not None:
            self.settings = settings

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the entry of a config.json, which is kept as it is, or from the arguments of this class.

        Raises FormatError for a version that is not known here.
        """
        for key, known in (("format_version", FORMAT_VERSION), ("group_size", GROUP_SIZE)):
            if config_dict.get(key, known) != known:
                raise FormatError(f"quantization_config: unknown {key}", expected=known, found=config_dict[key],
                                  advice="update linocut")
        if "encoding" in config_dict:
            config = cls(config_dict["encoding"], config_dict.get("policy"), config_dict.get("settings"))
        else:
            config = cls.__new__(cls)
            config.quant_method, config.entry = Method.LINOCUT, dict(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    @property
    def policy(self) -> Policy:
        """Which layer gets which encoding. Raises PolicyError if the entry of a config.json says nothing of use."""
        return Policy.from_dict(self.entry.get("policy", {}))

    @property
    def settings(self) -> dict[str, Any] | None:
        """How the model is used."""
        found = self.entry.get("settings")
        return dict(found) if isinstance(found, Mapping) else None

    @settings.setter
    def settings(self, settings: Mapping[str, Any]) -> None:
        self.entry["settings"] = dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """The entry of a config.json."""
        return copy.deepcopy(self.entry) | {"quant_method": METHOD}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: nothing is left out."""
        return self.to_dict()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigBase) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"LinocutConfig({self.entry})"


def _policy(encoding: str | None, policy: Policy | str | Mapping[str, Any] | None) -> Policy:
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Mapping):
        return Policy.from_dict(policy, encoding)
    if encoding is None:
        raise UsageError("LinocutConfig needs an encoding ('ternary', 'binary', 'affine4') or a whole policy")
    if policy is not None and policy not in PRESETS:
        raise UsageError(f"unknown policy preset {policy!r}; choose from {', '.join(PRESETS)}, or pass "
                         "linocut.quantize.policy.Policy.from_file(...)")
    return Policy.preset(policy or ("qwen3" if encoding == "affine4" else "flux2"), encoding)


# --- the files -------------------------------------------------------------------------------------------------------

class PackedFiles:
    """The files of one packed network, opened and checked.

    `packed` are the packed weights by module, `names` all tensors, as the files call them; `metadata` is what the files
    say beside linocut's own keys. Raises FormatError for a file that is not sound or not of linocut's format.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.place = Path(files[0]).parent
        self.packed: dict[str, PackedEntry] = {}
        self.metadata: dict[str, str] = {}
        self._where: dict[str, Checkpoint] = {}
        for file in files:
            self.add(Path(file))
        if not self.packed:
            raise FormatError("config.json calls these weights linocut's, and the file has none", path=files[0],
                              expected="packed weights", found="dense tensors",
                              advice="remove quantization_config from config.json, or get the packed file")

    def add(self, file: Path) -> list[str]:
        """Open one more file; returns the names of its tensors."""
        checkpoint = Checkpoint.open(file)
        self.packed |= checkpoint.packed
        self.metadata |= {key: value for key, value in checkpoint.metadata.items() if key not in _OWN_METADATA}
        self._where |= dict.fromkeys(checkpoint.names, checkpoint)
        return checkpoint.names

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def tensor(self, name: str) -> Tensor:
        """A view of a tensor in its file, in its stored dtype."""
        return tensor_from(self._where[name], name)

    def place_layers(self, network: nn.Module, dtype: torch.dtype) -> None:
        """Put packed layers into `network`, without values yet; embeddings will give rows of `dtype`."""
        place_packed(network, self.packed, dtype, self.renamed)

    def fill(self, network: nn.Module) -> None:
        """Give the packed layers of `network` that lie on the CPU their weights, as views of the files.

        Those on other devices keep the bytes that the library copied there, but for scales that it cast.
        """
        for module in self.packed:
            layer = network.get_submodule(self.renamed(module))
            assert isinstance(layer, PackedLinear | PackedEmbedding)
            for suffix in ("codes", "scales", "zeros"):
                buffer = getattr(layer, suffix)
                if buffer is None:
                    continue
                stored = self.tensor(f"{module}.{suffix}")
                if buffer.device.type in ("cpu", "meta"):
                    setattr(layer, suffix, stored)
                elif buffer.dtype != stored.dtype:
                    setattr(layer, suffix, stored.to(buffer.device))

    def renamed(self, name: str) -> str:
        """The name that a tensor or module has in the network: text encoders of transformers begin with "model."."""
        return name.removeprefix("model.")


def check_complete(network: nn.Module, names: set[str], place: Path, advice: str = "get the whole model") -> None:
    """Raise FormatError if a tensor of `network` is not among `names`; libraries would make up its values."""
    missing = sorted(set(network.state_dict()) - names)
    if missing:
        raise FormatError(f"tensor is missing ({len(missing)} in all)", path=place, tensor=missing[0],
                          expected="a tensor of this network", found="nothing", advice=advice)


# --- saving ----------------------------------------------------------------------------------------------------------

def save_as_linocut(network: nn.Module, folder: str | Path, file: str, config: Callable[[], Mapping[str, Any] | str],
                    metadata: Mapping[str, str], options: Mapping[str, Any]) -> None:
    """Write `network` and its config to `folder` in linocut's format, one file, which replaces an older one at the end.

    `options` are those of the libraries' `save_pretrained`; what cannot be is refused before anything is written.
    """
    if options.get("safe_serialization") is False:
        raise UsageError("linocut's weights are never pickles; leave out safe_serialization=False")
    if options.get("variant") is not None:
        raise UsageError(f"linocut's files have no variants (found variant={options['variant']!r}); choose another "
                         "folder")
    if options.get("push_to_hub"):
        raise UsageError("push_to_hub=True is not possible here; save first, then call push_to_hub() or use "
                         "'hf upload'")
    target = Path(folder)
    if target.is_file():
        raise UsageError(f"{target}: is a file, and a model is saved to a folder")
    target.mkdir(parents=True, exist_ok=True)
    write_checkpoint(target / file, packed_state(network), {"format": "pt"} | dict(metadata))
    text = config()
    atomic_write_bytes(target / "config.json",
                       (text if isinstance(text, str) else json.dumps(text, indent=2) + "\n").encode())
