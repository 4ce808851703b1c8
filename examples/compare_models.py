"""The same seed through the ternary and the binary model, side by side: python examples/compare_models.py [MODELS]"""

import sys

from PIL import Image

import linocut

models = sys.argv[1:] or ["embedded", "embedded-binary"]
prompts = ["a red apple", "two blue cups", "a cat left of a dog"]

rows = []
for model in models:
    pipe = linocut.Pipeline.from_pretrained(model)
    rows.append(pipe(prompts, seed=1).images)
    pipe.close()

width, height = rows[0][0].size
sheet = Image.new("RGB", (width * len(prompts), height * len(models)))
for y, row in enumerate(rows):
    for x, image in enumerate(row):
        sheet.paste(image, (x * width, y * height))
sheet.save("comparison.png")
