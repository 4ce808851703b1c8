"""Networks from checkpoints without a copy, packed in memory, and back to what a file holds."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from linocut.errors import FormatError, PolicyError
from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.formats.packed import PackedTensor
from linocut.kernels.dispatch import use_kernel
from linocut.models.convert import build_and_load, packed_state, quantize_, set_eps, tensor_from
from linocut.models.flux2 import Flux2Config, Flux2Transformer, image_position_ids, text_position_ids
from linocut.models.linear import FakeQuantLinear, PackedEmbedding, PackedLinear, StoredLinear
from linocut.models.text_encoder import Qwen3Config, Qwen3Encoder
from linocut.quantize.policy import Policy, Rule

SMALL = Flux2Config(in_channels=16, num_layers=1, num_single_layers=2, num_attention_heads=4, attention_head_dim=32,
                    joint_attention_dim=192, timestep_guidance_channels=32, axes_dims_rope=(8, 8, 8, 8))
TEXT = Qwen3Config(vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2,
                   num_key_value_heads=1, head_dim=64)


def transformer() -> Flux2Transformer:
    torch.manual_seed(0)
    model = Flux2Transformer(SMALL)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5 + float(parameter.ndim == 1)
    return model.eval()


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(1, 12, 16, generator=generator), torch.randn(1, 5, 192, generator=generator),
            torch.tensor([0.7]), image_position_ids(3, 4), text_position_ids(5))


def save(model: nn.Module, path: Path, dtype: torch.dtype | None = None) -> Checkpoint:
    write_checkpoint(path, packed_state(model, dtype), {})
    return Checkpoint.open(path)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("preset", ["flux2", "flux2-embedded"])
@pytest.mark.parametrize("encoding", ["binary", "ternary"])
@torch.no_grad()
def test_quantized_in_memory_equals_loaded_from_a_file(tmp_path: Path, preset: str, encoding: str) -> None:
    model = transformer()
    decisions = quantize_(model, Policy.preset(preset, encoding))
    kinds = [encoding for encoding, _ in decisions.values()]
    assert kinds.count(encoding) == 12 + 2 * 2
    assert kinds.count("affine4") == (5 if preset == "flux2-embedded" else 0)
    assert isinstance(model.transformer_blocks[0].attn.to_out[0], PackedLinear)
    checkpoint = save(model, tmp_path / "model.safetensors")
    loaded = build_and_load(Flux2Transformer, SMALL, checkpoint)
    assert torch.equal(loaded(*inputs()), model(*inputs()))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


@torch.no_grad()
def test_a_trained_student_exports_what_it_computed(tmp_path: Path) -> None:
    model = transformer()
    weights = {id(parameter) for parameter in model.parameters()}
    quantize_(model, Policy.preset("flux2-embedded", "ternary"), fake=True, eps=0.5)
    assert {id(parameter) for parameter in model.parameters()} == weights
    assert isinstance(model.norm_out["linear"], FakeQuantLinear)
    mixed = model(*inputs())
    set_eps(model, 0.0)
    wanted = model(*inputs())
    assert relative(mixed, wanted) > 1e-2
    loaded = build_and_load(Flux2Transformer, SMALL, save(model, tmp_path / "model.safetensors"))
    with use_kernel("native"):  # float activations, as in training
        assert relative(loaded(*inputs()), wanted) < 1e-5


@torch.no_grad()
def test_loading_copies_nothing(tmp_path: Path) -> None:
    model = transformer()
    quantize_(model, Policy.preset("flux2", "ternary"))
    checkpoint = save(model, tmp_path / "model.safetensors", torch.bfloat16)
    loaded = build_and_load(Flux2Transformer, SMALL, checkpoint)
    for name, tensor in loaded.state_dict().items():
        assert tensor.data_ptr() == checkpoint.array(name).ctypes.data, name
    assert loaded.x_embedder.weight.dtype == torch.bfloat16
    assert isinstance(loaded.x_embedder, StoredLinear)
    checkpoint.close()  # the views keep the file mapped
    found = loaded(*inputs())
    assert found.dtype == torch.float32
    cast = build_and_load(Flux2Transformer, SMALL, Checkpoint.open(tmp_path / "model.safetensors"), torch.float32)
    assert cast.x_embedder.weight.dtype == torch.float32
    assert relative(cast(*inputs()), found) < 1e-5
    half = build_and_load(Flux2Transformer, SMALL, Checkpoint.open(tmp_path / "model.safetensors"), torch.bfloat16)
    latents, text, *rest = inputs()
    assert relative(half(latents.bfloat16(), text, *rest).float(), found) < 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_packed_model_takes_no_memory_until_it_is_used(tmp_path: Path) -> None:
    path, size = tmp_path / "big.safetensors", 1 << 26
    packed = PackedTensor("binary", (size // 128, 1024), np.ones((size // 128, 128), np.uint8),
                          np.ones((size // 128, 8), np.float16))
    write_checkpoint(path, {"linear": packed}, {})
    program = f"""
import torch
from linocut.formats.checkpoint import Checkpoint
from linocut.models.convert import build_and_load
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * {os.sysconf("SC_PAGESIZE")}
class Net(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.linear = torch.nn.Linear(1024, {size // 128}, bias=False)
before = resident()
with Checkpoint.open({str(path)!r}) as checkpoint:
    net = build_and_load(Net, None, checkpoint)
print(resident() - before)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert int(ran.stdout) < 8e6  # the file has 75 MB, the dense weight would have 2.1 GB


def test_text_encoder_loads_the_layers_it_needs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    full = Qwen3Encoder(TEXT, taps=(1, 2, 4))
    quantize_(full, Policy.preset("qwen3", "affine4"))
    state = {f"model.{name}": value for name, value in packed_state(full).items()}
    state["lm_head.weight"] = np.zeros((300, 128), np.float32)
    write_checkpoint(tmp_path / "model.safetensors", state, {})
    checkpoint = Checkpoint.open(tmp_path / "model.safetensors")
    ids, mask = torch.randint(0, 300, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    whole = build_and_load(Qwen3Encoder, TEXT, checkpoint, taps=(1, 2, 4))
    assert isinstance(whole.embed_tokens, PackedEmbedding)
    short = build_and_load(lambda config: Qwen3Encoder(config, taps=(1, 2)), TEXT, checkpoint)
    assert len(short.layers) == 2
    with torch.no_grad():
        assert torch.equal(whole(ids, mask), full(ids, mask))
        assert torch.equal(short(ids, mask), full(ids, mask)[..., : 2 * 128])
        half = build_and_load(Qwen3Encoder, TEXT, checkpoint, torch.bfloat16, taps=(1, 2))
        assert half(ids, mask).dtype == torch.bfloat16


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = transformer()
    quantize_(model, Policy.preset("flux2", "binary"))
    good = packed_state(model)
    block = "single_transformer_blocks.1.attn.to_out"
    norm = "single_transformer_blocks.1.attn.norm_q"
    cases = {
        "missing": ({name: value for name, value in good.items() if name != "x_embedder.weight"}, "x_embedder.weight"),
        "missing packed": ({name: value for name, value in good.items() if name != block}, block),
        "extra": ({**good, "stranger.weight": np.zeros(3, np.float32)}, "stranger.weight"),
        "extra packed": ({**good, "stranger": good[block]}, "stranger"),
        "shape": ({**good, "x_embedder.weight": np.zeros((128, 17), np.float32)}, "x_embedder.weight"),
        "packed shape": ({**good, block: good["transformer_blocks.0.attn.to_q"]}, block),
        "packed norm": ({**{name: value for name, value in good.items() if name != f"{norm}.weight"},
                         norm: good[block]}, norm),
    }
    for label, (state, named) in cases.items():
        path = tmp_path / f"{label}.safetensors"
        write_checkpoint(path, state, {})
        with Checkpoint.open(path) as checkpoint, pytest.raises(FormatError, match=named):
            build_and_load(Flux2Transformer, SMALL, checkpoint)


def test_layers_with_a_bias_are_refused() -> None:
    model = nn.Sequential(nn.Linear(128, 4), nn.Linear(128, 4, bias=False))
    with pytest.raises(PolicyError, match="0 has a bias"):
        quantize_(model, Policy((Rule(".*", "ternary"),)))
    assert type(model[1]) is nn.Linear
    decisions = quantize_(model, Policy((Rule("1", "ternary"),)))
    assert [encoding for encoding, _ in decisions.values()] == ["dense", "ternary"]
    assert isinstance(model[1], PackedLinear)


def test_bfloat16_comes_as_a_view(tmp_path: Path) -> None:
    values = torch.randn(4, 3).bfloat16()
    write_checkpoint(tmp_path / "a.safetensors", {"x": (values.view(torch.uint16).numpy(), "BF16"),
                                                  "n": np.array(7, np.int64)}, {})
    with Checkpoint.open(tmp_path / "a.safetensors") as checkpoint:
        assert torch.equal(tensor_from(checkpoint, "x"), values)
        assert tensor_from(checkpoint, "n").item() == 7


@torch.no_grad()
def test_original_single_file_names_are_accepted(tmp_path: Path) -> None:
    model = transformer()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    renames = [("x_embedder", "img_in"), ("context_embedder", "txt_in"), ("proj_out", "final_layer.linear"),
               ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
               ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
               ("_modulation_img.linear", "_modulation_img.lin"), ("_modulation_txt.linear", "_modulation_txt.lin"),
               ("single_stream_modulation.linear", "single_stream_modulation.lin"),
               ("attn.to_qkv_mlp_proj", "linear1"),
               ("single_transformer_blocks.0.attn.to_out", "single_blocks.0.linear2"),
               ("single_transformer_blocks.1.attn.to_out", "single_blocks.1.linear2"),
               ("attn.to_out.0", "img_attn.proj"), ("attn.to_add_out", "txt_attn.proj"),
               ("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
               ("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
               ("ff.linear_in", "img_mlp.0"), ("ff.linear_out", "img_mlp.2"),
               ("ff_context.linear_in", "txt_mlp.0"), ("ff_context.linear_out", "txt_mlp.2"),
               ("single_transformer_blocks", "single_blocks"), ("transformer_blocks", "double_blocks")]
    norm = "norm.{}_norm.scale"
    original: dict[str, np.ndarray] = {}
    for side, parts in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
        triple = [state.pop(f"transformer_blocks.0.attn.{part}.weight") for part in parts]
        original[f"double_blocks.0.{side}_attn.qkv.weight"] = np.concatenate(triple)
    scale, shift = np.split(state.pop("norm_out.linear.weight"), 2)
    original["final_layer.adaLN_modulation.1.weight"] = np.concatenate([shift, scale])
    for name, array in state.items():
        for short, long in (("q", "query"), ("k", "key")):
            where = "" if name.startswith("single") else "img_attn."
            name = name.replace(f"attn.norm_{short}.weight", where + norm.format(long))
        for old, new in renames:
            name = name.replace(old, new)
        original[name] = array
    write_checkpoint(tmp_path / "flux.safetensors", original, {})
    with Checkpoint.open(tmp_path / "flux.safetensors") as checkpoint:
        loaded = build_and_load(Flux2Transformer, SMALL, checkpoint)
    assert torch.equal(loaded(*inputs()), model(*inputs()))
