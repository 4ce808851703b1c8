"""A student too big for one GPU's memory, or faster on several: FSDP2, and blocks that compute twice to store less.

Parameters, gradients, averages and what the optimizer remembers are dealt out among the processes by rows; a block's
weights come together while it computes. They travel in float32, since codes must be those of the latent weights as they
are. Nothing inside a network knows of this.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from linocut.models.flux2 import DoubleBlock, SingleBlock
from linocut.train.loop import Ranks


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer, in order."""
    return [block for block in module.modules() if isinstance(block, DoubleBlock | SingleBlock)]


def recompute_blocks(module: nn.Module) -> None:
    """Have every block keep its inputs alone and compute again what its gradients need."""
    for block in blocks_of(module):
        forward = block.forward
        block.forward = functools.partial(checkpoint, forward, use_reentrant=False)


def deal_out(module: nn.Module, ranks: Ranks) -> bool:
    """Deal the parameters of a transformer out among all processes, if there are several. Whether that was done."""
    if ranks.world == 1:
        return False
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return True


@torch.no_grad()
def whole(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state dict, put together again, one at a time; every process must go through all of them."""
    for name, tensor in module.state_dict().items():
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
