"""One request on its way through the phases: encode, denoise, decode.

When components are kept in memory, each picture goes through all phases before the next one begins; otherwise some
pictures go through a phase together, so that each network is opened once for them. A picture is always computed on its
own, so its pixels do not depend on its company. Shape letters: C latent channels, I image tokens, h and w the height
and width of the token grid (a sixteenth of the picture's).
"""

import contextlib
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linocut import __version__
from linocut.errors import Cancelled, UsageError
from linocut.models.configs import AutoencoderConfig
from linocut.models.flux2 import image_position_ids, text_position_ids
from linocut.models.modulations import Modulations
from linocut.models.prompt_tokenizer import TEMPLATE
from linocut.pipeline import memory_gpu
from linocut.pipeline.embeddings import Entry
from linocut.pipeline.measure import Meter, PhaseTiming
from linocut.pipeline.memory import Ways
from linocut.pipeline.png import Recipe
from linocut.pipeline.request import Job, Request, size_note
from linocut.pipeline.sampler import euler
from linocut.pipeline.schedule import choose_schedule
from linocut.pipeline.vocabulary import Vocabulary

if TYPE_CHECKING:
    from PIL.Image import Image

    from linocut.models.autoencoder import Autoencoder
    from linocut.pipeline.generate import Pipeline

Cancel = threading.Event | Callable[[], bool]


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `done` of `total` units (layers, blocks, strips) of a phase of picture number `picture`.

    phase is "encode", "denoise" or "decode"; `step` and `steps` count denoising steps, both 0 in the other phases.
    """

    phase: str
    done: int
    total: int
    picture: int
    pictures: int
    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Picture:
    """One drawn picture with all that is known about it."""

    image: "Image"
    recipe: Recipe
    index: int
    warnings: tuple[str, ...] = ()


class StepState(Mapping[str, Any]):
    """What a step callback sees; nothing is computed before it is asked for.

    "latents" and "x0": float32 [1, C, h, w], the noisy latents after the step and the predicted clean ones;
    "preview": the predicted clean image as a small RGB picture (PIL, an eighth of the size).
    """

    def __init__(self, latents: Tensor, x0: Tensor, grid: tuple[int, int],
                 preview: "Callable[[Tensor], Image]") -> None:
        self._makers: dict[str, Callable[[], Any]] = {
            "latents": lambda: _to_grid(latents, grid), "x0": lambda: _to_grid(x0, grid),
            "preview": lambda: preview(_to_grid(x0, grid))}
        self._made: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._made:
            self._made[key] = self._makers[key]()
        return self._made[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)




StepCallback = Callable[["Pipeline", int, float, StepState], Any]


class Run:
    """Draws the pictures of one request; see `pictures`."""

    def __init__(self, pipe: "Pipeline", request: Request, ways: Ways, sources: Sequence[torch.Generator],
                 callback: StepCallback | None, cancel: Cancel | None,
                 on_progress: Callable[[Progress], None] | None) -> None:
        self.pipe, self.request, self.ways, self.sources = pipe, request, ways, sources
        self.callback, self.on_progress = callback, on_progress
        self.cancelled = cancel.is_set if isinstance(cancel, threading.Event) else cancel
        self.meter = Meter(pipe.device)
        self._preview_vae: Autoencoder | None = None
        self.vocabulary = Vocabulary.of(pipe.folder)
        self._about_size = size_note(pipe.folder.settings, request.width, request.height)
        side = AutoencoderConfig.from_dict(pipe.folder.config("vae")).token_side
        self.grid = (request.height // side, request.width // side)
        self.schedule = choose_schedule(pipe.folder, self.grid[0] * self.grid[1], request.steps,
                                        request.schedule_tokens)

    @property
    def _limit(self) -> int | None:
        """Bytes that the process may have on the GPU that draws."""
        return self.pipe.max_memory if self.pipe.device.type == "cuda" else None

    def pictures(self) -> Iterator[Picture]:
        """Yield the pictures in order, each as soon as it is ready, within the pipeline's limit on a GPU's memory."""
        with memory_gpu.holding(self.pipe.choice.name, self._limit):
            yield from self._pictures()

    def _pictures(self) -> Iterator[Picture]:
        jobs = self.request.jobs
        at_once = 1 if self.ways.keep_loaded else self.ways.at_once
        features: dict[str, Tensor] = {}
        notes: dict[str, str | None] = {}
        for start in range(0, len(jobs), at_once):
            batch = jobs[start:start + at_once]
            wanted = dict.fromkeys([job.prompt for job in batch] + ([""] if self.request.guided else []))
            features = {text: features[text] for text in wanted if text in features}
            with explain_memory(self.request, self._limit), torch.no_grad():
                missing = [text for text in wanted if text not in features]
                if missing:
                    features.update(self._encode(missing, notes, batch[0]))
                latents, seeds = self._denoise(batch, features)
            for job, seed, image in zip(batch, seeds, self._decode(batch, latents), strict=True):
                unknown = None if self.vocabulary is None else self.vocabulary.note(job.prompt)
                told = [note for note in (notes[job.prompt], unknown, self._about_size, self.schedule.note) if note]
                yield Picture(image, self._recipe(job, seed), job.index, tuple(told))

    def _encode(self, prompts: list[str], notes: dict[str, str | None], job: Job) -> dict[str, Tensor]:
        """Text features of each prompt, from the prompt cache where they are there."""
        with self.meter.phase("encode") as timing:
            self._check()
            cache = self.pipe.prompt_cache()
            entries = {} if cache is None else {text: entry for text in prompts
                                                if (entry := cache.get(TEMPLATE.format(prompt=text))) is not None}
            timing.cached += len(entries)
            unread = [text for text in prompts if text not in entries]
            if unread:
                for text, entry in self._read(unread, timing, job):
                    entries[text] = entry
                    if cache is not None:
                        cache.put(TEMPLATE.format(prompt=text), entry)
            else:
                self._report("encode", 1, 1, job)
        self._keep_timings()
        length = int(self.pipe.folder.settings["text_length"])
        notes.update({text: cut_off(text, entry, length) for text, entry in entries.items()})
        return {text: entry.features.to(self.pipe.device) for text, entry in entries.items()}

    def _read(self, prompts: list[str], timing: PhaseTiming, job: Job) -> Iterator[tuple[str, Entry]]:
        """Run the text encoder on each prompt."""
        components, device = self.pipe.components, self.pipe.device
        start = time.perf_counter()
        with components.use("tokenizer") as tokenizer:
            tokens = [(*tokenizer.encode([text]), tokenizer.count(text), tokenizer.kept(text)) for text in prompts]
            del tokenizer
        self._check()
        with components.use("text_encoder") as network:
            encoder = components.runner(network)
            timing.load_seconds += time.perf_counter() - start
            for number, (text, (ids, mask, count, kept)) in enumerate(zip(prompts, tokens, strict=True)):
                def on_layer(done: int, total: int, number: int = number) -> None:
                    components.release_part(done)
                    self._report("encode", number * total + done, len(prompts) * total, job)

                features = encoder(ids.to(device), mask.to(device), on_layer=on_layer)
                yield text, Entry(features, count, kept)
            del network, encoder

    def _denoise(self, batch: Sequence[Job],
                 features: dict[str, Tensor]) -> tuple[list[Tensor], list[int | None]]:
        pipe, request = self.pipe, self.request
        latents: list[Tensor] = []
        seeds: list[int | None] = []
        with self.meter.phase("denoise") as timing:
            start = time.perf_counter()
            self._check()
            modulations = pipe.components.modulations(self.schedule)
            with pipe.components.use("transformer") as network:
                transformer = pipe.components.runner(network, self.ways.rows)
                timing.load_seconds += time.perf_counter() - start
                image_ids = image_position_ids(*self.grid).to(pipe.device)
                for job in batch:
                    noise, seed = self._noise(job, transformer.config.in_channels)
                    negative = features[""] if request.guided else None
                    velocity = self._velocity(transformer, modulations, features[job.prompt], negative, image_ids, job)
                    began = time.perf_counter()

                    def on_step(i: int, sigma: float, x: Tensor, x0: Tensor) -> None:
                        nonlocal began
                        timing.steps.append(time.perf_counter() - began)
                        if self.callback is not None:
                            self.callback(pipe, i, sigma, StepState(x, x0, self.grid, self._preview))
                        self._check()
                        began = time.perf_counter()

                    latents.append(_to_grid(euler(velocity, noise, self.schedule.sigmas, on_step), self.grid))
                    seeds.append(seed)
                del network, transformer, velocity
        self._keep_timings()
        return latents, seeds

    def _velocity(self, transformer: Any, modulations: Sequence[Modulations], text: Tensor, negative: Tensor | None,
                  image_ids: Tensor, job: Job) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the velocity field of one picture: x float32 [1, I, C] at each step's sigma in turn to [1, I, C]."""
        dtype, steps = self.pipe.dtype, self.request.steps
        text_ids = text_position_ids(text.shape[1]).to(image_ids.device)
        passes = 1 if negative is None else 2
        step = 0

        def velocity(x: Tensor, _: Tensor) -> Tensor:
            nonlocal step
            current = step
            step += 1

            def evaluate(features: Tensor, number: int) -> Tensor:
                def on_block(done: int, total: int) -> None:
                    self.pipe.components.release_part(done)
                    self._report("denoise", (current * passes + number) * total + done, steps * passes * total, job,
                                 current)
                return transformer(x.to(dtype), features.to(dtype), modulations[current], image_ids, text_ids,
                                   on_block=on_block)

            positive = evaluate(text, 0)
            if negative is None:
                return positive
            opposite = evaluate(negative, 1).float()
            return opposite + self.request.guidance * (positive.float() - opposite)

        return velocity

    def _noise(self, job: Job, channels: int) -> tuple[Tensor, int | None]:
        """Return the starting noise as tokens [1, I, C], and the seed that gives it if there is one."""
        if job.noise_from is None:
            assert job.seed is not None
            source = torch.Generator().manual_seed(job.seed)
            seed: int | None = job.seed
        else:
            source = self.sources[job.noise_from]
            # A generator that has been drawn from is in a state that no seed gives; then the recipe has none.
            fresh = torch.Generator().manual_seed(source.initial_seed())
            unused = source.device.type == "cpu" and torch.equal(fresh.get_state(), source.get_state())
            seed = source.initial_seed() if unused else None
        noise = torch.randn((1, channels, *self.grid), generator=source, dtype=torch.float32, device=source.device)
        return noise.flatten(2).transpose(1, 2).to(self.pipe.device), seed

    def _decode(self, batch: Sequence[Job], latents: list[Tensor]) -> "Iterator[Image]":
        waiting = latents[::-1]
        del latents
        with contextlib.ExitStack() as opened:
            vae: Any = None
            for job in batch:
                z = waiting.pop()  # let go of each as its picture is made
                with self.meter.phase("decode") as timing, explain_memory(self.request, self._limit), torch.no_grad():
                    if vae is None:
                        start = time.perf_counter()
                        vae = opened.enter_context(self.pipe.components.use("vae"))
                        timing.load_seconds += time.perf_counter() - start
                    self._check()

                    def on_part(done: int, total: int, job: Job = job) -> None:
                        self._report("decode", done, total, job)

                    pixels = vae.develop(z, self.ways.tile, on_part)
                    image = to_image(pixels[0] / 2 + 0.5)
                    del z, pixels
                self._keep_timings()
                yield image
            del vae

    def _preview(self, x0: Tensor) -> "Image":
        if self._preview_vae is None:
            self._preview_vae = self.pipe.components.vae_for_previews()
        there = next(self._preview_vae.buffers()).device
        return to_image(self._preview_vae.preview_rgb(x0.to(there))[0])

    def _recipe(self, job: Job, seed: int | None) -> Recipe:
        pipe, request = self.pipe, self.request
        image_tokens = self.grid[0] * self.grid[1]
        tokens = image_tokens + int(pipe.folder.settings["text_length"])
        return Recipe(model=pipe.folder.name, model_hash=pipe.model_hash, prompt=job.prompt, seed=seed,
                      width=request.width, height=request.height, steps=request.steps, guidance=request.guidance,
                      dtype=str(pipe.dtype).removeprefix("torch."), kernel=pipe.kernel(tokens),
                      device=pipe.components.computes_on, tile=self.ways.tile,
                      schedule_tokens=None if self.schedule.tokens == image_tokens else self.schedule.tokens,
                      versions={"linocut": __version__, "torch": str(torch.__version__),
                                "python": platform.python_version(), **pipe.components.versions})

    def _check(self) -> None:
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("cancelled")

    def _report(self, phase: str, done: int, total: int, job: Job, step: int = 0) -> None:
        self._check()
        if self.on_progress is not None:
            steps = self.request.steps if phase == "denoise" else 0
            self.on_progress(Progress(phase, done, total, job.index, len(self.request.jobs), step, steps))

    def _keep_timings(self) -> None:
        self.pipe.timings = {name: phase.to_dict() for name, phase in self.meter.phases.items()}


def cut_off(prompt: str, entry: Entry, length: int) -> str | None:
    """Return a warning that quotes what of the prompt does not fit into `length` tokens, or None if all of it fits."""
    if entry.tokens <= length:
        return None
    lost = prompt[entry.characters:].strip()
    quoted = f"cut off: {lost[:80] + ' ...' if len(lost) > 80 else lost!r}" if lost else "its closing words were cut"
    return f"the prompt takes {entry.tokens} tokens and this model reads {length}; {quoted}"


def _to_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, grid)


def to_image(pixels: Tensor) -> "Image":
    """[3, H, W] in [0, 1] to a PIL picture."""
    return to_images(pixels[None])[0]


def to_images(pixels: Tensor) -> "list[Image]":
    """[B, 3, H, W] in [0, 1] to PIL pictures, with one wait for the device."""
    from PIL import Image
    levels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(each) for each in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


@contextlib.contextmanager
def explain_memory(request: Request, limit: int | None = None) -> Iterator[None]:
    """Turn torch's ways of running out of memory into one that says what to do. `limit`: bytes to be had of a GPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        # torch's words, mlx's on a CPU and mlx's on Metal
        refusals = ("allocate memory", "Unable to allocate", "maximum allowed buffer size", "Insufficient Memory")
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in text for words in refusals):
            within = "" if limit is None else f" within {limit / 1e9:.2f} GB, all that this process has there included"
            raise UsageError(f"out of memory while drawing {request.width}x{request.height}{within}; choose a smaller "
                             f"size{'' if limit is None else ' or a higher limit'} (see 'linocut plan')") from error
        raise
