"""The text encoder on an NVIDIA GPU: the layers of `text_encoder.Qwen3Encoder`, recorded as one CUDA graph.

A prompt is some three thousand small kernels, and Python takes longer to start them than the GPU to run them. The first
prompt of a shape runs as it is written and compiles what has to be; the second is recorded, and later ones replay it.

Shape letters: B batch, T text tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linocut.kernels.gpu import graphs, runtime
from linocut.models.text_encoder import OnLayer, Qwen3Encoder


@dataclass
class _Recorded:
    """A graph, what it reads [B, T], and what it writes [B, T, taps * D]."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    mask: Tensor
    features: Tensor


class GpuEncoder:
    """A text encoder on a GPU; called like the encoder itself. Not for two threads at once.

    `graph_note` says why there is no CUDA graph.
    """

    def __init__(self, model: Qwen3Encoder, graph: bool = True) -> None:
        self.model = model
        self._seen: torch.Size | None = None
        self._recorded: _Recorded | None = None
        self.graph_note = None if graph and torch.cuda.is_available() else "graphs are for CUDA devices"

    @torch.no_grad()
    def __call__(self, ids: Tensor, mask: Tensor, on_layer: OnLayer | None = None) -> Tensor:
        """Features [B, T, taps * D]; the arguments are those of `Qwen3Encoder.forward`. Out of a graph, which takes
        milliseconds and is not interrupted, on_layer is called once."""
        with runtime.on_device(ids):
            if self._seen != ids.shape:
                self._seen, self._recorded = ids.shape, None
                return self.model(ids, mask, on_layer)
            if self._recorded is None and self.graph_note is None:
                self._record(ids, mask)
            if self._recorded is None:
                return self.model(ids, mask, on_layer)
            self._recorded.ids.copy_(ids)
            self._recorded.mask.copy_(mask)
            self._recorded.graph.replay()
            features = self._recorded.features.clone()
            if on_layer is not None:
                torch.cuda.synchronize(ids.device)
                on_layer(len(self.model.layers), len(self.model.layers))
            return features

    def _record(self, ids: Tensor, mask: Tensor) -> None:
        ids, mask = ids.clone(), mask.clone()
        try:
            with graphs.recorded(ids.device) as graph:
                features = self.model(ids, mask)
            self._recorded = _Recorded(graph, ids, mask, features)
        except RuntimeError as error:
            self.graph_note = f"capturing failed: {error}".splitlines()[0]
            torch.cuda.synchronize(ids.device)
