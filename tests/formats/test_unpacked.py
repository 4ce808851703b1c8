"""Packed weights in dense form, and the same weights under the names of other programs."""

import numpy as np
import pytest
from packed_samples import assert_same, sample

from linocut.errors import FormatError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.packed import dequantize
from linocut.formats.renaming import from_bfl, from_llama, is_llama, to_bfl, to_llama
from linocut.formats.unpacked import find_encoding, metadata, pack_values, packed_again, unpacked_output
from linocut.formats.weight import Weight, weights_of


def dense(values, kind="F16"):
    return Weight(kind, values.shape, lambda first, last: values[first:last], lambda: None)


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
def test_float16_holds_packed_weights(encoding):
    packed = sample(encoding)
    (values,) = unpacked_output("a", Weight(encoding, packed.shape, lambda a, b: packed, lambda: None)).encode(packed)
    assert values.dtype == np.float16
    assert np.array_equal(values, dequantize(packed))
    assert find_encoding(values.astype(np.float32)) == encoding
    assert_same(packed_again({"a.weight": dense(values)}, {})["a"].rows(0, 6), packed)


@pytest.mark.parametrize("encoding", ["affine4", "int8"])
def test_float32_holds_weights_of_four_and_eight_bits(encoding):
    packed = sample(encoding)
    output = unpacked_output("a", Weight(encoding, packed.shape, lambda a, b: packed, lambda: None))
    (values,) = output.encode(packed)
    assert values.dtype == np.float32
    assert np.array_equal(values, dequantize(packed))
    assert "bit weights become float32" in output.note
    assert set(packed_again({"a.weight": dense(values, "F32")}, {})) == {"a.weight"}


def test_bfloat16_with_negative_zeros():
    """Codes come from values, never from the sign bit."""
    values = np.zeros((2, 128), dtype=np.float32)
    values[:, 0::2], values[:, 1] = -0.0, 0.75
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    found = packed_again({"a.weight": dense(bits, "BF16")}, {})["a"]
    assert np.array_equal(dequantize(found.rows(0, 2)), values)


def test_a_ternary_weight_without_zeros_stays_ternary_through_our_files():
    packed = pack_values(np.full((2, 128), 0.5, np.float32), "ternary")
    weights = {"a": Weight("ternary", (2, 128), lambda a, b: packed, lambda: None)}
    values = dequantize(packed).astype(np.float16)
    assert packed_again({"a.weight": dense(values)}, {})["a"].kind == "binary"
    assert packed_again({"a.weight": dense(values)}, metadata(weights))["a"].kind == "ternary"


def test_ordinary_weights_stay_dense():
    values = np.random.default_rng(0).normal(size=(20, 128)).astype(np.float16)
    weights = {"a.weight": dense(values), "b.weight": dense(values[:, :100]), "c.bias": dense(values[0])}
    found = packed_again(weights, {})
    assert set(found) == {"a.weight", "b.weight", "c.bias"}


@pytest.mark.parametrize(("encoding", "value"), [("ternary", 0.25), ("binary", 0.25), ("binary", 0.0)])
def test_a_stray_value_is_named(encoding, value):
    values = np.full((20, 256), 0.5, np.float32)
    values[18, 130] = value
    with pytest.raises(FormatError, match="weight 130 of row 18 fits no"):
        pack_values(values, encoding)


def test_scales_out_of_reach_of_float16_are_refused_or_rounded():
    values = np.full((1, 128), 1 + 2.0**-20, np.float32)
    with pytest.raises(FormatError, match="does not fit float16"):
        pack_values(values, "binary")
    assert pack_values(values, "binary", exact=False).scales[0, 0] == 1


# --- names -----------------------------------------------------------------------------------------------------------

def test_names_of_the_single_file(dense_model, original_file):
    """To the original names and back is what an independent conversion wrote."""
    with Checkpoint.open(dense_model / "transformer") as ours, Checkpoint.open(original_file) as theirs:
        for found, expected in ((to_bfl(weights_of(ours)), theirs), (from_bfl(weights_of(theirs)), ours)):
            assert set(found) == set(expected.names)
            for name, weight in found.items():
                rows = weight.rows(0, weight.shape[0])
                assert np.array_equal(rows, expected.array(name)), name
                if weight.shape[0] > 5:
                    assert np.array_equal(weight.rows(3, weight.shape[0] - 1), rows[3:-1]), name


def test_packed_weights_are_joined_and_cut_by_rows():
    parts = {f"transformer_blocks.0.attn.to_{x}": sample("ternary", (128, 256), seed) for seed, x in enumerate("qkv")}
    weights = {name: Weight("ternary", packed.shape, lambda a, b, p=packed: type(p)(
        p.encoding, (b - a, 256), p.codes[a:b], p.scales[a:b]), lambda: None) for name, packed in parts.items()}
    joined = to_bfl(weights)
    assert list(joined) == ["double_blocks.0.img_attn.qkv"]
    assert joined["double_blocks.0.img_attn.qkv"].shape == (384, 256)
    for name, weight in from_bfl(joined).items():
        assert_same(weight.rows(0, 128), parts[name])


def test_fused_parts_must_be_alike():
    names = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
    values = np.zeros((4, 128), np.float16)
    weights = dict.fromkeys(names, dense(values))
    with pytest.raises(FormatError, match="q, k and v"):
        to_bfl({name: weights[name] for name in names[:2]})
    with pytest.raises(FormatError, match="differ"):
        to_bfl(weights | {names[1]: dense(values.astype(np.float32), "F32")})


def test_names_of_a_text_encoder(dense_model):
    with Checkpoint.open(dense_model / "text_encoder") as ours:
        weights = {name.removeprefix("model."): weight for name, weight in weights_of(ours).items()}
        renamed = to_llama(weights_of(ours))
        assert is_llama(list(renamed))
        assert "blk.2.attn_q_norm.weight" in renamed
        assert len(from_llama(renamed)) == len(renamed)
        assert set(from_llama(renamed)) == {name for name in weights if not name.startswith("lm_head")}


@pytest.mark.parametrize("rename", [to_bfl, from_bfl, to_llama, from_llama])
def test_strange_names_are_refused(rename):
    with pytest.raises(FormatError, match="the conversion knows"):
        rename({"nonsense.weight": dense(np.zeros((4, 128), np.float16))})
