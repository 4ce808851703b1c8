"""Triton's group norm against torch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import normal, relative, stored

from linocut.kernels.gpu import group_norm
from linocut.models.group_norm import GroupNorm


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles so small that a map has several parts."""
    monkeypatch.setattr(group_norm, "_VALUES", 64)
    monkeypatch.setattr(group_norm, "_TILES", 2)


@pytest.mark.parametrize(("shape", "groups"), [((1, 8, 1, 1), 2), ((1, 16, 5, 7), 4), ((2, 24, 6, 3), 3),
                                               ((1, 96, 3, 2), 32)])
@pytest.mark.parametrize("silu", [False, True])
def test_equals_torch(device, shape, groups, silu):
    x, weight, bias = normal(*shape) * 3 + 1, normal(shape[1], seed=1) + 1, normal(shape[1], seed=2)
    wanted = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-6)
    wanted = F.silu(wanted) if silu else wanted
    given = x.to(device).contiguous(memory_format=torch.channels_last)
    found = group_norm.group_norm(given, groups, weight.to(device), bias.to(device), 1e-6, silu)
    assert relative(found, wanted) < 1e-6
    assert found.is_contiguous(memory_format=torch.channels_last)
    apart = group_norm.group_norm(x.to(device), groups, weight.to(device), bias.to(device), 1e-6, silu)
    assert torch.equal(apart, found)  # a map whose channels lie apart is turned around first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_a_strip(device, dtype):
    whole = (normal(1, 8, 9, 5) * 3 + 1).to(dtype).to(device).contiguous(memory_format=torch.channels_last)
    strip = whole[:, :, 2:7]  # rows of a map, no copy
    mean, variance = group_norm.moments(strip)
    values = strip.cpu().double()
    assert relative(mean, values.mean((2, 3))) < 1e-6
    assert relative(variance, values.var((2, 3), correction=0)) < 1e-6
    assert mean.dtype == variance.dtype == torch.float64


def test_a_map_far_from_zero_keeps_its_digits(device):
    """A variance of a millionth of the square of the mean."""
    x = normal(1, 8, 9, 9) + 1000
    wanted = F.group_norm(x.double(), 2, eps=1e-6)
    one, zero = torch.ones(8, device=device), torch.zeros(8, device=device)
    assert relative(group_norm.group_norm(x.to(device), 2, one, zero, 1e-6), wanted) < 2e-4  # x itself: 6e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(device, dtype):
    x, weight, bias = (each.to(dtype) for each in (normal(1, 16, 5, 7), normal(16, seed=1), normal(16, seed=2)))
    found = group_norm.group_norm(x.to(device), 4, weight.to(device), bias.to(device), 1e-6, True)
    assert found.dtype == dtype
    wanted = F.silu(F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-6)).float()
    off = (found.cpu().float() - stored(wanted, dtype, device).float()).abs()
    assert float(off.max()) <= float(wanted.abs().max()) * torch.finfo(dtype).eps


def test_the_layer_uses_it_where_it_runs(device):
    layer, x = GroupNorm(4, 16).to(device), normal(1, 16, 5, 7).to(device)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    with torch.no_grad():
        assert relative(layer.by_triton(x), layer(x)) < 1e-6
        assert relative(layer.by_triton(x, silu=True), F.silu(layer(x))) < 1e-6
