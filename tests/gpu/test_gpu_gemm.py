"""Triton's products against the reference decoder, and activations against the rounding of the CPU."""

import itertools

import pytest
import torch
from gpu_cases import normal, on_device, random_packed, relative

from linocut.formats.packed import dequantize
from linocut.kernels.gpu import decode, gemm, rows
from linocut.kernels.gpu.activations import Activations
from linocut.kernels.gpu.gemm import Tile

# Tokens around a tile, and rows and widths around blocks of ternary weights.
SHAPES = [(1, 3, 128), (17, 65, 384), (33, 40, 768), (16, 33, 1408)]
SMALL = [Tile(16, 32, 4, 2, 2), Tile(32, 16, 4, 2, 1)]


def rounded(kind: str, m: int, n: int, device: str) -> Activations:
    act = Activations.empty(kind, m, n, device)
    rows.quantize(normal(m, n).to(device), act)
    return act


def scratch(kind: str, packed, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    (o, n), weight = packed.shape, on_device(packed, device)
    if kind == "folded":
        values, scales = torch.zeros(o, n, dtype=torch.int8, device=device), torch.zeros(o, device=device)
        decode.fold(weight, values, scales)
    else:
        dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
        values, scales = torch.zeros(o, n, dtype=dtype, device=device), torch.zeros(n // 128, o, device=device)
        decode.unpack(weight, values, scales)
    return values, scales


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
@pytest.mark.parametrize(("kind", "form"), [("int8", "unpacked"), ("rows", "unpacked"), ("rows", "folded"),
                                            ("fp8", "fp8")])
@pytest.mark.parametrize(("m", "o", "n"), SHAPES)
@pytest.mark.parametrize("bulk", [False, True])
def test_product_is_that_of_what_was_rounded(device, encoding, kind, form, m, o, n, bulk):
    """What rounding does is in both; sums of integers are exact, those of groups float32."""
    packed, act = random_packed(encoding, o, n), rounded(kind, m, n, device)
    values, scales = scratch(form, packed, device)
    weight = decode.values_of(values, scales).cpu() if form == "folded" else torch.from_numpy(dequantize(packed))
    wanted = act.dequantize().double().cpu() @ weight.double().T
    out = torch.full((m, o + 3), 77.0, device=device)
    gemm.product(act, values, scales, out[:, :o], Tile(16, 32, 4, 2, 2, bulk=bulk))
    assert relative(out[:, :o], wanted) < 1e-6
    assert (out[:, o:] == 77).all()  # nothing outside the result is written


@pytest.mark.parametrize(("encoding", "tile", "shape"), list(itertools.product(["binary", "ternary"], SMALL, SHAPES)))
def test_packed_product_gives_the_same(device, encoding, tile, shape):
    m, o, n = shape
    packed, act = random_packed(encoding, o, n), rounded("int8", m, n, device)
    wanted = act.dequantize().double().cpu() @ torch.from_numpy(dequantize(packed)).double().T
    out = torch.zeros(m, o, device=device)
    gemm.packed_product(act, on_device(packed, device), out, tile)
    assert relative(out, wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("encoding", "tile", "shape"), list(itertools.product(["binary", "ternary"], SMALL, SHAPES)))
def test_packed_product_of_floats_rounds_nothing(device, encoding, tile, shape, dtype):
    m, o, n = shape
    packed, act = random_packed(encoding, o, n), Activations.empty("float", m, n, device, dtype)
    rows.quantize(normal(m, n).to(device), act)
    wanted = act.values.double().cpu() @ torch.from_numpy(dequantize(packed)).double().T
    out = torch.full((m, o + 3), 77.0, device=device)
    gemm.packed_product(act, on_device(packed, device), out[:, :o], tile)
    assert relative(out[:, :o], wanted) < 1e-6
    assert (out[:, o:] == 77).all()


def test_a_broken_token_shows_and_stays_alone(device):
    x = normal(5, 256)
    x[2, 7] = float("nan")
    x[4, 200] = float("inf")
    packed = random_packed("ternary", 20, 256)
    for kind in ("int8", "rows", "fp8"):
        act = Activations.empty(kind, 5, 256, device)
        rows.quantize(x.to(device), act)
        out = torch.zeros(5, 20, device=device)
        gemm.product(act, *scratch("fp8" if kind == "fp8" else "unpacked", packed, device), out, SMALL[0])
        assert out[[2, 4]].isnan().all()
        assert out[[0, 1, 3]].isfinite().all()


def test_results_in_sixteen_bits(device):
    packed, act = random_packed("ternary", 40, 256), rounded("int8", 9, 256, device)
    wanted = act.dequantize().double().cpu() @ torch.from_numpy(dequantize(packed)).double().T
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.zeros(9, 40, dtype=dtype, device=device)
        gemm.product(act, *scratch("unpacked", packed, device), out, SMALL[0])
        assert relative(out, wanted) < 5e-3


@pytest.mark.parametrize("kind", ["int8", "rows", "fp8"])
def test_tokens_may_be_rounded_and_multiplied_in_parts(device, kind):
    packed, x = random_packed("ternary", 40, 384), normal(30, 384).to(device)
    whole, parts = (Activations.empty(kind, 30, 384, device) for _ in range(2))
    rows.quantize(x, whole)
    wanted, found = (torch.zeros(30, 40, device=device) for _ in range(2))
    given = scratch("fp8" if kind == "fp8" else "unpacked", packed, device)
    gemm.product(whole, *given, wanted, SMALL[0])
    for start, stop in ((0, 11), (11, 30)):
        rows.quantize(x[start:stop], parts.rows(start, stop))
        gemm.product(parts.rows(start, stop), *given, found[start:stop], SMALL[0])
    assert torch.equal(found, wanted)
    if kind == "int8":
        found.zero_()
        for start, stop in ((0, 11), (11, 30)):
            gemm.packed_product(parts.rows(start, stop), on_device(packed, device), found[start:stop], SMALL[0])
        assert relative(found, wanted) < 1e-6
