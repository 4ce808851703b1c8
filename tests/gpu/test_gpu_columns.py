"""GPTQ's inner loops in Triton against torch's, bit for bit."""

import pytest
import torch

from linocut.kernels import columns
from linocut.kernels.columns import columns_for, why_not_triton
from linocut.kernels.gpu.columns import TritonColumns
from linocut.quantize.columns import TorchColumns
from linocut.quantize.gptq import gptq


@pytest.fixture
def group(device):
    """A group of 128 columns inside wider tensors, 37 rows: block, codes, scale, upper, square."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(37, 384, generator=generator) * 0.05
    tokens = torch.randn(600, 384, generator=generator) * torch.arange(1, 385) ** -0.4
    square = tokens.T @ tokens / 600 + 0.05 * torch.eye(384)
    upper = torch.linalg.cholesky(torch.linalg.inv(square.double()), upper=True).float()
    scale = wide.abs().view(37, 3, 128).mean(-1)
    codes = (wide / 0.05).round().clamp(-1, 1)
    part = slice(128, 256)
    return [each.to(device) for each in (wide, codes, scale, upper, square)], part


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
def test_errors_are_passed_on_bit_for_bit(group, encoding):
    (wide, _, scale, upper, _), part = group
    wanted = TorchColumns().propagate(wide[:, part], scale[:, 1:2], upper[part, part], encoding)
    found = TritonColumns().propagate(wide[:, part], scale[:, 1:2], upper[part, part], encoding)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert set(wanted[0].unique().tolist()) == ({-1.0, 1.0} if encoding == "binary" else {-1.0, 0.0, 1.0})


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
def test_codes_descend_bit_for_bit(group, encoding):
    (wide, codes, scale, _, square), part = group
    codes = torch.where(codes == 0, 1.0, codes) if encoding == "binary" else codes
    residual = (wide - codes * scale.repeat_interleave(128, 1)) @ square
    given = residual[:, part], codes[:, part], scale[:, 1:2], square[part, part]
    wanted, found = TorchColumns().descend(*given, encoding), TritonColumns().descend(*given, encoding)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert 0.02 < float((wanted[0] != codes[:, part]).float().mean()) < 0.9


def test_gptq_is_the_same_on_both(group):
    (wide, _, _, _, square), _ = group
    for encoding in ("binary", "ternary"):
        wanted = gptq(wide, square, encoding, sweeps=1)
        found = gptq(wide, square, encoding, sweeps=1, columns=columns_for(wide.device))
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


def test_triton_computes_where_it_runs_and_may(device, monkeypatch):
    assert isinstance(columns_for(torch.device(device)), TritonColumns)
    monkeypatch.setenv("LINOCUT_KERNEL", "reference")
    assert isinstance(columns_for(torch.device(device)), TorchColumns)
    assert why_not_triton(device) == "the kernel reference is asked for"


def test_torch_computes_where_triton_cannot_compile(device, monkeypatch):
    def broken(*_):
        raise RuntimeError("no C compiler found")

    monkeypatch.setattr(TritonColumns, "propagate", broken)
    columns._why_broken.cache_clear()
    try:
        assert isinstance(columns_for(torch.device(device)), TorchColumns)
        assert "no C compiler found" in why_not_triton(device)
    finally:
        columns._why_broken.cache_clear()
