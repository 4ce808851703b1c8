"""Stage `export`: trained students become a model folder that the pipeline opens, both encodings side by side.

The folder shares text encoder, tokenizer and VAE; `transformer/` is the ternary student and `transformer-binary/` the
binary one. Dense tensors are stored in float16. Stage `teacher-model` makes such a folder of the teacher, all dense, so
that it can be drawn with and judged like any other model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from linocut.formats.folder import VOCABULARY_FILE
from linocut.formats.packed import GROUP_SIZE
from linocut.formats.writer import atomic_write_bytes, write_checkpoint
from linocut.models.convert import packed_state, quantize_, set_rounding
from linocut.quantize.policy import Policy
from linocut.train.autoencoder import load_vae
from linocut.train.captions import lexicon, words_of
from linocut.train.painter import Painter
from linocut.train.palette import BACKGROUNDS, COLOURS, PLACES, WALLS
from linocut.train.recipe import Recipe
from linocut.train.scenes import LOOSE_RELATIONS, MAX_OBJECTS, RELATIONS, SIZES, SPOTS, STYLES
from linocut.train.vocabulary import objects
from linocut.train.weights import load_weights, to_arrays

TEXT_POLICY = Policy.preset("qwen3", "affine4")
FOLDERS = {"ternary": "transformer", "binary": "transformer-binary"}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
             "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
             "max_image_seq_len": 4096, "time_shift_type": "exponential"}


def export(recipe: Recipe, run: Path, target: Path, folders: Mapping[str, str] = FOLDERS) -> None:
    """Write the model folder of every student found in the run folder; `folders` says which are looked for, and where
    their transformers go."""
    found = [encoding for encoding in folders if (run / encoding / "model.safetensors").is_file()]
    _write_surroundings(recipe, run, target)
    for encoding in found:
        painter, policy = quantized(recipe, encoding), recipe.packing(encoding)
        load_weights(painter, run / encoding)
        folder = target / folders[encoding]
        _write_packed(folder, "diffusion_pytorch_model.safetensors", painter.transformer,
                      recipe.transformer.to_dict(), policy)
        if recipe.teacher.keep_text:
            shutil.copytree(Path(recipe.teacher.start) / "text_encoder", target / "text_encoder", dirs_exist_ok=True)
        else:
            _write_packed(target / "text_encoder", "model.safetensors", painter.text_encoder,
                          recipe.text_encoder.to_dict(), TEXT_POLICY)
    print(f"  wrote {target} ({', '.join(found)}): {folder_bytes(target) / 1e6:.2f} MB", flush=True)


def export_teacher(recipe: Recipe, run: Path, target: Path) -> None:
    """Write the teacher as a model folder; it draws with the guidance that its students saw."""
    _write_surroundings(recipe, run, target, recipe.path.guidance)
    painter = Painter(recipe)
    load_weights(painter, run / "teacher")
    parts = (("transformer", "diffusion_pytorch_model.safetensors", painter.transformer, recipe.transformer.to_dict()),
             ("text_encoder", "model.safetensors", painter.text_encoder, recipe.text_encoder.to_dict()))
    for folder, file, module, config in parts:
        write_json(target / folder / "config.json", config)
        write_checkpoint(target / folder / file, to_arrays(module.state_dict(), "F16"))
    print(f"  wrote {target} (teacher): {folder_bytes(target) / 1e6:.2f} MB", flush=True)


def _write_surroundings(recipe: Recipe, run: Path, target: Path, guidance: float = 1.0) -> None:
    """Everything in a model folder but transformer and text encoder."""
    write_json(target / "model_index.json", model_index(recipe, guidance))
    write_json(target / "scheduler" / "scheduler_config.json", SCHEDULER)
    compact = json.dumps(vocabulary_table(), separators=(",", ":"), ensure_ascii=False)
    atomic_write_bytes(target / VOCABULARY_FILE, (compact + "\n").encode())
    shutil.copytree(run / "tokenizer", target / "tokenizer", dirs_exist_ok=True)
    vae = load_vae(recipe, run, torch.device("cpu"))
    write_json(target / "vae" / "config.json", vae.config.to_dict() | {"preview": True})
    write_checkpoint(target / "vae" / "diffusion_pytorch_model.safetensors", to_arrays(vae.state_dict(), "F16"))


def quantized(recipe: Recipe, encoding: str) -> Painter:
    """A painter with fake-quantized layers, ready for the latent weights of a student."""
    painter = Painter(recipe)
    round_text(painter, recipe)
    quantize_(painter.transformer, recipe.packing(encoding), fake=True)
    set_rounding(painter.transformer, getattr(recipe, encoding).rounding)
    return painter


def round_text(painter: Painter, recipe: Recipe) -> None:
    """The text encoder in four bits, as it will be shipped. One that is kept is what it will be."""
    if not recipe.teacher.keep_text:
        quantize_(painter.text_encoder, TEXT_POLICY, fake=True)


def model_index(recipe: Recipe, guidance: float = 1.0) -> dict[str, object]:
    """`model_index.json`: diffusers' component table and this project's settings."""
    distilled = guidance == 1
    own: dict[str, object] = {} if distilled else {"default_guidance": guidance}
    return {"_class_name": "Flux2KleinPipeline", "is_distilled": distilled,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "Qwen2TokenizerFast"],
            "transformer": ["diffusers", "Flux2Transformer2DModel"], "vae": ["diffusers", "AutoencoderKLFlux2"],
            "linocut": {"name": recipe.name,
                        "text_length": recipe.data.text_length, "text_taps": list(recipe.text_taps),
                        "default_size": [recipe.data.size, recipe.data.size],
                        "trained_sizes": [[recipe.data.size] * 2, *map(list, recipe.data.shapes)],
                        "default_steps": recipe.default_steps or recipe.path.grid, **own}}


def vocabulary_table() -> dict[str, object]:
    """What `vocabulary.json` says: the things, the lists of everything else to ask for, and all other words."""
    things = [{"name": thing.name, "plural": thing.plural, "synonyms": list(thing.synonyms)} for thing in objects()]
    lists = {"colours": list(COLOURS), "backgrounds": list(WALLS),
             "places": [BACKGROUNDS[name].phrases[0] for name in PLACES],
             "relations": [*RELATIONS, *LOOSE_RELATIONS], "spots": list(SPOTS), "sizes": list(SIZES),
             "styles": [style for style in STYLES if style != "plain"]}
    said = {word for thing in objects() for name in (thing.plural, *thing.names) for word in words_of(name)}
    return {"things": things, "most": MAX_OBJECTS, "lists": lists, "other_words": sorted(lexicon() - said)}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_packed(folder: Path, file: str, module: nn.Module, config: dict[str, object], policy: Policy) -> None:
    quantization = {"quant_method": "linocut", "format_version": 1, "group_size": GROUP_SIZE,
                    "policy": policy.to_dict()}
    write_json(folder / "config.json", config | {"quantization_config": quantization})
    write_checkpoint(folder / file, packed_state(module, torch.float16))
