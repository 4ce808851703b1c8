"""MLX's weights: golden words, and `mlx` itself decoding and multiplying what we wrote."""

import mlx.core as mx
import numpy as np
import pytest
from packed_samples import assert_same, sample

from linocut.errors import FormatError
from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.formats.mlx import is_mlx, mlx_output, mlx_quantization, mlx_weights, quantization
from linocut.formats.packed import dequantize, pack
from linocut.formats.slots import to_slots
from linocut.formats.weight import Weight

TABLES = {"binary": {"bits": 1, "group_size": 128}, "ternary": {"bits": 2, "group_size": 128},
          "affine4": {"bits": 4, "group_size": 64}, "int8": {"bits": 8, "group_size": 128}}


def file_of(path, packed, scales=None, biases=None, dtype=None):
    """A file with the weight `a`, optionally with other scales and offsets."""
    weight = Weight(packed.encoding, packed.shape, lambda first, last: packed, lambda: None)
    parts = dict(zip(("weight", "scales", "biases"), mlx_output("a", weight).encode(packed), strict=True))
    parts |= {} if scales is None else {"scales": scales, "biases": biases}
    write_checkpoint(path, {f"a.{name}": (part, dtype) if dtype and name != "weight" else part
                            for name, part in parts.items()})
    return path


def test_golden_words():
    bits = pack(np.array([[1, 1, 1] + [-1] * 125]), np.full((1, 1), 0.5, np.float32), "binary")
    assert to_slots(bits).view("<u4")[0, 0] == 0x00000007
    codes = [2, 1, 0, 2, 1, 1, 1, 0] + [1] * 120
    pairs = pack(np.array([codes]) - 1, np.full((1, 1), 0.5, np.float32), "ternary")
    assert to_slots(pairs).view("<u4")[0, 0] == 0x55551586


@pytest.mark.parametrize("encoding", TABLES)
def test_mlx_decodes_our_files_bit_for_bit(tmp_path, encoding):
    packed = sample(encoding)
    parts = mx.load(str(file_of(tmp_path / "x.safetensors", packed)))
    table = TABLES[encoding]
    weights = mx.dequantize(parts["a.weight"], parts["a.scales"].astype(mx.float32),
                            parts["a.biases"].astype(mx.float32), **table)
    assert np.array_equal(np.array(weights), dequantize(packed))


@pytest.mark.parametrize("encoding", TABLES)
def test_mlx_multiplies_in_float32(tmp_path, encoding):
    rng = np.random.default_rng(1)
    packed = sample(encoding)
    packed.scales[:] = rng.uniform(0.01, 0.1, packed.scales.shape)
    parts = mx.load(str(file_of(tmp_path / "x.safetensors", packed)))
    x = rng.normal(size=(5, 768)).astype(np.float32)
    product = mx.quantized_matmul(mx.array(x), parts["a.weight"], parts["a.scales"].astype(mx.float32),
                                  parts["a.biases"].astype(mx.float32), transpose=True, **TABLES[encoding])
    expected = x.astype(np.float64) @ dequantize(packed).T.astype(np.float64)
    assert np.abs(np.array(product) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("encoding", TABLES)
def test_round_trip_keeps_every_bit(tmp_path, encoding):
    packed = sample(encoding)
    with Checkpoint.open(file_of(tmp_path / "x.safetensors", packed)) as file:
        assert is_mlx(file)
        weight = mlx_weights(file, TABLES[encoding])["a"]
        assert_same(weight.rows(0, 6), packed)
        assert weight.rows(2, 5).codes.tobytes() == packed.codes[2:5].tobytes()


def bf16(values):
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def test_scales_in_bfloat16_are_taken_if_float16_holds_them(tmp_path):
    packed = sample("ternary")
    fits = np.full(packed.scales.shape, 0.75, np.float32)
    with Checkpoint.open(file_of(tmp_path / "x", packed, bf16(fits), bf16(-fits), "BF16")) as file:
        assert (mlx_weights(file, TABLES["ternary"])["a"].rows(0, 1).scales[0, 2] == 0.75).all()
    tiny = np.full(packed.scales.shape, 1.0078125 * 2.0**-20, np.float32)
    with Checkpoint.open(file_of(tmp_path / "y", packed, bf16(tiny), bf16(-tiny), "BF16")) as file:
        with pytest.raises(FormatError, match="does not fit float16"):
            mlx_weights(file, TABLES["ternary"])["a"].rows(0, 6)
        assert mlx_weights(file, TABLES["ternary"], exact=False)["a"].rows(0, 6).scales[0, 0] == np.float16(tiny[0, 0])


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
def test_offsets_that_make_other_values_are_refused(tmp_path, encoding):
    packed = sample(encoding)
    scales = np.full(packed.scales.shape, 0.5, np.float32)
    with Checkpoint.open(file_of(tmp_path / "x", packed, scales, -scales * 0.9)) as file, \
            pytest.raises(FormatError, match="times the offset"):
        mlx_weights(file, TABLES[encoding])["a"].rows(0, 6)


def test_eight_bits_with_another_zero_are_refused(tmp_path):
    packed = sample("int8")
    scales = np.full(packed.scales.shape, 0.5, np.float32)
    with Checkpoint.open(file_of(tmp_path / "x", packed, scales, -scales * 127)) as file, \
            pytest.raises(FormatError, match="-128 times the factor"):
        mlx_weights(file, TABLES["int8"])["a"].rows(0, 6)
    lowest = packed.codes.copy()
    lowest[3, 5] = 0x80
    broken = type(packed)("int8", packed.shape, lowest, packed.scales)
    with Checkpoint.open(file_of(tmp_path / "y", broken)) as file, pytest.raises(FormatError, match="out of range"):
        mlx_weights(file, TABLES["int8"])["a"].rows(0, 6)


def test_four_bits_with_any_offset_are_read_as_floats(tmp_path):
    """What `mx.quantize` makes of weights is no (code - zero) s with whole zeros."""
    w = mx.array(np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32))
    codes, scales, biases = mx.quantize(w, group_size=64, bits=4)
    write_checkpoint(tmp_path / "x", {"a.weight": np.array(codes), "a.scales": np.array(scales),
                                      "a.biases": np.array(biases)})
    with Checkpoint.open(tmp_path / "x") as file:
        weight = mlx_weights(file, TABLES["affine4"])["a.weight"]
        assert (weight.kind, weight.requantize) == ("F32", "affine4")
        assert np.allclose(weight.rows(1, 4), np.array(mx.dequantize(codes, scales, biases, group_size=64, bits=4))[1:],
                           rtol=1e-6, atol=1e-6)


def test_the_number_of_bits_must_be_known_and_fit(tmp_path):
    with pytest.raises(FormatError, match="how many bits"):
        quantization({}, {"quantization": {"bits": "2"}})
    assert quantization({"quantization": TABLES["ternary"]}) == TABLES["ternary"]
    with Checkpoint.open(file_of(tmp_path / "x", sample("ternary"))) as file:
        with pytest.raises(FormatError, match="3 bits in groups of 128"):
            mlx_weights(file, {"bits": 3, "group_size": 128})
        with pytest.raises(FormatError, match="groups have another size"):
            mlx_weights(file, TABLES["binary"])


def test_layers_of_another_encoding_are_named():
    weights = {name: Weight(kind, (128, 128), lambda a, b: None, lambda: None)
               for name, kind in (("a", "ternary"), ("b", "ternary"), ("c", "affine4"), ("d.weight", "F16"),
                                  ("e", "int8"))}
    assert mlx_quantization(weights) == TABLES["ternary"] | {"c": TABLES["affine4"], "e": TABLES["int8"]}
