"""Sprites made of plain shapes and a recipe of next to no size, so that training can be tested in seconds."""

from pathlib import Path

import numpy as np
from PIL import Image

from linocut.train.vocabulary import objects

ROOT = Path(__file__).parent.parent.parent
PIXELS = 24
SMALLER = {'name = "tiny"': 'name = "tiny"\npolicy = "flux2-compact"',
           "size = 64": "size = 32", "scenes = 96": "scenes = 48", "steps = 6\nbatch = 8": "steps = 20\nbatch = 8",
           "[teacher]": "[teacher]\npixels = 0.5\nlr = 3e-3\nwarmup = 1\nema = 0.5",
           "[vae]": "[vae]\nlr = 2e-3\nwarmup = 1",
           "[ternary]": "[ternary]\ncalibrate = 8\npixels = 0.9"}
PROMPTS = "# task | prompt\nsingle_object | a photo of a fox, please\ncounting | exactly three apples\n"


def write_sprites(folder: Path) -> Path:
    """One opaque square per object, lighter above than below, in a transparent frame that cropping removes."""
    folder.mkdir()
    shade = np.linspace(230, 60, PIXELS - 8).astype(np.uint8)
    for index, thing in enumerate(objects()):
        pixels = np.zeros((PIXELS, PIXELS, 4), np.uint8)
        pixels[4:-4, 4:-4, :3] = shade[:, None, None]
        pixels[4:-4, 4:-4, index % 3] //= 2  # not all of them gray
        pixels[4:-4, 4:-4, 3] = 255
        Image.fromarray(pixels).save(folder / f"{thing.code}.webp", lossless=True)
    return folder


def write_recipe(folder: Path) -> Path:
    """`recipes/tiny-cpu.toml`, smaller still and with two held-out prompts."""
    text = (ROOT / "recipes" / "tiny-cpu.toml").read_text("utf-8").replace("embedded/prompts.txt", "prompts.txt")
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "prompts.txt").write_text(PROMPTS)
    (folder / "recipe.toml").write_text(text)
    return folder / "recipe.toml"
