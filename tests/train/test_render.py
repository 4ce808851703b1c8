"""Scenes are drawn where they are placed, in the colour they ask for, and parts of them equal the whole."""

import colorsys
import random

import pytest
import torch
from tiny_recipe import write_sprites

from linocut.errors import ModelNotFoundError
from linocut.train.layout import Placement, place
from linocut.train.palette import BACKGROUNDS, COLOURS, LIGHT, MIDDLE, WALLS
from linocut.train.render import BLOCK, SceneRenderer
from linocut.train.scenes import STYLES, Group, Scene, sample_scene
from linocut.train.vocabulary import objects

SIZE = 64
# Middle of the hue range that a person calls by the name, in degrees.
HUES = {"red": 0, "orange": 30, "yellow": 50, "green": 130, "blue": 220, "purple": 280, "pink": 335}


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return write_sprites(tmp_path_factory.mktemp("sprites") / "all")


@pytest.fixture(scope="module")
def renderer(sprites):
    return SceneRenderer(sprites, SIZE, things=range(8))


def draw_one(renderer: SceneRenderer, *placements: Placement, background: str = "sky",
             style: str = "plain") -> torch.Tensor:
    """RGB [3, SIZE, SIZE] in 0..1; in the sky nothing throws a shadow."""
    looks = renderer.looks([Scene("single_object", (Group(0),), None, background, None, style)])
    return (renderer.draw(renderer.table([placements]), looks)[0] + 1) / 2


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
    images = renderer.draw(renderer.table([place(s, rng) for s in scenes]), renderer.looks(scenes))
    assert images.shape == (5, 3, SIZE, SIZE)
    assert images.dtype == torch.float32
    assert float(images.min()) >= -1
    assert float(images.max()) <= 1


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
        assert {"black": value < 0.3, "gray": 0.4 < value < 0.7, "white": value > 0.8}[name]


def test_natural_colours_are_the_sprites_own(renderer):
    picture = draw_one(renderer, Placement(1, None, 0.5, 0.5, 0.7))
    red, green, blue = picture[:, 32, 32].tolist()
    assert green == pytest.approx(red / 2, abs=0.02)
    assert blue == pytest.approx(red, abs=0.01)


@pytest.mark.parametrize("background", WALLS)
def test_walls_look_like_their_names(renderer, background):
    corner = draw_one(renderer, background=background)[:, 0, 0]
    hue, saturation, value = colorsys.rgb_to_hsv(*corner.tolist())
    if background in HUES:
        assert saturation > 0.15
        assert abs((hue * 360 - HUES[background] + 180) % 360 - 180) < 25
    elif background == "brown":
        assert 10 < hue * 360 < 40
        assert value < 0.75
    else:
        assert saturation < 0.2
        assert (value > 0.9) == (background == "white")
        assert (value < 0.2) == (background == "black")


def test_quiet_tones_are_light_or_of_middle_brightness(renderer):
    light, middle = ([float(draw_one(renderer, background=name).mean()) for name in names] for names in (LIGHT, MIDDLE))
    assert min(light) > 0.87
    assert 0.55 < min(middle) < max(middle) < 0.8


def test_places_have_a_horizon_and_stars(renderer):
    grass, night = (draw_one(renderer, background=name) for name in ("grass", "night"))
    assert grass[2, 5, 5] > grass[1, 5, 5]  # blue above
    assert grass[1, -5, 5] > 1.3 * grass[2, -5, 5]  # green below
    assert float(night[:, :SIZE // 2].amax()) > 0.5 > float(night[:, -SIZE // 4:].amax())  # no stars on the ground
    assert not grass.isnan().any()
    assert len({tuple(draw_one(renderer, background=name)[:, SIZE // 2, 3].tolist()) for name in BACKGROUNDS}) == len(
        BACKGROUNDS)


def test_things_throw_a_shadow_where_there_is_ground(renderer):
    thing = Placement(0, None, 0.5, 0.4, 0.5)
    bare, drawn = (draw_one(renderer, *things, background="gray") for things in ((), (thing,)))
    below = bare[:, 43:45, 32] - drawn[:, 43:45, 32]
    assert float(below.min()) > 0.01
    assert torch.equal(bare[:, :5], drawn[:, :5])
    sky, under = (draw_one(renderer, *things) for things in ((), (thing,)))
    assert torch.equal(sky[:, 43:45, 32], under[:, 43:45, 32])


def test_styles(renderer):
    thing = Placement(1, 0, 0.5, 0.5, 0.5)
    gray = draw_one(renderer, thing, style="black and white")
    assert torch.allclose(gray[0], gray[1], atol=1e-5)
    assert torch.allclose(gray[0], gray[2], atol=1e-5)
    blocks = draw_one(renderer, thing, style="pixel art").unfold(1, BLOCK, BLOCK).unfold(2, BLOCK, BLOCK).flatten(3)
    assert torch.allclose(blocks, blocks[..., :1].expand_as(blocks), atol=1e-6)
    assert len({draw_one(renderer, thing, style=style).sum().item() for style in STYLES}) == 3


@pytest.mark.parametrize("window", [(0, 0, SIZE), (8, 16, 32), (40, 0, 24)])
def test_a_window_equals_the_crop(renderer, window):
    rng = random.Random(4)
    scenes = [Scene("mixed", (Group(1, 2, 0), Group(4, 2)), None, "pink"),
              Scene("single_object", (Group(3),), None, "night", None, "pixel art")]
    table, looks = renderer.table([place(s, rng) for s in scenes]), renderer.looks(scenes)
    top, left, side = window
    whole = renderer.draw(table, looks)[:, :, top:top + side, left:left + side]
    assert torch.equal(renderer.draw(table, looks, window), whole)


def test_loading_some_things_changes_no_pixel(sprites, renderer):
    few = SceneRenderer(sprites, SIZE, things=(5, 2))
    placements = Placement(5, 3, 0.3, 0.3, 0.4), Placement(2, None, 0.7, 0.6, 0.3)
    assert torch.equal(draw_one(few, *placements), draw_one(renderer, *placements))


def test_missing_sprite(sprites, tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no sprite for person \(expected 1f9d1.webp\); run recipes/embedded"):
        SceneRenderer(tmp_path, SIZE)
    name = objects()[3].code
    (tmp_path / f"{name}-fe0f.webp").write_bytes((sprites / f"{name}.webp").read_bytes())
    assert len(SceneRenderer(tmp_path, SIZE, things=[3]).atlas.extent) == 1
