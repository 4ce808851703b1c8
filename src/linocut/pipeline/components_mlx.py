"""The networks of a model on mlx, behind the interface of `components.Components`.

Everything between the networks stays torch on the CPU: noise, sampler, modulations (once per schedule), previews, the
prompt cache. So pictures differ from other devices' by the rounding of the networks alone. What crosses over per step
are latents, text features and one row of modulations, a few megabytes.

Shape letters: B batch, T text tokens, I image tokens, C latent channels, h and w the token grid.
"""

import weakref
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor

from linocut.formats.checkpoint import Checkpoint
from linocut.formats.folder import ModelFolder
from linocut.mlx import runtime
from linocut.mlx.autoencoder import Decoder
from linocut.mlx.flux2 import Flux2
from linocut.mlx.text_encoder import TextEncoder
from linocut.models.configs import AutoencoderConfig, Flux2Config, Qwen3Config
from linocut.models.flux2 import rope_tables
from linocut.models.modulations import Modulations
from linocut.pipeline.components import Components

DTYPES = {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}


def to_mlx(x: Tensor) -> mx.array:
    """A CPU tensor as an array of mlx of the same dtype, copied."""
    return mx.array(x.float().numpy()).astype(DTYPES[x.dtype])


def to_torch(x: mx.array) -> Tensor:
    """An array of mlx as a CPU tensor of the same dtype, copied."""
    dtype = next(theirs for theirs, ours in DTYPES.items() if ours == x.dtype)
    return torch.from_numpy(np.array(x.astype(mx.float32))).to(dtype)


class MlxComponents(Components):
    """Builds, keeps and drops the networks of one model folder on mlx. `device` stays torch's CPU."""

    def __init__(self, folder: ModelFolder, dtype: torch.dtype, keep: bool) -> None:
        super().__init__(folder, dtype, torch.device("cpu"), keep)

    @property
    def computes_on(self) -> str:
        """For the recipe."""
        return f"mlx {runtime.device_name()}"

    @property
    def versions(self) -> dict[str, str]:
        """Versions of libraries that have a part in the pixels, besides torch."""
        return {"mlx": runtime.version() or "unknown"}

    def runner(self, network: Any, rows: int | None = None) -> Any:
        """A network as it is called; it is ready as it is."""
        return network

    def _build(self, name: str) -> Any:
        if name == "tokenizer":
            return super()._build(name)
        config = self.folder.config(name)
        # Stays open as long as the network lives: layers read their weights when they first run.
        checkpoint = self.folder.checkpoint(name)
        if name == "transformer":
            return _Transformer(Flux2Config.from_dict(config), checkpoint, DTYPES[self.dtype])
        if name == "text_encoder":
            return _TextEncoder(TextEncoder(Qwen3Config.from_dict(config), checkpoint,
                                            self.folder.settings["text_taps"], DTYPES[self.dtype], self.keep))
        return _PictureDecoder(AutoencoderConfig.from_dict(config), checkpoint, DTYPES[self.dtype])

    def _give_memory_back(self, *networks: "weakref.ref[Any]") -> None:
        super()._give_memory_back(*networks)
        runtime.give_memory_back()


class _TextEncoder:
    """Called as `models.text_encoder.Qwen3Encoder` is."""

    def __init__(self, network: TextEncoder) -> None:
        self._network = network

    def __call__(self, ids: Tensor, mask: Tensor, on_layer: Callable[[int, int], None] | None = None) -> Tensor:
        return to_torch(self._network(ids.numpy(), mask.numpy(), on_layer))


class _Transformer:
    """Called as `models.flux2.Flux2Transformer` is, with `Modulations`."""

    def __init__(self, config: Flux2Config, checkpoint: Checkpoint, dtype: mx.Dtype) -> None:
        self.config = config
        self._network = Flux2(config, checkpoint, dtype)

    def __call__(self, latents: Tensor, text: Tensor, modulations: Modulations, image_ids: Tensor, text_ids: Tensor,
                 on_block: Callable[[int, int], None] | None = None) -> Tensor:
        cos, sin = rope_tables(torch.cat([text_ids, image_ids]), self.config.axes_dims_rope, self.config.rope_theta)
        row = torch.cat([vector for vectors in modulations for vector in vectors], dim=1)[0]
        rope = to_mlx(cos[:, 0]), to_mlx(sin[:, 0])
        return to_torch(self._network(to_mlx(latents), to_mlx(text), to_mlx(row), rope, on_block))


class _PictureDecoder:
    """Called as `components.PictureDecoder` is. Pictures are always decoded in one piece."""

    def __init__(self, config: AutoencoderConfig, checkpoint: Checkpoint, dtype: mx.Dtype) -> None:
        self._network = Decoder(config, checkpoint, dtype)

    def image_from_latents(self, latents: Tensor) -> Tensor:
        return to_torch(self._network(to_mlx(latents)))

    def develop(self, latents: Tensor, tile: int | None, on_part: Callable[[int, int], None]) -> Tensor:
        return to_torch(self._network(to_mlx(latents), on_part))
