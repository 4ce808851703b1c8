"""The naming head's targets are what a scene shows, and its loss teaches the blocks before it."""

import math
import random

import pytest
import torch
from tiny_recipe import write_recipe, write_sprites

from linocut.train.layout import Placement, place
from linocut.train.naming import NamingHead, names_of
from linocut.train.painter import Painter
from linocut.train.palette import COLOURS
from linocut.train.recipe import Recipe
from linocut.train.render import SceneRenderer
from linocut.train.scenes import Scene, sample_scene

SIZE, PATCH = 64, 16
THINGS = (3, 5, 7)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    return SceneRenderer(write_sprites(tmp_path_factory.mktemp("sprites") / "all"), SIZE, things=THINGS)


def names(renderer: SceneRenderer, *placements: Placement) -> list[list[tuple[int, int]]]:
    found = names_of(renderer, renderer.table([placements]), PATCH)[0].reshape(4, 4, 2)
    return [[tuple(cell) for cell in row] for row in found.tolist()]


def test_names_things_and_colours_where_they_are(renderer):
    none = (len(THINGS), -1)
    found = names(renderer, Placement(5, None, 0.375, 0.625, 0.25), Placement(7, 2, 0.875, 0.125, 0.25))
    assert found[2][1] == (1, 0)  # the second thing of the atlas, natural
    assert found[0][3] == (2, 3)
    assert sum(cell == none for row in found for cell in row) == 14


def test_the_nearest_thing_gets_the_square(renderer):
    behind, before = Placement(3, 0, 0.5, 0.5, 1.0), Placement(5, 1, 0.375, 0.625, 0.25)
    assert names(renderer, behind, before)[2][1] == (1, 2)
    assert names(renderer, behind, before)[1][1] == (0, 1)


def test_covered_squares_are_those_that_change_when_the_thing_is_drawn(renderer):
    rng = random.Random(2)
    for _ in range(20):
        scene = sample_scene(rng, "single_object")
        where = [Placement(5, p.colour, p.x, p.y, p.size) for p in place(scene, rng)]
        looks = renderer.looks([Scene("single_object", scene.groups, None, "sky")])
        empty, drawn = (renderer.draw(renderer.table([placed]), looks)[0] for placed in ([], where))
        changed = ((drawn - empty).abs().amax(0) > 0.02).float()
        share = changed.reshape(4, PATCH, 4, PATCH).mean((1, 3))
        owner = renderer.covers(renderer.table([where]), PATCH)[0]
        assert (owner[share > 0.3] == 0).all()
        assert (owner[share < 0.2] == -1).all()


def test_loss_starts_at_chance_and_reaches_what_lies_before_the_head(tmp_path):
    recipe = Recipe.from_file(write_recipe(tmp_path))
    painter = Painter(recipe)
    head = NamingHead(painter.transformer, len(THINGS))
    rows, columns = recipe.tokens
    wanted = torch.stack([torch.randint(0, len(THINGS) + 1, (2, rows * columns)),
                          torch.randint(-1, len(COLOURS) + 1, (2, rows * columns))], -1)
    ids = torch.randint(0, 50, (2, recipe.data.text_length))

    def loss() -> torch.Tensor:
        painter.velocity(torch.randn(2, rows * columns, recipe.transformer.in_channels),
                         painter.read(ids, torch.ones_like(ids)), torch.rand(2))
        return head.loss(wanted)

    assert loss().item() == pytest.approx(math.log(len(THINGS) + 1) + math.log(len(COLOURS) + 1))
    torch.nn.init.normal_(head.name.weight)
    loss().backward()
    assert painter.transformer.x_embedder.weight.grad.abs().sum() > 0
    assert painter.transformer.proj_out.weight.grad is None
    assert head.features.numel() == 0  # what a pass left is let go
