"""Journeys from noise to picture, and latent weights that round to what GPTQ found."""

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_recipe import write_recipe

from linocut.models.convert import plan_layers
from linocut.models.flux2 import Flux2Transformer, image_position_ids, text_position_ids
from linocut.quantize.gptq import gptq
from linocut.quantize.rounding import fake_quantize
from linocut.train.calibrate import Batch, calibrate, latent_weights
from linocut.train.dataset import Captions
from linocut.train.distill import CaptionReader
from linocut.train.journeys import Journeys
from linocut.train.painter import grid_levels, jittered
from linocut.train.recipe import Recipe


class Straight:
    """A painter whose velocity is the constant `v` and whose text is the token ids."""

    def __init__(self, v: float, width: int) -> None:
        self.v, self.width = v, width

    def read(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return ids[..., None].expand(-1, -1, self.width).float()

    def velocity(self, x: torch.Tensor, text: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, self.v) * sigma[:, None, None]

    def walk(self, x: torch.Tensor, text: torch.Tensor, levels: list[float]) -> torch.Tensor:
        for here, there in pairwise(levels):
            x = x + (there - here) * self.v * here
        return x


def make_journeys(recipe: Recipe, captions: Captions, **more: object) -> Journeys:
    width, (rows, columns) = recipe.transformer.joint_attention_dim, recipe.tokens
    teacher = Straight(1.0, width)
    reader = CaptionReader(teacher, Straight(3.0, width), captions)
    return Journeys(recipe.path, grid_levels(recipe), teacher, reader, 8,
                    (rows * columns, recipe.transformer.in_channels), (recipe.data.text_length, width),
                    torch.device("cpu"), recipe.data.seed, **more)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe.from_file(write_recipe(tmp_path))  # a grid of two steps, the second of which the teacher halves


@pytest.fixture
def journeys(recipe) -> Journeys:
    length = recipe.data.text_length
    captions = Captions(torch.arange(100)[:, None].expand(-1, length).to(torch.int16).contiguous(),
                        torch.full((100,), 5, dtype=torch.int16))
    torch.manual_seed(0)
    return make_journeys(recipe, captions)


def test_rows_are_spread_over_the_steps_and_change_places(journeys):
    assert journeys.stage(0).tolist() == [0] * 4 + [1] * 4
    assert journeys.stage(1).tolist() == [1] * 4 + [0] * 4
    assert journeys.sigma(0)[0] == 1.0 > float(journeys.sigma(0)[-1]) > 0


def test_targets_lead_to_where_the_teacher_gets(journeys, recipe):
    first, second, _ = grid_levels(recipe)
    target = journeys.target(0)
    assert torch.allclose(target[:4], torch.full_like(target[:4], first))
    middle = (second + second / 2) / 2  # two halves, each with the velocity of its start
    assert torch.allclose(target[4:], torch.full_like(target[4:], middle), atol=1e-6)


def test_rows_move_as_the_teacher_or_as_the_student_says(journeys, recipe):
    first, second, _ = grid_levels(recipe)
    journeys.own[:2] = True
    before = journeys.x.clone()
    target = journeys.target(0)
    journeys.move(0, 3 * target, target)
    moved = (journeys.x - before)[:4] / (second - first)
    assert torch.allclose(moved[:2], torch.full_like(moved[:2], 3 * first), atol=1e-5)
    assert torch.allclose(moved[2:], torch.full_like(moved[2:], first), atol=1e-5)


def test_some_routes_have_levels_of_their_own(recipe):
    levels = [1.0, 0.9, 0.7, 0.0]
    routes = [jittered(levels, random.Random(seed)) for seed in range(300)]
    assert {(route[0], route[-1]) for route in routes} == {(1.0, 0.0)}
    second, third = ([route[index] for route in routes] for index in (1, 2))
    assert 0.8 <= min(second) < 0.82
    assert 0.93 < max(second) <= 0.95
    assert 0.35 <= min(third) < 0.4
    assert 0.76 < max(third) <= 0.8
    length = recipe.data.text_length
    captions = Captions(torch.zeros(9, length, dtype=torch.int16), torch.full((9,), 5, dtype=torch.int16))
    jumpy = replace(recipe, path=replace(recipe.path, jitter=1.0))
    made = make_journeys(jumpy, captions)
    assert made.sigma(1)[:4].unique().tolist() != [grid_levels(recipe)[1]]
    before, target = made.x.clone(), made.target(0)
    made.move(0, target, target)
    assert torch.allclose((made.x - before)[:4], target[:4] * (made.routes[0][1] - 1.0), atol=1e-5)


def test_rows_that_are_through_begin_anew(journeys):
    first, text = journeys.x.clone(), journeys.teacher_text.clone()
    target = journeys.target(0)
    journeys.move(0, target, target)
    journeys.depart(1, own=1.0)
    assert journeys.stage(1)[4:].tolist() == [0] * 4
    fresh = journeys.x[4:]
    assert abs(float(fresh.mean())) < 0.2
    assert float(fresh.std()) == pytest.approx(1.0, abs=0.15)
    assert not torch.equal(fresh, first[4:])
    assert not torch.equal(journeys.teacher_text[4:], text[4:])
    assert torch.equal(journeys.teacher_text[:4], text[:4])
    assert torch.equal(journeys.teacher_text, journeys.student_text)
    assert journeys.own.flatten().tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize("encoding", ["ternary", "binary"])
def test_latent_weights_round_to_what_gptq_found(encoding):
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=source) * 0.05
    inputs = torch.randn(1024, 256, generator=source) @ torch.randn(256, 256, generator=source)
    values, scales = gptq(weight, inputs.T @ inputs, encoding)
    wanted = values.float() * scales.repeat_interleave(128, 1)
    latent = latent_weights(weight, values.float(), scales, encoding)
    assert torch.equal(fake_quantize(latent, encoding), wanted)
    stiff = (latent == wanted).float().mean()
    assert float(stiff) < 0.02  # nearly everywhere the weights keep distances of their own
    assert float((latent - weight).square().mean()) < 0.8 * float((wanted - weight).square().mean())
    near = latent.abs() < 0.3 * scales.repeat_interleave(128, 1)
    assert float(near.float().mean()) > 0.05  # some are in doubt, and training can turn them


def test_groups_that_cannot_keep_their_distances_are_stored_as_they_are():
    weight = torch.zeros(2, 128)
    values = torch.zeros(2, 128)
    values[0, :3] = 1.0
    scales = torch.full((2, 1), 0.5)
    latent = latent_weights(weight, values, scales, "ternary")
    assert torch.equal(fake_quantize(latent, "ternary")[0], values[0] * 0.5)


@pytest.mark.parametrize("encoding", ["ternary", "binary"])
def test_modulations_are_rounded_on_the_one_curve_that_they_see(recipe, encoding):
    """They see noise levels alone, a few directions of all that there are, and what is lost counts there alone."""
    torch.manual_seed(0)
    config = recipe.transformer
    network = Flux2Transformer(config)
    network.init_weights()
    named = dict(network.named_modules())
    layers = {name: named[name] for name, (chosen, _) in plan_layers(network, recipe.packing(encoding)).items()
              if chosen == encoding and "blocks." not in name}
    assert len(layers) == 4
    for layer in layers.values():
        torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    between = torch.linspace(0.0137, 0.9871, 31)

    def curves() -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hooks = [layer.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in layers.values()]
        network.modulations(between)
        for hook in hooks:
            hook.remove()
        return torch.cat([out.flatten(1) for out in sorted(seen, key=lambda out: out.shape[1])], dim=1)

    batch = Batch(torch.randn(2, 4, config.in_channels), torch.randn(2, 3, config.joint_attention_dim),
                  torch.tensor([1.0, 0.5]))
    heard: dict[str, float] = {}
    with torch.no_grad():
        wanted, before = curves(), {name: layer.weight.clone() for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.weight.copy_(fake_quantize(before[name], encoding))
        nearest = (curves() - wanted).square().sum()
        for name, layer in layers.items():
            layer.weight.copy_(before[name])
        calibrate(network, [batch], image_position_ids(2, 2), text_position_ids(3), recipe.packing(encoding),
                  heard.__setitem__)
        for layer in layers.values():
            layer.weight.copy_(fake_quantize(layer.weight, encoding))
        found = (curves() - wanted).square().sum()
    assert set(layers) < set(heard)
    assert float(found) < 0.3 * float(nearest)
