"""What there is to quantize: a model folder, a transformer folder or one transformer file, checked before any work.

Whatever the naming of the source, its tensors are presented under diffusers' names (`formats.names`), and those of the
text encoder under Qwen3Model's; so the output does not depend on the form of the input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linocut.errors import FormatError, UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.folder import ModelFolder, read_settings
from linocut.formats.header import strict_json
from linocut.formats.hub import hub_id
from linocut.formats.layouts import CARRIED_SUFFIXES, LICENSES
from linocut.formats.names import BFLCheckpoint, open_flux2

Reader = Checkpoint | BFLCheckpoint

_CARRIED = ("text_encoder", "tokenizer", "vae", "scheduler")
_QWEN_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass
class Source:
    """An opened source. `settings` are those of a `ModelFolder`; `carried` maps places in the output to files that go
    there unchanged."""

    path: Path
    transformer: Reader
    transformer_config: dict[str, Any]
    index: dict[str, Any]
    settings: dict[str, Any]
    text_encoder: Checkpoint | None = None
    text_encoder_config: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, Path] = field(default_factory=dict)

    def files(self) -> list[Path]:
        """Every file that the output depends on."""
        readers = [reader for reader in (self.transformer, self.text_encoder) if reader is not None]
        checkpoints = [reader.source if isinstance(reader, BFLCheckpoint) else reader for reader in readers]
        return sorted({*self.carried.values(), *(file for one in checkpoints for file in one.files)})

    def close(self) -> None:
        """Let go of the mapped files."""
        self.transformer.close()
        if self.text_encoder is not None:
            self.text_encoder.close()


def open_source(src: str | Path, pack_text_encoder: bool) -> Source:
    """Open a source by path or hub id. Raises UsageError for a packed one, FormatError for an unsound one."""
    path = Path(src).expanduser()
    if path.is_file():
        source = _from_transformer(path, path.parent)
    elif path.is_dir() and not (path / "model_index.json").is_file():
        source = _from_transformer(path, path)
    else:
        source = _from_folder(src, pack_text_encoder)
    packed = len(source.transformer.packed)
    if packed or "quantization_config" in source.transformer_config:
        what = f"{packed} packed weights" if packed else "a quantization_config"
        raise UsageError(f"{src}: already quantized (its transformer has {what}); quantize the dense original")
    return source


def _from_transformer(path: Path, folder: Path) -> Source:
    if path.is_file() and path.suffix != ".safetensors":
        raise UsageError(f"{path}: not a .safetensors file; pickles (.bin, .pt, .ckpt) are never opened, since they "
                         "could run code")
    reader = open_flux2(path)
    config = _json_or_empty(folder / "config.json")
    if not config or "num_layers" not in config:
        config = flux2_config({name: reader.info(name).shape for name in reader.names}) or config
    # Distilled and base models have the same shapes; only the published name tells them apart.
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": "base" not in path.stem.lower(),
             "transformer": ["diffusers", config.get("_class_name", "Flux2Transformer2DModel")]}
    return Source(path, reader, config, index, read_settings(index, path))


def _from_folder(src: str | Path, pack_text_encoder: bool) -> Source:
    folder = ModelFolder.open(src)
    source = Source(folder.root, open_flux2(folder.path("transformer")), folder.config("transformer"),
                    with_base_model(folder.index, src), folder.settings)
    carried = [component for component in _CARRIED if folder.has(component)]
    if pack_text_encoder and folder.has("text_encoder"):
        text_encoder = folder.checkpoint("text_encoder")
        if text_encoder.packed:
            text_encoder.close()  # packed already: goes along as it is
        else:
            source.text_encoder = text_encoder
            source.text_encoder_config = folder.config("text_encoder")
    for component in carried:
        for file in sorted(folder.path(component).iterdir()):
            weights = file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")
            if component == "text_encoder" and source.text_encoder is not None and (
                    weights or file.name == "config.json"):
                continue
            if file.is_file() and file.suffix in CARRIED_SUFFIXES:
                source.carried[f"{component}/{file.name}"] = file
    for pattern in LICENSES:
        source.carried |= {file.name: file for file in sorted(folder.root.glob(pattern)) if file.is_file()}
    return source


def with_base_model(index: Mapping[str, Any], src: str | Path) -> dict[str, Any]:
    """The index of what is made from the model `src`: it names that one, if it is one of the hub's."""
    found = hub_id(str(src))
    own = index.get("linocut")
    if found is None or Path(src).expanduser().exists():
        return dict(index)
    return {**index, "linocut": {**(own if isinstance(own, dict) else {}), "base_model": found[0]}}


def _json_or_empty(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = strict_json(path.read_bytes(), path, "file")
    if not isinstance(value, dict):
        raise FormatError("file has the wrong form", path=path, expected="a JSON object", found=type(value).__name__)
    return value


def flux2_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The diffusers config of a FLUX.2 transformer, read off its shapes; empty if this is something else."""
    def blocks(prefix: str) -> int:
        return len({name.split(".")[1] for name in shapes if name.startswith(prefix + ".")})

    needed = ("x_embedder.weight", "context_embedder.weight", "proj_out.weight",
              "time_guidance_embed.timestep_embedder.linear_1.weight")
    head = next((shape[0] for name, shape in shapes.items() if name.endswith(".attn.norm_q.weight") and shape), 0)
    if any(len(shapes.get(name, ())) != 2 for name in needed) or not head or head % 8:
        return {}
    width, channels = shapes["x_embedder.weight"]
    # A model of single blocks only has no MLP of its own: to_out takes [attention | MLP].
    inputs = {suffix: shape[1] for name, shape in shapes.items() for suffix in (".ff.linear_out.weight",
              ".attn.to_out.weight") if name.endswith(suffix) and len(shape) == 2}
    if not inputs or not width:
        return {}
    hidden = inputs.get(".ff.linear_out.weight", inputs.get(".attn.to_out.weight", 0) - width)
    velocity = shapes["proj_out.weight"][0]
    return {
        "_class_name": "Flux2Transformer2DModel", "patch_size": 1, "in_channels": channels,
        "out_channels": None if velocity == channels else velocity, "num_layers": blocks("transformer_blocks"),
        "num_single_layers": blocks("single_transformer_blocks"), "attention_head_dim": head,
        "num_attention_heads": width // head, "joint_attention_dim": shapes["context_embedder.weight"][1],
        "timestep_guidance_channels": shapes[needed[3]][1], "mlp_ratio": hidden / width,
        "axes_dims_rope": [head // 4] * 4, "rope_theta": 2000, "eps": 1e-6,
        "guidance_embeds": any(".guidance_embedder." in name for name in shapes),
    }


def text_encoder_names(names: list[str], taps: tuple[int, ...]) -> dict[str, str]:
    """{name in the output: name in the source} of what a text encoder needs to give the states of layers `taps`.

    Layers after the last tap and the head are left out; the final norm counts only if the last layer is a tap.
    """
    kept, last = {}, 0
    for name in names:
        target = name.removeprefix("model.")
        found = _QWEN_LAYER.match(target)
        last = max(last, int(found[1]) + 1 if found else 0)
        if not target.startswith("lm_head.") and not (found and int(found[1]) >= max(taps)):
            kept[target] = name
    if last < max(taps):
        raise FormatError("text encoder has too few layers", expected=f"{max(taps)} (text_taps)", found=last)
    if last > max(taps):
        kept.pop("norm.weight", None)
    return kept
