"""Sheets: every picture in its place with its caption, and small enough to commit."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from linocut.errors import FormatError, UsageError
from linocut.train.autoencoder import save_grid
from linocut.train.sheet import Entry, _wrap, compose, split_grid, write_sheet

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def flat(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (64, 64), colour)


def test_pictures_lie_side_by_side_with_a_caption_below():
    entries = [Entry((flat(RED), flat(GREEN), flat(BLUE)), "a red book and a yellow vase on it", f"seed {i}")
               for i in range(5)]
    sheet = np.asarray(compose(entries, ("teacher", "ternary", "binary"), columns=2, width=800))
    assert sheet.shape[1] == 800
    for colour in (RED, GREEN, BLUE):
        rows, columns = (sheet == colour).all(-1).nonzero()
        assert len(rows) % 5 == 0
        assert len(rows) == 5 * round((len(rows) / 5) ** 0.5) ** 2  # five squares
        assert len(np.unique(columns)) * len(np.unique(rows)) == 6 * len(rows) / 5  # in two columns and three rows
    red, green = ((sheet == colour).all(-1) for colour in (RED, GREEN))
    assert red.any(0).argmax() < green.any(0).argmax()
    bottom = red.any(1).argmax() + round((red.sum() / 5) ** 0.5)
    assert (sheet[bottom:bottom + 30] < 100).any()  # ink of the caption
    assert (sheet[:red.any(1).argmax()] < 160).any()  # and of the headings


def test_long_captions_wrap_and_make_room():
    short, long = (compose([Entry((flat(RED),), text)], (), 1, 200).height for text in ("a fox", "a fox " * 30))
    assert long >= short + 4 * 19
    font = ImageFont.load_default(15)
    lines = _wrap("one two three incomprehensibilities four", font, 60)
    assert " ".join(lines) == "one two three incomprehensibilities four"
    assert all(font.getlength(line) <= 60 or " " not in line for line in lines)


def test_nothing_to_show():
    with pytest.raises(UsageError, match="no held-out prompts"):
        compose([], (), 3)


def test_a_sheet_of_noise_is_made_to_fit(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    write_sheet(Image.fromarray(noise), tmp_path / "docs" / "large.png", limit=10**6)
    write_sheet(Image.fromarray(noise), tmp_path / "docs" / "small.png", limit=100_000)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "docs" / "large.png")), noise)
    assert (tmp_path / "docs" / "small.png").stat().st_size <= 100_000
    assert Image.open(tmp_path / "docs" / "small.png").size == (300, 300)
    assert "300 x 300" in capsys.readouterr().out


@pytest.mark.parametrize("count", [3, 8, 11])
def test_grids_come_apart_again(tmp_path, count):
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_grid(images, 8, tmp_path / "teacher.png")
    for image, picture in zip(images, split_grid(tmp_path / "teacher.png", count, 16), strict=True):
        expected = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(picture), expected)


def test_a_grid_of_another_recipe(tmp_path):
    save_grid(torch.zeros(9, 3, 16, 16), 8, tmp_path / "teacher.png")
    with pytest.raises(FormatError, match=r"another size than the recipe says \(expected \(288, 72\)"):
        split_grid(tmp_path / "teacher.png", 9, 32)
