"""The folders that a conversion writes, one per program: which files, what each weight becomes, which configs go along.

    linocut     transformer/, text_encoder/                        our own
    diffusers   transformer/, text_encoder/                        dense, "unpacked"
    bfl         transformer.safetensors                            dense, original names
    gguf        transformer.gguf, text_encoder.gguf                for stable-diffusion.cpp
    mlx         transformer-packed-mflux/, text_encoder-mlx-4bit/  as Bonsai's for Apple machines
    gemlite     transformer-gemlite-int1/ or -int2/                as Bonsai's for NVIDIA GPUs, but safetensors

Everything else (tokenizer, autoencoder, scheduler, licences) goes along as it is, and `model_index.json` and the
networks' configs are always there, so that the way back gives a whole model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from linocut.errors import FormatError, UsageError
from linocut.formats import unpacked
from linocut.formats.checkpoint import CheckpointWriter
from linocut.formats.gemlite import gemlite_output
from linocut.formats.gguf import GGUFPlan
from linocut.formats.gguf_weights import gguf_output
from linocut.formats.mlx import mlx_output, mlx_quantization
from linocut.formats.renaming import to_bfl, to_llama
from linocut.formats.unpacked import unpacked_output
from linocut.formats.weight import Output, Weight, Weights, native_output
from linocut.formats.writer import TensorWriter
from linocut.integrations.recognize import FILLERS, Component, Model
from linocut.quantize.policy import FLUX2_PRESETS, Policy, Rule
from linocut.quantize.stream import quantization_config

__all__ = ["TARGETS", "Job", "Layout", "Options", "layout_for"]

TARGETS = ("linocut", "diffusers", "bfl", "gguf", "mlx", "gemlite")
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_FORMAT = {"format": "pt"}
_FILLER = "output_norm.weight"
_QWEN_LAYER = re.compile(r"layers\.(\d+)\.")
_CLASSES = {"transformer": ["diffusers", "Flux2Transformer2DModel"], "vae": ["diffusers", "AutoencoderKLFlux2"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "Qwen2TokenizerFast"]}


@dataclass(frozen=True)
class Options:
    """Choices among what GGUF files can hold: the type of ternary weights and that of dense tensors."""

    ternary: str = "Q2_0"
    dense: str = "keep"


@dataclass
class Job:
    """One file of weights. `renamed` are the weights under the file's names, `outputs` says what each becomes."""

    component: str
    file: str
    renamed: Weights
    outputs: dict[str, Output]
    writer: Callable[[Path], TensorWriter]

    @property
    def nbytes(self) -> int:
        """Bytes of the file, about: its tensors without the header."""
        return sum(weight.count * 4 if weight.kind == "F32" else weight.count * 2 for weight in self.renamed.values())


@dataclass
class Layout:
    """A folder to be written: files of weights, small texts, and files that go along as they are."""

    jobs: list[Job] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    carried: dict[str, Path] = field(default_factory=dict)

    @property
    def losses(self) -> list[str]:
        """What the files cannot hold, once each."""
        return list(dict.fromkeys(out.loss for job in self.jobs for out in job.outputs.values() if out.loss))

    @property
    def notes(self) -> list[str]:
        """What changes its form without loss of values, once each."""
        return list(dict.fromkeys(out.note for job in self.jobs for out in job.outputs.values() if out.note))


def layout_for(model: Model, to: str, options: Options) -> Layout:
    """What converting `model` to the form `to` writes. Raises UsageError for what that form cannot be."""
    if to not in TARGETS:
        raise UsageError(f"unknown form {to!r}; choose from {', '.join(TARGETS)}")
    if to in ("linocut", "mlx", "gemlite") and not model.transformer.encodings & {"binary", "ternary"}:
        raise UsageError(f"{model.path}: its transformer has no binary or ternary weights; make some with "
                         "'linocut quantize'")
    layout = Layout(carried=dict(model.carried))
    _BUILDERS[to](model, layout, options)
    layout.texts["model_index.json"] = _dumps(_index(model) if to == "diffusers" else model.index)
    return layout


# --- the forms -------------------------------------------------------------------------------------------------------

def _linocut(model: Model, layout: Layout, _: Options) -> None:
    _native(layout, "transformer", _WEIGHTS, model.transformer)
    encoder = model.text_encoder
    if encoder is None or _carry(layout, encoder, ("linocut", "dense")):
        return
    _native(layout, "text_encoder", "model.safetensors", encoder)


def _native(layout: Layout, component: str, file: str, source: Component) -> None:
    weights = source.weights
    entries = {name: (weight.kind, weight.matrix) for name, weight in weights.items() if weight.packed}
    _safetensors(layout, component, f"{component}/{file}", weights, native_output, {}, entries)
    own = quantization_config(_policy(component, weights), source.groups_per_scale) if entries else {}
    layout.texts[f"{component}/config.json"] = _dumps(_plain(source.config) | (
        {"quantization_config": own} if own else {}))


def _diffusers(model: Model, layout: Layout, _: Options) -> None:
    _dense(layout, f"transformer/{_WEIGHTS}", model.transformer.weights)
    layout.texts["transformer/config.json"] = _dumps(_plain(model.transformer.config))
    encoder = model.text_encoder
    if encoder is None or _carry(layout, encoder, ("dense",)):
        return
    weights, layers = _whole_encoder(encoder.weights)
    _safetensors(layout, "text_encoder", "text_encoder/model.safetensors", weights, unpacked_output, {})
    config = _plain(encoder.config) | {"num_hidden_layers": layers, "architectures": ["Qwen3ForCausalLM"],
                                       "model_type": "qwen3", "tie_word_embeddings": True}
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = (config["layer_types"] + ["full_attention"] * layers)[:layers]
    layout.texts["text_encoder/config.json"] = _dumps(config)


def _dense(layout: Layout, file: str, weights: Weights) -> None:
    _safetensors(layout, "transformer", file, weights, unpacked_output, unpacked.metadata(weights))


def _bfl(model: Model, layout: Layout, _: Options) -> None:
    weights = model.transformer.weights
    renamed = to_bfl(weights)
    # The file is read under diffusers' names again, so that is how its metadata calls the modules.
    _safetensors(layout, "transformer", "transformer.safetensors", renamed, unpacked_output, unpacked.metadata(weights))
    layout.texts["transformer/config.json"] = _dumps(_plain(model.transformer.config))
    _carry_or_native(model, layout)


def _gguf(model: Model, layout: Layout, options: Options) -> None:
    parts = {"transformer": (model.transformer, to_bfl, "flux")}
    if model.text_encoder is not None:
        parts["text_encoder"] = (model.text_encoder, to_llama, "qwen3")
    for component, (source, rename, architecture) in parts.items():
        renamed = rename(source.weights)
        facts = {"general.architecture": architecture, "general.quantization_version": 2,
                 "general.name": f"{model.path.name} {component}"}
        if component == "text_encoder" and _FILLER not in renamed:
            # Cut off before its end, an encoder has no final norm. Programs ask for one all the same; FLUX.2's outputs
            # lie before it.
            first = renamed.get("blk.0.attn_norm.weight")
            if first is None:
                raise FormatError("the text encoder has no first norm", path=model.path,
                                  expected="layers.0.input_layernorm.weight", found=f"{len(renamed)} other tensors")
            renamed[_FILLER] = _constant(first.shape, 1.0)
            facts[FILLERS] = _FILLER
        outputs = {name: gguf_output(name, weight, options.ternary, options.dense)
                   for name, weight in renamed.items()}
        layout.jobs.append(Job(component, f"{component}.gguf", renamed, outputs, _gguf_writer(outputs, facts)))
        layout.texts[f"{component}/config.json"] = _dumps(_plain(source.config))


def _gguf_writer(outputs: dict[str, Output], facts: Mapping[str, Any]) -> Callable[[Path], TensorWriter]:
    parts = [part for output in outputs.values() for part in output.parts]
    return lambda path: TensorWriter(path, GGUFPlan(parts, facts), resume=True)


def _mlx(model: Model, layout: Layout, _: Options) -> None:
    folder = "transformer-packed-mflux"
    weights = model.transformer.weights
    _safetensors(layout, "transformer", f"{folder}/{_WEIGHTS}", weights, mlx_output, {})
    facts = mlx_quantization(weights)
    layout.texts[f"{folder}/config.json"] = _dumps(_plain(model.transformer.config))
    layout.texts[f"{folder}/quantization_config.json"] = _dumps(facts)
    encoder = model.text_encoder
    if encoder is None or _carry(layout, encoder, ("dense",)):
        return
    folder = "text_encoder-mlx-4bit"
    _safetensors(layout, "text_encoder", f"{folder}/model.safetensors", encoder.weights, mlx_output, {})
    quantized = {"quantization": mlx_quantization(encoder.weights)} if encoder.encodings else {}
    layout.texts[f"{folder}/config.json"] = _dumps(_plain(encoder.config) | quantized)


def _gemlite(model: Model, layout: Layout, _: Options) -> None:
    weights = model.transformer.weights
    encodings = model.transformer.encodings & {"binary", "ternary"}
    if len(encodings) != 1:
        raise UsageError(f"{model.path}: gemlite's folders are for binary or for ternary weights, and this model has "
                         "both")
    bits = 1 if encodings == {"binary"} else 2
    folder = f"transformer-gemlite-int{bits}"
    _safetensors(layout, "transformer", f"{folder}/{_WEIGHTS}", weights, gemlite_output, {})
    packed = sorted(name for name, weight in weights.items() if weight.kind in encodings)
    layout.texts[f"{folder}/config.json"] = _dumps(_plain(model.transformer.config))
    layout.texts[f"{folder}/quantization_config.json"] = _dumps({
        "format": "gemlite-int1-g128" if bits == 1 else "gemlite-int2-ternary-g128", "bits": bits, "group_size": 128,
        "packing_bitwidth": 8, "quantized_fqns": packed, "quantized_count": len(packed)})
    _carry_or_native(model, layout)


_BUILDERS: dict[str, Callable[[Model, Layout, Options], None]] = {
    "linocut": _linocut, "diffusers": _diffusers, "bfl": _bfl, "gguf": _gguf, "mlx": _mlx, "gemlite": _gemlite}


# --- what they share -------------------------------------------------------------------------------------------------

def _safetensors(layout: Layout, component: str, file: str, weights: Weights,
                 rule: Callable[[str, Weight], Output], metadata: Mapping[str, str],
                 packed: Mapping[str, tuple[str, tuple[int, int]]] | None = None) -> None:
    outputs = {name: rule(name, weight) for name, weight in weights.items()}
    parts = [part for name, output in outputs.items() for part in output.parts if not packed or name not in packed]
    layout.jobs.append(Job(component, file, weights, outputs, lambda path: CheckpointWriter(
        path, parts, _FORMAT | dict(metadata), packed, resume=True)))


def _carry(layout: Layout, component: Component, forms: tuple[str, ...]) -> bool:
    """Let a text encoder go along as it is, if it is of one of these forms; True if it was."""
    if component.form not in forms:
        return False
    folder = component.files[0].parent
    layout.carried |= {f"text_encoder/{file.name}": file for file in sorted(folder.iterdir())
                       if file.is_file() and file.suffix in (".safetensors", ".json", ".txt", ".jinja")}
    return True


def _carry_or_native(model: Model, layout: Layout) -> None:
    """A form without a text encoder of its own: it goes along, or as ours where it was of another program's."""
    if model.text_encoder is not None and not _carry(layout, model.text_encoder, ("linocut", "dense")):
        _native(layout, "text_encoder", "model.safetensors", model.text_encoder)


def _whole_encoder(weights: Weights) -> tuple[Weights, int]:
    """A text encoder that was cut after its last used layer, with one more layer that changes nothing.

    transformers applies the final norm to what leaves the last layer, and FLUX.2 wants it without.
    """
    layers = 1 + max(int(found[1]) for found in map(_QWEN_LAYER.match, weights) if found)
    if "norm.weight" in weights:
        return weights, layers
    added = dict(weights)
    for name, weight in weights.items():
        found = _QWEN_LAYER.match(name)
        if found and int(found[1]) == layers - 1:
            rest = name[found.end():]
            added[f"layers.{layers}.{rest}" + (".weight" if weight.packed else "")] = _constant(
                weight.shape, 1.0 if len(weight.shape) == 1 else 0.0)
    embedding = next(weight for name, weight in weights.items() if name.startswith("embed_tokens"))
    added["norm.weight"] = _constant(embedding.shape[1:], 1.0)
    return added, layers + 1


def _constant(shape: tuple[int, ...], value: float) -> Weight:
    return Weight("F16", shape, lambda first, last: np.full((last - first, *shape[1:]), value, dtype=np.float16),
                  lambda: None)


def _policy(component: str, weights: Weights) -> Policy:
    """Which layer has which encoding, as a policy: a preset where one says the same, else every layer by name."""
    shapes = {name.removesuffix(".weight"): weight.shape for name, weight in weights.items()
              if weight.packed or name.endswith(".weight")}
    kinds = {name: weight.kind for name, weight in weights.items() if weight.packed}
    names = ("qwen3",) if component == "text_encoder" else FLUX2_PRESETS
    for preset in names:
        for encoding in sorted(set(kinds.values())):
            policy = Policy.preset(preset, encoding)
            decided = {name: kind for name, (kind, _) in ((name, policy.decide(name, shape))
                                                          for name, shape in shapes.items()) if kind != "dense"}
            if decided == kinds:
                return policy
    return Policy(tuple(Rule(re.escape(name), kind) for name, kind in kinds.items()), "converted")


def _index(model: Model) -> dict[str, Any]:
    """model_index.json with the classes that diffusers looks for."""
    parts = {"transformer"} | {place.split("/")[0] for place in model.carried}
    parts |= {"text_encoder"} if model.text_encoder is not None else set()
    classes = {part: names for part, names in _CLASSES.items() if part in parts}
    index = {"_class_name": "Flux2KleinPipeline", "_diffusers_version": "0.37.0"} | classes | model.index
    return index | {"_class_name": "Flux2KleinPipeline"}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items()
            if key not in ("quantization_config", "quantization", "timestep_table")}


def _dumps(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"
