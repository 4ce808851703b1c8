"""A whole model of next to no size, random but deterministic, in the layout of a real one: for end-to-end tests."""

import json
from pathlib import Path

import torch

from linocut.formats.checkpoint import write_checkpoint
from linocut.models.autoencoder import Autoencoder, AutoencoderConfig
from linocut.models.convert import packed_state, quantize_
from linocut.models.flux2 import Flux2Config, Flux2Transformer
from linocut.models.text_encoder import Qwen3Config, Qwen3Encoder
from linocut.quantize.policy import Policy, Rule
from linocut.train.tokenizer import save_tokenizer, train_tokenizer

TEXT_LENGTH = 40
CAPTIONS = ["a red apple", "two blue cups", "a green fox left of a yellow star", "three cats and a dog"]
TRANSFORMER = Flux2Config(in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=64,
                          num_attention_heads=2, joint_attention_dim=384, axes_dims_rope=(16, 16, 16, 16))
VAE = AutoencoderConfig(block_out_channels=(16, 16, 32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
                        preview=True)
PACKED_BLOCKS = r"(single_)?transformer_blocks\..*"


def write_tiny_model(root: Path, encoding: str = "ternary", *, distilled: bool = True, default_size: int = 64,
                     seed: int = 0) -> Path:
    """Write a model folder to `root` and return it. `encoding` is that of the transformer's blocks."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(CAPTIONS, 300)
    text = Qwen3Config(vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                       num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    transformer, encoder, vae = Flux2Transformer(TRANSFORMER), Qwen3Encoder(text, taps=(1, 2, 3)), Autoencoder(VAE)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    vae.preview.weight.normal_(std=0.3)
    quantize_(transformer, Policy((Rule(PACKED_BLOCKS, encoding), Rule(".*", "dense"))))
    quantize_(encoder, Policy((Rule(".*", "affine4"),)))

    for folder, model, file in (("transformer", transformer, "diffusion_pytorch_model"),
                                ("text_encoder", encoder, "model"), ("vae", vae, "diffusion_pytorch_model")):
        (root / folder).mkdir(parents=True)
        write_checkpoint(root / folder / f"{file}.safetensors", packed_state(model))
        (root / folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_tokenizer(tokenizer, root / "tokenizer")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    (root / "model_index.json").write_text(json.dumps({
        "_class_name": "Flux2KleinPipeline", "is_distilled": distilled,
        "linocut": {"text_length": TEXT_LENGTH, "text_taps": [1, 2, 3], "default_size": [default_size, default_size],
                    "default_steps": 2}}))
    return root
