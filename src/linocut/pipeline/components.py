"""The networks of a model, one after another in memory.

The transformer counts as two: what depends on the noise level alone is evaluated for a whole schedule, and gone, before
the rest is opened.

A component is built around memory-mapped weights when its phase begins and dropped when it ends, unless the model is
small enough as a whole to stay (`memory.should_keep`); then a second picture starts at once.
"""

import contextlib
import ctypes
import gc
import os
import platform
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from linocut.formats.checkpoint import Checkpoint
from linocut.formats.folder import ModelFolder
from linocut.kernels.gpu import runtime as gpu
from linocut.models import flux2_cpu, text_encoder_cpu
from linocut.models.autoencoder import Autoencoder, ResnetBlock
from linocut.models.configs import AutoencoderConfig, Flux2Config, Qwen3Config
from linocut.models.convert import build_and_load
from linocut.models.flux2 import Flux2Blocks
from linocut.models.modulations import Modulations, TimestepNetwork, tabulate
from linocut.models.text_encoder import PromptTokenizer, Qwen3Encoder
from linocut.pipeline.decoding import decoder_dtype
from linocut.pipeline.footprint import needed_once, part_of, parts_in_order
from linocut.pipeline.memory import Ways
from linocut.pipeline.schedule import Schedule


class Components:
    """Builds, keeps and drops the networks of one model folder."""

    def __init__(self, folder: ModelFolder, dtype: torch.dtype, device: torch.device, keep: bool) -> None:
        self.folder, self.dtype, self.device, self.keep = folder, dtype, device, keep
        self._kept: dict[str, Any] = {}
        self._stream = False
        self._streamed: tuple[Checkpoint, list[list[str]]] | None = None
        self._modulations: tuple[Schedule, list[Modulations]] | None = None
        self._runners: dict[int, tuple[Any, Any]] = {}  # networks by id, and what runs them on a GPU
        use_huge_pages()
        if not keep:
            avoid_fragments()

    def follow(self, ways: Ways) -> None:
        """Keep networks and stream their blocks as a plan says, from now on."""
        if self._kept and not ways.keep_loaded:
            self.drop()
        if self.keep and not ways.keep_loaded:
            avoid_fragments()
        self.keep, self._stream = ways.keep_loaded, ways.stream

    @property
    def kept(self) -> list[str]:
        """Names of the networks in memory."""
        return list(self._kept)

    @property
    def computes_on(self) -> str:
        """What computes, in words for the recipe: "cpu x86_64", or "cuda" with the name of the GPU."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        return f"{self.device.type} {name}"

    @property
    def versions(self) -> dict[str, str]:
        """Versions of libraries that have a part in the pixels, besides torch."""
        return {}

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[Any]:
        """Yield the "tokenizer", "text_encoder", "transformer" or "vae"; drop it afterwards unless it is kept.

        The transformer comes as `Flux2Blocks`, which is called with `modulations`.
        """
        model = self._kept.get(name)
        if model is None:
            model = self._build(name)
            if self.keep:
                self._kept[name] = model
        try:
            yield model
        finally:
            network = weakref.ref(model)
            del model
            if not self.keep:
                self._streamed = None
                self._runners.clear()
                self._give_memory_back(network)

    def runner(self, network: Any, rows: int | None = None) -> Any:
        """What computes best with a text encoder or transformer from `use`; called like the network itself.

        `rows` is how many tokens a fused step of the transformer takes at a time.
        """
        if self._on_tensor_cores:
            if id(network) not in self._runners:
                self._runners[id(network)] = network, self._gpu_runner(network)
            return self._runners[id(network)][1]
        if isinstance(network, Qwen3Encoder):
            return text_encoder_cpu.runner(network) if self.device.type == "cpu" else network
        return flux2_cpu.runner(network, rows)

    def _gpu_runner(self, network: Any) -> Any:
        from linocut.models import flux2_gpu, text_encoder_gpu

        if not isinstance(network, Qwen3Encoder):
            return flux2_gpu.runner(network)
        return network if self._stream else text_encoder_gpu.GpuEncoder(network)  # layers that visit are never there

    @property
    def _on_tensor_cores(self) -> bool:
        """Whether this is an NVIDIA GPU on which Triton's kernels multiply."""
        return self.device.type == "cuda" and gpu.why_no_products(str(self.device)) is None

    def release_part(self, done: int) -> None:
        """Let what part number `done`, from 1, was the last to need leave memory; it comes back if it runs again.

        Parts are the layers of the text encoder and the blocks of the transformer. Their weights are read where they
        lie in the file, one part after another, so they can do with the memory of one. Unless networks are kept, layers
        go as they are done, blocks where the plan says so, and what embeds the prompt with the first of either.
        """
        if self._streamed is not None:
            checkpoint, parts = self._streamed
            for name in parts[(done - 1) % len(parts)]:
                checkpoint.release(name)

    def modulations(self, schedule: Schedule) -> list[Modulations]:
        """What the transformer needs to know of each noise level. Those of the last schedule stay: they are small."""
        kept = self._modulations
        if kept is None or not torch.equal(kept[0].sigmas, schedule.sigmas):
            rows = self._modulation_rows(schedule).split(1)
            if not self.keep:
                self._give_memory_back()
            kept = self._modulations = schedule, [Modulations.from_rows(row) for row in rows]
        return kept[1]

    def _modulation_rows(self, schedule: Schedule) -> torch.Tensor:
        if schedule.tabulated:
            table = self.folder.timestep_table()
            assert table is not None
            return torch.from_numpy(table.rows(schedule.tokens, schedule.steps)).to(self.device)
        config = Flux2Config.from_dict(self.folder.config("transformer"))
        weights = self.folder.timestep_weights()
        assert weights is not None  # else there would be no such schedule
        with weights:
            network = build_and_load(TimestepNetwork, config, weights)
            rows = tabulate(network, schedule.sigmas[:-1], lambda: _release_all_but_parts(weights))
        return rows.to(self.device)  # a GPU has no use for the weights

    def vae_for_previews(self) -> Autoencoder:
        """The autoencoder with its weights as they are stored: only the few that previews read enter memory."""
        kept = self._kept.get("vae")
        if isinstance(kept, Autoencoder):
            return kept
        with self.folder.checkpoint("vae") as checkpoint:
            decoder = self._load_decoder(checkpoint)
        # Without a stored preview map one is fitted by running the decoder, which then has to be able to compute.
        return decoder if decoder.config.preview else decoder.made_ready(self._decoder_dtype())

    def drop(self) -> None:
        """Forget every network that was kept."""
        networks = [weakref.ref(model) for model in self._kept.values()]
        self._kept.clear()
        self._runners.clear()
        self._modulations = None
        self._give_memory_back(*networks)

    def _give_memory_back(self, *networks: "weakref.ref[Any]") -> None:
        give_memory_back(*networks)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _build(self, name: str) -> Any:
        if name == "tokenizer":
            return PromptTokenizer.from_folder(self.folder.path("tokenizer"), self.folder.settings["text_length"])
        config, dtype = self.folder.config(name), self.dtype
        if name == "vae":
            with self.folder.checkpoint("vae") as checkpoint:
                decoder = self._load_decoder(checkpoint).made_ready(self._decoder_dtype()).to(self.device)
                _release_all_but_parts(checkpoint)  # what was converted is in memory twice until now
            return decoder
        model: nn.Module
        with self.folder.checkpoint(name) as checkpoint:  # tensors keep their own hold on the mapped file
            if name == "transformer":
                model = build_and_load(Flux2Blocks, Flux2Config.from_dict(config), checkpoint, compute_dtype=dtype)
                self._streamed = self._parts(checkpoint, self._stream)
            else:
                model = build_and_load(Qwen3Encoder, Qwen3Config.from_dict(config), checkpoint, compute_dtype=dtype,
                                       taps=tuple(self.folder.settings["text_taps"]))
                self._streamed = self._parts(checkpoint, True)
        if self.device.type == "cpu":
            return model
        if isinstance(model, Qwen3Encoder) and self._on_tensor_cores and dtype == torch.float32:
            model.compute_in(torch.bfloat16)
        if isinstance(model, Qwen3Encoder) and self._stream:
            layers, model.layers = model.layers, nn.ModuleList()
            model.to(self.device).layers = layers
            visit(layers, self.device)
            return model
        return model.to(self.device)

    def _parts(self, checkpoint: Checkpoint, stream: bool) -> tuple[Checkpoint, list[list[str]]] | None:
        """What `release_part` releases after each block or layer, in their order: if `stream`, itself too."""
        parts = parts_in_order(checkpoint)
        if self.keep or self.device.type != "cpu" or not parts:
            return None
        if not stream:
            parts = [[] for _ in parts]
        parts[0] += needed_once(checkpoint)
        return checkpoint, parts

    def _load_decoder(self, checkpoint: Checkpoint) -> "PictureDecoder":
        config = AutoencoderConfig.from_dict(self.folder.config("vae"))
        # Programs that do not know the preview map keep its key and drop its tensors when they save a model.
        stored = config.preview and "preview.weight" in checkpoint
        return build_and_load(PictureDecoder, replace(config, preview=stored), checkpoint)

    def _decoder_dtype(self) -> torch.dtype:
        """On a CPU the decoder's own, whatever the transformer runs in; bfloat16 on GPUs that multiply it; else the
        transformer's."""
        if self.device.type == "cpu":
            return getattr(torch, decoder_dtype()[0])
        fast = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= gpu.TENSOR_CORES
        return torch.bfloat16 if fast else self.dtype


class PictureDecoder(Autoencoder):
    """The autoencoder without its encoder, which drawing does not need."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config)
        del self.encoder
        self.quant_conv = None

    def made_ready(self, dtype: torch.dtype) -> "PictureDecoder":
        """This decoder with its weights in `dtype` and channels last, as CPU convolutions like them best."""
        for part in (self.decoder, self.post_quant_conv):
            if part is not None:
                part.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def develop(self, latents: Tensor, tile: int | None, on_part: Callable[[int, int], None]) -> Tensor:
        """`image_from_latents`; on_part(done, total) runs after each strip, or residual block if there are none."""
        if tile is not None:
            return self.image_from_latents(latents, tile, on_part)
        blocks = [module for module in self.decoder.modules() if isinstance(module, ResnetBlock)]
        handles = [block.register_forward_hook(lambda *_, done=done: on_part(done, len(blocks)))
                   for done, block in enumerate(blocks, start=1)]
        try:
            return self.image_from_latents(latents)
        finally:
            for handle in handles:
                handle.remove()

    def rename_key(self, name: str) -> str | None:
        """The name of a checkpoint's tensor in this network, or None for the encoder's."""
        return None if name.startswith(("encoder.", "quant_conv.")) else name


def visit(layers: Iterable[nn.Module], device: torch.device) -> None:
    """Let each layer be on `device` only while it runs; its tensors stay where they are, in a mapped file."""
    for layer in layers:
        tables: list[dict[str, Any]] = [each for part in layer.modules() for each in (part._parameters, part._buffers)]
        home = [dict(table) for table in tables]

        def come(*_: Any, tables: list[dict[str, Any]] = tables) -> None:
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None:
                        there = tensor.to(device)
                        table[name] = nn.Parameter(there, False) if isinstance(tensor, nn.Parameter) else there

        def go(*_: Any, tables: list[dict[str, Any]] = tables, home: list[dict[str, Any]] = home) -> None:
            for table, tensors in zip(tables, home, strict=True):
                table.update(tensors)

        layer.register_forward_pre_hook(come)
        layer.register_forward_hook(go, always_call=True)  # also when memory runs out in between


def _release_all_but_parts(checkpoint: Checkpoint) -> None:
    for name in checkpoint:
        if part_of(name) is None:
            checkpoint.release(name)


def give_memory_back(*networks: "weakref.ref[Any]") -> None:
    """Return freed memory to the system, so that the next component starts from a flat floor.

    Asks glibc, which otherwise keeps freed pieces below its mmap threshold. `networks` should be gone by now. Only if
    one is not are cycles looked for: among all of torch's objects that takes a twentieth of a second.
    """
    if any(network() is not None for network in networks):
        gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        _libc().malloc_trim(0)


def avoid_fragments() -> None:
    """Have glibc map every block from 1 MB on by itself, in this process and from now on.

    By default it raises that limit to 32 MB as blocks come and go, and the activations of a big model, many of which
    lie below it, then leave holes that double the peak. Other systems' allocators have no such knob.
    """
    m_mmap_threshold = -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        _libc().mallopt(m_mmap_threshold, 1 << 20)


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


_ASKING, _asked = threading.Lock(), list[str]()


def use_huge_pages() -> None:
    """Have torch ask Linux for pages of 2 MB in tensors of that size and more, in this process and from now on.

    Memory that comes fresh from the system costs a fault per page: some 700,000 of 4 kB while a picture of 512 px is
    decoded. torch asks its environment once, when it makes its first tensor; if there is one, nothing changes.
    """
    name = "THP_MEM_ALLOC_ENABLE"
    with _ASKING:
        if _asked or name in os.environ:  # the user's own choice
            return
        _asked.append(name)
        os.environ[name] = "1"
        try:
            torch.empty(1, device="cpu")
        finally:
            del os.environ[name]  # not for the processes that this one starts
