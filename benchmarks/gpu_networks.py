"""Transformers of any shape with random weights on the device, for `gpu.py`: packed ones, and dense beside them."""

import torch
from torch import nn

from linocut.models.configs import Flux2Config
from linocut.models.flux2 import Flux2Blocks, RMSNorm
from linocut.models.linear import PackedLinear, StoredLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def packed_network(config: Flux2Config, encoding: str) -> Flux2Blocks:
    """A transformer with random packed blocks that keep the size of what goes through, on the device."""
    with torch.device("meta"):
        network = Flux2Blocks(config)
    torch.manual_seed(0)
    for name, module in list(network.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        parent = network.get_submodule(name.rpartition(".")[0])
        if "blocks." in name:
            layer: nn.Module = PackedLinear(module.in_features, module.out_features, encoding).to(DEVICE)
            layer.codes.random_(0, 256)  # type: ignore[operator]
            size = (module.in_features * (1.0 if encoding == "binary" else 2 / 3)) ** -0.5
            layer.scales.uniform_(0.7 * size, 1.3 * size)  # type: ignore[operator]
        else:
            layer = StoredLinear(module.in_features, module.out_features, bias=False)
            layer.weight = nn.Parameter(torch.randn(module.weight.shape, device=DEVICE, dtype=torch.bfloat16)
                                        * module.in_features**-0.5, requires_grad=False)
        setattr(parent, name.rpartition(".")[2], layer)
    _norms(network)
    return network.requires_grad_(False).eval()


def _norms(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, RMSNorm):
            module.weight = nn.Parameter(torch.ones(module.weight.shape, device=DEVICE), requires_grad=False)


def dense_network(config: Flux2Config) -> Flux2Blocks:
    """The same in bfloat16."""
    with torch.device("meta"):
        network = Flux2Blocks(config)
    network = network.to(torch.bfloat16).to_empty(device=DEVICE)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    _norms(network)
    return network.requires_grad_(False).eval()
