"""The text encoder and its tokenizer give what transformers gives."""

import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM, Qwen3Model
from transformers import Qwen3Config as ReferenceConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from linocut.errors import Cancelled, FormatError, ModelNotFoundError, UsageError
from linocut.models.prompt_tokenizer import TEMPLATE, PromptTokenizer
from linocut.models.text_encoder import Layer, Qwen3Config, Qwen3Encoder, rotary_table
from linocut.train.tokenizer import save_tokenizer, train_tokenizer

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 5,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def reference_pair(taps=(1, 2, 4), **changes):
    torch.manual_seed(0)
    config = ReferenceConfig(**{**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **changes})
    reference = Qwen3Model(config).eval()
    for parameter in reference.parameters():  # norms other than one, activations far from zero
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    model = Qwen3Encoder(Qwen3Config.from_dict(config.to_dict()), taps)
    model.load_state_dict(reference.state_dict())
    return reference, model


def padded_batch(tokens=23):
    ids = torch.randint(0, 97, (3, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    mask[1, 17:] = 0
    return ids, mask


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("taps", [(1, 2, 4), (0, 3), (2, 4, 5)])
@torch.no_grad()
def test_equals_transformers_on_every_row(kv_heads, taps):
    reference, model = reference_pair(taps, num_key_value_heads=kv_heads)
    ids, mask = padded_batch()
    states = reference(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    features = model(ids, mask)
    assert features.shape == (3, 23, len(taps) * 48)
    assert relative_error(features, torch.cat([states[tap] for tap in taps], dim=-1)) < 1e-5


@torch.no_grad()
def test_mask_changes_padding_rows_only():
    _, model = reference_pair()
    ids, mask = padded_batch()
    with_mask, without = model(ids, mask), model(ids, torch.ones_like(mask))
    assert relative_error(with_mask[0, :5], without[0, :5]) < 1e-5
    assert relative_error(with_mask[0, 5:], without[0, 5:]) > 1e-2


def test_layers_after_the_last_tap_do_not_exist():
    _, model = reference_pair((1, 3))
    assert len(model.layers) == 3
    assert not hasattr(model, "norm")
    _, model = reference_pair((1, 5))
    assert len(model.layers) == 5
    assert hasattr(model, "norm")


@torch.no_grad()
def test_loads_a_causal_model_with_prefix_and_tied_head():
    config = ReferenceConfig(**SIZES, tie_word_embeddings=True)
    reference = Qwen3ForCausalLM(config).eval()
    model = Qwen3Encoder(Qwen3Config.from_dict(config.to_dict()), (1, 2))
    state = reference.state_dict()
    assert "lm_head.weight" in state
    assert "model.layers.0.mlp.up_proj.weight" in state
    model.load_state_dict(state)
    ids, mask = padded_batch()
    states = reference(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert relative_error(model(ids, mask), torch.cat(states[1:3], dim=-1)) < 1e-5
    with pytest.raises(RuntimeError, match="unexpected"):
        model.load_state_dict({**state, "unexpected.weight": torch.zeros(1)})


@pytest.mark.slow
@torch.no_grad()
def test_one_layer_at_the_size_of_qwen3_4b():
    torch.manual_seed(0)
    config = Qwen3Config()
    reference_config = ReferenceConfig(**config.to_dict(), attn_implementation="sdpa")
    reference = Qwen3DecoderLayer(reference_config, 0).eval()
    with torch.device("meta"):
        layer = Layer(config)
    layer.load_state_dict(reference.state_dict(), assign=True)
    x = torch.randn(1, 48, 2560)
    allowed = torch.ones(1, 1, 48, 48, dtype=torch.bool).tril()
    allowed[..., 40:] = False
    cos, sin = rotary_table(48, config.head_dim, config.rope_theta, x.device)
    expected = reference(x, attention_mask=allowed, position_embeddings=(cos[None], sin[None]))
    assert relative_error(layer(x, allowed, cos, sin), expected) < 1e-5
    assert sum(parameter.numel() for parameter in layer.parameters()) == 100_925_440 + 2 * 2560 + 2 * 128


def test_gradients_reach_every_parameter():
    _, model = reference_pair((1, 2, 5))
    ids, mask = padded_batch()
    model(ids, mask).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@torch.no_grad()
def test_progress_and_cancellation():
    _, model = reference_pair()
    ids, mask = padded_batch()
    seen = []
    model(ids, mask, on_layer=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def stop(done, total):
        raise Cancelled("stop")

    with pytest.raises(Cancelled):
        model(ids, mask, on_layer=stop)


def test_config_reads_both_generations_and_refuses_the_unknown():
    old = {**SIZES, "rope_theta": 1e6, "model_type": "qwen3"}
    new = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert Qwen3Config.from_dict(old) == Qwen3Config.from_dict(new)
    config = Qwen3Config.from_dict(old)
    assert Qwen3Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for change in ({"hidden_act": "gelu"}, {"attention_bias": True}, {"use_sliding_window": True},
                   {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {"num_key_value_heads": 3}):
        with pytest.raises(FormatError, match="expected"):
            Qwen3Config.from_dict({**old, **change})
    with pytest.raises(UsageError, match="text_taps"):
        Qwen3Encoder(config, (2, 6))


# ------------------------------------------------------------------------------------------------------- tokenizer

CAPTIONS = ["a red apple and two blue cups", "three dogs to the left of a tree", "It's a cat's hat, 42 stars"] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(CAPTIONS, 400), path)
    return path


@pytest.fixture(scope="module")
def reference_tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("prompt", [
    "a red apple", "", "  spaces  around ", "3 dogs' naïve café  \n\n x", "{braces} 100%", "e\u0301 😀 日本",
    "an <|im_end|> in the middle <think>", "x " * 60, "word " * 9 + "end"])
def test_tokenizer_equals_transformers(folder, reference_tokenizer, prompt):
    text = reference_tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                                   add_generation_prompt=True, enable_thinking=False)
    assert text == TEMPLATE.format(prompt=prompt)
    for length in (40, 12):
        expected = reference_tokenizer(text, return_tensors="pt", padding="max_length", truncation=True,
                                       max_length=length)
        tokenizer = PromptTokenizer.from_folder(folder, length)
        ids, mask = tokenizer.encode([prompt])
        assert ids.dtype == mask.dtype == torch.long
        assert ids.shape == (1, length)
        assert torch.equal(ids, expected.input_ids)
        assert torch.equal(mask, expected.attention_mask)
        assert tokenizer.count(prompt) == len(reference_tokenizer(text).input_ids)


def test_batch_is_its_rows(folder):
    tokenizer = PromptTokenizer.from_folder(folder / "tokenizer.json", 40)
    prompts = ["a red apple", "two blue cups", ""]
    ids, mask = tokenizer.encode(prompts)
    assert all(torch.equal(ids[i], tokenizer.encode([prompt])[0][0]) for i, prompt in enumerate(prompts))
    assert mask.sum(1).tolist() == [tokenizer.count(prompt) for prompt in prompts]
    assert tokenizer.encode([])[0].shape == (0, 40)
    assert int(ids.max()) < tokenizer.vocab_size


def test_training_is_repeatable_and_bounded():
    first, second = train_tokenizer(iter(CAPTIONS), 300), train_tokenizer(CAPTIONS, 300)
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() <= 300
    text = "Zürich \x00 <|im_start|> 東京"
    assert first.decode(first.encode(text).ids, skip_special_tokens=False) == text
    with pytest.raises(UsageError, match="vocab_size"):
        train_tokenizer(CAPTIONS, 200)


def test_broken_tokenizers_are_refused(tmp_path, folder):
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json"):
        PromptTokenizer.from_folder(tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="readable"):
        PromptTokenizer.from_folder(tmp_path, 8)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != "<think>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match="<think>"):
        PromptTokenizer.from_folder(tmp_path, 8)
    with pytest.raises(UsageError, match="text length"):
        PromptTokenizer.from_folder(folder, 0)
