"""diffusers' own pipeline on packed weights: python examples/draw_with_diffusers.py PROMPT [FOLDER]"""

import sys

import torch
from diffusers import Flux2KleinPipeline

from linocut.formats.folder import ModelFolder
from linocut.integrations.diffusers import pipeline_arguments

prompt = sys.argv[1] if len(sys.argv) > 1 else "two red apples and a blue cup"
model = sys.argv[2] if len(sys.argv) > 2 else "embedded"


def tell(pipe: Flux2KleinPipeline, step: int, timestep: torch.Tensor, values: dict[str, torch.Tensor]) -> dict:
    print(f"step {step + 1}: the latents' deviation is {values['latents'].std():.2f}")
    return values


pipe = Flux2KleinPipeline.from_pretrained(ModelFolder.open(model).root, dtype=torch.float32)
packed = sum(buffer.nbytes for buffer in pipe.transformer.buffers())
dense = sum(parameter.nbytes for parameter in pipe.transformer.parameters())
print(f"the transformer has {packed / 1e6:.1f} MB of packed weights and {dense / 1e6:.1f} MB of others")
result = pipe(prompt=prompt, generator=torch.Generator().manual_seed(7), callback_on_step_end=tell,
              **pipeline_arguments(model))
result.images[0].save("picture.png")
