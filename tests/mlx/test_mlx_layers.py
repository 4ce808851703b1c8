"""Weights and layers on mlx: re-coding is exact, and a checkpoint that does not fit is refused by name."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from linocut.cli.bench import kernels
from linocut.errors import FormatError
from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.formats.packed import dequantize
from linocut.mlx import layers, selfcheck
from linocut.mlx.layers import Embedding, Linear, Packed, Source, pack
from linocut.models.synthetic import random_packed

ENCODINGS = ("binary", "ternary", "affine4", "int8")


def some(encoding: str, shape: tuple[int, int] = (96, 768), seed: int = 0):
    return random_packed(np.random.default_rng(seed), encoding, shape)


@pytest.fixture
def two_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "why_not_one_bit", lambda: "asked for by a test")


def expect_exact(packed) -> Packed:
    found = pack(packed)
    assert np.array_equal(np.array(found.dequantize()), dequantize(packed))
    return found


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("n", [128, 640, 768, 1024])
def test_recoding_is_exact(encoding: str, n: int) -> None:
    found = expect_exact(some(encoding, (40, n)))
    assert (found.bits, found.group) == {"binary": (1, 128), "ternary": (2, 128), "affine4": (4, 64), "int8": (8, 128)}[
        encoding]
    assert found.words.shape == (40, n * found.bits // 32)


def test_binary_weights_take_two_bits_where_one_is_not_to_be_had(two_bits: None) -> None:
    assert expect_exact(some("binary")).bits == 2


def test_scales_that_do_not_double_in_float16_stay_exact() -> None:
    packed = some("binary", (4, 128))
    packed.scales[:] = 60000.0
    assert expect_exact(packed).scales.dtype == mx.float32
    assert expect_exact(some("binary")).scales.dtype == mx.float16


def test_one_bit_products_work_here() -> None:
    assert layers.why_not_one_bit() is None


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_products_match_float64(encoding: str) -> None:
    packed = some(encoding)
    x = np.random.default_rng(1).standard_normal((2, 5, 768)).astype(np.float32)
    wanted = x.astype(np.float64) @ dequantize(packed).astype(np.float64).T
    found = np.array(pack(packed).matmul(mx.array(x)))
    assert found.dtype == np.float32
    assert np.linalg.norm(found - wanted) < 2e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_products_keep_the_type_of_activations(encoding: str, dtype: mx.Dtype) -> None:
    y = pack(some(encoding), dtype).matmul(mx.ones((3, 768), dtype))
    assert y.dtype == dtype


@pytest.fixture
def file(tmp_path: Path) -> Checkpoint:
    rng = np.random.default_rng(2)
    bits = rng.standard_normal((6, 64)).astype(np.float32).view(np.uint32) >> 16
    write_checkpoint(tmp_path / "a.safetensors", {
        "packed": some("ternary", (64, 256)), "table": some("affine4", (50, 128)),
        "dense.weight": (bits.astype(np.uint16), "BF16"), "dense.bias": rng.standard_normal(6).astype(np.float16)})
    return Checkpoint.open(tmp_path / "a.safetensors")


def test_layers_read_weights_when_they_first_run_and_hold_them_if_told(file: Checkpoint) -> None:
    x = mx.array(np.random.default_rng(3).standard_normal((3, 256)).astype(np.float32))
    wanted = np.array(x) @ dequantize(file.packed_tensor("packed")).T
    for keep in (True, False):
        layer = Linear(Source(file, mx.float32, keep), "packed", 256, 64)
        assert layer._held is None
        assert np.allclose(np.array(layer(x)), wanted, rtol=1e-5, atol=1e-5)
        assert (layer._held is not None) == keep
        assert np.allclose(np.array(layer(x)), wanted, rtol=1e-5, atol=1e-5)


def test_dense_layers_compute_with_what_is_stored(file: Checkpoint) -> None:
    layer = Linear(Source(file, mx.float32), "dense", 64, 6, bias=True)
    x = np.random.default_rng(3).standard_normal((3, 64)).astype(np.float32)
    weight = (file.array("dense.weight").astype(np.uint32) << 16).view(np.float32)
    assert np.allclose(np.array(layer(mx.array(x))), x @ weight.T + file.array("dense.bias"), rtol=1e-5, atol=1e-5)


def test_embeddings_come_in_the_order_of_the_ids(file: Checkpoint) -> None:
    ids = np.array([7, 0, 49, 7, 7, 3])
    found = Embedding(Source(file, mx.float32), "table", 50, 128)(ids)
    assert np.array_equal(np.array(found), dequantize(file.packed_tensor("table"))[ids])


def test_what_does_not_fit_is_named(file: Checkpoint) -> None:
    with pytest.raises(FormatError, match=r"nothing\.weight.*missing"):
        Linear(Source(file, mx.float32), "nothing", 1, 1)
    with pytest.raises(FormatError, match=r"packed\.weight.*another shape.*\[64, 128\].*\[64, 256\]"):
        Linear(Source(file, mx.float32), "packed", 128, 64)
    with pytest.raises(FormatError, match="no Linear and no Embedding"):
        Source(file, mx.float32).array("packed.weight", (64, 256))
    source = Source(file, mx.float32)
    Linear(source, "packed", 256, 64)
    with pytest.raises(FormatError, match=r"dense\.bias.*not part of this network \(3 in all\)"):
        source.finish()


def test_the_check_of_doctor_notices_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = list(selfcheck.check_model_sized((20, 384, 192)))
    assert {each.encoding for each in checks} == set(ENCODINGS)
    assert all(each.ok and each.m == selfcheck.TOKENS_ON_CPU for each in checks)
    right = Packed.matmul
    monkeypatch.setattr(Packed, "matmul", lambda self, x: right(self, x) * 1.001)
    assert not any(each.ok for each in selfcheck.check_model_sized((20, 384, 192)))


def test_bench_measures_products_on_mlx() -> None:
    done = CliRunner().invoke(kernels.command, ["--mlx", "--ours-only", "--shapes", "64x128", "--m", "2", "--rounds",
                                                "1", "--encoding", "ternary", "--json"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.output)["results"]
    assert set(row["gops"]) == {"ternary", "mlx ternary"}
