"""Sprites: cropped, resized without bleeding, and recoloured where they are colourful."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from linocut.train.sprites import CHANNELS, edge_rgb, load_atlas, open_sprite, split_colour

CPU = torch.device("cpu")


def save(path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path, lossless=True)


def unpack(texels: torch.Tensor) -> list[torch.Tensor]:
    return [texels >> 8 * place & 255 for place in range(CHANNELS)]


def test_sprites_are_cropped_and_centred(tmp_path):
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[10:20, 5:35] = (200, 10, 10, 255)  # 30 wide, 10 high
    save(tmp_path / "a.webp", pixels)
    sprite = open_sprite(tmp_path / "a.webp")
    assert sprite.shape == (4, 30, 30)
    assert torch.equal(sprite[3].sum(1) > 0, torch.arange(30).ge(10) & torch.arange(30).lt(20))
    atlas = load_atlas(tmp_path, [SimpleNamespace(code="a", name="a")], (8, 16), CPU)
    assert atlas.starts == (0, 64)
    assert atlas.stride == len(atlas.texels) == 64 + 256
    assert atlas.extent[0].tolist() == pytest.approx([1.0, 2 / 3])


def test_colourful_parts_take_a_colour_and_gray_ones_keep_theirs():
    rgba = torch.ones(4, 20, 20)
    rgba[:3, :12] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]  # mostly red
    rgba[:3, 12:] = 0.3  # on gray wheels
    tinted = split_colour(rgba)[5]
    assert float(tinted[:12].min()) == 1
    assert float(tinted[12:].max()) == 0
    rgba[:3, :12] = 0.8
    assert float(split_colour(rgba)[5].min()) == 1  # nothing is colourful: all of it


def test_small_details_of_gray_things_keep_their_colour():
    rgba = torch.ones(4, 20, 20)
    rgba[:3] = 0.8
    rgba[:3, 4:6, 4:6] = 0.1  # an eye
    rgba[:3, 10:13, 10:13] = torch.tensor([0.9, 0.4, 0.4])[:, None, None]  # a nose
    tinted = split_colour(rgba)[5]
    assert float(tinted[4:6, 4:6].max()) == 0
    assert float(tinted[10:13, 10:13].max()) == 0
    assert float(tinted.sum()) == 400 - 4 - 9
    rgba[:3, :5] = 0.1  # a quarter of it is dark: no detail
    assert float(split_colour(rgba)[5, :5].min()) == 1


def test_shade_follows_brightness():
    rgba = torch.ones(4, 1, 101)
    rgba[:3] = torch.linspace(0.1, 0.9, 101)
    shade = split_colour(rgba)[4, 0]
    assert float(shade[0]) == 0
    assert float(shade[-1]) == 1
    assert float(shade[50]) == pytest.approx(0.5, abs=0.02)
    assert (shade.diff() >= 0).all()
    rgba[:3] = 0.5 + 0.01 * torch.rand(1, 101, generator=torch.Generator().manual_seed(0))  # compression noise
    assert float(split_colour(rgba)[4].std()) < 0.02


def test_what_hides_under_transparency_does_not_bleed(tmp_path):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., 1] = 255  # green, unseen
    pixels[16:48, 16:48] = (255, 0, 0, 255)
    pixels[0, 0, 3] = pixels[-1, -1, 3] = 255  # so that nothing is cropped
    save(tmp_path / "a.webp", pixels)
    atlas = load_atlas(tmp_path, [SimpleNamespace(code="a", name="a")], (16,), CPU)
    red, green, _, alpha, _, _ = (channel.view(16, 16)[2:-2, 2:-2] for channel in unpack(atlas.texels))
    seen = alpha > 20
    assert seen.sum() >= 64
    assert int(red[seen].min()) > 240
    assert int(green[seen].max()) < 15


def test_edge_colour():
    rgba = torch.zeros(4, 60, 60)
    rgba[3, 10:50, 10:50] = 1
    rgba[0, 10:50, 10:50] = 1  # red outside
    rgba[:3, 16:44, 16:44] = torch.tensor([0.0, 0.0, 1.0])[:, None, None]  # blue inside
    assert edge_rgb(rgba) == (1.0, 0.0, 0.0)
