"""Recording CUDA graphs where several threads draw, each on a GPU of its own.

`torch.cuda.graph` records on one stream for the whole process unless it is given another, and that stream belongs to
the GPU that recorded first. And while torch records in its usual mode, no other thread may take memory of any GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ONE_AT_A_TIME = threading.Lock()  # torch can record one graph at a time
_STREAMS: dict[torch.device, torch.cuda.Stream] = {}  # one a GPU: libraries keep a workspace for each stream


@contextmanager
def recorded(device: torch.device | str) -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of what runs on this CUDA device inside the block. Raises RuntimeError if something there cannot be
    recorded."""
    device = torch.device(device)
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    with _ONE_AT_A_TIME, torch.cuda.device(device):
        if device not in _STREAMS:
            _STREAMS[device] = torch.cuda.Stream(device)
        with torch.cuda.graph(graph, stream=_STREAMS[device], capture_error_mode="thread_local"):
            yield graph
