"""Scenes are drawn where they are placed, in the colour they ask for, and parts of them equal the whole."""

import colorsys
import random

import pytest
import torch
from tiny_recipe import write_sprites

from linocut.errors import ModelNotFoundError
from linocut.train.render import SceneRenderer
from linocut.train.scenes import BACKGROUNDS, COLOURS, Group, Placement, Scene, objects, place, sample_scene

SIZE = 64
# Middle of the hue range that a person calls by the name, in degrees.
HUES = {"red": 0, "orange": 30, "yellow": 50, "green": 130, "blue": 220, "purple": 280, "pink": 335}


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return write_sprites(tmp_path_factory.mktemp("sprites") / "all")


@pytest.fixture(scope="module")
def renderer(sprites):
    return SceneRenderer(sprites, SIZE, things=range(8))


def draw_one(renderer: SceneRenderer, *placements: Placement, background: str | None = "gray") -> torch.Tensor:
    """RGB [3, SIZE, SIZE] in 0..1."""
    backgrounds = renderer.backgrounds([Scene("single_object", (Group(0),), None, background)], 0)
    return (renderer.draw(renderer.table([placements]), backgrounds)[0] + 1) / 2


def test_draws_where_it_is_placed(renderer):
    empty, drawn = draw_one(renderer), draw_one(renderer, Placement(0, None, 0.25, 0.75, 0.25))
    changed = (empty - drawn).abs().amax(0) > 0
    rows, columns = changed.nonzero().unbind(1)
    assert (rows.min(), rows.max()) == (40, 55)
    assert (columns.min(), columns.max()) == (8, 23)
    assert changed[40:56, 8:24].all()


def test_range_and_shape(renderer):
    rng = random.Random(0)
    scenes = [sample_scene(rng, "counting") for _ in range(5)]
    scenes = [Scene(s.task, (Group(s.groups[0].thing % 8, s.groups[0].count, s.groups[0].colour),)) for s in scenes]
    images = renderer.draw(renderer.table([place(s, rng) for s in scenes]), renderer.backgrounds(scenes, 1))
    assert images.shape == (5, 3, SIZE, SIZE)
    assert images.dtype == torch.float32
    assert float(images.min()) >= -1
    assert float(images.max()) <= 1
    assert torch.equal(renderer.backgrounds(scenes, 1), renderer.backgrounds(scenes, 1))


def test_later_things_lie_on_top(renderer):
    below, above = Placement(0, 0, 0.5, 0.5, 0.6), Placement(1, 4, 0.5, 0.5, 0.3)
    picture = draw_one(renderer, below, above)
    assert picture[2, 32, 32] > picture[0, 32, 32]  # blue in the middle
    assert picture[0, 32, 18] > picture[2, 32, 18]  # red around it
    assert (draw_one(renderer, above, below)[0] > 0.3)[32, 32]


@pytest.mark.parametrize("name", COLOURS)
def test_tints_look_like_their_names(renderer, name):
    # Not the upper and lower ends, which are highlight and shadow.
    patch = draw_one(renderer, Placement(2, COLOURS.index(name), 0.5, 0.5, 0.7))[:, 26:38, 26:38].flatten(1).mean(1)
    hue, saturation, value = colorsys.rgb_to_hsv(*patch.tolist())
    if name in HUES:
        assert saturation > 0.4
        assert abs((hue * 360 - HUES[name] + 180) % 360 - 180) < 20
    elif name == "brown":
        assert 10 < hue * 360 < 40
        assert value < 0.6
    else:
        assert saturation < 0.15
        assert value < 0.3 if name == "black" else value > 0.8


def test_natural_colours_are_the_sprites_own(renderer):
    picture = draw_one(renderer, Placement(1, None, 0.5, 0.5, 0.7))
    red, green, blue = picture[:, 32, 32].tolist()
    assert green == pytest.approx(red / 2, abs=0.02)
    assert blue == pytest.approx(red, abs=0.01)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_backgrounds(renderer, background):
    corner = draw_one(renderer, background=background)[:, 0, 0]
    hue, saturation, value = colorsys.rgb_to_hsv(*corner.tolist())
    if background in HUES:
        assert saturation > 0.15
        assert abs((hue * 360 - HUES[background] + 180) % 360 - 180) < 25
    else:
        assert saturation < 0.2
        assert (value > 0.9) == (background == "white")
        assert (value < 0.2) == (background == "black")


def test_quiet_backgrounds_are_light(renderer):
    scenes = [Scene("single_object", (Group(0),))] * 50
    backgrounds = renderer.backgrounds(scenes, 3)
    assert float(backgrounds.min()) > 0.85
    assert len(backgrounds.unique(dim=0)) > 2


@pytest.mark.parametrize("window", [(0, 0, SIZE), (5, 17, 32), (40, 0, 24)])
def test_a_window_equals_the_crop(renderer, window):
    rng = random.Random(4)
    scenes = [Scene("mixed", (Group(1, 2, 0), Group(4, 2)), None, "pink"), Scene("single_object", (Group(3),))]
    table, backgrounds = renderer.table([place(s, rng) for s in scenes]), renderer.backgrounds(scenes, 0)
    top, left, side = window
    whole = renderer.draw(table, backgrounds)[:, :, top:top + side, left:left + side]
    assert torch.equal(renderer.draw(table, backgrounds, window), whole)


def test_loading_some_things_changes_no_pixel(sprites, renderer):
    few = SceneRenderer(sprites, SIZE, things=(5, 2))
    placements = Placement(5, 3, 0.3, 0.3, 0.4), Placement(2, None, 0.7, 0.6, 0.3)
    assert torch.equal(draw_one(few, *placements), draw_one(renderer, *placements))


def test_missing_sprite(sprites, tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no sprite for person \(expected 1f9d1.webp\); run recipes/embedded"):
        SceneRenderer(tmp_path, SIZE)
    name = objects()[3].code
    (tmp_path / f"{name}-fe0f.webp").write_bytes((sprites / f"{name}.webp").read_bytes())
    assert SceneRenderer(tmp_path, SIZE, things=[3]).things == 1
