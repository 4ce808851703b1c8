"""The original FLUX.2 single file under diffusers' names."""

import numpy as np
import pytest
from test_checkpoint import klein_tensors

from linocut.errors import FormatError
from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.formats.names import BFLCheckpoint, bfl_plan, is_bfl, open_flux2


def bfl_shapes(d: int = 3072, head: int = 128, text: int = 7680, double: int = 5, single: int = 20,
               ) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original file."""
    shapes: dict[str, tuple[int, ...]] = {
        "img_in.weight": (d, 128), "txt_in.weight": (d, text), "time_in.in_layer.weight": (d, 256),
        "time_in.out_layer.weight": (d, d), "double_stream_modulation_img.lin.weight": (6 * d, d),
        "double_stream_modulation_txt.lin.weight": (6 * d, d), "single_stream_modulation.lin.weight": (3 * d, d),
        "final_layer.linear.weight": (128, d), "final_layer.adaLN_modulation.1.weight": (2 * d, d),
    }
    for i in range(double):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            shapes |= {f"{block}_attn.qkv.weight": (3 * d, d), f"{block}_attn.proj.weight": (d, d),
                       f"{block}_attn.norm.query_norm.scale": (head,), f"{block}_attn.norm.key_norm.scale": (head,),
                       f"{block}_mlp.0.weight": (6 * d, d), f"{block}_mlp.2.weight": (d, 3 * d)}
    for i in range(single):
        block = f"single_blocks.{i}"
        shapes |= {f"{block}.linear1.weight": (9 * d, d), f"{block}.linear2.weight": (d, 4 * d),
                   f"{block}.norm.query_norm.scale": (head,), f"{block}.norm.key_norm.scale": (head,)}
    return shapes


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_klein_maps_149_tensors_to_169(prefix):
    shapes = {prefix + name: shape for name, shape in bfl_shapes().items()}
    assert len(shapes) == 149
    assert is_bfl(shapes)
    plan = bfl_plan(shapes)
    dense, packed = klein_tensors()
    expected = {name: shape for name, _, shape in dense} | {f"{name}.weight": shape for name, shape in packed.items()}
    assert {name: source.shape for name, source in plan.items()} == expected
    assert len(plan) == 169
    assert not is_bfl(plan)
    assert [name for name, source in plan.items() if source.swap] == ["norm_out.linear.weight"]


def test_values(tmp_path):
    rng = np.random.default_rng(0)
    shapes = bfl_shapes(d=8, head=4, text=12, double=1, single=1)
    arrays = {name: rng.random(shape, dtype=np.float32) for name, shape in shapes.items()}
    write_checkpoint(tmp_path / "flux.safetensors", arrays)
    with open_flux2(tmp_path / "flux.safetensors") as checkpoint:
        assert isinstance(checkpoint, BFLCheckpoint)
        qkv = arrays["double_blocks.0.txt_attn.qkv.weight"]
        for index, part in enumerate("qkv"):
            name = f"transformer_blocks.0.attn.add_{part}_proj.weight"
            assert (checkpoint.array(name) == qkv[8 * index : 8 * index + 8]).all()
            assert not checkpoint.array(name).flags.owndata
            assert checkpoint.info(name).shape == (8, 8)
            assert checkpoint.info(name).nbytes == 256
            checkpoint.release(name)
        final = arrays["final_layer.adaLN_modulation.1.weight"]  # shift, then scale
        assert (checkpoint.array("norm_out.linear.weight") == np.concatenate([final[8:], final[:8]])).all()
        for old, new in [
            ("single_blocks.0.linear1.weight", "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"),
            ("double_blocks.0.img_mlp.2.weight", "transformer_blocks.0.ff.linear_out.weight"),
            ("double_blocks.0.txt_attn.norm.key_norm.scale", "transformer_blocks.0.attn.norm_added_k.weight"),
            ("double_blocks.0.img_attn.proj.weight", "transformer_blocks.0.attn.to_out.0.weight"),
            ("time_in.out_layer.weight", "time_guidance_embed.timestep_embedder.linear_2.weight"),
        ]:
            assert (checkpoint.array(new) == arrays[old]).all()
        assert sum(checkpoint.info(name).nbytes for name in checkpoint.names) == checkpoint.tensor_nbytes
        with pytest.raises(FormatError, match="no such tensor"):
            checkpoint.array("img_in.weight")


def test_agrees_with_the_conversion_of_diffusers():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.Flux2Transformer2DModel(
        in_channels=128, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=256, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False)
    want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    plan = bfl_plan(bfl_shapes(d=32, head=16, text=48, double=2, single=2))
    assert {name: source.shape for name, source in plan.items()} == want
    assert torch.is_tensor(model.x_embedder.weight)


def test_refusals(tmp_path):
    with pytest.raises(FormatError, match="mystery"):
        bfl_plan({"mystery.weight": (3, 3)})
    with pytest.raises(FormatError, match="multiple of 3 rows"):
        bfl_plan({"double_blocks.0.img_attn.qkv.weight": (4, 3)})
    with pytest.raises(FormatError, match="multiple of 2 rows"):
        bfl_plan({"final_layer.adaLN_modulation.1.weight": (5, 3)})
    with pytest.raises(FormatError, match="become one"):
        bfl_plan({"img_in.weight": (4, 3), "model.diffusion_model.img_in.weight": (4, 3)})
    write_checkpoint(tmp_path / "x.safetensors", {"x_embedder.weight": np.zeros((2, 2), np.float32)})
    assert isinstance(open_flux2(tmp_path / "x.safetensors"), Checkpoint)
