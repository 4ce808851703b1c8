"""Draw one picture and write it with its recipe: python examples/draw.py "two red apples and a blue cup" """

import sys

import linocut
from linocut.pipeline.png import write_png

prompt = sys.argv[1] if len(sys.argv) > 1 else "two red apples and a blue cup"
model = sys.argv[2] if len(sys.argv) > 2 else "embedded"

pipe = linocut.Pipeline.from_pretrained(model)
result = pipe(prompt, seed=7)
write_png(result.images[0], "picture.png", result.recipe, force=True)
for phase, timing in result.timings.items():
    print(f"{phase:<8}{timing['seconds']:6.2f} s, at most {timing['peak_rss'] / 1e6:.0f} MB")
