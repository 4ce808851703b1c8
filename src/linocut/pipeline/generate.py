"""From prompts to pictures: `Pipeline`, in diffusers' words.

    >>> pipe = Pipeline.from_pretrained("embedded")
    >>> pipe("two red apples and a blue cup", seed=7).images[0].save("apples.png")

Components live one after another: prompts are encoded, latents denoised, pictures decoded (`linocut.pipeline.run`).
"""

import math
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from linocut import __version__
from linocut.errors import FormatError, UsageError
from linocut.formats.folder import ModelFolder
from linocut.kernels import dispatch, fused, fusible
from linocut.kernels.gpu import accuracy
from linocut.kernels.gpu import runtime as gpu
from linocut.mlx import runtime
from linocut.models.configs import CELL, AutoencoderConfig, Flux2Config, Qwen3Config
from linocut.pipeline import budget, embeddings, memory, memory_gpu
from linocut.pipeline.components import Components
from linocut.pipeline.device import choose
from linocut.pipeline.png import Recipe
from linocut.pipeline.request import Request, make_request
from linocut.pipeline.run import Cancel, Picture, Progress, Run, StepCallback, StepState

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["GenerationResult", "Picture", "Pipeline", "Progress", "StepState"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class GenerationResult:
    """What a call returns.

    `timings` has, per phase ("encode", "denoise", "decode"), `seconds`, of these `load_seconds` to open the network,
    and `peak_rss` in bytes, on a CUDA device also `peak_gpu`; "denoise" also the seconds of each step.
    """

    images: list["Image"]
    seeds: list[int | None]
    recipes: list[Recipe]
    timings: dict[str, dict[str, Any]]
    warnings: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the first picture."""
        return self.recipes[0]


class Pipeline:
    """Draws pictures with one model. Not safe for use from several threads at once; make one per thread.

    Attributes: `folder` the model's files; `dtype` of the computation; `choice` of what computes, with its reason;
    `device` of torch's tensors ("cpu" for mlx); `timings` of the last call.
    """

    def __init__(self, folder: ModelFolder, *, dtype: str | torch.dtype = "float32", threads: int | None = None,
                 device: str | torch.device = "auto", keep_loaded: bool | None = None,
                 prompt_cache: bool = True, max_memory: str | int | None = None) -> None:
        self.folder = folder
        self.dtype = _dtype(dtype)
        self.choice = choose(str(device), max_memory)
        self.device = _torch_device(self.choice.name, self.dtype)
        _check_model(folder)
        _use_threads(threads)
        self.max_memory = None if max_memory is None else budget.parse_bytes(max_memory)
        self._planner, self._keep = self._make_planner(), keep_loaded
        default_width, default_height = folder.settings["default_size"]
        keep = self._planner.default_ways(default_width, default_height).keep_loaded if keep_loaded is None \
            else keep_loaded
        self.components = self._components(keep)
        self.timings: dict[str, dict[str, Any]] = {}
        self._hash: str | None = None
        self._cache_place = embeddings.place() if prompt_cache else None
        self._encoder: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str] = "embedded", *,
                        dtype: str | torch.dtype = "float32", threads: int | None = None,
                        device: str | torch.device = "auto", keep_loaded: bool | None = None,
                        prompt_cache: bool = True, max_memory: str | int | None = None) -> "Pipeline":
        """Open a model: "embedded", "embedded-binary", a folder, or a Hugging Face id.

        Args:
            dtype: of the computation; "float32" (default), "bfloat16" or "float16".
            threads: CPU threads for this process; default `LINOCUT_THREADS`, else torch's own choice.
            device: what computes: "cpu", "cuda", "mps", "mlx", or "auto" for the best that is known to work
                (`linocut.pipeline.device`).
            keep_loaded: keep networks in memory between pictures; default: if the model is under 256 MB.
            prompt_cache: keep what the text encoder makes of each prompt on disk (`linocut.pipeline.embeddings`).
            max_memory: most memory of this process, as "2GB" or in bytes: of the GPU on a CUDA device. Pictures are
                drawn in the quickest way that stays within it (`linocut.pipeline.budget`), or refused.
        Opening reads configs and headers only; weights enter memory as they are used.
        Raises ModelNotFoundError, FormatError or UsageError.
        """
        return cls(ModelFolder.open(name_or_path), dtype=dtype, threads=threads, device=device,
                   keep_loaded=keep_loaded, prompt_cache=prompt_cache, max_memory=max_memory)

    def __call__(self, prompt: str | Sequence[str], *, width: int | None = None, height: int | None = None,
                 num_inference_steps: int | None = None, seed: int | Sequence[int] | None = None,
                 generator: Generators | None = None, num_images: int = 1, guidance_scale: float | None = None,
                 callback_on_step_end: StepCallback | None = None, cancel: Cancel | None = None,
                 on_progress: Callable[[Progress], None] | None = None) -> GenerationResult:
        """Draw pictures and return them all. The arguments are those of `draw`."""
        pictures = list(self.draw(prompt, width=width, height=height, num_inference_steps=num_inference_steps,
                                  seed=seed, generator=generator, num_images=num_images,
                                  guidance_scale=guidance_scale, callback_on_step_end=callback_on_step_end,
                                  cancel=cancel, on_progress=on_progress))
        noted = list(dict.fromkeys(note for picture in pictures for note in picture.warnings))
        for note in noted:
            warnings.warn(note, stacklevel=2)
        return GenerationResult([p.image for p in pictures], [p.recipe.seed for p in pictures],
                                [p.recipe for p in pictures], self.timings, noted)

    def draw(self, prompt: str | Sequence[str], *, width: int | None = None, height: int | None = None,
             num_inference_steps: int | None = None, seed: int | Sequence[int] | None = None,
             generator: Generators | None = None, num_images: int = 1, guidance_scale: float | None = None,
             callback_on_step_end: StepCallback | None = None, cancel: Cancel | None = None,
             on_progress: Callable[[Progress], None] | None = None) -> Iterator[Picture]:
        """Check the request now, then yield pictures as they get ready: every prompt with every seed.

        Args:
            prompt: one, or several.
            width, height: pixels, multiples of 32; default: the model's.
            num_inference_steps: default: the model's (4 for distilled ones).
            seed: picture i of a prompt uses seed + i; several seeds draw each; None draws a random one per prompt.
            generator: CPU generator(s) to draw noise from instead, as in diffusers.
            num_images: pictures per prompt and seed.
            guidance_scale: for models that are not distilled; above 1 it costs a second pass per step. Default: the
                model's.
            callback_on_step_end: called as (pipe, i, sigma, state) after step i; see `StepState`. Its result is unused.
            cancel: a `threading.Event`, or a function that returns True to stop; asked after every block.
            on_progress: gets a `Progress` after every layer, block and strip.
        Raises UsageError if it cannot be drawn, Cancelled if `cancel` says so.
        """
        sources = [] if generator is None else [generator] if isinstance(generator, torch.Generator) else generator
        request = make_request(prompt, self.folder.settings, width=width, height=height,
                               num_inference_steps=num_inference_steps, seed=seed, num_images=num_images,
                               guidance_scale=guidance_scale, generators=len(sources))
        return self.draw_request(request, sources, callback_on_step_end=callback_on_step_end, cancel=cancel,
                                 on_progress=on_progress)

    def draw_request(self, request: Request, generators: Sequence[torch.Generator] = (), *,
                     callback_on_step_end: StepCallback | None = None, cancel: Cancel | None = None,
                     on_progress: Callable[[Progress], None] | None = None) -> Iterator[Picture]:
        """As `draw`, for a request that `make_request` has checked and spelled out already."""
        plan = self._plan(request.width, request.height, pictures=len(request.jobs), prompts=request.prompts,
                          tile=request.tile, base=self._base(), free=self._free())
        ways = replace(plan.ways, tile=None) if self.choice.name == "mlx" else plan.ways
        self.components.follow(ways)
        run = Run(self, request, ways, generators, callback_on_step_end, cancel, on_progress)
        self.timings = {}
        return run.pictures()

    def plan(self, width: int | None = None, height: int | None = None, *, pictures: int = 1, prompts: int = 1,
             base: int | None = None) -> memory.Plan:
        """Predict memory per phase for pictures of this size, drawn within `max_memory`; see `linocut.pipeline.memory`.

        `base` are resident bytes of the process besides the networks; default: what it has. Raises UsageError if such
        a picture cannot be drawn within `max_memory`.
        """
        default_width, default_height = self.folder.settings["default_size"]
        return self._plan(width or default_width, height or default_height, pictures=pictures, prompts=prompts,
                          base=self._base() if base is None else base)

    def _plan(self, width: int, height: int, *, free: int | None = None, tile: int | None = None,
              **options: int) -> memory.Plan:
        return budget.fit(self._planner, width, height, limit=self.max_memory, free=free, keep_loaded=self._keep,
                          tile=tile, dtype=str(self.dtype).removeprefix("torch."), **options)

    def _make_planner(self) -> memory.Planner:
        return budget.planner_for(self.folder, self.choice.name)

    def _free(self) -> int | None:
        """Bytes that this process may have in all where it computes; None where that is not known."""
        free = budget.available_on(self.choice.name)
        return free if free is None or self.device.type == "cuda" else free + memory.resident_bytes()

    def _base(self) -> int:
        """Resident bytes without networks that are kept, which a plan counts itself."""
        if self.device.type == "cuda":
            return memory_gpu.BASE_BYTES
        kept = sum(self._planner.disk.get(name, 0) for name in self.components.kept)
        return max(memory.BASE_BYTES, memory.resident_bytes() - kept)

    @property
    def model_hash(self) -> str:
        if self._hash is None:
            self._hash = self.folder.hash()
        return self._hash

    def kernel(self, tokens: int, component: str = "transformer") -> str:
        """Name of the kernel that a component's packed layers run on with this many tokens; "torch" if none is packed.

        On mlx that is "mlx" for all layers.
        Where whole blocks run fused (`why_not_fused`), with " fused" behind it, and the variant of attention in C++ or
        the accuracy that is asked for on a GPU.
        """
        if self.choice.name == "mlx":
            return "mlx"
        with self.folder.checkpoint(component) as checkpoint:
            layers = [entry for name, entry in checkpoint.packed.items() if not name.endswith("embed_tokens")]
        if not layers:
            return "torch"
        largest = max(layers, key=lambda entry: math.prod(entry.shape))
        o, n = largest.shape
        name = dispatch.select(dispatch.Problem(self.device.type, self.dtype, tokens, n, o, largest.encoding,
                                                torch.get_num_threads())).name
        if self.why_not_fused(component):
            return name
        return f"{name} fused {accuracy.level() if self.device.type == 'cuda' else fused.attention_variant()}"

    def why_not_fused(self, component: str) -> str | None:
        """None if whole blocks of "transformer" or "text_encoder" run fused (`kernels.fused`, on a GPU
        `models.flux2_gpu`), else the reason."""
        on_gpu = self.device.type == "cuda"
        with self.folder.checkpoint(component) as checkpoint:
            dense = fusible.dense_in_blocks(checkpoint, fusible.ON_GPU if on_gpu else fusible.MULTIPLIED)
        config = self.folder.config(component)
        width = Flux2Config.from_dict(config).attention_head_dim if component == "transformer" else \
            Qwen3Config.from_dict(config).head_dim
        if on_gpu:
            if component != "transformer":
                return "the text encoder runs layer by layer on a GPU"
            return f"{dense} is neither binary nor ternary" if dense else gpu.why_not_fused(self.choice.name, width)
        return fused.why_not(width, dense, "mlx" if self.choice.name == "mlx" else self.device.type)

    def prompt_cache(self) -> embeddings.PromptCache | None:
        """Text features on disk for what this pipeline computes now, or None if there is no such cache."""
        if self._cache_place is None or self._cache_place.why_not:
            return None
        if self._encoder is None:
            self._encoder = embeddings.encoder_identity(self.folder) or {}
        if not self._encoder:
            return None
        length = int(self.folder.settings["text_length"])
        computes = {"dtype": str(self.dtype), "device": self.components.computes_on if self.choice.name == "mlx"
                    else self.device.type, **self.components.versions, "kernel": self.kernel(length, "text_encoder"),
                    "linocut": __version__, "torch": str(torch.__version__), "machine": platform.machine(),
                    "processor": torch.backends.cpu.get_cpu_capability()}
        return embeddings.PromptCache(self._cache_place, {**self._encoder, **computes})

    def _components(self, keep: bool) -> Components:
        if self.choice.name != "mlx":
            return Components(self.folder, self.dtype, self.device, keep)
        from linocut.pipeline.components_mlx import MlxComponents
        return MlxComponents(self.folder, self.dtype, keep)

    def close(self) -> None:
        """Drop networks that were kept in memory."""
        self.components.drop()


def _check_model(folder: ModelFolder) -> None:
    """Raise FormatError if the three networks do not fit together, before any of them is loaded."""
    transformer = Flux2Config.from_dict(folder.config("transformer"))
    text = Qwen3Config.from_dict(folder.config("text_encoder"))
    vae = AutoencoderConfig.from_dict(folder.config("vae"))
    channels = CELL * CELL * vae.latent_channels
    table = folder.timestep_table()
    for what, expected, found in (
            ("joint_attention_dim of the transformer", len(folder.settings["text_taps"]) * text.hidden_size,
             transformer.joint_attention_dim),
            ("in_channels of the transformer", channels, transformer.in_channels),
            ("out_channels of the transformer", channels, transformer.velocity_channels),
            ("width of the timestep table", transformer.width, transformer.width if table is None else table.width)):
        if expected != found:
            raise FormatError(f"{what} does not fit its neighbours", path=folder.root, expected=expected, found=found)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)} (found {dtype!r})")
    return found


def _torch_device(name: str, dtype: torch.dtype) -> torch.device:
    """Where torch's tensors lie if `name` computes. Raises UsageError if that is not there, or not in this dtype."""
    if name == "mlx":
        runtime.require()
        if dtype != torch.float32 and not runtime.on_gpu():
            raise UsageError("mlx on a CPU adds up in the type of its inputs, which needs float32 (found "
                             f"{str(dtype).removeprefix('torch.')}); leave out the dtype")
        return torch.device("cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"device mps was asked for, and torch {torch.__version__} finds no such device; on Apple "
                         "silicon, mlx is faster")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {name} was asked for, and torch {torch.__version__} finds no CUDA device; "
                         "'linocut doctor' says more")
    if name.startswith("cuda") and not gpu.there(name):
        last = torch.cuda.device_count() - 1
        raise UsageError(f"device {name} was asked for, and the last CUDA device that torch finds is cuda:{last}")
    return torch.device(name)


def _use_threads(threads: int | None) -> None:
    """Set the number of CPU threads of torch and of the kernels: the argument, else LINOCUT_THREADS, else as it is."""
    asked = os.environ.get("LINOCUT_THREADS", "").strip()
    if threads is None and not asked:
        return
    given = asked if threads is None else threads
    if isinstance(given, str) and given.isdecimal():
        given = int(given)
    if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= 4096:
        raise UsageError(f"threads must be a whole number, 1 or more (found {given!r})")
    torch.set_num_threads(given)
    if asked:
        os.environ["LINOCUT_THREADS"] = str(given)


