"""A guided teacher: what it does with the empty prompt, what its students see of it, and how it is exported."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_recipe import write_recipe

from linocut import Pipeline
from linocut.errors import UsageError
from linocut.models.autoencoder import Autoencoder, PreviewMap
from linocut.train.dataset import Captions
from linocut.train.export import export_teacher, model_index
from linocut.train.guidance import Guided, Teacher
from linocut.train.painter import Painter, grid_levels
from linocut.train.recipe import PathSettings, Recipe
from linocut.train.teacher import held_out_latents
from linocut.train.tokenizer import save_tokenizer, train_tokenizer
from linocut.train.weights import save_weights

SCALE = 1.75


class Echo:
    """A network whose velocity is the mean of its text, and who counts how often it was asked."""

    asked = 0

    def velocity(self, latents: torch.Tensor, text: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return text.mean((1, 2))[:, None, None] * torch.ones_like(latents)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    recipe = Recipe.from_file(write_recipe(tmp_path))
    return replace(recipe, path=replace(recipe.path, guidance=SCALE))


def test_velocity_is_moved_away_from_that_of_the_empty_prompt():
    x, text, empty = torch.zeros(2, 3, 4), torch.tensor([2.0, 6.0])[:, None, None].expand(2, 5, 7), torch.ones(1, 5, 7)
    guided = Guided(Echo(), 3.0, empty)
    assert guided.velocity(x, text, torch.ones(2))[:, 0, 0].tolist() == [1 + 3 * (2 - 1), 1 + 3 * (6 - 1)]
    assert torch.allclose(guided.walk(x, text, [1.0, 0.5, 0.0])[:, 0, 0], torch.tensor([-4.0, -16.0]))
    assert guided.network.asked == 3  # with and without the prompt at once
    plain = Guided(Echo(), 1.0, empty)
    assert plain.velocity(x, text, torch.ones(2))[:, 0, 0].tolist() == [2, 6]
    assert plain.network.asked == 1  # a scale of 1 costs nothing


def test_a_teacher_reads_the_empty_prompt_as_the_pipeline_does(recipe):
    torch.manual_seed(0)
    painter = Painter(recipe).eval().requires_grad_(False)
    for value in painter.transformer.parameters():  # fresh ones draw nothing and hear no prompt
        torch.nn.init.normal_(value, std=0.1)
    tokenizer = recipe_tokenizer(recipe)
    teacher = Teacher(recipe, painter, tokenizer)
    ids, mask = tokenizer.encode([""])
    assert torch.allclose(teacher.empty, painter.read(ids, mask), atol=0.02)  # in fewer digits, as it trains
    captions = Captions.build(tokenizer, ["a red fox", "two owls"], torch.device("cpu"))
    text = teacher.read(*captions.pick(torch.arange(2)))
    rows, columns = recipe.tokens
    noise, sigma = torch.randn(2, rows * columns, recipe.transformer.in_channels), torch.tensor([0.9, 0.4])
    # In float64 it makes no difference that the teacher takes both passes as one batch.
    painter.transformer.double()
    teacher.empty, noise, text, sigma = teacher.empty.double(), noise.double(), text.double(), sigma.double()
    without = painter.velocity(noise, teacher.empty.repeat(2, 1, 1), sigma)
    wanted = without + SCALE * (painter.velocity(noise, text, sigma) - without)
    found = teacher.velocity(noise, text, sigma)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(found, painter.velocity(noise, text, sigma), atol=1e-4)
    assert torch.allclose(teacher.at(recipe.tokens).velocity(noise, text, sigma), wanted, atol=1e-6)
    assert teacher.at((1, 3)).velocity(noise[:, :3], text, sigma).shape == (2, 3, recipe.transformer.in_channels)
    levels = grid_levels(recipe)
    there = noise + (levels[1] - levels[0]) * teacher.velocity(noise, text, torch.ones(2) * levels[0])
    assert torch.allclose(teacher.walk(noise, text, levels[:2]), there, atol=0.05)


def recipe_tokenizer(recipe: Recipe):
    from linocut.models.text_encoder import PromptTokenizer

    return PromptTokenizer(train_tokenizer(["a red fox and two owls"] * 9, 300), recipe.data.text_length)


def test_a_guided_teacher_is_exported_as_one(recipe):
    index = json.loads(json.dumps(model_index(recipe, SCALE)))
    assert index["is_distilled"] is False
    assert index["linocut"]["default_guidance"] == SCALE
    student = model_index(recipe)
    assert student["is_distilled"] is True
    assert "default_guidance" not in student["linocut"]


def test_an_exported_teacher_draws_what_its_students_saw(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # float32, as pipelines draw
    recipe = replace(recipe, path=replace(recipe.path, guidance=8.0))
    run, tokenizer = tmp_path / "run", recipe_tokenizer(recipe)
    torch.manual_seed(0)
    painter, vae = Painter(recipe).eval().requires_grad_(False), Autoencoder(recipe.autoencoder)
    for value in painter.transformer.parameters():
        torch.nn.init.normal_(value, std=0.1)
    painter.save(run / "teacher")
    save_tokenizer(tokenizer.tokenizer, run / "tokenizer")
    vae.preview = PreviewMap(recipe.autoencoder.latent_channels)
    save_weights(run / "vae", vae.state_dict())
    export_teacher(recipe, run, tmp_path / "model")
    kept: list[torch.Tensor] = []
    Pipeline.from_pretrained(tmp_path / "model", prompt_cache=False)(
        "a red fox", seed=0, num_inference_steps=recipe.path.grid,
        callback_on_step_end=lambda _, i, sigma, state: kept.append(state["latents"]))
    captions = Captions.build(tokenizer, ["a red fox"], torch.device("cpu"))
    teacher = Teacher(recipe, painter, tokenizer)
    seen, unguided = (held_out_latents(recipe, each, captions) for each in (teacher, painter))
    difference = float((kept[-1] - seen).norm() / (unguided - seen).norm())
    assert difference < 0.02  # of the float16 in the folder


def test_guidance_that_no_model_folder_can_say_is_refused():
    for scale in (0.5, 101, float("nan"), True):
        with pytest.raises(UsageError, match=r"path\.guidance must lie in 1"):
            PathSettings(guidance=scale)
