"""What is asked of a pipeline, checked before anything is loaded. Needs no torch.

A request becomes a list of `Job`s, one per picture, in the order in which the pictures come out: every prompt with
every seed, and each of these `num_images` times with seed, seed + 1, ...
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from linocut.errors import UsageError
from linocut.pipeline.memory import LARGEST_SIDE, check_size
from linocut.pipeline.png import LARGEST_SEED

MOST_STEPS = 1000
MOST_IMAGES = 100_000


@dataclass(frozen=True)
class Job:
    """One picture to draw. `noise_from` is the index of the caller's generator, or None to seed one with `seed`."""

    index: int
    prompt: str
    seed: int | None
    noise_from: int | None = None


@dataclass(frozen=True)
class Request:
    """A checked request.

    `schedule_tokens`: go through the noise levels of pictures of so many tokens instead. `tile`: decode in strips of so
    many rows of pixels; None leaves it to the plan. Both come from recipes.
    """

    jobs: tuple[Job, ...]
    width: int
    height: int
    steps: int
    guidance: float
    schedule_tokens: int | None = None
    tile: int | None = None

    @property
    def prompts(self) -> int:
        """How many different texts are read."""
        return len({job.prompt for job in self.jobs} | ({""} if self.guided else set()))

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs: two passes per step."""
        return self.guidance > 1


def check_prompt(prompt: object) -> str:
    """Return the prompt, or raise UsageError if there is nothing to draw in it."""
    if not isinstance(prompt, str):
        raise UsageError(f"a prompt must be text (found {type(prompt).__name__})")
    if not prompt.strip():
        raise UsageError("the prompt is empty; say what to draw")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError("the prompt is not valid UTF-8; check the encoding of the terminal or the file") from None
    return prompt


def check_seed(seed: object) -> int:
    """Return the seed, or raise UsageError unless it is a whole number in 0 .. 2^63 - 1."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UsageError(f"a seed must be a whole number (found {seed!r})")
    if not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"a seed must lie in 0..{LARGEST_SEED} (found {seed}); leave it out for a random one")
    return seed


def random_seed() -> int:
    """A seed to print and to keep: 32 bits are enough and easy to copy."""
    return secrets.randbelow(2**32)


def make_request(prompt: str | Sequence[str], settings: dict[str, Any], *, width: int | None = None,
                 height: int | None = None, num_inference_steps: int | None = None,
                 seed: int | Sequence[int] | None = None, num_images: int = 1, guidance_scale: float | None = None,
                 generators: int = 0, schedule_tokens: int | None = None, tile: int | None = None) -> Request:
    """Check a request against a model's settings and spell it out as jobs.

    Args:
        settings: `ModelFolder.settings`, which give the default size, steps and guidance, and whether the model is
            distilled.
        generators: how many noise generators the caller brings instead of seeds; 0 for none.
        schedule_tokens: image tokens of the size whose noise levels to use; None for the picture's own.
        tile: height of the decoder's strips; None for what the plan finds best.
    Raises UsageError for anything that cannot be drawn.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UsageError("no prompt; say what to draw")
    prompts = [check_prompt(each) for each in prompts]

    default_width, default_height = settings["default_size"]
    width, height = (default_width if width is None else width), (default_height if height is None else height)
    check_size(width, height)

    steps = settings["default_steps"] if num_inference_steps is None else num_inference_steps
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MOST_STEPS:
        raise UsageError(f"steps must be a whole number in 1..{MOST_STEPS} (found {steps!r})")
    if not isinstance(num_images, int) or isinstance(num_images, bool) or not 1 <= num_images <= MOST_IMAGES:
        raise UsageError(f"the number of images must be a whole number in 1..{MOST_IMAGES} (found {num_images!r})")

    if tile is not None and not 1 <= tile <= LARGEST_SIDE:
        raise UsageError(f"strips of the decoder have 1..{LARGEST_SIDE} rows (found {tile})")

    distilled = bool(settings["is_distilled"])
    if guidance_scale is None:
        guidance = 1.0 if distilled else float(settings["default_guidance"])
    else:
        guidance = float(guidance_scale)
        if not 0 <= guidance <= 100:  # also catches NaN
            raise UsageError(f"guidance must lie in 0..100 (found {guidance_scale})")
        if distilled and guidance > 1:
            raise UsageError(f"this model is distilled: guidance {guidance:g} would change nothing; leave it out")

    jobs: list[Job] = []
    if generators:
        if seed is not None:
            raise UsageError("give a seed or a generator, not both")
        for text in prompts:
            for source in range(generators):
                jobs += [Job(len(jobs) + i, text, None, source) for i in range(num_images)]
    else:
        for text in prompts:
            given = [random_seed()] if seed is None else [seed] if isinstance(seed, int) else list(seed)
            for each in given:
                first = check_seed(each)
                jobs += [Job(len(jobs) + i, text, check_seed(first + i)) for i in range(num_images)]
        if not jobs:
            raise UsageError("the list of seeds is empty; give at least one, or none at all for a random one")
    return Request(tuple(jobs), width, height, steps, guidance, schedule_tokens, tile)


def size_note(settings: Mapping[str, Any], width: int, height: int) -> str | None:
    """What to tell who asks for a size that the model has not learned; None if it has, or a size near it."""
    learned = settings["trained_sizes"]
    if not learned or any(abs(width - w) <= w / 8 and abs(height - h) <= h / 8 for w, h in learned):
        return None
    sizes = ", ".join(f"{w}x{h}" for w, h in learned)
    return f"this model has learned pictures of {sizes} only; at {width}x{height} things may be cut off or come twice"
