"""What lies at a path: a model in any of the forms that linocut reads, recognized by what is in its files.

Folder names are only used to find the parts: `transformer/` and PrismML's `transformer-packed-mflux/` and
`transformer-gemlite-int1/`, `-int2/`, files ending in `.gguf`, and the same for the text encoder. What a part is, its
own tensors say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linocut.errors import FormatError, UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.folder import VOCABULARY_FILE, ModelFolder, from_hub, read_settings
from linocut.formats.gemlite import gemlite_weights, is_gemlite
from linocut.formats.gguf import GGUFFile
from linocut.formats.gguf_weights import gguf_weights
from linocut.formats.header import strict_json
from linocut.formats.layouts import CARRIED_SUFFIXES, LICENSES, PICKLES, file_names, place_of
from linocut.formats.mlx import is_mlx, mlx_weights, quantization
from linocut.formats.names import is_bfl
from linocut.formats.packed import GROUP_SIZE
from linocut.formats.renaming import from_bfl, from_llama, is_llama, to_bfl
from linocut.formats.unpacked import packed_again
from linocut.formats.weight import TensorFile, Weights, named, weights_of
from linocut.quantize.source import flux2_config, with_base_model

__all__ = ["Component", "Model", "open_component", "open_model"]

_CARRIED = ("tokenizer", "vae", "scheduler")
FILLERS = "linocut.fillers"  # metadata of GGUF files: a tensor that only other programs ask for
_FOREIGN_KEYS = ("quantization_config", "quantization", "timestep_table")


@dataclass
class Component:
    """One network: its weights under the names that linocut uses, its config, and the form they were found in.

    form: "linocut", "dense", "bfl", "unpacked", "gguf", "mlx", "gemlite" or "hqq". `verify` checks its
    files as far as they carry checksums, and that values are finite. `groups_per_scale` is 2 where the file says that
    neighbouring groups share their scales.
    """

    form: str
    weights: Weights
    config: dict[str, Any]
    files: list[Path]
    close: Callable[[], None]
    verify: Callable[[], object]
    groups_per_scale: int = 1

    @property
    def encodings(self) -> set[str]:
        """The encodings of its packed weights."""
        return {weight.kind for weight in self.weights.values() if weight.packed}


@dataclass
class Model:
    """A model of any form. `carried` maps places in a model folder to files that go there as they are."""

    path: Path
    transformer: Component
    text_encoder: Component | None
    index: dict[str, Any]
    settings: dict[str, Any]
    carried: dict[str, Path] = field(default_factory=dict)

    @property
    def components(self) -> dict[str, Component]:
        """The networks whose weights are converted."""
        found = {"transformer": self.transformer}
        return found if self.text_encoder is None else found | {"text_encoder": self.text_encoder}

    def files(self) -> list[Path]:
        """Every file that a conversion depends on."""
        own = [file for component in self.components.values() for file in component.files]
        return sorted({*own, *self.carried.values()})

    def close(self) -> None:
        """Let go of the files."""
        for component in self.components.values():
            component.close()


def open_model(src: str | Path, exact: bool = True) -> Model:
    """Open a model by path, by the name of an embedded one, or by alias or id on the hub.

    Without `exact`, scales that float16 does not hold are rounded when they are read. Raises ModelNotFoundError where
    there is no model, FormatError for a file that is not sound, UsageError for what no model is made of.
    """
    fetched = from_hub(str(src))
    if fetched is not None:
        model = open_model(fetched, exact)
        model.index = with_base_model(model.index, src)
        return model
    path = Path(src).expanduser()
    if path.is_file():
        return _from_transformer(path, open_component(path, exact), path.stem)
    if path.is_dir():
        place = _find(path, "transformer")
        if place is None:
            return _from_transformer(path, open_component(path, exact), path.name)
        if (path / "model_index.json").is_file():
            return _from_folder(ModelFolder.open(path), place, exact)
        return _from_parts(path, place, exact)
    folder = ModelFolder.open(src)
    return _from_folder(folder, folder.path("transformer"), exact)


def open_component(place: Path, exact: bool = True, transformer: bool = True, renamed: bool = True,
                   taps: Sequence[int] | None = None) -> Component:
    """Open the weights at `place`, a file or a folder, whatever their form. `taps` as in `Checkpoint.open`.

    Matrices of a `transformer` are looked at for being packed ones in dense form. With `renamed`, names are those that
    linocut uses, otherwise the file's.
    """
    file = _pickle(place) if place.is_dir() else place
    folder = place if place.is_dir() else place.parent
    config = _json(folder / "config.json")
    if not config and file is not None:
        config = _json(folder / place.stem / "config.json")
    if file is not None and file.suffix == ".gguf":
        return _from_gguf(file, config, exact, renamed)
    if file is not None and file.suffix == ".pt":
        return _from_pickle(file, config, exact)
    if file is not None and file.suffix != ".safetensors":
        raise UsageError(f"{file}: not a file of weights that is read here; choose .safetensors, .gguf, or one of "
                         f"{', '.join(PICKLES)}")
    checkpoint = Checkpoint.open(place, taps)
    try:
        form, weights = _from_safetensors(checkpoint, folder, config, exact, transformer, renamed)
    except BaseException:
        checkpoint.close()
        raise
    own = config.get("quantization_config")
    tied = form == "linocut" and isinstance(own, dict) and own.get("groups_per_scale") == 2
    return Component(form, named(checkpoint.path, weights), config, checkpoint.files, checkpoint.close,
                     checkpoint.verify, 1 + tied)


def _from_safetensors(checkpoint: Checkpoint, folder: Path, config: Mapping[str, Any], exact: bool,
                      transformer: bool, renamed: bool) -> tuple[str, Weights]:
    if checkpoint.packed:
        return "linocut", weights_of(checkpoint)
    if is_gemlite(checkpoint):
        return "gemlite", gemlite_weights(checkpoint, exact)
    if is_mlx(checkpoint):
        return "mlx", mlx_weights(checkpoint, quantization(_json(folder / "quantization_config.json"), config), exact)
    weights = weights_of(checkpoint)
    form = "dense"
    if is_bfl(checkpoint.names):
        form, weights = "bfl", from_bfl(weights)
    if transformer:
        weights = packed_again(weights, checkpoint.metadata, exact)
        if form == "dense" and any(weight.packed for weight in weights.values()):
            form = "unpacked"
    if form == "bfl" and not renamed:
        weights = to_bfl(weights)
    return form, weights


def _from_gguf(path: Path, config: dict[str, Any], exact: bool, renamed: bool) -> Component:
    file = GGUFFile(path)
    try:
        weights = named(path, gguf_weights(file, exact))
        if renamed:
            weights.pop(str(file.metadata.get(FILLERS)), None)
        if renamed and is_llama(list(weights)):
            weights = from_llama(weights)
        elif renamed and is_bfl(file.tensors):
            weights = from_bfl(weights)
    except BaseException:
        file.close()
        raise
    ternary = {tensor.kind.weights for tensor in file.tensors.values() if tensor.kind.encoding == "ternary"}
    return Component("gguf", weights, config, [path], file.close, file.verify, 1 + (ternary == {2 * GROUP_SIZE}))


def _from_pickle(path: Path, config: dict[str, Any], exact: bool) -> Component:
    from linocut.integrations.pickles import hqq_weights, state_dict

    if path.name not in PICKLES:
        raise UsageError(f"{path}: pickles are not opened, since they could run code; only {' and '.join(PICKLES)} of "
                         "published models are, by a loader that makes nothing but tensors")
    if path.name == "qmodel.pt":
        return Component("hqq", named(path, hqq_weights(path)), config, [path], _nothing, _nothing)
    tensors: TensorFile = state_dict(path)
    if not is_gemlite(tensors):
        raise FormatError("holds no gemlite pack", path=path, expected="tensors named ....W_q", found="none")
    return Component("gemlite", named(path, gemlite_weights(tensors, exact)), config, [path], _nothing, _nothing)


def _nothing() -> None:
    """Tensors of a pickle go with the last reference."""


def _pickle(folder: Path) -> Path | None:
    """The known pickle in a folder without safetensors, if any."""
    if any(folder.glob("*.safetensors")):
        return None
    return next((folder / name for name in PICKLES if (folder / name).is_file()), None)


def _find(root: Path, part: str) -> Path | None:
    """Where the weights of a part lie: a GGUF file, a file or a folder that holds some."""
    place = place_of(part, file_names(root))
    return None if place is None else root / place


def _from_transformer(path: Path, transformer: Component, name: str) -> Model:
    _complete_config(transformer)
    # Distilled and base models have the same shapes; only the published name tells them apart.
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": "base" not in name.lower(),
             "transformer": ["diffusers", transformer.config.get("_class_name", "Flux2Transformer2DModel")]}
    return Model(path, transformer, None, index, read_settings(index, path))


def _from_folder(folder: ModelFolder, place: Path, exact: bool) -> Model:
    transformer = open_component(place, exact)
    timestep = folder.timestep_weights() if transformer.form == "linocut" and folder.timestep_table() else None
    if timestep is not None:  # the layers beside a timestep table; the table itself stays behind
        transformer.weights = transformer.weights | weights_of(timestep)
        transformer.files = [*transformer.files, *timestep.files]
    elif "time_guidance_embed.timestep_embedder.linear_1" not in {
            name.removesuffix(".weight") for name in transformer.weights}:
        raise UsageError(f"{folder.root}: the layers that see the noise level are missing; get "
                         "transformer/timestep_weights.safetensors, too")
    return _with_parts(folder.root, transformer, dict(folder.index), folder.settings, exact)


def _from_parts(root: Path, place: Path, exact: bool) -> Model:
    """A folder without model_index.json, as gemlite's published ones are."""
    transformer = open_component(place, exact)
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": "base" not in root.name.lower()}
    return _with_parts(root, transformer, index, read_settings(index, root), exact)


def _with_parts(root: Path, transformer: Component, index: dict[str, Any], settings: dict[str, Any],
                exact: bool) -> Model:
    _complete_config(transformer)
    model = Model(root, transformer, None, index, settings)
    place = _find(root, "text_encoder")
    if place is not None:
        model.text_encoder = open_component(place, exact, transformer=False, taps=settings["text_taps"])
        if model.text_encoder.form not in ("linocut", "dense"):
            model.text_encoder.weights = {name.removeprefix("model."): weight for name, weight
                                          in model.text_encoder.weights.items() if not name.startswith("lm_head")}
    inner = place / "tokenizer" if place is not None and place.is_dir() else None
    for part in _CARRIED:
        folder = inner if part == "tokenizer" and not (root / part).is_dir() and inner is not None else root / part
        if folder.is_dir():
            model.carried |= {f"{part}/{file.name}": file for file in sorted(folder.iterdir())
                              if file.is_file() and file.suffix in CARRIED_SUFFIXES}
    for pattern in (*LICENSES, VOCABULARY_FILE):
        model.carried |= {file.name: file for file in sorted(root.glob(pattern)) if file.is_file()}
    return model


def _complete_config(transformer: Component) -> None:
    """Give a transformer its config: without keys of other forms, from the shapes where the file says nothing."""
    config = {key: value for key, value in transformer.config.items() if key not in _FOREIGN_KEYS}
    if "num_layers" not in config:
        shapes = {f"{name}.weight" if weight.packed else name: weight.shape
                  for name, weight in transformer.weights.items()}
        config = flux2_config(shapes) or config
    if "num_layers" not in config:
        raise UsageError(f"{transformer.files[0]}: holds no FLUX.2 transformer")
    transformer.config = config


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = strict_json(path.read_bytes(), path, "file")
    if not isinstance(value, dict):
        raise FormatError("file has the wrong form", path=path, expected="a JSON object", found=type(value).__name__)
    return value

