"""gemlite's packs and HQQ's four-bit weights: golden bytes and round trips."""

import numpy as np
import pytest
from packed_samples import assert_same, sample

from linocut.errors import FormatError
from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.formats.gemlite import gemlite_output, gemlite_weights, is_gemlite
from linocut.formats.hqq import hqq_weight
from linocut.formats.packed import dequantize, pack
from linocut.formats.weight import Weight

PARTS = ("W_q", "scales", "zeros", "metadata", "orig_shape")


def packs(packed):
    """The five tensors of a pack."""
    weight = Weight(packed.encoding, packed.shape, lambda first, last: packed, lambda: None)
    return dict(zip(PARTS, gemlite_output("a", weight).encode(packed), strict=True))


def write(path, parts):
    write_checkpoint(path, {f"a.{name}": np.ascontiguousarray(part) for name, part in parts.items()})
    return path


def test_golden_packs():
    bits = pack(np.array([[1, 1, 1] + [-1] * 5 + [1] + [-1] * 247]), np.full((1, 2), 0.5, np.float32), "binary")
    found = packs(bits)
    assert found["W_q"][:3, 0].tolist() == [7, 1, 0]
    assert found["W_q"].shape == (32, 1)
    assert (found["scales"][0, 0], found["zeros"][0, 0]) == (1.0, -0.5)
    assert found["metadata"].tolist() == [0, 1, 128, 1, 8, 1, 1, 0, 1, 0, 4, 1]
    assert found["orig_shape"].tolist() == [1, 256]
    codes = [2, 1, 0, 2, 1, 1, 1, 0] + [1] * 248
    pairs = packs(pack(np.array([codes]) - 1, np.full((1, 2), 0.5, np.float32), "ternary"))
    assert pairs["W_q"][:3, 0].tolist() == [134, 21, 85]
    assert (pairs["scales"][0, 0], pairs["zeros"][0, 0]) == (0.5, -0.5)
    assert pairs["metadata"].tolist() == [0, 2, 128, 3, 4, 1, 1, 0, 1, 0, 4, 1]


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
@pytest.mark.parametrize("shape", [(6, 768), (256, 256)])
def test_round_trip_keeps_every_bit(tmp_path, encoding, shape):
    """Square ones too, in which rows and columns are easily confused."""
    packed = sample(encoding, shape)
    with Checkpoint.open(write(tmp_path / "x", packs(packed))) as file:
        assert is_gemlite(file)
        weight = gemlite_weights(file)["a"]
        assert_same(weight.rows(0, shape[0]), packed)
        assert weight.rows(1, 3).codes.tobytes() == packed.codes[1:3].tobytes()


def test_scales_in_float32_as_published(tmp_path):
    packed = sample("ternary")
    parts = packs(packed)
    parts |= {name: parts[name].astype(np.float32) for name in ("scales", "zeros")}
    parts["metadata"][8] = 0
    with Checkpoint.open(write(tmp_path / "x", parts)) as file:
        assert_same(gemlite_weights(file)["a"].rows(0, 6), packed)


@pytest.mark.parametrize(("change", "problem"), [
    (lambda p: p.pop("zeros"), "part of a gemlite pack is missing"),
    (lambda p: p["metadata"].__setitem__(10, 3), "of this form is not read"),
    (lambda p: p["metadata"].__setitem__(4, 32), "of this form is not read"),
    (lambda p: p["metadata"].__setitem__(1, 4), "of this form is not read"),
    (lambda p: p.__setitem__("orig_shape", p["orig_shape"][::-1].copy()), "do not fit each other"),
    (lambda p: p.__setitem__("W_q", p["W_q"].T.copy()), "do not fit each other"),
    (lambda p: p.__setitem__("scales", p["scales"][:3].copy()), "do not fit each other"),
])
def test_other_packs_are_refused(tmp_path, change, problem):
    parts = packs(sample("ternary"))
    change(parts)
    with Checkpoint.open(write(tmp_path / "x", parts)) as file, pytest.raises(FormatError, match=problem):
        gemlite_weights(file)


def test_rows_of_one_group_are_not_written():
    weight = Weight("ternary", (2, 128), lambda first, last: None, lambda: None)
    with pytest.raises(FormatError, match="single group"):
        gemlite_output("a", weight)


def hqq(codes, zeros, scales, shape, **facts):
    """HQQ's half-split packing of codes [R, 64]."""
    half = len(codes) // 2
    return hqq_weight("a", codes[:half] << 4 | codes[half:], scales, zeros, shape,
                      {"nbits": 4, "group_size": 64, "axis": 1, "packing": "4bit_u8"} | facts)


def test_hqq_packs_halves():
    """Row r lies in high nibbles, row r + R / 2 in low ones."""
    codes = np.zeros((4, 64), dtype=np.uint8)
    codes[0, :4], codes[2, :4] = (1, 2, 3, 4), (5, 6, 7, 8)
    ones = np.ones((4, 1), dtype=np.float32)
    weight = hqq(codes, 0 * ones, ones, (2, 128))
    rows = weight.rows(0, 2)
    assert dequantize(rows)[0, :4].tolist() == [1, 2, 3, 4]
    assert dequantize(rows)[1, :4].tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("whole", [True, False])
def test_hqq_decodes_any_rows(whole):
    rng = np.random.default_rng(0)
    shape = (6, 256)
    codes = rng.integers(0, 16, (24, 64)).astype(np.uint8)
    zeros = rng.integers(0, 16, (24, 1)).astype(np.float32) if whole else rng.uniform(0, 15, (24, 1)).astype(np.float32)
    scales = rng.uniform(0.01, 0.1, (24, 1)).astype(np.float16).astype(np.float32)
    expected = ((codes - zeros) * scales).reshape(shape)
    weight = hqq(codes, zeros, scales, shape)
    assert (weight.kind, weight.requantize) == (("affine4", "") if whole else ("F32", "affine4"))
    for first, last in ((0, 6), (1, 2), (2, 4), (5, 6)):
        rows = weight.rows(first, last)
        assert np.array_equal(dequantize(rows) if whole else rows, expected[first:last])


@pytest.mark.parametrize("facts", [{"nbits": 3}, {"group_size": 128}, {"axis": 0}, {"packing": "4bit_32"}])
def test_hqq_of_another_form_is_refused(facts):
    ones = np.ones((4, 1), dtype=np.float32)
    with pytest.raises(FormatError, match="HQQ weight of this form"):
        hqq(np.zeros((4, 64), dtype=np.uint8), ones, ones, (2, 128), **facts)
