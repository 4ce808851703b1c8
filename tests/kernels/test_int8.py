"""Activations in int8 and products with packed weights: the rule, parity with floats, and bits that depend on nothing.

Two comparisons. With the activations as they were rounded, x_q = values * scales, the product is exact but for float32
rounding. With the float activations it may differ by what rounding them costs: half a step of max|x| / 127 at most.
"""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import random_packed, relative_error, tensors

from linocut.errors import KernelError
from linocut.formats.packed import ENCODINGS, dequantize
from linocut.kernels import cpu, dispatch, native
from linocut.kernels.fusible import MULTIPLIED
from linocut.kernels.problem import PackedWeight, Problem, checked

TOKENS = (1, 2, 7, 16, 17, 33, 256, 1024)
SHAPES = ((2, 128), (3, 384), (33, 640), (65, 768), (130, 896), (48, 3072))

# In-features of klein's packed layers and of its text encoder's; some of their rows tell as much as all.
MODEL_WIDTHS = [(encoding, n) for encoding in ("binary", "ternary") for n in (3072, 9216, 12288)]
MODEL_WIDTHS += [("affine4", n) for n in (2560, 4096, 9728)]

# Relative to the norm of y. Each group adds one rounding to the sum, each output one: eps * sqrt(groups) at most.
EXACT = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
# A value is off by at most half a step, evenly spread: std = max / 127 / sqrt(12). The largest of 128 normal values is
# 2.7 standard deviations on average, hence 2.7 / 127 / 3.46 = 0.6% of the activations, and as much of y.
ROUNDED = 0.012


def variants() -> list[str]:
    """The variants of the product that this CPU can run, best first."""
    return [name for name, _, reason in native.module().gemm_variants() if not reason]


@pytest.fixture(params=["auto", *variants()])
def variant(request, monkeypatch):
    """Each variant that runs here, and the automatic choice."""
    monkeypatch.setenv("LINOCUT_GEMM", "" if request.param == "auto" else request.param)
    return request.param


def weight_of(encoding: str, o: int, n: int, seed: int = 0) -> tuple[PackedWeight, torch.Tensor]:
    """A packed weight and what it decodes to, float64."""
    packed = random_packed(encoding, o, n, seed)
    return checked(*tensors(packed), encoding, n), torch.from_numpy(dequantize(packed)).double()


def randn(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def bits(y: torch.Tensor) -> torch.Tensor:
    return y.view(torch.int32 if y.dtype == torch.float32 else torch.int16)


# ------------------------------------------------------------------------------------------------- activations

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rule_of_rounding(dtype):
    x = (randn(9, 384) * torch.logspace(-6, 3, 9)[:, None]).to(dtype)
    act = cpu.quantize(x)
    groups = x.float().view(9, 3, 128)
    largest = groups.abs().amax(-1)
    assert torch.equal(act.scales, largest / 127)
    values = torch.round(groups * (127 / largest)[:, :, None]).flatten(1)
    assert torch.equal(act.values[:, :384].float(), values)
    assert torch.equal(act.sums, values.view(9, 6, 64).sum(-1).int())
    assert ((act.dequantize() - x.float()).abs().view(9, 3, 128) <= act.scales[:, :, None] * 0.5001).all()


def test_ties_go_to_the_even_number():
    x = torch.zeros(1, 128)
    x[0, :6] = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert cpu.quantize(x).values[0, :6].tolist() == [127, 0, 2, 2, 0, -2]


def test_zeros_tiny_and_broken_groups():
    x = randn(6, 256)
    x[0, :128] = 0
    x[1, :128] = 1e-40
    x[2, 5] = float("nan")
    x[3, 5] = float("-inf")
    x[4, :128] = 3e38
    act = cpu.quantize(x)
    assert act.scales[:2, 0].tolist() == [0, 0]
    assert act.scales[2:4, 0].isnan().all()
    assert act.scales[:, 1].isfinite().all()
    assert (act.values[:4, :128] == 0).all()
    assert (act.sums[:4, :2] == 0).all()
    assert (act.values[4, :128] == 127).all()


def test_strided_rows_are_read_as_they_lie():
    wide = randn(10, 512)
    for x in (wide[:, 128:384], wide[::2, :256], wide[3:4, 256:], wide[:, :256].t().contiguous().t(),
              wide[:1, :256].expand(4, 256)):
        found, wanted = cpu.quantize(x), cpu.quantize(x.clone(memory_format=torch.contiguous_format))
        assert torch.equal(found.values[:, :256], wanted.values[:, :256])
        assert torch.equal(found.scales, wanted.scales)


# ---------------------------------------------------------------------------------------------------- products

@pytest.mark.parametrize("encoding", MULTIPLIED)
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize(("o", "n"), SHAPES)
def test_products_are_exact_on_rounded_activations(variant, encoding, m, o, n):
    weight, w = weight_of(encoding, o, n)
    act = cpu.quantize(randn(m, n, m))
    wanted = act.dequantize().double() @ w.T
    for dtype, tolerance in EXACT.items():
        found = cpu.linear_quantized(act, weight, dtype=dtype)
        assert found.dtype == dtype
        assert relative_error(found, wanted) < tolerance


@pytest.mark.parametrize(("encoding", "n"), MODEL_WIDTHS)
def test_products_are_exact_at_the_models_widths(encoding, n, monkeypatch):
    weight, w = weight_of(encoding, 35, n)
    x = randn(max(TOKENS), n)
    act = cpu.quantize(x)
    wanted = act.dequantize().double() @ w.T
    for name in variants():
        monkeypatch.setenv("LINOCUT_GEMM", name)
        for m in TOKENS:
            found = cpu.linear_quantized(cpu.quantize(x[:m]), weight)
            assert relative_error(found, wanted[:m]) < EXACT[torch.float32], (name, m)


@pytest.mark.parametrize("encoding", MULTIPLIED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_activations_costs_under_a_hundredth(variant, encoding, dtype):
    weight, w = weight_of(encoding, 200, 1280)
    x = randn(65, 1280).to(dtype)
    with dispatch.use_kernel("int8"):
        found = dispatch.linear(x, weight.codes, weight.scales, weight.zeros, encoding)
    assert found.dtype == dtype
    error = relative_error(found, x.double() @ w.T)
    assert 0.001 < error < ROUNDED  # from below: it must really have been rounded


@pytest.mark.parametrize("encoding", MULTIPLIED)
def test_every_variant_gives_the_same_bits(encoding, monkeypatch):
    weight, _ = weight_of(encoding, 97, 1408)
    act = cpu.quantize(randn(35, 1408))
    for dtype in EXACT:
        found = {}
        for name in variants():
            monkeypatch.setenv("LINOCUT_GEMM", name)
            found[name] = bits(cpu.linear_quantized(act, weight, dtype=dtype))
        for name, y in found.items():
            assert torch.equal(y, found["generic"]), name


@pytest.mark.parametrize("encoding", MULTIPLIED)
def test_bits_depend_on_no_cut_and_no_thread(variant, encoding, monkeypatch):
    """More tokens than a task takes, so that tokens are cut too."""
    weight, _ = weight_of(encoding, 40, 256)
    x = randn(600, 256)
    whole = cpu.linear_quantized(cpu.quantize(x), weight)
    for threads in range(1, 9):
        monkeypatch.setenv("LINOCUT_THREADS", str(threads))
        assert torch.equal(bits(cpu.linear_quantized(cpu.quantize(x), weight)), bits(whole)), threads
    for start, stop in ((0, 1), (1, 8), (8, 21), (599, 600)):
        assert torch.equal(cpu.linear_quantized(cpu.quantize(x[start:stop]), weight), whole[start:stop])
        rows = weight.rows(start % 40, start % 40 + 9)
        part = cpu.linear_quantized(cpu.quantize(x[:33]), rows)
        assert torch.equal(part, whole[:33, start % 40: start % 40 + 9])


def test_extreme_sums_do_not_overflow(variant):
    """All codes and all values at their limits, with equal and with alternating signs."""
    n = 1280
    for encoding in MULTIPLIED:
        for sign in (1, -1):
            codes = {"binary": 255, "ternary": 255 if sign > 0 else 0, "affine4": 255}[encoding]
            packed, _ = weight_of(encoding, 33, n)
            zeros = None if packed.zeros is None else torch.zeros_like(packed.zeros)
            weight = PackedWeight(torch.full_like(packed.codes, codes), packed.scales, zeros, encoding, n)
            w = dispatch.candidate("reference")
            decoded = torch.empty(33, n)
            w.decode(weight, decoded)
            x = torch.full((17, n), float(sign))
            x[1::2, ::2] *= -1
            found = cpu.linear_quantized(cpu.quantize(x), weight)
            torch.testing.assert_close(found.double(), x.double() @ decoded.double().T, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("encoding", MULTIPLIED)
def test_a_broken_token_says_so_and_spoils_no_other(variant, encoding):
    weight, _ = weight_of(encoding, 50, 256)
    x = randn(40, 256)
    clean = cpu.linear_quantized(cpu.quantize(x), weight)
    x[3, 200], x[17, 0], x[39, 128] = float("nan"), float("inf"), float("-inf")
    found = cpu.linear_quantized(cpu.quantize(x), weight)
    broken = torch.tensor([3, 17, 39])
    assert found[broken].isnan().all()
    rest = torch.ones(40, dtype=torch.bool)
    rest[broken] = False
    assert torch.equal(found[rest], clean[rest])
    assert cpu.linear_quantized(cpu.quantize(x), weight, dtype=torch.bfloat16)[broken].isnan().all()


def test_out_may_be_part_of_something_wider(variant):
    weight, _ = weight_of("ternary", 70, 256)
    act = cpu.quantize(randn(19, 256))
    for dtype in EXACT:
        wanted = cpu.linear_quantized(act, weight, dtype=dtype)
        wide = torch.full((19, 100), 7.0, dtype=dtype)
        assert cpu.linear_quantized(act, weight, out=wide[:, 5:75]) is not None
        assert torch.equal(wide[:, 5:75], wanted)
        assert (wide[:, :5] == 7).all()
        assert (wide[:, 75:] == 7).all()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape_gives_the_generic_bits(data):
    """Shapes, cuts of rows, strides of the output and threads at random: the variant chosen against `generic`."""
    encoding = data.draw(st.sampled_from(MULTIPLIED))
    n, o, m = 128 * data.draw(st.integers(1, 12)), data.draw(st.integers(1, 140)), data.draw(st.integers(1, 70))
    first = data.draw(st.integers(0, o - 1))
    whole, _ = weight_of(encoding, o, n, data.draw(st.integers(0, 99)))
    weight = whole.rows(first, data.draw(st.integers(first + 1, o)))
    act = cpu.quantize(randn(m, n, data.draw(st.integers(0, 99))))
    pad, dtype = data.draw(st.integers(0, 40)), data.draw(st.sampled_from(list(EXACT)))
    found, wanted = (torch.zeros((m, weight.o + pad), dtype=dtype)[:, pad:] for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINOCUT_THREADS", str(data.draw(st.integers(1, 5))))
        cpu.linear_quantized(act, weight, out=found)
        patch.setenv("LINOCUT_GEMM", "generic")
        cpu.linear_quantized(act, weight, out=wanted)
    assert torch.equal(bits(found), bits(wanted))


# ------------------------------------------------------------------------------------------ choices and errors

def test_the_variant_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("LINOCUT_GEMM", "generic")
    assert cpu.gemm_variant() == "generic"
    monkeypatch.setenv("LINOCUT_GEMM", "avx9000")
    weight, _ = weight_of("binary", 4, 128)
    with pytest.raises(KernelError, match=r"LINOCUT_GEMM=avx9000 .*generic"):
        cpu.linear_quantized(cpu.quantize(randn(1, 128)), weight)
    monkeypatch.delenv("LINOCUT_GEMM")
    assert cpu.gemm_variant() == variants()[0]


def test_the_plain_product_is_not_chosen_alone(monkeypatch):
    """On a CPU that no fast variant knows, floats from decoded weights are quicker."""
    monkeypatch.delenv("LINOCUT_GEMM", raising=False)
    problem = Problem("cpu", torch.float32, 4, 256, 8, "ternary")
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "gemm_variant", lambda: "generic")
        assert dispatch.select(problem).name == "native"
        assert "LINOCUT_KERNEL=int8" in dict(dispatch.explain(problem))["int8"]
        with dispatch.use_kernel("int8"):
            assert dispatch.select(problem).name == "int8"
    monkeypatch.setenv("LINOCUT_GEMM", "generic")
    assert dispatch.select(problem).name == "int8"


def test_what_does_not_fit_is_named():
    weight, _ = weight_of("binary", 4, 128)
    with pytest.raises(KernelError, match="expected N = 128, found 256"):
        cpu.linear_quantized(cpu.quantize(randn(1, 256)), weight)
    with pytest.raises(KernelError, match="multiple of 128"):
        cpu.quantize(randn(1, 100))
    with pytest.raises(KernelError, match="float32 or bfloat16"):
        cpu.linear_quantized(cpu.quantize(randn(1, 128)), weight, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"y must have shape \[1, 4\]"):
        cpu.linear_quantized(cpu.quantize(randn(1, 128)), weight, out=torch.empty(1, 5))
    act = cpu.quantize(randn(2, 256))
    module = native.module()
    for arguments in ((randn(2, 128), act.values, act.scales, act.sums, 256, 192, 1),
                      (randn(2, 128), act.values, act.scales, act.sums, 256, 256, 1),
                      (randn(2, 64), act.values, act.scales, act.sums, 256, 0, 1),
                      (randn(3, 256), act.values, act.scales, act.sums, 256, 0, 1),
                      (randn(2, 256), act.values, act.scales, act.sums, 384, 0, 1),
                      (randn(2, 256), act.values, act.scales[:1], act.sums, 256, 0, 1),
                      (randn(256, 2).t(), act.values, act.scales, act.sums, 256, 0, 1)):
        with pytest.raises(ValueError, match="must"):
            module.quantize_activations(*arguments)


def test_half_a_row_at_a_time_is_the_whole_row():
    x = randn(5, 384)
    act, whole = cpu.Activations.empty(5, 384), cpu.quantize(x)
    for first, columns in ((128, 256), (0, 128)):
        part = x[:, first: first + columns]
        native.module().quantize_activations(part, act.values, act.scales, act.sums, 384, first, 2)
    assert torch.equal(act.values[:, :384], whole.values[:, :384])
    assert torch.equal(act.scales, whole.scales)
    assert torch.equal(act.sums, whole.sums)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_process_has_threads_of_its_own(monkeypatch):
    monkeypatch.setenv("LINOCUT_THREADS", "3")
    weight, _ = weight_of("ternary", 200, 256)
    act = cpu.quantize(randn(20, 256))
    wanted = cpu.linear_quantized(act, weight)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(cpu.linear_quantized(act, weight), wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_calls_from_many_threads_at_once(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setenv("LINOCUT_THREADS", "3")
    weight, _ = weight_of("binary", 130, 256)
    inputs = [cpu.quantize(randn(5, 256, seed)) for seed in range(60)]
    wanted = [cpu.linear_quantized(act, weight) for act in inputs]
    with ThreadPoolExecutor(6) as callers:
        found = list(callers.map(lambda act: cpu.linear_quantized(act, weight), inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# ------------------------------------------------------------------------------------------------ torch.compile

@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_operator_is_what_torch_expects(encoding):
    weight, _ = weight_of(encoding, 9, 256)
    packed = (weight.codes, weight.scales, weight.zeros, encoding)
    for x in (randn(3, 256), randn(3, 256).bfloat16()):
        torch.library.opcheck(torch.ops.linocut.packed_linear.default, (x, *packed, False))
        torch.library.opcheck(torch.ops.linocut.packed_linear.default, (x.requires_grad_(), *packed, True))
    torch.library.opcheck(torch.ops.linocut.packed_linear_gradient.default, (randn(3, 9), *packed, 256))


def test_compiled_equals_eager_in_one_graph():
    weight, _ = weight_of("ternary", 24, 256)

    def layer(x):
        y = dispatch.linear(x, weight.codes, weight.scales, None, "ternary")
        return torch.nn.functional.silu(y) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (2, 3, 50):
        assert torch.equal(compiled(randn(m, 256)), layer(randn(m, 256)))
    with dispatch.use_kernel("reference"):
        error = relative_error(compiled(randn(2, 256)), layer(randn(2, 256)))
    assert error < 1e-6  # the operator chooses when it runs


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_gradients_flow_through_a_compiled_layer(encoding):
    weight, _ = weight_of(encoding, 24, 256)

    def layer(x):
        y = dispatch.linear(x, weight.codes, weight.scales, weight.zeros, encoding)
        return torch.nn.functional.silu(y).sum()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = randn(3, 256)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    for function, leaf in ((compiled, found), (layer, wanted)):
        function(leaf).backward()
    assert wanted.grad.norm() > 0
    assert torch.equal(found.grad, wanted.grad)


def test_scales_that_no_file_has_give_numbers_or_nan_but_no_harm(variant):
    special = np.array([0x7E00, 0x7C00, 0xFC00, 0x0000, 0x8000, 0x0001, 0xBC00, 0x7BFF], np.uint16).view(np.float16)
    weight, _ = weight_of("ternary", 16, 256)
    scales = torch.from_numpy(np.resize(special, (16, 2)).copy())
    found = cpu.linear_quantized(cpu.quantize(randn(5, 256)), PackedWeight(weight.codes, scales, None, "ternary", 256))
    assert found[:, 0].isnan().all()
    assert found[:, 3].isfinite().all()
