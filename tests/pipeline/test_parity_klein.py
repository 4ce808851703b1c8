"""The whole pipeline against diffusers' Flux2KleinPipeline: same folder of weights, same noise, same prompt.

The folder is written by diffusers and transformers themselves, with klein's architecture at a small size and random
weights; ours is opened from it with no conversion.
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from linocut import Pipeline
from linocut.formats.checkpoint import write_checkpoint
from linocut.kernels.dispatch import use_kernel
from linocut.models.convert import packed_state, quantize_
from linocut.models.flux2 import Flux2Config, Flux2Transformer
from linocut.models.linear import PackedLinear
from linocut.quantize.policy import Policy

LENGTH, TAPS = 40, (1, 2, 3)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
PROMPTS = ["two red apples and a blue cup", "Ein Schloß über den Wolken, 3 Türme", " ".join(["long"] * 80)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(PROMPTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, pad_token=SPECIAL[0],
                                   padding_side="right")


@pytest.fixture(scope="module")
def theirs() -> Flux2KleinPipeline:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True, initializer_range=0.2)).eval()
    transformer = Flux2Transformer2DModel(
        in_channels=32, num_layers=2, num_single_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=192, timestep_guidance_channels=64, axes_dims_rope=(16, 16, 16, 16), rope_theta=2000,
        guidance_embeds=False).eval()
    vae = AutoencoderKLFlux2(block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=8,
                             norm_num_groups=16).eval()
    for parameter in transformer.parameters():
        parameter.data.normal_(0 if parameter.ndim == 2 else 1, parameter.shape[-1] ** -0.5)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae, text_encoder=text, tokenizer=tokenizer, transformer=transformer, is_distilled=True)


def write_folder(pipe: Flux2KleinPipeline, root: Path, distilled: bool) -> Path:
    for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        getattr(pipe, name).save_pretrained(root / name)
    index: dict[str, Any] = {"_class_name": "Flux2KleinPipeline", "linocut": {
        "text_length": LENGTH, "text_taps": list(TAPS), "default_size": [64, 64], "default_steps": 4}}
    if distilled:
        index["is_distilled"] = True
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="module")
def folders(theirs: Flux2KleinPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("klein")
    return {distilled: write_folder(theirs, root / str(distilled), distilled) for distilled in (True, False)}


@pytest.mark.parametrize(("prompt", "width", "height", "steps", "guidance"), [
    (PROMPTS[0], 64, 64, 4, None), (PROMPTS[1], 96, 32, 3, None), (PROMPTS[2], 32, 64, 1, None),
    (PROMPTS[0], 64, 32, 5, 3.5),
], ids=["square", "wide", "cut-off-prompt", "guided"])
@pytest.mark.filterwarnings("ignore:the prompt takes")
def test_same_pictures_as_diffusers(theirs: Flux2KleinPipeline, folders: dict[bool, Path], prompt: str, width: int,
                                    height: int, steps: int, guidance: float | None) -> None:
    theirs.register_to_config(is_distilled=guidance is None)
    compare(theirs, folders[guidance is None], prompt, width, height, steps, guidance)


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
@torch.no_grad()
def test_packed_weights_draw_what_diffusers_draws_with_them_unpacked(
        theirs: Flux2KleinPipeline, folders: dict[bool, Path], tmp_path: Path, encoding: str) -> None:
    packed = tmp_path / "packed"
    shutil.copytree(folders[True], packed)
    (file,) = (packed / "transformer").glob("*.safetensors")
    dense = theirs.transformer
    ours = Flux2Transformer(Flux2Config.from_dict(dense.config))
    ours.load_state_dict(dense.state_dict())
    quantize_(ours, Policy.preset("flux2-embedded", encoding))
    file.unlink()
    write_checkpoint(file, packed_state(ours), {})
    theirs.register_to_config(is_distilled=True)
    theirs.transformer = copy.deepcopy(dense)
    try:
        for name, module in ours.named_modules():
            if isinstance(module, PackedLinear):
                theirs.transformer.get_submodule(name).weight.copy_(module.dequantize())
        with use_kernel("native"):  # float activations, as theirs are
            compare(theirs, packed, PROMPTS[0], 64, 64, 4, None)
    finally:
        theirs.transformer = dense


@pytest.fixture(autouse=True)
def plainest_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float weights and float32 throughout, as diffusers computes here."""
    monkeypatch.setenv("LINOCUT_KERNEL", "reference")


def compare(theirs: Flux2KleinPipeline, folder: Path, prompt: str, width: int, height: int, steps: int,
            guidance: float | None, seed: int = 7) -> None:
    """Draw with both and compare the latents after every step and the pixels."""
    wanted: list[torch.Tensor] = []

    def keep(_: object, step: int, t: object, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        wanted.append(values["latents"].clone())
        return values

    theirs.set_progress_bar_config(disable=True)
    picture = theirs(prompt=prompt, width=width, height=height, num_inference_steps=steps,
                     guidance_scale=guidance or 1.0,
                     generator=torch.Generator().manual_seed(seed), max_sequence_length=LENGTH,
                     text_encoder_out_layers=TAPS, callback_on_step_end=keep).images[0]

    found: list[torch.Tensor] = []
    pipe = Pipeline.from_pretrained(folder)
    result = pipe(prompt, width=width, height=height, num_inference_steps=steps, seed=seed, guidance_scale=guidance,
                  callback_on_step_end=lambda _, i, sigma, state: found.append(state["latents"]))
    assert len(found) == len(wanted) == steps
    for ours, reference in zip(found, wanted, strict=True):
        tokens = ours.flatten(2).transpose(1, 2)
        assert (tokens - reference).abs().max() / reference.abs().max() < 1e-4
    difference = np.abs(np.asarray(result.images[0]).astype(int) - np.asarray(picture).astype(int))
    assert result.images[0].size == (width, height)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    assert np.asarray(picture).std() > 10  # not a flat picture, so that the comparison means something
