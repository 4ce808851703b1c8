"""Choosing a kernel: order, reasons, overrides, and errors that name what does not fit."""

import pytest
import torch
from kernel_cases import random_packed, relative_error, tensors

from linocut.errors import KernelError, LinocutError, UsageError
from linocut.formats.packed import dequantize
from linocut.kernels import cpu, dispatch, native, problem
from linocut.kernels.problem import checked


def a_problem(**changes):
    facts = {"device": "cpu", "dtype": torch.float32, "m": 4, "n": 256, "o": 8, "encoding": "ternary", "threads": 1}
    return problem.Problem(**{**facts, **changes})


@pytest.fixture
def no_module(monkeypatch):
    """A machine on which the C++ module was never built."""
    monkeypatch.setattr(native, "status", lambda: (None, "the C++ module cannot be imported; run `make build`"))


def test_int8_is_preferred_and_generic_never_chosen_alone():
    reasons = dict(dispatch.explain(a_problem()))
    assert list(reasons) == ["int8", "native", "triton-int8", "triton", "reference", "generic"]
    assert reasons["int8"] is None
    assert reasons["native"] is None
    assert reasons["reference"] is None
    assert "LINOCUT_KERNEL=generic" in reasons["generic"]
    assert dispatch.select(a_problem()).name == "int8"


def test_gradients_and_odd_widths_are_not_for_int8():
    for changes, word in (({"gradients": True}, "gradient"), ({"n": 192, "encoding": "affine4"}, "128"),
                          ({"device": "cuda"}, "CPU")):
        assert word in dict(dispatch.explain(a_problem(**changes)))["int8"]
    assert dispatch.select(a_problem(gradients=True)).name == "native"
    x = torch.ones(2, 256, requires_grad=True)
    packed = random_packed("ternary", 8, 256)
    assert dispatch.linear(x, *tensors(packed), "ternary").grad_fn is not None
    with dispatch.use_kernel("int8"):
        with torch.no_grad():
            assert dispatch.linear(x, *tensors(packed), "ternary").grad_fn is None
        with pytest.raises(KernelError, match="gradient"):
            dispatch.linear(x, *tensors(packed), "ternary")


def test_int8_weights_are_decoded_and_their_activations_are_not_rounded():
    given = a_problem(encoding="int8")
    assert "not rounded" in dict(dispatch.explain(given))["int8"]
    assert dispatch.select(given).name == "native"
    packed = random_packed("int8", 8, 256)
    x = torch.randn(5, 256)
    wanted = x.double() @ torch.from_numpy(dequantize(packed)).double().T
    assert relative_error(dispatch.linear(x, *tensors(packed), "int8"), wanted) < 1e-6
    with dispatch.use_kernel("int8"):  # a whole model can be asked for it
        assert dispatch.select(given).name == "native"
    with pytest.raises(ValueError, match="no packed product"):
        cpu.linear_quantized(cpu.quantize(x), checked(*tensors(packed), "int8", 256))


def test_without_the_module_the_reference_draws(no_module):
    assert "make build" in dict(dispatch.explain(a_problem()))["int8"]
    assert "make build" in dict(dispatch.explain(a_problem()))["native"]
    assert dispatch.select(a_problem()).name == "reference"
    packed = random_packed("ternary", 8, 256)
    assert dispatch.linear(torch.ones(2, 256), *tensors(packed), "ternary").shape == (2, 8)


def test_a_missing_module_is_a_reason_not_a_crash(monkeypatch):
    def missing(name):
        raise ImportError("No module named 'linocut._native'")

    native.status.cache_clear()
    monkeypatch.setattr(native.importlib, "import_module", missing)
    try:
        module, line = native.status()
        assert module is None
        assert "cannot be imported" in line
    finally:
        native.status.cache_clear()


def test_a_module_of_another_build_is_refused(monkeypatch):
    native.status.cache_clear()
    monkeypatch.setattr(native, "INTERFACE", 99)
    try:
        module, line = native.status()
        assert module is None
        assert "expected interface 99" in line
    finally:
        native.status.cache_clear()


def test_an_override_that_cannot_run_says_why(no_module):
    with dispatch.use_kernel("native"), pytest.raises(KernelError, match=r"cannot run .*make build"):
        dispatch.select(a_problem())


def test_overrides(monkeypatch):
    monkeypatch.setenv("LINOCUT_KERNEL", "reference")
    assert dispatch.select(a_problem()).name == "reference"
    with dispatch.use_kernel("generic"):
        assert dispatch.select(a_problem()).name == "generic"
        with dispatch.use_kernel("auto"):
            assert dispatch.select(a_problem()).name == "int8"
    monkeypatch.setenv("LINOCUT_KERNEL", "fastest")
    with pytest.raises(KernelError, match=r"no kernel called 'fastest' \(known: auto, int8, native"):
        dispatch.select(a_problem())
    with pytest.raises(KernelError), dispatch.use_kernel("nonsense"):
        pass


def test_other_devices_and_dtypes_go_to_the_reference():
    assert dispatch.select(a_problem(device="cuda")).name == "reference"
    assert dispatch.select(a_problem(dtype=torch.float64)).name == "reference"
    with pytest.raises(KernelError, match="no kernel can run"):
        dispatch.select(a_problem(dtype=torch.int32))


def test_thread_count(monkeypatch):
    monkeypatch.delenv("LINOCUT_THREADS", raising=False)
    assert problem.thread_count()[0] == torch.get_num_threads()
    monkeypatch.setenv("LINOCUT_THREADS", "3")
    assert problem.thread_count() == (3, "LINOCUT_THREADS=3")
    for wrong in ("0", "-1", "many", "1.5"):
        monkeypatch.setenv("LINOCUT_THREADS", wrong)
        with pytest.raises(UsageError, match="LINOCUT_THREADS"):
            problem.thread_count()


def test_tensors_that_do_not_fit_are_named():
    codes, scales, _ = tensors(random_packed("ternary", 8, 256))
    x = torch.ones(2, 256)
    with pytest.raises(KernelError, match="`codes`"):
        dispatch.linear(x, codes[:, :-1], scales, None, "ternary")
    with pytest.raises(KernelError, match="`scales`"):
        dispatch.linear(x, codes, scales.float(), None, "ternary")
    with pytest.raises(KernelError, match="zeros"):
        dispatch.linear(x, codes, scales, codes, "ternary")
    with pytest.raises(KernelError, match="`zeros`"):
        dispatch.linear(x, torch.zeros(8, 128, dtype=torch.uint8), torch.ones(8, 4).half(), None, "affine4")
    with pytest.raises(LinocutError, match="encoding"):
        dispatch.linear(x, codes, scales, None, "quaternary")
    with pytest.raises(KernelError, match="x is on meta"):
        dispatch.linear(x.to("meta"), codes, scales, None, "ternary")


def test_shapes_pass_through():
    packed = random_packed("binary", 8, 256)
    for lead in ((), (3,), (2, 3), (0,), (2, 0)):
        y = dispatch.linear(torch.ones(*lead, 256), *tensors(packed), "binary", torch.ones(8))
        assert y.shape == (*lead, 8)


def test_rows_by_slice_and_by_index():
    packed = random_packed("affine4", 20, 256)
    whole = dispatch.dequantize(*tensors(packed), "affine4", 256)
    assert torch.equal(dispatch.dequantize(*tensors(packed), "affine4", 256, rows=slice(3, 9)), whole[3:9])
    picked = torch.tensor([7, 7, 0, 19])
    assert torch.equal(dispatch.dequantize(*tensors(packed), "affine4", 256, rows=picked), whole[picked])
    assert dispatch.dequantize(*tensors(packed), "affine4", 256, rows=slice(0, 0)).shape == (0, 256)
