"""GPTQ rounding: better than plain rounding where inputs are correlated, exact where nothing can be lost."""

import itertools

import pytest
import torch

from linocut.errors import FormatError, UsageError
from linocut.formats.packed import GROUP_SIZE
from linocut.quantize.gptq import gptq, outer_sum, output_error, refit_scales
from linocut.quantize.rounding import quantize_binary, quantize_ternary

PLAIN = {"binary": quantize_binary, "ternary": quantize_ternary}


def decoded(values, scales):
    return values.float() * scales.repeat_interleave(GROUP_SIZE, dim=1)


def correlated(inputs, decay, seed=0):
    """Sum of x x^T over tokens whose spectrum falls as k^-decay, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator))
    tokens = torch.randn(8 * inputs, inputs, generator=generator) * torch.arange(1, inputs + 1) ** (-decay / 2)
    tokens = tokens @ basis.T
    return tokens.T @ tokens


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
def test_correlated_inputs_lose_less_than_half_of_plain_rounding(encoding):
    torch.manual_seed(1)
    weight, hessian = torch.randn(64, 384) * 0.05, correlated(384, 1.0)
    plain = output_error(weight, decoded(*PLAIN[encoding](weight)), hessian)
    passed = output_error(weight, decoded(*gptq(weight, hessian, encoding, sweeps=0)), hessian)
    swept = output_error(weight, decoded(*gptq(weight, hessian, encoding, sweeps=3)), hessian)
    assert passed < 0.6 * plain
    assert swept < 0.95 * passed


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
def test_white_inputs_do_as_well_as_the_optimum(encoding):
    torch.manual_seed(2)
    weight = torch.randn(32, 256)
    hessian = torch.eye(256)
    plain = output_error(weight, decoded(*PLAIN[encoding](weight)), hessian)
    assert output_error(weight, decoded(*gptq(weight, hessian, encoding)), hessian) <= plain * 1.001


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
def test_weights_on_the_grid_stay_as_they_are(encoding):
    torch.manual_seed(3)
    codes = torch.randint(0, 2, (8, 256)) * 2 - 1 if encoding == "binary" else torch.randint(-1, 2, (8, 256))
    scales = torch.tensor([0.5, 0.25]).expand(8, 2)
    values, found = gptq(decoded(codes, scales), correlated(256, 0.7), encoding)
    assert torch.equal(values, codes.to(torch.int8))
    assert torch.allclose(found, scales, rtol=2e-3)


def test_refit_scales_are_least_squares():
    torch.manual_seed(4)
    weight, hessian = torch.randn(3, 256), correlated(256, 0.5) / 2048
    codes = torch.where(weight >= 0, 1.0, -1.0)
    flipped, scales = refit_scales(weight, hessian, codes)
    best = output_error(weight, decoded(flipped, scales), hessian)
    for row, group, factor in itertools.product(range(3), range(2), (0.98, 1.02)):
        other = scales.clone()
        other[row, group] *= factor
        assert output_error(weight, decoded(flipped, other), hessian) > best


def test_scales_are_float16_values():
    torch.manual_seed(5)
    _, scales = gptq(torch.randn(4, 128), correlated(128, 1.0), "ternary")
    assert torch.equal(scales, scales.half().float())


def test_unfit_arguments_are_refused():
    with pytest.raises(UsageError, match="affine4"):
        gptq(torch.zeros(4, 128), torch.eye(128), "affine4")
    with pytest.raises(FormatError, match=r"multiple of 128"):
        gptq(torch.zeros(4, 100), torch.eye(100), "ternary")
    with pytest.raises(FormatError, match="finite"):
        gptq(torch.full((4, 128), float("nan")), torch.eye(128), "ternary")


def test_sums_run_over_tokens():
    y, x = torch.tensor([[1.0, 2.0], [0.5, 0.0]]).bfloat16(), torch.tensor([[3.0], [4.0]])
    assert outer_sum(y, x).tolist() == [[5.0], [6.0]]
    assert outer_sum(y, x).dtype == torch.float32
