"""Rounding against brute force, the format's scale rules, and the tie between training and export."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from linocut.errors import FormatError, UsageError
from linocut.formats.packed import ENCODINGS, MAX_SCALE, MIN_SCALE, dequantize, unpack
from linocut.models.linear import FakeQuantLinear
from linocut.quantize.rounding import (
    FAKE_METHODS,
    _affine_range,
    _affine_search,
    fake_quantize,
    quantize_affine4,
    quantize_binary,
    quantize_tensor,
    quantize_ternary,
    relative_error,
    round_scale,
)

seeds = st.integers(0, 2**31 - 1)


def random_weights(seed: int, rows: int = 3, columns: int = 256) -> Tensor:
    """Weights of mixed distributions and magnitudes, with exact zeros and repeated values among them."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    kind = seed % 5
    if kind == 1:
        w = w**3
    elif kind == 2:
        w = (w * 2).round() / 2
    elif kind == 3:
        w = w * (torch.rand(rows, columns, generator=generator) < 0.1)
    elif kind == 4:
        w[:, :128] = 0
    return w * 10 ** float(torch.randint(-4, 3, (), generator=generator))


def test_round_scale_equals_fp16_rounding_everywhere():
    # Every float16 in range, the float32 midpoints between neighbours, and their float32 neighbours.
    halves = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    middles = (halves[:-1] + halves[1:]) / 2
    near = torch.cat([torch.nextafter(middles, torch.tensor(0.0)), torch.nextafter(middles, torch.tensor(1e9))])
    values = torch.cat([halves, middles, near, torch.tensor([0.0, 1e-12, 7e4, 3e38])])
    assert torch.equal(round_scale(values), values.clamp(MIN_SCALE, MAX_SCALE).half().float())


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_binary_is_sign_times_mean(seed):
    w = random_weights(seed)
    values, scales = quantize_binary(w)
    assert torch.equal(values, torch.where(w >= 0, 1, -1).to(torch.int8))
    expected = w.double().abs().view(3, 2, 128).mean(-1).clamp(MIN_SCALE, MAX_SCALE)
    torch.testing.assert_close(scales.double(), expected, rtol=2**-11 + 1e-6, atol=2**-25)


def ternary_optimum(group: np.ndarray) -> float:
    """Smallest squared error over all kept counts with their least-squares scales, in float64."""
    magnitude = np.sort(np.abs(group.astype(np.float64)))[::-1]
    sums = np.cumsum(magnitude)
    return float((magnitude**2).sum() - (sums**2 / np.arange(1, len(sums) + 1)).max())


@given(seeds)
@settings(max_examples=40, deadline=None)
def test_exact_ternary_reaches_the_optimum(seed):
    w = random_weights(seed)
    values, scales = quantize_ternary(w)
    q = (values.float().view(3, 2, 128) * scales[..., None]).double()
    error = (q - w.double().view(3, 2, 128)).square().sum(-1)
    for row, group in itertools.product(range(3), range(2)):
        source = w[row, group * 128 : (group + 1) * 128].numpy()
        energy = float((source.astype(np.float64) ** 2).sum())
        # The scale's FP16 rounding costs at most (2^-11)^2 of the kept energy, more below FP16's normal range.
        slack = 3e-7 * energy + 128 * (2**-25) ** 2
        assert float(error[row, group]) <= ternary_optimum(source) + slack


def test_ternary_optimum_is_the_optimum_over_all_codes():
    # The claim behind the sort, on groups small enough to try all 3^6 code vectors.
    rng = np.random.default_rng(0)
    codes = np.array(list(itertools.product([-1, 0, 1], repeat=6)), dtype=np.float64)[:]
    codes = codes[np.abs(codes).sum(1) > 0]
    for _ in range(20):
        w = rng.standard_normal(6)
        gain = np.maximum(codes @ w, 0) ** 2 / (codes**2).sum(1)
        assert (w**2).sum() - gain.max() == pytest.approx(ternary_optimum(w), abs=1e-12)


@pytest.mark.parametrize(("encoding", "low", "high"), [("binary", 0.355, 0.372), ("ternary", 0.183, 0.193),
                                                       ("affine4", 0.006, 0.012), ("int8", 3e-5, 5e-5)])
def test_gaussian_error_is_the_known_one(encoding, low, high):
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)) * 0.02
    assert low < relative_error(w, quantize_tensor(w, encoding)) < high


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_exact_is_never_worse_than_tied(encoding):
    w = torch.cat([random_weights(seed) for seed in range(20)])
    exact, tied = (relative_error(w, quantize_tensor(w, encoding, method)) for method in ("exact", "tied"))
    assert exact <= tied + 1e-7


@given(seeds, st.sampled_from(ENCODINGS), st.sampled_from(FAKE_METHODS))
@settings(max_examples=60, deadline=None)
def test_export_is_bit_equal_to_the_training_forward(seed, encoding, method):
    w = random_weights(seed)
    assume(method == "tied" or encoding != "affine4")  # of which there is one range for training, another for files
    packed = quantize_tensor(w, encoding, method)
    assert np.array_equal(dequantize(packed), fake_quantize(w, encoding, method=method).numpy())


def test_training_rounds_by_known_methods():
    w = random_weights(3)
    assert not torch.equal(fake_quantize(w, "ternary"), fake_quantize(w, "ternary", method="absmean"))
    with pytest.raises(UsageError, match="tied or absmean, not 'exact'"):
        fake_quantize(w, "ternary", method="exact")


@given(seeds, st.sampled_from(["exact", "tied"]))
@settings(max_examples=40, deadline=None)
def test_scales_of_two_groups_are_those_of_one_twice_as_long(seed, method):
    """Tied ternary scales are the optimum over both groups; an odd last group is on its own."""
    w = random_weights(seed, columns=640)
    values, scales = quantize_ternary(w, method, groups_per_scale=2)
    assert torch.equal(scales[:, 0:4:2], scales[:, 1:4:2])
    alone = quantize_ternary(w[:, 512:], method)
    assert torch.equal(values[:, 512:], alone[0])
    assert torch.equal(scales[:, 4:], alone[1])
    if method == "tied":
        return
    q = (values.float().view(3, 5, 128) * scales[..., None]).double().view(3, 640)
    error = (q - w.double())[:, :512].view(3, 2, 256).square().sum(-1)
    for row, pair in itertools.product(range(3), range(2)):
        source = w[row, pair * 256 : (pair + 1) * 256].numpy()
        slack = 3e-7 * float((source.astype(np.float64) ** 2).sum()) + 256 * (2**-25) ** 2
        assert float(error[row, pair]) <= ternary_optimum(source) + slack


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_tied_binary_scales_are_means_of_both_groups(seed):
    w = random_weights(seed, columns=512)
    values, scales = quantize_binary(w, groups_per_scale=2)
    assert torch.equal(values, quantize_binary(w)[0])
    expected = w.double().abs().view(3, 2, 256).mean(-1).clamp(MIN_SCALE, MAX_SCALE).repeat_interleave(2, 1)
    torch.testing.assert_close(scales.double(), expected, rtol=2**-11 + 1e-6, atol=2**-25)


@pytest.mark.parametrize(("encoding", "most"), [("binary", 1.01), ("ternary", 1.01), ("affine4", 1.0)])
def test_tying_costs_little_on_a_gaussian(encoding, most):
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1)) * 0.02
    apart, together = (quantize_tensor(w, encoding, groups_per_scale=count) for count in (1, 2))
    assert relative_error(w, apart) <= relative_error(w, together) <= most * relative_error(w, apart)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_row_blocks_do_not_change_the_result(encoding):
    w = torch.randn(1500, 512, generator=torch.Generator().manual_seed(2))
    whole = quantize_tensor(w, encoding)
    part = quantize_tensor(w[1100:1300], encoding)
    assert whole.shape == (1500, 512)
    assert np.array_equal(whole.codes[1100:1300], part.codes)
    assert np.array_equal(whole.scales[1100:1300], part.scales)


def test_absent_values_follow_the_format():
    w = torch.zeros(2, 128)
    w[1] = -0.0
    for encoding in ENCODINGS:
        for method in ("exact", "tied"):
            packed = quantize_tensor(w, encoding, method)
            assert (packed.scales.astype(np.float32) == MIN_SCALE).all()
            assert (unpack(packed) == (1 if encoding == "binary" else 0)).all()
    tiny = torch.full((1, 128), 1e-9)
    assert (unpack(quantize_tensor(tiny, "ternary")) == 0).all(), "nearer to zero than to the smallest scale"
    huge = torch.full((1, 128), 1e6)
    assert (dequantize(quantize_tensor(huge, "ternary")) == MAX_SCALE).all()


def test_int8_reaches_the_largest_weight_and_is_off_by_half_a_step_at_most():
    w = torch.cat([random_weights(seed) for seed in range(20)])
    packed = quantize_tensor(w, "int8")
    codes, scales = unpack(packed).reshape(len(w), -1, 128), packed.scales.astype(np.float32)
    groups = w.numpy().reshape(codes.shape)
    live = np.abs(groups).max(axis=2) > 127 * 2.0**-14  # scales in float16's full precision
    assert (np.abs(codes).max(axis=2)[live] == 127).all()
    # Where a scale was rounded down, 127 of it end short of the largest weight, by 127 halves of float16's last bit.
    short = 127 * np.spacing(packed.scales).astype(np.float32) / 2
    assert (np.abs(codes * scales[:, :, None] - groups) <= (scales / 2 + short)[:, :, None] * 1.0001).all()


@pytest.mark.parametrize("tails", [3.0, 5.0, 1000.0])  # of Student's distribution: heavy ones, to a Gaussian's
def test_affine4_comes_near_the_best_scale_and_zero_point(tails):
    g = torch.from_numpy(np.random.default_rng(4).standard_t(tails, (300, 64))).float()
    signed, scales, _ = _affine_search(g)
    found = (signed * scales - g).square().sum(-1)
    best = torch.full_like(found, np.inf)
    span = (g.amax(-1) - g.amin(-1))[:, None]
    for zero, factor in itertools.product(range(16), np.linspace(0.3, 1.2, 181)):
        scale = span * factor / 15
        code = (g / scale).round().clamp(-zero, 15 - zero)
        best = torch.minimum(best, (code * scale - g).square().sum(-1))
    signed, scales, _ = _affine_range(g)
    simple = (signed * scales - g).square().sum(-1)
    assert found.sum() <= 1.01 * best.sum()
    assert found.sum() <= 0.95 * simple.sum()
    assert (found <= simple * (1 + 1e-5)).all()


def test_affine4_codes_are_in_range_and_zero_is_exact():
    w = torch.cat([random_weights(seed) for seed in range(10)])
    codes, scales, zeros = quantize_affine4(w)
    assert codes.dtype == zeros.dtype == torch.uint8
    assert int(codes.max()) <= 15
    assert int(zeros.max()) <= 15
    q = (codes.float().view(30, 4, 64) - zeros[..., None]) * scales[..., None]
    assert (q.view_as(w)[w == 0] == 0).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gradient_is_straight_through(encoding):
    w = torch.randn(4, 256, requires_grad=True)
    upstream = torch.randn(4, 256)
    fake_quantize(w, encoding).backward(upstream)
    assert torch.equal(w.grad, upstream)
    w.grad = None
    fake_quantize(w, encoding, clip=2.0).backward(upstream)
    cut = w.grad == 0
    assert torch.equal(w.grad[~cut], upstream[~cut])
    if encoding == "binary":
        assert 0 < float(cut.float().mean()) < 0.3
        assert float(w.detach().abs()[cut].min()) > float(w.detach().abs()[~cut].median())


def test_eps_blends_towards_the_weight():
    w = torch.randn(4, 256)
    q = fake_quantize(w, "ternary")
    torch.testing.assert_close(fake_quantize(w, "ternary", eps=0.25), q + 0.25 * (w - q))
    torch.testing.assert_close(fake_quantize(w, "ternary", eps=torch.tensor(0.25)), q + 0.25 * (w - q))
    torch.testing.assert_close(fake_quantize(w, "ternary", eps=1.0), w)


def test_bf16_autocast_keeps_float32_weights_exact():
    w = torch.randn(4, 256)
    expected = fake_quantize(w, "ternary")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fake_quantize(w, "ternary"), expected)
    assert fake_quantize(w.bfloat16(), "binary").dtype == torch.bfloat16


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_dynamo_traces_it_without_a_graph_break(encoding):
    w = torch.randn(4, 256, requires_grad=True)
    compiled = torch.compile(lambda x: fake_quantize(x, encoding, 0.5), backend="aot_eager", fullgraph=True)
    out = compiled(w)
    assert torch.equal(out, fake_quantize(w, encoding, 0.5))
    out.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_compiled_layer_has_the_gradient_of_one_that_is_not(encoding, backend):
    layer = FakeQuantLinear(128, 3, encoding)  # torch 2.11 gives an autograd.Function's weight none here
    layer(torch.ones(2, 128)).square().sum().backward()
    wanted, layer.weight.grad = layer.weight.grad, None
    layer.compile(backend=backend, dynamic=False)
    layer(torch.ones(2, 128)).square().sum().backward()
    torch._dynamo.reset()  # of one method torch compiles but a few variants in a process; other tests need theirs
    assert wanted.any()
    assert torch.equal(layer.weight.grad, wanted)


def test_bad_input_is_refused():
    with pytest.raises(FormatError, match="not all finite"):
        quantize_tensor(torch.tensor([[float("nan")] * 128]), "binary", name="layer")
    with pytest.raises(FormatError, match="multiple of 128"):
        quantize_tensor(torch.ones(2, 100), "ternary")
    with pytest.raises(FormatError, match="2 dimensions"):
        quantize_tensor(torch.ones(128), "ternary")
    with pytest.raises(UsageError, match="unknown encoding"):
        fake_quantize(torch.ones(2, 128), "ternery")
    with pytest.raises(UsageError, match="unknown rounding method"):
        quantize_tensor(torch.ones(2, 128), "ternary", method="best")


def test_relative_error_of_known_values():
    w = torch.cat([torch.ones(1, 128), torch.zeros(1, 128)])
    assert relative_error(w[:1], quantize_tensor(w[:1], "ternary")) == 0.0
    assert relative_error(w[1:], quantize_tensor(w[1:], "ternary")) == 0.0
    pair = torch.tensor([[1.0, 3.0] * 64])
    assert relative_error(pair, quantize_tensor(pair, "binary")) == pytest.approx(0.2)
