"""What we are compared with: torch's own layers, dense in float32 or bfloat16, or quantized to int8.

The networks are ours, plain, with random weights of the true shapes. All blocks of a kind share one set of weights: far
larger than any cache, so it is read from memory each time all the same, and nobody needs 20 GB to compare.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linocut.models.autoencoder import Autoencoder, GroupNorm, PointwiseConv, Upsample
from linocut.models.configs import AutoencoderConfig, Flux2Config, Qwen3Config
from linocut.models.flux2 import DoubleBlock, Flux2Transformer, SingleBlock
from linocut.models.text_encoder import Layer, Qwen3Encoder

VOCABULARY = 1024
"""Rows of the text encoders' embedding tables; looking one up takes no time in a larger table either."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}
"""Of each precision, for all that is not int8."""

Network = TypeVar("Network", bound=nn.Module)


class Int8Linear(nn.Module):
    """torch's dynamically quantized Linear: int8 weights with a scale per row, int8 activations with one per tensor."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scales = weight.float().abs().amax(1).clamp_min(1e-12) / 127
        self.packed = prepack((weight.float() / scales[:, None]).round().to(torch.int8), scales)

    @classmethod
    def from_int8(cls, values: Tensor, scales: Tensor) -> Int8Linear:
        """A layer from int8 weights [O, N] and float32 scales [O]."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.packed = prepack(values, scales)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x.float(), self.packed).to(x.dtype)


def prepack(values: Tensor, scales: Tensor) -> object:
    """Weights in the layout that oneDNN computes with."""
    torch.backends.quantized.engine = "onednn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that these operators will move to another package
        weight = torch._make_per_channel_quantized_tensor(values, scales, torch.zeros(len(scales), dtype=torch.long), 0)
        return torch.ops.quantized.linear_prepack(weight, None)


def swap_linears(module: Network) -> Network:
    """Replace every Linear without a bias inside `module` by torch's int8 one."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and child.bias is None:
            setattr(module, name, Int8Linear(child.weight.detach()))
        else:
            swap_linears(child)
    return module


def dense(module: Network, dtype: torch.dtype) -> Network:
    """`module`, built without memory, with random weights that keep the size of activations."""
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(1.0)
    for buffer in module.buffers():
        buffer.fill_(1)
    return module.to(dtype).eval()


def transformer(config: Flux2Config, precision: str) -> Flux2Transformer:
    """The transformer, dense in one of `DTYPES`; for int8, with the Linears of its blocks quantized."""
    with torch.device("meta"):
        model = Flux2Transformer(config)
        blocks = DoubleBlock(config), SingleBlock(config)
        model.transformer_blocks, model.single_transformer_blocks = nn.ModuleList(), nn.ModuleList()
    dense(model, DTYPES[precision])
    double, single = (_block(block, precision) for block in blocks)
    model.transformer_blocks = nn.ModuleList([double] * config.num_layers)
    model.single_transformer_blocks = nn.ModuleList([single] * config.num_single_layers)
    return model


def text_encoder(config: Qwen3Config, taps: tuple[int, ...], precision: str) -> Qwen3Encoder:
    """The text encoder, likewise."""
    with torch.device("meta"):
        model, layer = Qwen3Encoder(config, taps), Layer(config)
        count, model.layers = len(model.layers), nn.ModuleList()
        model.embed_tokens = nn.Embedding(VOCABULARY, config.hidden_size)
    dense(model, DTYPES[precision])
    model.layers = nn.ModuleList([_block(layer, precision)] * count)
    return model


def _block(block: Network, precision: str) -> Network:
    dense(block, DTYPES[precision])
    return swap_linears(block) if precision == "int8" else block


def decoder(config: AutoencoderConfig, dtype: torch.dtype) -> Autoencoder:
    """The autoencoder of torch's own layers, channels last, with random weights."""
    with torch.device("meta"):
        model = Autoencoder(config)
    return plain(dense(model, dtype))


def plain(model: Autoencoder) -> Autoencoder:
    """The same autoencoder with torch's own layers instead of ours, channels last."""
    own = {GroupNorm: nn.GroupNorm, PointwiseConv: nn.Conv2d, Upsample: _PlainUpsample}
    for module in list(model.modules()):
        if type(module) in own:
            object.__setattr__(module, "__class__", own[type(module)])
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class _PlainUpsample(Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
