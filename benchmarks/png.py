"""Milliseconds and bytes of PNG files: ours beside Pillow's by zlib's strategies. See `pipeline/png_pixels.py`.

    python benchmarks/png.py [--pictures 6] [--side 1024]

Pictures are the embedded models' of their own size, and noise of a photograph's spectrum (1 / f) at --side pixels.
Of each the quickest of three; "CPU" adds up what all threads took.
"""

import argparse
import io
import statistics
import time
import zlib
from typing import Any

import numpy as np
from PIL import Image, features

from linocut.formats.folder import EMBEDDED
from linocut.pipeline.generate import Pipeline
from linocut.pipeline.png import encode_png

PROMPTS = ("two red apples and a blue cup", "a green fox above a book", "three yellow stars", "a dog left of a cat",
           "a purple car", "a frog and a crown")
WAYS: dict[str, dict[str, Any] | None] = {
    "ours": None, "Pillow, level 6": {}, "Pillow, level 4": {"compress_level": 4},
    "Pillow, level 1": {"compress_level": 1}, "Pillow, runs": {"compress_type": zlib.Z_RLE},
    "Pillow, no strings": {"compress_type": zlib.Z_HUFFMAN_ONLY}}


def photograph(side: int, seed: int) -> Image.Image:
    """Noise whose amplitude falls with its frequency, with a little of a sensor's on top."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1
    layers = []
    for _ in range(3):
        layer = np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) / frequency**1.2).real
        layers.append((layer - layer.mean()) / layer.std() * 50 + 128 + 1.5 * rng.standard_normal((side, side)))
    return Image.fromarray(np.stack(layers, -1).clip(0, 255).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--side", type=int, default=1024)
    given = parser.parse_args()
    sets = {"photograph": [photograph(given.side, i) for i in range(given.pictures)]}
    for model in EMBEDDED:
        pipe = Pipeline.from_pretrained(model)
        sets[model] = [pipe(PROMPTS[i % len(PROMPTS)], seed=i).images[0] for i in range(given.pictures)]
    print(f"zlib-ng {features.version('zlib_ng') if features.check('zlib_ng') else 'no'}, {given.pictures} of each")
    for name, pictures in sets.items():
        for way, options in WAYS.items():
            found = [quickest(picture, options) for picture in pictures]
            wall, cpu, size = (statistics.median(each) for each in zip(*found, strict=True))
            print(f"{name:<16}{way:<24}{wall * 1e3:>8.1f} ms{cpu * 1e3:>8.1f} ms of CPU{size:>10.0f} bytes", flush=True)


def quickest(picture: Image.Image, options: dict[str, Any] | None) -> tuple[float, float, int]:
    """Seconds by the clock and of the CPU, and bytes; ours without options."""
    found = []
    for _ in range(3):
        buffer, wall, cpu = io.BytesIO(), time.perf_counter(), time.process_time()
        if options is None:
            buffer.write(encode_png(picture, None))
        else:
            picture.save(buffer, "PNG", **options)
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    return (*(min(each) for each in zip(*found, strict=True)), buffer.tell())  # type: ignore[return-value]


if __name__ == "__main__":
    main()
