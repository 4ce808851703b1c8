"""Packed layers compute what their weights decode to; training layers compute what will be stored."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linocut.errors import FormatError
from linocut.formats.packed import ENCODINGS, dequantize
from linocut.models.linear import (
    FakeQuantEmbedding,
    FakeQuantLinear,
    PackedEmbedding,
    PackedLinear,
    StoredEmbedding,
    StoredLinear,
)
from linocut.quantize.rounding import quantize_tensor


def weight(o: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(o, n, generator=torch.Generator().manual_seed(seed)) / n**0.5


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("o", "n"), [(1, 128), (7, 640), (33, 768)])
def test_packed_linear_multiplies_with_the_decoded_weight(encoding: str, o: int, n: int) -> None:
    packed = quantize_tensor(weight(o, n), encoding)
    layer = PackedLinear.from_packed(packed)
    w = torch.from_numpy(dequantize(packed))
    assert torch.equal(layer.dequantize(), w)
    x = torch.randn(2, 3, n, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, w))
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(grad, 2 * F.linear(x, w) @ w)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_buffers_are_the_arrays_and_go_back_to_a_file(encoding: str) -> None:
    packed = quantize_tensor(weight(8, 256), encoding)
    layer = PackedLinear.from_packed(packed)
    for suffix, array in packed.parts().items():
        assert getattr(layer, suffix).data_ptr() == array.ctypes.data
        assert (layer.to_packed().parts()[suffix] == array).all()
    names = {"codes", "scales", "zeros"} if encoding == "affine4" else {"codes", "scales"}
    assert set(layer.state_dict()) == names


def test_casting_a_model_leaves_packed_bytes_alone() -> None:
    packed = quantize_tensor(weight(8, 256) * 1e-5, "ternary")  # scales that bfloat16 cannot hold
    layer = PackedLinear.from_packed(packed)
    model = nn.Sequential(layer, nn.Linear(8, 8)).to(torch.bfloat16)
    assert model[1].weight.dtype == torch.bfloat16
    assert layer.codes.dtype == torch.uint8
    assert layer.scales.dtype == torch.float16
    assert (layer.scales.numpy() == packed.scales).all()
    assert model(torch.ones(1, 256, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_packed_embedding_decodes_rows() -> None:
    packed = quantize_tensor(weight(50, 128), "affine4")
    layer, table = PackedEmbedding.from_packed(packed), torch.from_numpy(dequantize(packed))
    ids = torch.tensor([[3, 49, 3], [0, 1, 2]])
    assert torch.equal(layer(ids), table[ids])
    assert layer.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert torch.equal(layer(ids), table[ids].bfloat16())
    with pytest.raises(IndexError):
        layer(torch.tensor([50]))


def test_a_packed_weight_of_another_shape_or_encoding_is_refused() -> None:
    packed = quantize_tensor(weight(8, 256), "ternary")
    for layer in (PackedLinear(256, 9, "ternary"), PackedLinear(256, 8, "binary"), PackedLinear(128, 8, "ternary")):
        with pytest.raises(FormatError, match="does not fit"):
            layer.set_packed(packed)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_fake_quant_linear_computes_what_is_exported(encoding: str) -> None:
    linear = nn.Linear(256, 16, bias=False)
    parameter = linear.weight
    layer = FakeQuantLinear.from_linear(linear, encoding)
    assert layer.weight is parameter
    x = torch.randn(5, 256)
    stored = torch.from_numpy(dequantize(layer.to_packed()))
    assert torch.equal(layer(x), F.linear(x, stored))
    layer.eps = 1.0
    torch.testing.assert_close(layer(x), F.linear(x, parameter))
    layer.eps = 0.25
    torch.testing.assert_close(layer(x), F.linear(x, 0.75 * stored + 0.25 * parameter))
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0
    assert set(layer.state_dict()) == {"weight"}


def test_annealing_does_not_compile_again() -> None:
    layer = FakeQuantLinear(128, 8, "ternary", eps=0.5)
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(1)
        return graph

    compiled = torch.compile(layer, backend=count, fullgraph=True)
    x = torch.randn(3, 128)
    for eps in (0.5, 0.3, 0.1, 0.0):
        layer.eps = eps
        torch.testing.assert_close(compiled(x), layer(x))
    assert layer.eps == 0.0
    assert len(graphs) == 1


def test_fake_quant_embedding_looks_up_what_is_exported() -> None:
    layer = FakeQuantEmbedding.from_embedding(nn.Embedding(20, 128), "affine4")
    ids = torch.tensor([[1, 19]])
    assert torch.equal(layer(ids), torch.from_numpy(dequantize(layer.to_packed()))[ids])
    layer(ids).sum().backward()
    assert (layer.weight.grad != 0).any(dim=1).nonzero().flatten().tolist() == [1, 19]


@pytest.mark.parametrize(("o", "n", "bias"), [(8, 16, True), (700, 8192, False), (700, 8192, True)])
@torch.no_grad()
def test_stored_linear_computes_in_the_dtype_of_its_input(o: int, n: int, bias: bool) -> None:
    layer = StoredLinear(n, o, bias=bias).to(torch.bfloat16)
    x = torch.randn(2, 3, n)
    found = layer(x)
    assert found.dtype == torch.float32
    b = layer.bias.float() if bias else None
    torch.testing.assert_close(found, F.linear(x, layer.weight.float(), b))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_stored_embedding_casts_rows() -> None:
    layer = StoredEmbedding(10, 4).to(torch.bfloat16)
    assert layer(torch.tensor([1, 2])).dtype == torch.float32
