"""Triton's decoders against formats.packed, the numpy implementation of the format."""

import pytest
import torch
from gpu_cases import on_device, random_packed, stored

from linocut.formats.packed import ENCODINGS, dequantize, unpack
from linocut.kernels.gpu import decode

WIDTHS = (128, 384, 640, 768, 1280, 3072)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoded_weights_are_equal_to_the_last_bit(device, encoding, n, dtype):
    packed = random_packed(encoding, 35, n)
    out = torch.full((35, n), 77, dtype=dtype, device=device)
    decode.decode(on_device(packed, device), out)
    assert torch.equal(out.cpu(), stored(torch.from_numpy(dequantize(packed)), dtype, device))


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_unpacked_values_and_scales_are_exact(device, encoding, n, dtype):
    packed = random_packed(encoding, 35, n)
    values = torch.zeros(35, n, dtype=dtype, device=device)
    scales = torch.zeros(n // 128, 35, device=device)
    decode.unpack(on_device(packed, device), values, scales)
    assert torch.equal(values.cpu().float(), torch.from_numpy(unpack(packed)).float())
    assert torch.equal(scales.cpu(), torch.from_numpy(packed.scales).float().T)


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
@pytest.mark.parametrize("n", WIDTHS)
def test_folded_weights_are_within_half_a_step_of_the_scale(device, encoding, n):
    packed = random_packed(encoding, 35, n)
    values = torch.zeros(35, n, dtype=torch.int8, device=device)
    scales = torch.zeros(35, device=device)
    decode.fold(on_device(packed, device), values, scales)
    wanted = torch.from_numpy(dequantize(packed))
    largest = torch.from_numpy(packed.scales).float().amax(1, keepdim=True)
    assert torch.allclose(scales.cpu()[:, None] * 127, largest)
    assert ((decode.values_of(values, scales).cpu() - wanted).abs() <= largest * (0.5 / 127 + 1e-6)).all()
    assert torch.equal(values.cpu() == 0, wanted == 0)  # scales within a factor of eight: none is rounded away


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_byte_decodes_without_harm(device, encoding):
    """As the reference: a damaged file gives wrong weights, never a crash or a value out of range."""
    from linocut.kernels import reference
    from linocut.kernels.selfcheck import random_weight

    weight = random_weight(encoding, 20, 1408)
    out = torch.empty(20, 1408, device=device)
    moved = type(weight)(weight.codes.to(device), weight.scales.to(device),
                         None if weight.zeros is None else weight.zeros.to(device), encoding, 1408)
    decode.decode(moved, out)
    assert torch.equal(out.cpu(), reference.decode(weight))
