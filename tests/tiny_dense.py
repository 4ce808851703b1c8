"""A tiny random dense model, as a model folder and as one file in the original naming: what to quantize in tests."""

import re
from pathlib import Path

import numpy as np

from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.models.autoencoder import AutoencoderConfig
from linocut.models.flux2 import Flux2Config
from linocut.models.synthetic import SyntheticModel
from linocut.models.text_encoder import Qwen3Config

TINY = SyntheticModel(
    transformer=Flux2Config(in_channels=64, num_layers=2, num_single_layers=3, num_attention_heads=1,
                            joint_attention_dim=384, timestep_guidance_channels=128),
    text_encoder=Qwen3Config(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                             num_attention_heads=2, num_key_value_heads=1, head_dim=64),
    vae=AutoencoderConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=16),
    text_taps=(1, 2, 3), text_length=64, default_size=(64, 64), ordinary_tokens=300)

# diffusers name -> original name; q, k, v map to the same name and are joined in this order
_ORIGINAL = (
    (r"x_embedder", "img_in"), (r"context_embedder", "txt_in"), (r"proj_out", "final_layer.linear"),
    (r"time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"(double_stream_modulation_\w+|single_stream_modulation)\.linear", r"\1.lin"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"transformer_blocks\.(\d+)\.attn\.to_[qkv]", r"double_blocks.\1.img_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_q", r"double_blocks.\1.img_attn.norm.query_norm"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_k", r"double_blocks.\1.img_attn.norm.key_norm"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_q", r"double_blocks.\1.txt_attn.norm.query_norm"),
    (r"transformer_blocks\.(\d+)\.attn\.norm_added_k", r"double_blocks.\1.txt_attn.norm.key_norm"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
    (r"single_transformer_blocks\.(\d+)\.attn\.norm_q", r"single_blocks.\1.norm.query_norm"),
    (r"single_transformer_blocks\.(\d+)\.attn\.norm_k", r"single_blocks.\1.norm.key_norm"),
)


def write_original_form(source: Path, target: Path) -> None:
    """Write diffusers weights as the original single file: fused q, k, v and swapped halves of the last modulation."""
    joined: dict[str, list[np.ndarray]] = {}
    with Checkpoint.open(source) as checkpoint:
        for name in sorted(checkpoint.names, key=lambda name: (name.replace("to_q.", "1").replace("add_q_", "1")
                           .replace("to_k.", "2").replace("add_k_", "2").replace("to_v.", "3").replace("add_v_", "3"))):
            module = name.removesuffix(".weight")
            original = next(re.sub(pattern, new, module) for pattern, new in _ORIGINAL if re.fullmatch(pattern, module))
            array = checkpoint.array(name).copy()
            if module == "norm_out.linear":
                array = np.concatenate(np.split(array, 2)[::-1])
            joined.setdefault(original + (".scale" if "_norm" in original else ".weight"), []).append(array)
    write_checkpoint(target, {name: (np.concatenate(arrays), "BF16") for name, arrays in joined.items()})
