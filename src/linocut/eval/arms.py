"""The models that are compared: each draws the same prompts from the same noise.

On a CPU pictures are drawn one by one by the pipeline that users run. On a GPU, where small models are drawn faster
together, they go through the same networks, schedule and noise in batches. How a GPU's products are computed depends on
how many go together, and so do the last bits of pictures (docs/gpu.md).

Shape letters: B batch, I image tokens, C channels of a token, h and w the token grid.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linocut.errors import UsageError
from linocut.models import flux2_cpu
from linocut.models.configs import AutoencoderConfig
from linocut.models.flux2 import image_position_ids, text_position_ids
from linocut.pipeline.generate import Pipeline
from linocut.pipeline.request import Job, Request, make_request
from linocut.pipeline.run import to_images
from linocut.pipeline.sampler import euler
from linocut.pipeline.schedule import choose_schedule

if TYPE_CHECKING:
    from PIL.Image import Image

_AT_ONCE = 32  # pictures of a batch on a GPU


@dataclass(frozen=True)
class Shot:
    """One picture to draw."""

    prompt: str
    seed: int


class Arm:
    """A model with the size and the number of steps that it draws in; `label` names it in results and on disk.

    Raises what opening the model raises, and UsageError for a size or a number of steps that it cannot draw.
    """

    def __init__(self, label: str, model: str, device: str = "cpu", width: int | None = None,
                 height: int | None = None, steps: int | None = None, batched: bool | None = None) -> None:
        self.label = label
        self.pipe = Pipeline.from_pretrained(model, device=device, prompt_cache=False)
        self.request: Request = make_request("a picture", self.pipe.folder.settings, width=width, height=height,
                                             num_inference_steps=steps, seed=0)
        self.batched = self.pipe.device.type != "cpu" if batched is None else batched

    @property
    def facts(self) -> dict[str, Any]:
        """What decides its pictures, for the description of a run."""
        request, folder = self.request, self.pipe.folder
        side = AutoencoderConfig.from_dict(folder.config("vae")).token_side
        tokens = (request.height // side) * (request.width // side) + int(folder.settings["text_length"])
        return {"model": folder.name, "hash": self.pipe.model_hash, "width": request.width, "height": request.height,
                "steps": request.steps, "kernel": self.pipe.kernel(tokens),
                **({"guidance": request.guidance} if request.guided else {})}

    def draw(self, shots: Sequence[Shot]) -> Iterator[Image]:
        """A picture per shot, in order."""
        if not self.batched:
            jobs = tuple(Job(index, shot.prompt, shot.seed) for index, shot in enumerate(shots))
            yield from (picture.image for picture in self.pipe.draw_request(replace(self.request, jobs=jobs)))
            return
        field = Field(self)
        for start in range(0, len(shots), _AT_ONCE):
            part = shots[start:start + _AT_ONCE]
            yield from field.pictures(field.walk(field.noise([shot.seed for shot in part]),
                                                 field.read([shot.prompt for shot in part])))


class Field:
    """An arm's velocity field: what it would do at any state of any picture. Its networks stay loaded."""

    def __init__(self, arm: Arm) -> None:
        pipe, request = arm.pipe, arm.request
        self.pipe = pipe
        side = AutoencoderConfig.from_dict(pipe.folder.config("vae")).token_side
        self.grid = (request.height // side, request.width // side)
        self.schedule = choose_schedule(pipe.folder, self.grid[0] * self.grid[1], request.steps)
        self.levels: list[float] = self.schedule.sigmas.tolist()
        self.modulations = pipe.components.modulations(self.schedule)
        self._open: list[Any] = []
        self.tokenizer, encoder, transformer, self.vae = (
            self._keep(name) for name in ("tokenizer", "text_encoder", "transformer", "vae"))
        self.encoder, self.channels = encoder, transformer.config.in_channels
        self.transformer = pipe.components.runner(transformer)
        self.image_ids = image_position_ids(*self.grid).to(pipe.device)
        self.guidance = request.guidance
        self.empty = self.read([""]) if request.guided else None

    def _keep(self, name: str) -> Any:
        context = self.pipe.components.use(name)
        self._open.append(context)  # a generator that is let go of would drop the network
        return context.__enter__()

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The noise that the pipeline draws from for these seeds: float32 [B, I, C]."""
        rows = [torch.randn((1, self.channels, *self.grid), generator=torch.Generator().manual_seed(seed),
                            dtype=torch.float32) for seed in seeds]
        return torch.cat(rows).flatten(2).transpose(1, 2).contiguous().to(self.pipe.device)

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> Tensor:
        """Text features [B, T, F]."""
        ids, mask = self.tokenizer.encode(list(prompts))
        return self.encoder(ids.to(self.pipe.device), mask.to(self.pipe.device))

    @torch.no_grad()
    def velocity(self, x: Tensor, text: Tensor, step: int) -> Tensor:
        """Velocity at states x [B, I, C] of step number `step`, guided if the arm is: float32 [B, I, C]."""
        v = self._velocity(x, text, step)
        if self.empty is None:
            return v
        opposite = self._velocity(x, self.empty.expand_as(text), step)
        return opposite + self.guidance * (v - opposite)

    def _velocity(self, x: Tensor, text: Tensor, step: int) -> Tensor:
        text_ids = text_position_ids(text.shape[1]).to(x.device)
        dtype = self.pipe.dtype
        if isinstance(self.transformer, flux2_cpu.FusedTransformer):  # takes one picture's modulations at a time
            return torch.cat([self.transformer(x[i:i + 1].to(dtype), text[i:i + 1].to(dtype), self.modulations[step],
                                               self.image_ids, text_ids).float() for i in range(len(x))])
        return self.transformer(x.to(dtype), text.to(dtype), self.modulations[step], self.image_ids, text_ids).float()

    def states(self, x: Tensor, text: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """This arm's own path from noise x: (step, state, velocity there) for each step, then (steps, result, 0)."""
        for step, (here, there) in enumerate(zip(self.levels, self.levels[1:], strict=False)):
            v = self.velocity(x, text, step)
            yield step, x, v
            x = x + (there - here) * v
        yield len(self.levels) - 1, x, torch.zeros_like(x)

    def walk(self, x: Tensor, text: Tensor) -> Tensor:
        """From noise to clean latents [B, I, C]."""
        step = -1

        def velocity(state: Tensor, _: Tensor) -> Tensor:
            nonlocal step
            step += 1
            return self.velocity(state, text, step)

        return euler(velocity, x, self.schedule.sigmas)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pictures float32 [B, 3, H, W] in 0..1 of latents [B, I, C]."""
        z = x.transpose(1, 2).unflatten(2, self.grid)
        return torch.cat([self.vae.image_from_latents(part) for part in z.split(8)]).float().clamp(-1, 1) / 2 + 0.5

    def pictures(self, x: Tensor) -> list[Image]:
        """As `decode`, as pictures."""
        return to_images(self.decode(x))


def label_of(model: str, taken: Sequence[str] = ()) -> tuple[str, str]:
    """(label, model) of an argument MODEL or LABEL=MODEL. The label is a name for a folder.

    Raises UsageError for a label that is taken or holds other signs.
    """
    label, equals, name = model.partition("=")
    if not equals:
        label, name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").split("/")[-1]).strip("-."), model
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
        raise UsageError(f"{model!r}: a label may hold letters, digits, '.', '_' and '-'; say LABEL=MODEL")
    if label in taken:
        raise UsageError(f"two models are labelled {label!r}; say LABEL=MODEL to tell them apart")
    return label, name
