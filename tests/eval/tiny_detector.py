"""The detector's recipe at next to no size, on sprites of plain shapes."""

from pathlib import Path

import numpy as np
from PIL import Image

from linocut.train.vocabulary import objects

RECIPE = """size = 64
shapes = [[64, 64], [96, 64]]
widths = [16, 24, 32, 40]
head = 32
steps = 20
batch = 8
lr = 4e-3
warmup = 5
ema = 0.95
save_every = 5
log_every = 1
cases = 4
things = 3
layouts = 64
settle = 2
vae = ""
"""


def write_shapes(folder: Path, count: int = 3) -> Path:
    """Sprites of the first things: a wide bar, a tall bar with a hole, a triangle, ..., lighter above than below."""
    folder.mkdir()
    y, x = np.mgrid[0:32, 0:32]
    shapes = (abs(y - 16) < 8, (abs(x - 16) < 8) & ~((abs(x - 16) < 4) & (abs(y - 12) < 5)), x + y > 31)
    for thing, inside in zip(objects()[:count], shapes, strict=False):
        pixels = np.zeros((32, 32, 4), np.uint8)
        pixels[..., :3] = np.linspace(220, 60, 32).astype(np.uint8)[:, None, None]
        pixels[..., 3] = 255 * inside
        Image.fromarray(pixels).save(folder / f"{thing.code}.webp", lossless=True)
    return folder
