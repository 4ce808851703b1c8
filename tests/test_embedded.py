"""The models inside the package: complete, intact, as small as promised, and those that the recipe describes."""

from pathlib import Path

import pytest

from linocut.formats.folder import ModelFolder
from linocut.models.autoencoder import AutoencoderConfig
from linocut.models.flux2 import Flux2Config
from linocut.models.prompt_tokenizer import PromptTokenizer
from linocut.models.text_encoder import Qwen3Config
from linocut.train.recipe import Recipe

ROOT = Path(__file__).parents[1]
MODELS = {"embedded": "ternary", "embedded-binary": "binary"}


@pytest.fixture(scope="module")
def recipe():
    return Recipe.from_file(ROOT / "recipes" / "embedded" / "recipe.toml")


def test_both_models_with_all_parts_stay_under_28_megabytes():
    root = ModelFolder.open("embedded").root
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < 28e6


@pytest.mark.parametrize(("model", "encoding"), MODELS.items())
def test_blocks_are_packed_and_within_the_design(model, encoding):
    with ModelFolder.open(model).checkpoint("transformer") as checkpoint:
        blocks = {name: entry for name, entry in checkpoint.packed.items() if "blocks." in name}
        assert {entry.encoding for entry in blocks.values()} == {encoding}
        assert 30e6 < sum(entry.shape[0] * entry.shape[1] for entry in blocks.values()) <= 45e6
        assert checkpoint.verify() == len(checkpoint.names)


@pytest.mark.parametrize("model", MODELS)
def test_configs_are_those_of_the_recipe(model, recipe):
    folder = ModelFolder.open(model)
    assert Flux2Config.from_dict(folder.config("transformer")) == recipe.transformer
    text = Qwen3Config.from_dict(folder.config("text_encoder"))
    assert text == recipe.text_encoder
    assert PromptTokenizer.from_folder(folder.path("tokenizer"), 64).vocab_size <= text.vocab_size
    ours = AutoencoderConfig.from_dict(folder.config("vae"))
    assert ours.block_out_channels == recipe.autoencoder.block_out_channels
    assert tuple(folder.settings["text_taps"]) == recipe.text_taps
    assert folder.settings["text_length"] == recipe.data.text_length


@pytest.mark.parametrize("model", MODELS)
def test_a_prompt_decides_what_is_drawn(model):
    from linocut import Pipeline

    pipe = Pipeline.from_pretrained(model)
    red, blue = (pipe(f"a {colour} car on a white background", seed=3, num_inference_steps=2).images[0]
                 for colour in ("red", "blue"))
    assert red.size == (256, 256)
    middle = (96, 96, 160, 160)
    red_r, _, red_b = red.crop(middle).resize((1, 1)).getpixel((0, 0))
    blue_r, _, blue_b = blue.crop(middle).resize((1, 1)).getpixel((0, 0))
    assert red_r > red_b + 20
    assert blue_b > blue_r + 20
