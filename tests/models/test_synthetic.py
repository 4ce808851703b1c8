"""Synthetic models: true sizes to the byte, sound files, the same bytes in any order, finite activations."""

import json

import pytest
import torch
from tiny_dense import TINY
from tokenizers import Tokenizer

from linocut.errors import UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.folder import ModelFolder
from linocut.models.convert import build_and_load
from linocut.models.flux2 import Flux2Config, Flux2Transformer, image_position_ids, text_position_ids
from linocut.models.prompt_tokenizer import PromptTokenizer
from linocut.models.synthetic import KNOWN, PARTS, _Weights, synthetic_tokenizer, write_synthetic
from linocut.pipeline.schedule import make_timestep_table


@pytest.mark.parametrize(("encoding", "transformer", "text_encoder"), [
    ("binary", 907_656_192, 1_678_900_224), ("ternary", 1_184_259_072, 1_678_900_224),
    ("bf16", 7_751_089_152, 6_228_176_384)])
def test_kleins_sizes_to_the_byte(tmp_path, encoding, transformer, text_encoder):
    jobs = {part: _Weights(tmp_path, KNOWN["klein-4b"], part, encoding) for part in PARTS[:3]}
    assert jobs["transformer"].nbytes == transformer
    assert jobs["text_encoder"].nbytes == text_encoder
    assert jobs["vae"].nbytes == 2 * 84_046_115 + 2 * 256 + 8
    assert len(jobs["transformer"].packed) == (0 if encoding == "bf16" else 100)
    parts = [_Weights(tmp_path, KNOWN["klein-4b"], kind, encoding)
             for kind in ("transformer without timestep", "timestep")]
    assert [part.nbytes for part in parts] == [transformer - 341_311_488, 341_311_488]


def test_a_folder_is_sound_and_does_not_depend_on_the_order_of_making(tmp_path):
    write_synthetic(tmp_path / "a", TINY, "ternary")
    for part in reversed(PARTS):
        write_synthetic(tmp_path / "b", TINY, "ternary", (part,))
    names = sorted(str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert names == sorted(str(p.relative_to(tmp_path / "b")) for p in (tmp_path / "b").rglob("*") if p.is_file())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    folder = ModelFolder.open(tmp_path / "a")
    assert folder.settings["text_taps"] == [1, 2, 3]
    for component in ("transformer", "text_encoder", "vae"):
        with folder.checkpoint(component) as checkpoint:
            assert checkpoint.verify() == len(checkpoint.names)


def test_a_timestep_table_takes_its_layers_out_of_the_transformer(tmp_path):
    write_synthetic(tmp_path / "plain", TINY, "binary", ("transformer",))
    write_synthetic(tmp_path / "table", TINY, "binary", ("transformer",), make_table=make_timestep_table)
    folder = ModelFolder.open(tmp_path / "table")
    with ModelFolder.open(tmp_path / "plain").checkpoint("transformer") as whole:
        names = []
        for component in ("transformer", "timestep_weights"):
            checkpoint = folder.weight_files()[component]
            for name in checkpoint.names:
                assert checkpoint.array(name).tobytes() == whole.array(name).tobytes()
            names += checkpoint.names
        assert sorted(names) == sorted(whole.names)
    assert folder.timestep_table().width == TINY.transformer.width


@pytest.mark.parametrize("encoding", ["binary", "ternary", "bf16"])
def test_activations_stay_finite_and_of_order_one(tmp_path, encoding):
    write_synthetic(tmp_path, TINY, encoding, ("transformer",))
    with Checkpoint.open(tmp_path / "transformer") as checkpoint:
        config = Flux2Config.from_dict(json.loads((tmp_path / "transformer/config.json").read_text()))
        model = build_and_load(Flux2Transformer, config, checkpoint, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    velocity = model(torch.randn(1, 16, 64, generator=generator), torch.randn(1, 8, 384, generator=generator),
                     torch.tensor([0.7]), image_position_ids(4, 4), text_position_ids(8))
    assert 0.1 < float(velocity.std()) < 10


def test_the_tokenizer_has_qwens_ids_and_takes_any_text(tmp_path):
    tokenizer = Tokenizer.from_str(synthetic_tokenizer(151_643).decode())
    assert tokenizer.get_vocab_size(with_added_tokens=False) == 151_643
    assert tokenizer.get_vocab_size() == 151_669
    expected = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652,
                "<tool_call>": 151657, "<think>": 151667, "</think>": 151668}
    assert {token: tokenizer.token_to_id(token) for token in expected} == expected
    text = "Zwei rote Äpfel, 3 кота и 猫 🍎 <not a token>"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    (tmp_path / "tokenizer.json").write_bytes(synthetic_tokenizer(300))
    ids, mask = PromptTokenizer.from_folder(tmp_path, 64).encode(["a cat"])
    assert ids[0, 0] == 301
    assert ids[0, -1] == 300
    assert 0 < int(mask.sum()) < 64


def test_refusals(tmp_path):
    with pytest.raises(UsageError, match="unknown part"):
        write_synthetic(tmp_path, TINY, "ternary", ("decoder",))
    with pytest.raises(UsageError, match="unknown encoding"):
        write_synthetic(tmp_path, TINY, "int8")
    with pytest.raises(UsageError, match="256 tokens"):
        synthetic_tokenizer(100)
