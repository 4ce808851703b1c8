"""Every kernel of float activations against formats.packed.dequantize, the numpy implementation of the format."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import ROWS, TOKENS, TOLERANCE, WIDTHS, random_packed, relative_error, tensors

from linocut.formats.packed import ENCODINGS, dequantize, row_bytes
from linocut.kernels import blocked, dispatch, native

KERNELS = ("native", "reference", "generic")  # int8 rounds activations: test_int8.py


@pytest.fixture(params=KERNELS)
def kernel(request):
    """Each kernel in turn. The C++ module must be there: CI builds it, and a test that skips would hide its loss."""
    if request.param != "reference":
        assert native.why_no_module() is None, native.why_no_module()
    with dispatch.use_kernel(request.param):
        yield request.param


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("o", ROWS)
def test_decoded_weights_are_equal_to_the_last_bit(kernel, encoding, n, o):
    packed = random_packed(encoding, o, n)
    wanted = torch.from_numpy(dequantize(packed))
    for dtype in TOLERANCE:
        found = dispatch.dequantize(*tensors(packed), encoding, n, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, wanted.to(dtype))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize(("o", "n"), [(1, 128), (65, 640), (200, 896), (64, 3072)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_matches_the_oracle(kernel, encoding, m, o, n, dtype):
    if kernel == "generic" and m > 33:
        m = 33  # a scalar loop: the larger sizes only cost time
    packed = random_packed(encoding, o, n)
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(m)).to(dtype)
    wanted = x.double() @ torch.from_numpy(dequantize(packed)).double().T
    found = dispatch.linear(x, *tensors(packed), encoding)
    assert found.dtype == dtype
    assert relative_error(found, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_weight_of_many_blocks_equals_the_whole(kernel, encoding, monkeypatch):
    """Blocks of rows change memory, not numbers; the last block is a short one."""
    packed = random_packed(encoding, 150, 512)
    x = torch.randn(2, 9, 512)
    whole = F.linear(x, torch.from_numpy(dequantize(packed)))
    monkeypatch.setattr(blocked, "SCRATCH_BYTES", 64 * 512 * 4)
    bias = torch.randn(150)
    assert relative_error(dispatch.linear(x, *tensors(packed), encoding, bias), whole + bias) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_threads_do_not_change_decoded_bits(kernel, threads, monkeypatch):
    monkeypatch.setenv("LINOCUT_THREADS", threads)
    monkeypatch.setattr(native, "_SPLIT_WEIGHTS", 1000)
    packed = random_packed("ternary", 65, 1280)
    assert torch.equal(dispatch.dequantize(*tensors(packed), "ternary", 1280), torch.from_numpy(dequantize(packed)))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gradients_reach_x(kernel, encoding, monkeypatch):
    monkeypatch.setattr(blocked, "SCRATCH_BYTES", 64 * 256 * 4)
    packed = random_packed(encoding, 150, 256)
    x = torch.randn(5, 256, requires_grad=True)
    grad = torch.randn(5, 150)
    dispatch.linear(x, *tensors(packed), encoding).backward(grad)
    assert x.grad is not None
    assert relative_error(x.grad, grad @ torch.from_numpy(dequantize(packed))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_compiled_variant_agrees(encoding):
    """Each instruction set that this CPU has; the others are reported by name so that nobody believes them tested."""
    module, line = native.status()
    assert module is not None, line
    usable = [name for name, reason in module.variants() if not reason]
    assert usable[-1] == "baseline"
    packed = random_packed(encoding, 33, 1920)
    codes, scales, zeros = tensors(packed)
    wanted = torch.from_numpy(dequantize(packed))
    for name in usable:
        out = torch.empty(33, 1920)
        module.decode(codes, scales.view(torch.int16), zeros, encoding, 1920, out, name)
        assert torch.equal(out, wanted), name
        half = torch.empty(33, 1920, dtype=torch.bfloat16)
        module.decode(codes, scales.view(torch.int16), zeros, encoding, 1920, half.view(torch.int16), name)
        assert torch.equal(half, wanted.bfloat16()), name


def test_no_kernel_is_left_out():
    """Those of Triton: tests/gpu."""
    assert {each.name for each in dispatch.CANDIDATES} == {*KERNELS, "int8", "triton", "triton-int8"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_cpp_and_python_agree_on_row_bytes(encoding):
    module, line = native.status()
    assert module is not None, line
    for n in range(128, 12289, 128):
        assert module.row_bytes(encoding, n) == row_bytes(encoding, n)
