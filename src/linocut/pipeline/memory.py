"""The memory planner: bytes on disk and peak bytes in memory per phase, from configs and file headers alone.

Nothing is loaded and torch is not imported, so a plan costs milliseconds. A phase's peak is

    base          what the process holds anyway: interpreter, torch, libraries
  + weights       file bytes that the phase touches through the memory map, plus copies in another dtype
  + activations   the largest set of tensors alive at one moment, by closed forms
  + scratch       decoded rows of one packed layer at a time

Peaks are of resident memory as `measure.Meter` measures it. The closed forms are upper estimates: a plan must not be
below what is measured, and tests hold it to at most twice that. Mapped weights count fully although the system may
evict them; so a machine with a little less than the plan still works, slower.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linocut.errors import UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.folder import ModelFolder
from linocut.formats.names import is_timestep
from linocut.kernels import fusible
from linocut.kernels.fusible import HIDDEN_SLICE
from linocut.models.configs import AutoencoderConfig, Flux2Config, Qwen3Config
from linocut.pipeline.decoding import decoder_dtype

MB = 10**6
BASE_BYTES = 330 * MB
"""Resident memory of a process that has imported torch and drawn a picture of next to no size."""
SCRATCH_BYTES = 64 * MB
"""Decoded rows of a packed layer (`linocut.kernels.blocked`), with what the matrix product and the allocator take."""
CONVOLUTION_BYTES = 64 * MB
"""What the convolution library and the allocator hold back while a picture is decoded."""
KEEP_BELOW_BYTES = 256 * MB
"""Models whose components are smaller than this together stay loaded between phases and pictures."""
TILE_ABOVE_BYTES = 2000 * MB
"""The decoder works in tiles if its activations would pass this. A constant, since tiling may move last bits."""
TILE_ROWS = 64
"""Height of the strips that the decoder then works in, in pixels."""
SIZE_MULTIPLE = 32
LARGEST_SIDE = 16384
LARGEST_PNG_SIDE = 2**31 - 1
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PAGE_CLUSTER = 64 * 1024  # a page fault in a mapped file brings in its neighbours


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
    """What drawing one picture takes. Sizes in bytes; `tile` in pixels or None."""

    model: str
    width: int
    height: int
    dtype: str
    disk: dict[str, int]
    keep_loaded: bool
    tile: int | None
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
        return {"model": self.model, "width": self.width, "height": self.height, "dtype": self.dtype,
                "disk": {**self.disk, "total": sum(self.disk.values())}, "peak": self.peak,
                "peak_phase": self.peak_phase, "keep_loaded": self.keep_loaded, "tile": self.tile, "phases": phases}


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


def plan(folder: ModelFolder, width: int, height: int, *, dtype: str = "float32", pictures: int = 1,
         keep_loaded: bool | None = None, base: int = BASE_BYTES) -> Plan:
    """Predict what drawing takes on a CPU: file sizes, and the peak of resident memory per phase.

    Args:
        folder: the model; only its configs and the headers of its weight files are read.
        pictures: pictures whose latents wait for the decoder together.
        keep_loaded: whether components stay loaded between phases; None decides by the model's size.
        base: resident bytes of the process before anything is loaded.
    Raises UsageError for an impossible size or dtype, FormatError for a broken model.
    """
    check_size(width, height)
    if dtype not in DTYPE_BYTES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPE_BYTES)} (found {dtype!r})")
    settings = folder.settings
    text = Qwen3Config.from_dict(folder.config("text_encoder"))
    transformer = Flux2Config.from_dict(folder.config("transformer"))
    vae = AutoencoderConfig.from_dict(folder.config("vae"))
    disk = weight_bytes(folder)
    tokenizer = folder.path("tokenizer")
    disk["tokenizer"] = sum(file.stat().st_size for file in tokenizer.glob("*") if file.is_file())
    keep = should_keep(disk) if keep_loaded is None else keep_loaded

    size = DTYPE_BYTES[dtype]
    text_length = int(settings["text_length"])
    image_tokens = (width // vae.token_side) * (height // vae.token_side)
    features = text_length * len(settings["text_taps"]) * text.hidden_size * size
    latents = image_tokens * transformer.in_channels * 4
    tile = tile_for(vae, width, height)
    decoder_size = DTYPE_BYTES[decoder_dtype()[0]]
    decode_work = _decode_bytes(vae, width, height, tile, decoder_size)

    weights = {}
    for name in ("text_encoder", "transformer", "vae"):
        with folder.checkpoint(name) as checkpoint:
            layers = max(settings["text_taps"]) if name == "text_encoder" else None
            weights[name] = _touched_bytes(checkpoint, layers, text_length, decoder_size if name == "vae" else 0)
            if layers is not None and not keep:  # a layer leaves memory when it is done
                each = [0] * layers
                for tensor in checkpoint:
                    if 0 <= layer_index(tensor) < layers:
                        each[layer_index(tensor)] += checkpoint.info(tensor).nbytes
                weights[name] -= max(0, sum(each) - 2 * max(each))  # twice, as pages come and go in clusters
            if name == "transformer":  # what sees the noise level alone is gone before the rest comes
                timestep = sum(checkpoint.info(tensor).nbytes for tensor in checkpoint if is_timestep(tensor))
                weights[name] = max(timestep or disk.get("timestep_weights", 0), weights[name] - timestep)
            if name == "text_encoder":
                whole = fusible.why_not(text.head_dim, fusible.dense_in_blocks(checkpoint)) is None
                encode_work = features + (_fused_layer_bytes if whole else _layer_bytes)(text, text_length, size)
            elif name == "transformer":
                whole = fusible.why_not(transformer.attention_head_dim, fusible.dense_in_blocks(checkpoint)) is None
                work = _fused_block_bytes if whole else _block_bytes
                denoise_work = 6 * latents + work(transformer, text_length, image_tokens, size)
    held = weights if keep else dict.fromkeys(weights, 0)
    waiting = pictures * latents
    phases = (
        Phase("encode", weights["text_encoder"], encode_work + features, SCRATCH_BYTES, base=base),
        Phase("denoise", weights["transformer"], denoise_work + features + waiting, SCRATCH_BYTES,
              held["text_encoder"], base),
        Phase("decode", weights["vae"], decode_work + waiting + 4 * width * height, CONVOLUTION_BYTES,
              held["text_encoder"] + held["transformer"], base),
    )
    return Plan(folder.name, width, height, dtype, disk, keep, tile, phases)


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
    return TILE_ROWS if _decode_bytes(vae, width, height, None, 4) > TILE_ABOVE_BYTES else None


def available_bytes() -> int | None:
    """Memory that this process may still take: what the system calls available, within the container's limit."""
    candidates = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                candidates.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # cgroup v2; "max" is no number
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        candidates.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    if not candidates:
        with contextlib.suppress(ImportError):
            import psutil
            candidates.append(int(psutil.virtual_memory().available))
    return max(0, min(candidates)) if candidates else None


def refuse_if_too_large(plan: Plan, *, already: int = 0, available: int | None = None) -> None:
    """Raise UsageError if the plan needs more memory than there is; the message says how much and what to do.

    `already` are the bytes that this process holds now; `available` is what else there is (default: ask the system).
    """
    free = available_bytes() if available is None else available
    free = None if free is None else free + already
    if max(plan.width, plan.height) > LARGEST_SIDE:
        raise UsageError(f"{plan.width}x{plan.height} is out of reach: it would need {gigabytes(plan.peak)} while "
                         f"{plan.peak_phase[:-1]}ing, and sides end at {LARGEST_SIDE}; choose a smaller --size")
    if free is not None and plan.peak > free:
        raise UsageError(f"{plan.width}x{plan.height} with {plan.model} would need {gigabytes(plan.peak)} "
                         f"while {plan.peak_phase[:-1]}ing, and {gigabytes(free)} are free; choose a smaller --size")


def gigabytes(count: int) -> str:
    """Format bytes for people: '812 MB', '5.1 GB'."""
    if count < 10**9:
        return f"{count / MB:.0f} MB" if count >= 10 * MB else f"{count / MB:.1f} MB"
    return f"{count / 10**9:,.1f} GB"


# ---- closed forms -------------------------------------------------------------------------------------------------

def _layer_bytes(config: Qwen3Config, tokens: int, size: int) -> int:
    """Return the work of one layer of the text encoder."""
    width, mlp = config.hidden_size, config.intermediate_size
    heads, kv, head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    # Residual, normed, taps kept and their concatenation; q, k, v with rotated float32 copies; scores; the MLP.
    layer = tokens * (4 * width + 3 * heads * head + 4 * kv * head + 4 * mlp) + 2 * heads * tokens * tokens
    return layer * max(size, 4)


def _fused_layer_bytes(config: Qwen3Config, tokens: int, size: int) -> int:
    """The same where layers run fused: buffers for all of them (models/text_encoder_cpu.py), and taps as above."""
    width, mlp = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    floats = 3 * width + 3 * (queries + 2 * keys) + 2 * min(mlp, HIDDEN_SLICE)
    return tokens * (4 * floats + _quantized_bytes(width + queries + mlp) + 2 * width * size)


def _block_bytes(config: Flux2Config, text: int, image: int, size: int) -> int:
    """Return the work of the largest block of the transformer."""
    width, mlp = config.width, config.mlp_width
    tokens = text + image
    # A single-stream block holds the residual, its modulated copy, the fused projection (3D + 2M), attention's
    # output (D), the gated MLP (2M) and their concatenation; rotated float32 copies of q and k live before that.
    return tokens * max((8 * width + 4 * mlp) * size, (7 * width + 2 * mlp) * size + 5 * width * 4)


def _fused_block_bytes(config: Flux2Config, text: int, image: int, size: int) -> int:
    """The same where blocks run fused: buffers for all of them (models/flux2_cpu.py)."""
    width, mlp = config.width, config.mlp_width
    # float32: the residual and what is added to it, embedded tokens; q, k and v for attention (at most float32).
    # bfloat16: q, k and v as projected; a slice of the MLP. int8: what goes into the products.
    floats, halves = 3 * width + 3 * width, 3 * width + 2 * min(mlp, HIDDEN_SLICE)
    return (text + image) * (4 * floats + 2 * halves + _quantized_bytes(2 * width + 2 * mlp))


def _quantized_bytes(values: int) -> int:
    """Return the bytes of activations in int8, with a scale per 128, a sum per 64 and some padding."""
    return values + values // 128 * 4 + values // 64 * 4 + 3 * 64


def _decode_bytes(config: AutoencoderConfig, width: int, height: int, tile: int | None, size: int) -> int:
    """Return the work of the decoder: its widest layers at full resolution."""
    channels = config.decoder_widths
    narrow, wide = channels[0], channels[min(1, len(channels) - 1)]
    area = width * height
    if tile is None:
        # The first residual block of the last stage: its input, the input normalised, and the convolution at work.
        work = area * (3 * wide + narrow)
    else:
        # Two whole maps of a residual block and its input at half the resolution; all else is as tall as a strip.
        held = [area * (wide / 4 + 2 * narrow)]
        for stage in range(1, len(channels)):
            inner = channels[min(stage + 1, len(channels) - 1)]
            held.append((area >> (2 * stage)) * (inner + 2 * channels[stage]))
        work = int(max(held)) + 5 * wide * min(tile + 2, height) * width
    # The attention at the lowest resolution holds a few maps of the widest stage; its scores are never written out.
    attention = (area >> (2 * (len(channels) - 1))) * channels[-1] * 8
    return max(work, attention) * size + 2 * area * 3 * 4


def _touched_bytes(checkpoint: Checkpoint, layers: int | None, tokens: int, decoder_size: int) -> int:
    """Bytes of a checkpoint that become resident: mapped pages that are read, and the decoder's copies.

    `layers` is how many layers of the text encoder are used, None for other networks; `decoder_size` is the bytes of
    a weight as the decoder computes with it, 0 for other networks.
    """
    total = 0
    for name in checkpoint.names:
        info = checkpoint.info(name)
        if (layers is not None and layer_index(name) >= layers) or name.startswith("lm_head."):
            continue
        if decoder_size and name.startswith(("encoder.", "quant_conv.")):
            continue
        if "embed_tokens." in name:  # only the rows that are looked up
            total += min(info.nbytes, tokens * _PAGE_CLUSTER)
            continue
        # The transformer and the text encoder read dense weights as they are stored; the decoder's are laid out anew.
        total += info.nbytes + info.count * decoder_size
    return total


def layer_index(name: str) -> int:
    """Return 12 for 'model.layers.12.mlp.up_proj.codes', and -1 for a tensor outside the layers."""
    parts = name.split(".")
    if "layers" in parts[:-1]:
        with contextlib.suppress(ValueError):
            return int(parts[parts.index("layers") + 1])
    return -1


def resident_bytes() -> int:
    """Resident memory of this process now; 0 where it cannot be told."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(ImportError):
        import psutil
        return int(psutil.Process().memory_info().rss)
    return 0
