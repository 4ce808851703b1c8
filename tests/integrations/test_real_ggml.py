"""ggml's own library reads our blocks and files, and multiplies by them: all types, Q1_0 and Q2_0 too."""

import numpy as np
import pytest
from ggml_library import decode, multiply, tensors, traits
from packed_samples import sample

from linocut.formats.checkpoint import Checkpoint
from linocut.formats.ggml import TYPES, quantize_q8, write_block
from linocut.formats.gguf import GGUFFile
from linocut.formats.packed import dequantize
from linocut.integrations.convert import convert
from linocut.integrations.targets import Options

HOLDS = [("binary", "Q1_0"), ("ternary", "Q2_0"), ("ternary", "TQ1_0"), ("ternary", "TQ2_0"), ("affine4", "Q4_1")]


@pytest.mark.parametrize("kind", [name for name in TYPES if name not in ("Q1_0/32", "PQ2_0")])
def test_types_are_numbered_and_sized_as_there(kind):
    name, weights, nbytes = traits(TYPES[kind].number)
    assert name.lower() == kind.lower()
    assert (weights, nbytes) == (TYPES[kind].weights, TYPES[kind].nbytes)


@pytest.mark.parametrize(("encoding", "kind"), HOLDS)
def test_it_decodes_the_same_weights(encoding, kind):
    packed = sample(encoding, tied=kind.startswith("TQ"))
    theirs = decode(write_block(packed, kind), TYPES[kind].number, packed.shape[1])
    if kind != "Q4_1":
        assert np.array_equal(theirs, dequantize(packed))
    else:  # its offset is rounded to float16
        largest = 15 * packed.scales.astype(np.float32).repeat(64, axis=1)
        assert (np.abs(theirs - dequantize(packed)) <= largest * 2**-11).all()


@pytest.mark.parametrize(("encoding", "kind"), HOLDS)
def test_it_multiplies_by_them(encoding, kind):
    """Activations that eight bits hold exactly, so that nothing but the weights can differ."""
    packed = sample(encoding, tied=kind.startswith("TQ"))
    rng = np.random.default_rng(1)
    x = rng.integers(-127, 128, packed.shape[1]).astype(np.float32)
    x[::32] = 127
    rows = write_block(packed, kind)
    weights = decode(rows, TYPES[kind].number, packed.shape[1]).astype(np.float64)
    size = np.abs(weights) @ np.abs(x)
    assert (np.abs(multiply(rows, TYPES[kind].number, x) - weights @ x) <= 1e-5 * size).all()


def test_q8_0_is_decoded_and_made_as_there():
    values = np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32)
    rows = quantize_q8(values)
    assert np.abs(decode(rows, 8, 256) - values).max() <= np.abs(values).max() / 127


@pytest.mark.parametrize("packed_model", ["binary", "ternary"], indirect=True)
def test_it_reads_the_files_that_conversion_writes(packed_model, tmp_path):
    convert(packed_model, tmp_path / "x", "gguf", options=Options())
    for part in ("transformer", "text_encoder"):
        path = tmp_path / "x" / f"{part}.gguf"
        with GGUFFile(path) as file:
            assert tensors(path) == {name: (tensor.kind.number, tensor.offset, tensor.nbytes)
                                     for name, tensor in file.tensors.items()}


def test_a_cut_text_encoder_gets_the_final_norm_that_programs_ask_for(packed_model, tmp_path):
    """It lies behind all that FLUX.2 uses, and does not come back."""
    convert(packed_model, tmp_path / "x", "gguf")
    assert "output_norm.weight" in tensors(tmp_path / "x" / "text_encoder.gguf")
    convert(tmp_path / "x", tmp_path / "y", "linocut")
    with Checkpoint.open(tmp_path / "y" / "text_encoder") as found:
        assert not [name for name in found.names if name.endswith("norm.weight") and "layers" not in name]
