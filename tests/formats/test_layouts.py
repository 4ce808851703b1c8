"""Which files of a repository a model needs, decided from names alone."""

import json

import numpy as np
import pytest

from linocut.errors import FormatError, ModelNotFoundError, UsageError
from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.formats.hub import ALIASES, failure, hub_id, is_whole
from linocut.formats.layouts import needed_files, place_of, unused_text_tensors

TOKENIZER = ["tokenizer/merges.txt", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
             "tokenizer/vocab.json"]
KLEIN = ["model_index.json", "README.md", "LICENSE.md", ".gitattributes", "flux-2-klein-4b.safetensors", "teaser.png",
         "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/generation_config.json",
         "text_encoder/model.safetensors.index.json", "text_encoder/model-00001-of-00002.safetensors",
         "text_encoder/model-00002-of-00002.safetensors", *TOKENIZER, "transformer/config.json",
         "transformer/diffusion_pytorch_model.safetensors", "vae/config.json",
         "vae/diffusion_pytorch_model.safetensors"]
BONSAI = ["model_index.json", "manifest.json", "LICENSE", "NOTICE.md", "scheduler/scheduler_config.json", *TOKENIZER,
          "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "transformer-packed-mflux/config.json",
          "transformer-packed-mflux/quantization_config.json", "transformer-packed-mflux/checkpoint_manifest.json",
          "transformer-packed-mflux/diffusion_pytorch_model.safetensors", "text_encoder-mlx-4bit/config.json",
          "text_encoder-mlx-4bit/model.safetensors"]
GEMLITE = ["manifest.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
           "text_encoder-hqq-4bit/qmodel.pt", "text_encoder-hqq-4bit/config.json",
           "text_encoder-hqq-4bit/tokenizer/tokenizer.json", "transformer-gemlite-int2/config.json",
           "transformer-gemlite-int2/state_dict.pt", "transformer-gemlite-int2/gemlite_autotune.json",
           "transformer-gemlite-int2/quantization_config.json"]
TAPS = (9, 18, 27)


def index(*last_layers: int) -> dict:
    """An index of a text encoder of 36 layers, its shards ending with these layers."""
    files, first = {}, 0
    for number, last in enumerate(last_layers, 1):
        name = f"model-{number:05d}-of-{len(last_layers):05d}.safetensors"
        files |= {f"model.layers.{layer}.mlp.up_proj.weight": name for layer in range(first, last + 1)}
        first = last + 1
    shards = sorted(set(files.values()))
    return {"weight_map": files | {"model.embed_tokens.weight": shards[0], "model.norm.weight": shards[-1],
                                   "lm_head.weight": shards[-1]}}


def test_klein_without_its_single_file():
    needed = needed_files(KLEIN, TAPS, lambda name: index(19, 35))
    assert set(KLEIN) - set(needed) == {"README.md", ".gitattributes", "flux-2-klein-4b.safetensors", "teaser.png"}
    assert len(needed) == len(set(needed))


def test_shards_with_unused_layers_alone_are_left_out():
    names = [*KLEIN, *(f"text_encoder/model-{number:05d}-of-00004.safetensors" for number in range(1, 5))]
    needed = needed_files(names, TAPS, lambda name: index(10, 20, 26, 35))
    shards = [name for name in needed if name.startswith("text_encoder/model-")]
    assert shards == [f"text_encoder/model-{number:05d}-of-00004.safetensors" for number in (1, 2, 3)]
    every = needed_files(names, (9, 18, 36), lambda name: index(10, 20, 26, 35))
    assert "text_encoder/model-00004-of-00004.safetensors" in every


def test_what_the_outputs_of_layers_do_not_depend_on():
    names = index(35)["weight_map"]
    unused = unused_text_tensors(names, TAPS)
    assert unused == {"model.norm.weight", "lm_head.weight"} | {f"model.layers.{layer}.mlp.up_proj.weight"
                                                                for layer in range(27, 36)}
    assert unused_text_tensors(names, (9, 18, 36)) == {"lm_head.weight"}  # the last layer's output is normed


def test_forms_of_other_programs():
    assert set(BONSAI) - set(needed_files(BONSAI, TAPS, pytest.fail)) == {
        "manifest.json", "transformer-packed-mflux/checkpoint_manifest.json"}
    assert set(GEMLITE) - set(needed_files(GEMLITE, TAPS, pytest.fail)) == {
        "manifest.json", "transformer-gemlite-int2/gemlite_autotune.json"}
    gguf = ["transformer.gguf", "text_encoder.gguf", "transformer/config.json", "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors", "model_index.json", "other.gguf"]
    assert set(gguf) - set(needed_files(gguf, TAPS, pytest.fail)) == {"other.gguf"}
    assert place_of("transformer", gguf) == "transformer.gguf"


def test_a_tokenizer_inside_the_text_encoder_counts(tmp_path):
    for name in GEMLITE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    listed = {part: ["x", "X"] for part in ("text_encoder", "tokenizer", "vae")}
    (tmp_path / "model_index.json").write_text(json.dumps(listed))
    assert is_whole(tmp_path)
    (tmp_path / "text_encoder-hqq-4bit/tokenizer/tokenizer.json").unlink()
    assert not is_whole(tmp_path)


def test_weights_come_once_and_optional_files_if_asked():
    more = ["LICENSES/a.bin", "transformer/diffusion_pytorch_model.fp16.safetensors",
            "transformer/timestep_table.safetensors", "transformer/timestep_weights.safetensors",
            "vae/model.safetensors", "transformer/x.bin"]
    needed = needed_files([*KLEIN, *more], TAPS, lambda name: index(35))
    assert [name for name in needed if name in more] == ["transformer/timestep_table.safetensors"]
    asked = needed_files([*KLEIN, *more], TAPS, lambda name: index(35), optional=True)
    assert "transformer/timestep_weights.safetensors" in asked


def test_what_is_no_model_is_said():
    with pytest.raises(UsageError, match=r"found 'a', 'b', 'c', 'd' and 1 more"):
        needed_files(list("abcde"), TAPS, pytest.fail)
    with pytest.raises(FormatError, match="several weight files"):
        needed_files(["model_index.json", "transformer/a.safetensors", "transformer/b.safetensors"], TAPS, pytest.fail)
    for more in ([], ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]):
        with pytest.raises(UsageError, match=r"but not the model_index.json .* found 'transformer/config.json'"):
            needed_files(["transformer/config.json", "transformer/model.safetensors.index.json", *more], TAPS,
                         pytest.fail)
    with pytest.raises(FormatError, match="outside its folder"):
        needed_files(KLEIN, TAPS, lambda name: {"weight_map": {"a": "../../x.safetensors"}})


def test_a_text_encoder_opens_without_shards_of_unused_layers(tmp_path):
    one = np.ones(4, np.float32)
    names = {"model-1.safetensors": ["model.embed_tokens.weight", "model.layers.0.a", "model.norm.weight"],
             "model-2.safetensors": ["model.layers.1.a"], "model-3.safetensors": ["model.layers.2.a", "lm_head.weight"]}
    for file, tensors in names.items():
        write_checkpoint(tmp_path / file, dict.fromkeys(tensors, one))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {tensor: file for file, tensors in names.items() for tensor in tensors}}))
    assert len(Checkpoint.open(tmp_path, (1, 2)).names) == 6
    (tmp_path / "model-3.safetensors").unlink()
    # The final norm is not for these taps, so it is left out, too: what is there looks like an encoder of two layers.
    assert set(Checkpoint.open(tmp_path, (1, 2)).names) == {"model.embed_tokens.weight", "model.layers.0.a",
                                                            "model.layers.1.a"}
    for taps in (None, (1, 3)):
        with pytest.raises(ModelNotFoundError, match="model-3"):
            Checkpoint.open(tmp_path, taps)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="model-2"):
        Checkpoint.open(tmp_path, (1, 2))


def test_names_on_the_hub():
    assert hub_id("klein-4b") == ("black-forest-labs/FLUX.2-klein-4B", "main")
    assert hub_id("bonsai-ternary@v1") == ("prism-ml/bonsai-image-ternary-4B-mlx-2bit", "v1")
    assert hub_id("org/name@refs/pr/1") == ("org/name", "refs/pr/1")
    assert all(hub_id(target) == (target, "main") for target in ALIASES.values())
    for name in ("", "name", "a/b/c", "../x", "org/name@", "org/name@../x", "org/name@/x", "org/na me", "org//x"):
        assert hub_id(name) is None


def test_a_long_failure_is_cut_between_words():
    text = failure(RuntimeError("word " * 100))
    assert text.startswith("not in the cache, and it could not be fetched (RuntimeError: word word")
    assert text.endswith(" word ...)")
