"""Networks of any shape with random weights on the device, for `gpu.py`: packed ones, and dense beside them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from linocut.cli.bench.baselines import plain
from linocut.models.configs import AutoencoderConfig, Flux2Config, Qwen3Config
from linocut.models.flux2 import Flux2Blocks
from linocut.models.linear import PackedEmbedding, PackedLinear, StoredLinear
from linocut.models.text_encoder import Qwen3Encoder
from linocut.pipeline.components import PictureDecoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def packed_network(config: Flux2Config, encoding: str) -> Flux2Blocks:
    """A transformer with random packed blocks that keep the size of what goes through."""
    network = _meta(Flux2Blocks, config)
    torch.manual_seed(0)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear):
            if "blocks." in name:
                size = (module.in_features * (1.0 if encoding == "binary" else 2 / 3)) ** -0.5
                layer: nn.Module = _random(PackedLinear(module.in_features, module.out_features, encoding), size)
            else:
                layer = StoredLinear(module.in_features, module.out_features, bias=False, device="meta")
                layer.weight = nn.Parameter(torch.randn(module.weight.shape, device=DEVICE, dtype=torch.bfloat16)
                                            * module.in_features**-0.5, requires_grad=False)
            _put(network, name, layer)
    return _ready(network)


def dense_network(config: Flux2Config) -> Flux2Blocks:
    """The same in bfloat16."""
    return _dense(_meta(Flux2Blocks, config))


class _Fp8Linear(nn.Module):
    """A dense layer in FP8 (e4m3), a scale per token and per row of W, by torch's own product."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.values, self.scale = _rounded(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        a, scale = _rounded(x.flatten(0, -2))
        y = torch._scaled_mm(a, self.values.t(), scale, self.scale.t(), out_dtype=torch.bfloat16)
        return y.unflatten(0, x.shape[:-1])


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


def fp8_network(config: Flux2Config) -> Flux2Blocks:
    """The same with FP8 products in its blocks."""
    network = dense_network(config)
    for name, module in list(network.named_modules()):
        if "blocks." in name and isinstance(module, nn.Linear):
            _put(network, name, _Fp8Linear(module))
    return network


def packed_text_encoder(config: Qwen3Config, taps: tuple[int, ...]) -> Qwen3Encoder:
    """A text encoder as model folders ship it, in four bits, computing as the pipeline has it compute on a GPU."""
    network = _meta(Qwen3Encoder, config, taps)
    torch.manual_seed(0)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear):
            layer = PackedLinear(module.in_features, module.out_features, "affine4")
            _put(network, name, _random(layer, module.in_features**-0.5 / 4.61))  # the deviation of a code 0..15
        elif isinstance(module, nn.Embedding):
            _put(network, name, _random(PackedEmbedding(module.num_embeddings, module.embedding_dim), 0.2))
    return _ready(network).compute_in(torch.bfloat16)


def dense_text_encoder(config: Qwen3Config, taps: tuple[int, ...]) -> Qwen3Encoder:
    """The same in bfloat16."""
    return _dense(_meta(Qwen3Encoder, config, taps))


def decoder(config: AutoencoderConfig, of_torch: bool = False) -> PictureDecoder:
    """The decoder as the pipeline has it on a GPU, with random weights; or of torch's own layers, channels last."""
    network: Any = _meta(PictureDecoder, config).to_empty(device=DEVICE)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    network.bn.reset_running_stats()
    network = network.made_ready(torch.bfloat16).requires_grad_(False).eval()
    return plain(network) if of_torch else network


def compile_blocks(*groups: nn.ModuleList) -> None:
    """torch.compile for each block by itself: one compilation for all blocks of a kind."""
    if DEVICE == "cuda":
        for blocks in groups:
            for block in blocks:
                block.compile(dynamic=False)


def _meta(network: Callable[..., Any], *arguments: Any) -> Any:
    with torch.device("meta"):
        return network(*arguments)


def _random(layer: Any, size: float) -> Any:
    """A packed layer on the device whose scales lie around `size`, and whose zero points make codes symmetric."""
    layer.to(DEVICE)
    layer.codes.random_(0, 256)
    layer.scales.uniform_(0.7 * size, 1.3 * size)
    if layer.zeros is not None:
        layer.zeros.fill_(0x78)
    return layer


def _put(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, layer)


def _dense(network: Any) -> Any:
    network = network.to(torch.bfloat16).to_empty(device=DEVICE)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
    return _ready(network)


def _ready(network: Any) -> Any:
    for name, module in network.named_modules():
        if "norm" in name and getattr(module, "weight", None) is not None:
            module.weight = nn.Parameter(torch.ones(module.weight.shape, device=DEVICE), requires_grad=False)
    return network.requires_grad_(False).eval()
