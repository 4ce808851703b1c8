"""The memory planner for a CUDA device: peak bytes of GPU memory per phase, with the same ways as on a CPU.

    base          context, loaded kernels and libraries' workspaces
  + weights       packed as they are stored; dense ones in the dtype that they are stored in, the decoder's in bfloat16
  + activations   closed forms (`footprint`), the fused step's with the scratch that a weight is unpacked to

The networks stay on the GPU if all of them fit. "stream" lets each layer of the text encoder be there only while it
runs; the transformer is packed, and stays. On the host only mapped files are read.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from linocut.formats.folder import ModelFolder
from linocut.kernels import fusible
from linocut.kernels.gpu import runtime
from linocut.kernels.gpu.candidates import SCRATCH_BYTES
from linocut.pipeline import footprint
from linocut.pipeline.memory import (
    CONVOLUTION_BYTES,
    DTYPE_BYTES,
    MB,
    Phase,
    Plan,
    Planner,
    Ways,
    check_size,
)

BASE_BYTES = 850 * MB
"""GPU memory of a process beside what torch takes for tensors: context, kernels, workspaces (800 MB on a H200)."""
_STRIPS = 200 * MB
"""What convolutions of strips take beside their maps, and the pieces that no map fits into."""
_PIECES = 150 * MB
"""What torch holds in pieces that no tensor fits into, while it reads and denoises (93 MB of 1.6 GB on a H200)."""
_LEFT_OVER = 250 * MB
"""What torch keeps in blocks of earlier phases that the decoder's maps do not fit into, where networks stay."""
_shares: dict[int, list[float]] = {}  # by number of the GPU: torch's share before any limit, then those of limits
_lock = threading.Lock()


class GpuPlanner(Planner):
    """Plans pictures of one model on a CUDA device."""

    def __init__(self, folder: ModelFolder, device: str) -> None:
        super().__init__(folder)
        self.device = device
        with folder.checkpoint("transformer") as checkpoint:
            dense = fusible.dense_in_blocks(checkpoint, fusible.ON_GPU)
        self._on_gpu = dense is None and runtime.why_not_fused(device, self.transformer.attention_head_dim) is None

    def default_ways(self, width: int, height: int) -> Ways:
        """How a picture is drawn if memory is no concern: everything stays, and nothing is cut."""
        return Ways(keep_loaded=True, tile=None)

    def plan(self, width: int, height: int, *, dtype: str = "float32", pictures: int = 1, prompts: int = 1,
             ways: Ways | None = None, base: int = BASE_BYTES) -> Plan:
        """Predict what drawing takes of the GPU's memory. The arguments are those of `Planner.plan`."""
        check_size(width, height)
        ways = self.default_ways(width, height) if ways is None else ways
        vae, size, length = self.vae, DTYPE_BYTES[dtype], self.text_length
        together = 1 if ways.keep_loaded else min(pictures, ways.at_once)
        image = (width // vae.token_side) * (height // vae.token_side)
        features = length * len(self.settings["text_taps"]) * self.text.hidden_size * size
        known, latents = features * self._texts(prompts, together), image * self.transformer.in_channels * 4
        text = self.text_all
        reading = text - (0 if not ways.stream else self.text_layers - 2 * self.text_largest)
        layer = footprint.layer_bytes(self.text, length, size)
        encode = Phase("encode", reading, layer + known + features, SCRATCH_BYTES + _PIECES, base=base)
        step = footprint.gpu_step_bytes(self.transformer, length, image) if self._on_gpu else \
            footprint.block_bytes(self.transformer, length, image, size)
        held = text + layer + SCRATCH_BYTES if ways.keep_loaded else 0  # and what the encoder works in
        denoise = Phase("denoise", self._weights, max(step, self._timestep - self._weights) + known
                        + (6 + together) * latents, SCRATCH_BYTES + _PIECES, held, base)
        value = 2 if runtime.why_no_products(self.device) is None else size
        work = footprint.decode_bytes(vae, width, height, ways.tile, value) + known + together * latents
        decode = Phase("decode", self._vae_values * value, work + 4 * width * height,
                       CONVOLUTION_BYTES + (_LEFT_OVER if ways.keep_loaded else 0)
                       + (0 if ways.tile is None else _STRIPS),
                       held + (self._weights + step if ways.keep_loaded else 0), base)
        return Plan(self.folder.name, width, height, dtype, self.disk, ways, (encode, denoise, decode))

    def _read_text_encoder(self) -> None:
        super()._read_text_encoder()
        with self.folder.checkpoint("text_encoder") as checkpoint:
            parts = footprint.parts_in_order(checkpoint)[: max(self.settings["text_taps"])]
            others = [name for name in checkpoint if footprint.part_of(name) is None and not name.startswith("lm_head")]
            sizes = [sum(checkpoint.info(name).nbytes for name in part) for part in parts]
            self.text_layers, self.text_largest = sum(sizes), max(sizes, default=0)
            self.text_all = self.text_layers + sum(checkpoint.info(name).nbytes for name in others)


@contextlib.contextmanager
def holding(device: str, limit: int | None) -> Iterator[None]:
    """Inside the block torch takes no more of a GPU than a process of `limit` bytes leaves it, whatever a plan says.

    Before it takes more it gives back the blocks that earlier work left, which come to a quarter of what the decoder
    needs. The share of a process is one for all that it does there: of several limits at a time the least holds, and
    afterwards the share that was there before.
    """
    if limit is None or not runtime.there(device):
        yield
        return
    import torch

    index = torch.device(device).index
    number = torch.cuda.current_device() if index is None else index
    whole = torch.cuda.get_device_properties(number).total_memory
    share = min(1.0, max(0, limit - BASE_BYTES) / whole)
    with _lock:
        if not _shares.get(number):
            known = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # not in every version of torch
            _shares[number] = [1.0 if known is None else known(number)]
        _shares[number].append(share)
        torch.cuda.set_per_process_memory_fraction(min(_shares[number]), number)
        if torch.cuda.memory_reserved(number) > share * whole:
            torch.cuda.empty_cache()
    try:
        yield
    finally:
        with _lock:
            _shares[number].remove(share)
            torch.cuda.set_per_process_memory_fraction(min(_shares[number]), number)
            if len(_shares[number]) == 1:
                del _shares[number]


def available_bytes(device: str) -> int | None:
    """GPU memory that this process may still take, with what it holds already: compare a plan's peak with it. None
    without such a device."""
    import torch

    if not runtime.there(device):
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + int(torch.cuda.memory_reserved(device)) + BASE_BYTES
