"""What goes over the wire, for checking requests and for the OpenAPI schema. Responses of the own API are in contract
with the studio; those below /v1 have the shape of OpenAI's images API.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from linocut.pipeline.png import LARGEST_SEED
from linocut.server.marks import LONGEST_TAG, MOST_TAGS
from linocut.server.settings import LARGEST_SIDE, MOST_IMAGES, MOST_PROMPT, MOST_STEPS

Prompt = Annotated[str, Field(min_length=1, max_length=MOST_PROMPT, pattern=r"\S", description="What to draw.")]
Side = Annotated[int, Field(ge=32, le=LARGEST_SIDE, multiple_of=32)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED - MOST_IMAGES)]
ImageId = Annotated[str, Field(min_length=1, max_length=64)]
Tag = Annotated[str, Field(min_length=1, max_length=LONGEST_TAG, pattern=r"\S")]


class Asked(BaseModel):
    """Base of requests: what is not known is a mistake, and a string is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every error: one sentence that says what was expected, what was found and what to do."""

    error: ErrorFacts


class NewJob(Asked):
    """A prompt to draw `num_images` times, with seed, seed + 1, ...; None means the model's default."""

    prompt: Prompt
    model: str | None = None
    width: Side | None = None
    height: Side | None = None
    steps: Steps | None = None
    seed: Seed | None = None
    num_images: int = Field(1, ge=1, le=MOST_IMAGES)
    guidance: float | None = Field(None, ge=0, le=100)


class Move(Asked):
    """A new place in the queue; 0 is next."""

    position: int = Field(ge=0, le=10**6)


class Marks(Asked):
    """What to change of a picture's marks; None leaves it."""

    favourite: bool | None = None
    tags: list[Tag] | None = Field(None, max_length=MOST_TAGS)


class Ids(Asked):
    """Pictures to do something with."""

    ids: list[ImageId] = Field(min_length=1, max_length=1000)


class Login(Asked):
    token: str = Field(max_length=200)


class Image(BaseModel):
    """A picture in the gallery. `trashed` is the time of its deletion."""

    id: str
    created: float
    model: str
    model_hash: str
    prompt: str
    seed: int | None
    width: int
    height: int
    steps: int
    guidance: float
    favourite: bool
    tags: list[str]
    bytes: int
    trashed: float | None
    url: str
    thumbnail_url: str


class ImageWithRecipe(Image):
    recipe: dict[str, Any]


class Images(BaseModel):
    images: list[Image]


class Page(Images):
    """Pictures from the newest on; `next` is the `after` of the following page."""

    next: str | None
    total: int


class TagCount(BaseModel):
    tag: str
    count: int


class Tags(BaseModel):
    tags: list[TagCount]


class Progress(BaseModel):
    """`fraction` and `seconds_left` are those of the whole job, all else of the present phase."""

    phase: Literal["loading", "encode", "denoise", "decode"]
    done: int
    total: int
    picture: int
    pictures: int
    step: int
    steps: int
    fraction: float
    seconds_left: float | None


class Job(BaseModel):
    id: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    cancelling: bool
    position: int | None
    created: float
    started: float | None
    finished: float | None
    model: str
    prompt: str
    width: int
    height: int
    steps: int
    seeds: list[int]
    guidance: float
    progress: Progress | None
    images: list[Image]
    warnings: list[str]
    error: str | None
    timings: dict[str, Any]


class Jobs(BaseModel):
    jobs: list[Job]
    queued: int
    limit: int


class FoundRecipe(BaseModel):
    """`same_weights` is None if this server has no model of that name."""

    recipe: dict[str, Any]
    model_known: bool
    same_weights: bool | None


class ModelMemory(BaseModel):
    width: int
    height: int
    peak: int
    phases: dict[str, int]
    free: int | None
    fits: bool
    why_not: str | None


class Model(BaseModel):
    name: str
    encoding: str
    default_size: list[int]
    default_steps: int
    is_distilled: bool
    payload: dict[str, int]
    memory: ModelMemory
    loaded: bool
    examples: list[str]


class Models(BaseModel):
    models: list[Model]


class Link(BaseModel):
    """How a phone reaches this server; without a LAN address `hint` says how to get one."""

    lan: bool
    url: str | None
    qr: str | None
    hint: str | None


class OpenAIRequest(BaseModel):
    """The images API of OpenAI; `seed` and `steps` are ours. What it has besides is accepted and has no effect."""

    prompt: Prompt
    model: str | None = None
    n: int | None = Field(1, ge=1, le=10)
    size: str | None = Field(None, pattern=r"^(auto|[0-9]{2,5}x[0-9]{2,5})$", description="256x256, or auto")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=3)
    seed: Seed | None = None
    steps: Steps | None = None


class OpenAIImage(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None


class OpenAIImages(BaseModel):
    created: int
    data: list[OpenAIImage]
    output_format: str
    size: str


class OpenAIModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "linocut"


class OpenAIModels(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]
