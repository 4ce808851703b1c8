"""Recipes: the committed ones are sound, and mistakes are told in one line."""

import re

import pytest
from tiny_recipe import ROOT

from linocut.errors import UsageError
from linocut.models.flux2 import Flux2Transformer
from linocut.quantize.policy import Policy
from linocut.train.loop import Ranks
from linocut.train.recipe import Recipe
from linocut.train.stages import run_stage

TINY = (ROOT / "recipes" / "tiny-cpu.toml").read_text("utf-8").replace('held_out = "embedded/prompts.txt"\n', "")


def packed_weights(model, policy: Policy, part: str = "") -> int:
    shapes = {name: tuple(m.weight.shape) for name, m in model.named_modules() if getattr(m, "weight", None) is not None
              and m.weight.ndim == 2}
    return sum(shapes[name][0] * shapes[name][1] for name, (encoding, _) in policy.plan(shapes).items()
               if encoding == "ternary" and part in name)


def test_the_policy_is_the_recipes(tmp_path):
    (tmp_path / "recipe.toml").write_text(TINY.replace('name = "tiny"', 'name = "tiny"\npolicy = "flux2-compact"'))
    assert Recipe.from_file(tmp_path / "recipe.toml").packing("binary") == Policy.preset("flux2-compact", "binary")
    (tmp_path / "recipe.toml").write_text(TINY)
    assert Recipe.from_file(tmp_path / "recipe.toml").packing("binary").name == "flux2-embedded"


def test_embedded_recipe_keeps_to_the_size_it_promises():
    recipe = Recipe.from_file(ROOT / "recipes" / "embedded" / "recipe.toml")
    model, policy = Flux2Transformer(recipe.transformer), recipe.packing("ternary")
    assert 40e6 < packed_weights(model, policy, "blocks.") < 45e6
    assert packed_weights(model, policy) < 49e6  # with the modulations, which see noise levels alone
    assert recipe.tokens == (16, 16)
    assert recipe.text_encoder.num_hidden_layers >= 6
    assert len(recipe.text_taps) * recipe.text_encoder.hidden_size == recipe.transformer.joint_attention_dim


@pytest.mark.parametrize(("old", "new", "message"), [
    ("[vae]", "[vea]", r"unknown sections \['vea'\]; known are"),
    ("crop = 32", "corp = 32", r"unknown keys \['corp'\] in \[vae\]; known are"),
    ("text_taps = [1, 2, 3]", "text_taps = [1, 2]", "joint_attention_dim must be taps x hidden_size = 256, found 384"),
    ("in_channels = 16", "in_channels = 64", "in_channels must be 4 x latent_channels = 16, found 64"),
    ("substeps = [1, 2]", "substeps = [1]", r"one number per step of the grid \(2\)"),
    ("grid = 2", "grid = ", "not a readable recipe"),
    ('name = "tiny"', 'name = "tiny"\npolicy = "small"', "unknown policy 'small'; choose from flux2, "),
    ('name = "tiny"', 'name = "tiny"\nheld_out = "none.txt"', r"none.txt cannot be read .*bring it along"),
    ('name = "tiny"', "", "name"),
])
def test_mistakes(tmp_path, old, new, message):
    assert old in TINY
    path = tmp_path / "recipe.toml"
    path.write_text(TINY.replace(old, new))
    with pytest.raises(UsageError, match=message) as caught:
        Recipe.from_file(path)
    assert str(caught.value).startswith(str(path))


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="not a readable recipe"):
        Recipe.from_file(tmp_path / "none.toml")


@pytest.mark.parametrize(("stage", "message"), [
    ("teacher", "no result of stage vae, which stage teacher goes on from"), ("ternary", "no result of stage vae"),
    ("export", "no result of stage vae"), ("sheet", "no exported model"),
    ("paint", "unknown stage 'paint'; stages are"),
])
def test_a_stage_says_what_it_needs(tmp_path, stage, message):
    recipe = Recipe.from_file(ROOT / "recipes" / "tiny-cpu.toml")
    with pytest.raises(Exception, match=re.escape(message)) as caught:
        run_stage(stage, recipe, tmp_path, tmp_path, "cpu")
    assert type(caught.value).__module__ == "linocut.errors"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("device", "message"), [("cuda:99", "no device cuda:99"), ("toaster", "unknown device")])
def test_devices_that_do_not_exist(device, message):
    with pytest.raises(UsageError, match=message):
        Ranks.start(device)
