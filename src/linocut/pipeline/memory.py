"""The memory planner: bytes on disk and peak bytes in memory per phase, from configs and file headers alone.

Nothing is loaded and torch is not imported, so a plan costs milliseconds. A phase's peak is

    base          what the process holds anyway: interpreter, torch, libraries
  + weights       file bytes that the phase touches through the memory map, plus copies in another dtype
  + activations   the largest set of tensors alive at one moment, by closed forms (`linocut.pipeline.footprint`)
  + scratch       decoded rows of one packed layer at a time

Peaks are of resident memory as `measure.Meter` measures it. The closed forms are upper estimates: a plan must not be
below what is measured, and tests hold it to at most twice that. Mapped weights count fully although the system may
evict them; so a machine with a little less than the plan still works, slower.
"""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linocut.errors import UsageError
from linocut.formats.folder import ModelFolder
from linocut.formats.names import is_timestep
from linocut.kernels import fusible
from linocut.models.configs import AutoencoderConfig, Flux2Config, Qwen3Config
from linocut.pipeline import footprint
from linocut.pipeline.decoding import decoder_dtype, has_amx

MB = 10**6
BASE_BYTES = 330 * MB
"""Resident memory of a process that has imported torch and drawn a picture of next to no size."""
SCRATCH_BYTES = 64 * MB
"""Decoded rows of a packed layer (`linocut.kernels.blocked`), with what the matrix product and the allocator take."""
_LIBRARY_BYTES = 8 * MB
"""What torch's matrix products hold where blocks run layer by layer: up to 4.4 MB over the rest (AMD EPYC, no AMX)."""
CONVOLUTION_BYTES = 64 * MB
"""What the convolution library and the allocator hold back while a picture is decoded."""
KEEP_BELOW_BYTES = 256 * MB
"""Models whose components are smaller than this together stay loaded between phases and pictures."""
TILE_ABOVE_BYTES = 2000 * MB
"""The decoder works in tiles if its activations would pass this. A constant, since tiling may move last bits."""
TILE_ROWS = 64
"""Height of the strips that the decoder then works in, in pixels."""
PICTURES_AT_ONCE = 16
"""Pictures that go through a phase together when components are dropped in between."""
SIZE_MULTIPLE = 32
LARGEST_SIDE = 16384
LARGEST_PNG_SIDE = 2**31 - 1
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Ways:
    """How a picture is drawn, from the quickest way to the smallest. All but `tile` give the same bits."""

    keep_loaded: bool
    """Networks stay in memory between phases and pictures."""
    tile: int | None
    """Height in pixels of the strips that the decoder works in; None for one piece."""
    stream: bool = False
    """Each block of the transformer leaves memory when it is done, and comes back in the next step."""
    rows: int | None = None
    """Tokens that go through a block's products at a time; None for all."""
    at_once: int = PICTURES_AT_ONCE
    """Pictures that go through a phase together, unless networks are kept."""


@dataclass(frozen=True)
class Phase:
    """Bytes of one phase; `held` are components that stay loaded from earlier phases."""

    name: str
    weights: int
    activations: int
    scratch: int
    held: int = 0
    base: int = BASE_BYTES

    @property
    def peak(self) -> int:
        return self.base + self.held + self.weights + self.activations + self.scratch


@dataclass(frozen=True)
class Plan:
    """What drawing one picture takes, in bytes, and the ways it is drawn in."""

    model: str
    width: int
    height: int
    dtype: str
    disk: dict[str, int]
    ways: Ways
    phases: tuple[Phase, ...]

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: phase.peak).name

    def to_dict(self) -> dict[str, Any]:
        phases = {p.name: {"peak": p.peak, "base": p.base, "held": p.held, "weights": p.weights,
                           "activations": p.activations, "scratch": p.scratch} for p in self.phases}
        ways = self.ways
        return {"model": self.model, "width": self.width, "height": self.height, "dtype": self.dtype,
                "disk": {**self.disk, "total": sum(self.disk.values())}, "peak": self.peak,
                "peak_phase": self.peak_phase, "keep_loaded": ways.keep_loaded, "tile": ways.tile,
                "stream": ways.stream, "rows": ways.rows, "at_once": ways.at_once, "phases": phases}


def check_size(width: int, height: int) -> None:
    """Raise UsageError unless both sides are positive multiples of 32 that any picture could have."""
    for name, value in (("width", width), ("height", height)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise UsageError(f"{name} must be a whole number of pixels (found {value!r})")
        if value <= 0:
            raise UsageError(f"{name} must be positive (found {value})")
        if value > LARGEST_PNG_SIDE:  # also keeps the planner's numbers within what a float holds
            raise UsageError(f"{name} is larger than a PNG can be (expected at most {LARGEST_SIDE}, found a number of "
                             f"{len(str(value))} digits); choose a smaller one")
        if value % SIZE_MULTIPLE:
            below = value // SIZE_MULTIPLE * SIZE_MULTIPLE
            near = f"{below} or {below + SIZE_MULTIPLE}" if below else str(SIZE_MULTIPLE)
            raise UsageError(f"{name} must be a multiple of {SIZE_MULTIPLE} (found {value}); use {near}")


class Planner:
    """Plans pictures of one model; its configs and the headers of its weight files are read once."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder
        self.settings = folder.settings
        self.text = Qwen3Config.from_dict(folder.config("text_encoder"))
        self.transformer = Flux2Config.from_dict(folder.config("transformer"))
        self.vae = AutoencoderConfig.from_dict(folder.config("vae"))
        tokenizer = folder.path("tokenizer")
        self.disk = {**weight_bytes(folder),
                     "tokenizer": sum(file.stat().st_size for file in tokenizer.glob("*") if file.is_file())}
        self.text_length = int(self.settings["text_length"])
        self._read_text_encoder()
        self._read_transformer()
        self._read_vae()

    def _read_text_encoder(self) -> None:
        with self.folder.checkpoint("text_encoder") as checkpoint:
            parts = footprint.parts_in_order(checkpoint)[: max(self.settings["text_taps"])]
            others = [name for name in checkpoint if footprint.part_of(name) is None and not name.startswith("lm_head")]
            touched = [*others, *(name for part in parts for name in part)]
            self._text_weights = footprint.touched_bytes(checkpoint, touched, self.text_length)
            self._text_streamed = self._text_weights - footprint.streamed_bytes(checkpoint, parts)
            self._fused_text = fusible.why_not(self.text.head_dim, fusible.dense_in_blocks(checkpoint)) is None

    def _read_transformer(self) -> None:
        with self.folder.checkpoint("transformer") as checkpoint:
            names = [name for name in checkpoint if not is_timestep(name)]
            self._weights = footprint.touched_bytes(checkpoint, names, 0)
            self._streamed = self._weights - footprint.streamed_bytes(checkpoint, footprint.parts_in_order(checkpoint))
            self._once = sum(checkpoint.info(name).nbytes for name in footprint.needed_once(checkpoint))
            dense = fusible.dense_in_blocks(checkpoint)
        self._fused = fusible.why_not(self.transformer.attention_head_dim, dense) is None
        self._timestep = 0
        weights = self.folder.timestep_weights()
        if weights is not None:  # what sees the noise level alone is gone before the rest comes, layer by layer
            with weights:
                sizes = [weights.info(name).nbytes for name in weights if is_timestep(name)]
            self._timestep = max(sizes, default=0)

    def _read_vae(self) -> None:
        with self.folder.checkpoint("vae") as checkpoint:
            names = [name for name in checkpoint if not name.startswith(("encoder.", "quant_conv."))]
            self._vae_mapped = footprint.touched_bytes(checkpoint, names, 0)
            self._vae_values = sum(checkpoint.info(name).count for name in names)

    def default_ways(self, width: int, height: int) -> Ways:
        """How a picture is drawn if memory is no concern."""
        return Ways(should_keep(self.disk), tile_for(self.vae, width, height))

    def plan(self, width: int, height: int, *, dtype: str = "float32", pictures: int = 1, prompts: int = 1,
             ways: Ways | None = None, base: int = BASE_BYTES) -> Plan:
        """Predict what drawing takes on a CPU: file sizes, and the peak of resident memory per phase.

        Args:
            pictures: pictures of the request; some of them wait for the decoder together.
            prompts: different texts among these.
            ways: how to draw; default `default_ways`.
            base: resident bytes of the process before anything is loaded.
        Raises UsageError for an impossible size or dtype.
        """
        check_size(width, height)
        if dtype not in DTYPE_BYTES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPE_BYTES)} (found {dtype!r})")
        ways = self.default_ways(width, height) if ways is None else ways
        text, vae, size, length = self.text, self.vae, DTYPE_BYTES[dtype], self.text_length
        together = 1 if ways.keep_loaded else min(pictures, ways.at_once)
        image = (width // vae.token_side) * (height // vae.token_side)
        features = length * len(self.settings["text_taps"]) * text.hidden_size * size
        texts = self._texts(prompts, together)
        known, latents = features * texts, image * self.transformer.in_channels * 4

        layer = (footprint.fused_layer_bytes if self._fused_text else footprint.layer_bytes)(text, length, size)
        reading = self._text_weights if ways.keep_loaded else self._text_streamed
        encode = Phase("encode", reading, max(layer + known + features, self._tokenizer() - reading), SCRATCH_BYTES,
                       base=base)

        block = footprint.fused_block_bytes(self.transformer, length, image, ways.rows, fusible.attention_bytes()) \
            if self._fused else footprint.block_bytes(self.transformer, length, image, size)
        weights = self._streamed if ways.stream else self._weights
        if self._fused and texts == 1 and not ways.keep_loaded:
            weights = max(self._streamed, weights - self._once)  # what embeds the only prompt goes as the rest comes
        copied = has_amx()
        scratch = SCRATCH_BYTES
        if not self._fused:
            scratch = 3 * SCRATCH_BYTES if copied else SCRATCH_BYTES + _LIBRARY_BYTES
        denoise = Phase("denoise", weights, max(block + (6 + together) * latents, self._timestep - weights) + known,
                        scratch, self._text_weights if ways.keep_loaded else 0, base)

        value = DTYPE_BYTES[decoder_dtype()[0]]
        work = footprint.decode_bytes(vae, width, height, ways.tile, value)
        # AMX's convolutions copy what they read. Measured: in a heap that keeps what is freed that takes over a quarter
        # more; where blocks of 1 MB are mapped one by one (`components.avoid_fragments`), nothing.
        work += work // 2 if copied and ways.keep_loaded else 0
        copies = self._vae_values * value  # the stored weights are in memory only until they are converted
        work = max(work, self._vae_mapped) + known + together * latents + 4 * width * height
        if ways.keep_loaded:  # then freed memory is not given back between phases, and may not fit what follows
            work += max(encode.activations, denoise.activations) + scratch - SCRATCH_BYTES
        decode = Phase("decode", copies, work,
                       CONVOLUTION_BYTES, self._text_weights + weights if ways.keep_loaded else 0, base)
        return Plan(self.folder.name, width, height, dtype, self.disk, ways, (encode, denoise, decode))

    def _texts(self, prompts: int, together: int) -> int:
        """Texts whose features are in memory at once: with guidance, the empty one beside those of the pictures."""
        empty = 0 if self.settings["is_distilled"] else 1
        return min(max(prompts, 1 + empty), together + empty)

    def _tokenizer(self) -> int:
        return footprint.tokenizer_bytes(self.disk["tokenizer"])


def plan(folder: ModelFolder, width: int, height: int, *, keep_loaded: bool | None = None, **options: Any) -> Plan:
    """`Planner.plan` of a model, with networks kept or dropped if `keep_loaded` says so."""
    planner = Planner(folder)
    check_size(width, height)
    ways = planner.default_ways(width, height)
    if keep_loaded is not None:
        ways = replace(ways, keep_loaded=keep_loaded)
    return planner.plan(width, height, ways=ways, **options)


def should_keep(disk: dict[str, int]) -> bool:
    """Whether components stay loaded between phases: yes for a model that is small as a whole."""
    return sum(disk.values()) <= KEEP_BELOW_BYTES


def weight_bytes(folder: ModelFolder) -> dict[str, int]:
    """Size of each component's weight files on disk."""
    sizes = {}
    for name, checkpoint in folder.weight_files().items():
        with checkpoint:
            sizes[name] = checkpoint.file_nbytes
    return sizes


def tile_for(vae: AutoencoderConfig, width: int, height: int) -> int | None:
    """Return the height in pixels of the strips that the decoder works in, or None to decode in one piece.

    Depends on the model and the size alone, not on the machine nor on its decoder's dtype: a recipe says it once.
    """
    return TILE_ROWS if footprint.decode_bytes(vae, width, height, None, 4) > TILE_ABOVE_BYTES else None


def gigabytes(count: int) -> str:
    """Format bytes for people: '812 MB', '5.1 GB'."""
    if count < 10**9:
        return f"{count / MB:.0f} MB" if count >= 10 * MB else f"{count / MB:.1f} MB"
    return f"{count / 10**9:,.1f} GB"


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where it cannot be told."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(ImportError):
        import psutil
        return int(psutil.Process().memory_info().rss)
    return 0
