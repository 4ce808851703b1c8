"""Each network on mlx against ours in torch, on random weights: within 1e-4 in float32."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from tiny_dense import TINY

from linocut.errors import Cancelled, FormatError, UsageError
from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.kernels.dispatch import use_kernel
from linocut.mlx.autoencoder import Decoder
from linocut.mlx.flux2 import Flux2
from linocut.mlx.text_encoder import TextEncoder
from linocut.models.autoencoder import Autoencoder
from linocut.models.configs import AutoencoderConfig, Flux2Config, Qwen3Config
from linocut.models.convert import build_and_load, packed_state, quantize_
from linocut.models.flux2 import Flux2Transformer, image_position_ids, rope_tables, text_position_ids
from linocut.models.text_encoder import Qwen3Encoder
from linocut.quantize.policy import Policy, Rule

WITHIN = 1e-4
FLUX2 = Flux2Config(in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=64, num_attention_heads=2,
                    joint_attention_dim=256, timestep_guidance_channels=64, axes_dims_rope=(8, 24, 24, 8), mlp_ratio=2)
QWEN3 = Qwen3Config(vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=64)
VAE = AutoencoderConfig(block_out_channels=(16, 32, 48, 64), layers_per_block=2, latent_channels=8, norm_num_groups=8)


@pytest.fixture(autouse=True)
def repeatable() -> None:
    torch.manual_seed(0)


def relative(found: mx.array, wanted: torch.Tensor) -> float:
    return float(np.abs(np.array(found) - wanted.numpy()).max() / wanted.abs().max())


def stored(model: torch.nn.Module, path: Path) -> Checkpoint:
    write_checkpoint(path / "model.safetensors", packed_state(model))
    return Checkpoint.open(path / "model.safetensors")


# ------------------------------------------------------------------------------------------------ transformer

def transformer(encoding: str, path: Path) -> tuple[Flux2Transformer, Checkpoint]:
    model = Flux2Transformer(FLUX2).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(1 if "norm_" in name and parameter.ndim == 1 else 0, 0.5 * parameter.shape[-1] ** -0.5)
    if encoding != "dense":
        quantize_(model, Policy((Rule(r"(single_)?transformer_blocks\..*", encoding), Rule(".*", "dense"))))
    checkpoint = stored(model, path)
    return build_and_load(Flux2Transformer, FLUX2, checkpoint), checkpoint


def inputs(batch: int = 1, text: int = 11) -> tuple[torch.Tensor, ...]:
    return (torch.randn(batch, 12, FLUX2.in_channels), 3 * torch.randn(batch, text, FLUX2.joint_attention_dim),
            torch.tensor([0.7]), image_position_ids(3, 4), text_position_ids(text))


def run(network: Flux2, torch_network: Flux2Transformer, arguments: tuple[torch.Tensor, ...],
        on_block: Callable[[int, int], None] | None = None, dtype: mx.Dtype = mx.float32) -> mx.array:
    latents, text, sigma, image_ids, text_ids = arguments
    mod = torch_network.modulations(sigma)
    row = torch.cat([vector for vectors in mod for vector in vectors], dim=1)[0]
    tables = rope_tables(torch.cat([text_ids, image_ids]), FLUX2.axes_dims_rope, FLUX2.rope_theta)
    cos, sin = (mx.array(table[:, 0].numpy()) for table in tables)
    return network(mx.array(latents.numpy()).astype(dtype), mx.array(text.numpy()).astype(dtype),
                   mx.array(row.numpy()), (cos, sin), on_block)


@pytest.mark.parametrize("encoding", ["binary", "ternary", "affine4", "dense"])
@torch.no_grad()
def test_the_transformer_is_ours(encoding: str, tmp_path: Path) -> None:
    theirs, checkpoint = transformer(encoding, tmp_path)
    network = Flux2(FLUX2, checkpoint)
    for arguments in (inputs(), inputs(batch=2, text=5)):
        with use_kernel("reference"):
            wanted = theirs(*arguments)
        assert relative(run(network, theirs, arguments), wanted) < WITHIN


@torch.no_grad()
def test_a_transformer_in_the_original_names_is_read(original_file: Path, dense_model: Path, tmp_path: Path) -> None:
    config = TINY.transformer
    rope = (mx.zeros((5, 64)) + 1, mx.zeros((5, 64)))
    x, text, row = mx.random.normal((1, 2, 64)), mx.random.normal((1, 3, 384)), mx.random.normal((17, 128))
    own, original = (Flux2(config, Checkpoint.open(path)) for path in (dense_model / "transformer", original_file))
    assert mx.array_equal(own(x, text, row, rope), original(x, text, row, rope))


@torch.no_grad()
def test_blocks_are_counted_and_a_run_stops_between_them(tmp_path: Path) -> None:
    theirs, checkpoint = transformer("ternary", tmp_path)
    network = Flux2(FLUX2, checkpoint)
    calls: list[tuple[int, int]] = []
    run(network, theirs, inputs(), lambda done, total: calls.append((done, total)))
    assert calls == [(i, 5) for i in range(1, 6)]

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise Cancelled("stopped")

    fresh = Flux2(FLUX2, checkpoint)
    with pytest.raises(Cancelled):
        run(fresh, theirs, inputs(), stop)
    assert [block.out._held is not None for block in fresh.single] == [True, False, False]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@torch.no_grad()
def test_sixteen_bits_come_near(dtype: mx.Dtype, tmp_path: Path) -> None:
    """On a CPU mlx adds up in 16 bits, so this shows that types go through, and no more."""
    theirs, checkpoint = transformer("ternary", tmp_path)
    with use_kernel("reference"):
        wanted = theirs(*(arguments := inputs()))
    found = run(Flux2(FLUX2, checkpoint, dtype), theirs, arguments, dtype=dtype)
    assert found.dtype == dtype
    assert relative(found.astype(mx.float32), wanted) < 0.2


def test_a_transformer_of_another_config_is_refused(tmp_path: Path) -> None:
    _, checkpoint = transformer("ternary", tmp_path)
    for change, message in (({"num_layers": 3}, "missing"), ({"num_layers": 1}, "not part of this network"),
                            ({"in_channels": 8}, "another shape")):
        with pytest.raises(FormatError, match=message):
            Flux2(Flux2Config.from_dict({**FLUX2.to_dict(), **change}), checkpoint)


# ----------------------------------------------------------------------------------------------- text encoder

def encoder(packed: bool, taps: tuple[int, ...], path: Path) -> tuple[Qwen3Encoder, Checkpoint]:
    model = Qwen3Encoder(QWEN3, taps).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.normal_(1 if "norm" in name else 0, parameter.shape[-1] ** -0.5)
    if packed:
        quantize_(model, Policy((Rule(".*", "affine4"),)))
    checkpoint = stored(model, path)
    return build_and_load(Qwen3Encoder, QWEN3, checkpoint, taps=taps), checkpoint


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.randint(0, QWEN3.vocab_size, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[0, 7:], mask[1, 15:] = 0, 0
    return ids, mask


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("packed", "taps"), [(True, (1, 2, 3)), (False, (1, 2, 3)), (True, (0, 4))])
@torch.no_grad()
def test_the_text_encoder_is_ours(packed: bool, taps: tuple[int, ...], keep: bool, tmp_path: Path) -> None:
    theirs, checkpoint = encoder(packed, taps, tmp_path)
    ids, mask = prompts()
    with use_kernel("reference"):
        wanted = theirs(ids, mask)
    calls: list[tuple[int, int]] = []
    network = TextEncoder(QWEN3, checkpoint, taps, keep=keep)
    found = network(ids.numpy(), mask.numpy(), lambda done, total: calls.append((done, total)))
    assert relative(found, wanted) < WITHIN
    assert calls == [(i, max(taps)) for i in range(1, max(taps) + 1)]
    assert all((layer.down._held is not None) == keep for layer in network.layers)


def test_taps_beyond_the_model_are_refused(tmp_path: Path) -> None:
    _, checkpoint = encoder(True, (1, 2), tmp_path)
    with pytest.raises(UsageError, match="text taps"):
        TextEncoder(QWEN3, checkpoint, (1, 5))


# ---------------------------------------------------------------------------------------------------- decoder

def autoencoder(config: AutoencoderConfig, path: Path) -> tuple[Autoencoder, Checkpoint]:
    model = Autoencoder(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(1 if name.endswith("weight") else 0, 0.2)
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2.0)
    return model, stored(model, path)


@pytest.mark.parametrize("config", [
    VAE, AutoencoderConfig(block_out_channels=(8, 16), decoder_block_out_channels=(16, 24), layers_per_block=1,
                           latent_channels=4, norm_num_groups=8, use_post_quant_conv=False,
                           mid_block_add_attention=False)], ids=["full", "small"])
@torch.no_grad()
def test_the_decoder_is_ours(config: AutoencoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linocut.mlx.autoencoder.QUERIES_AT_ONCE", 5)
    theirs, checkpoint = autoencoder(config, tmp_path)
    latents = torch.randn(2, 4 * config.latent_channels, 2, 3)
    calls: list[tuple[int, int]] = []
    found = Decoder(config, checkpoint)(mx.array(latents.numpy()), lambda done, total: calls.append((done, total)))
    wanted = theirs.image_from_latents(latents)
    assert found.shape == tuple(wanted.shape)
    assert relative(found, wanted) < WITHIN
    blocks = 2 + len(config.block_out_channels) * (config.layers_per_block + 1)
    assert calls == [(i, blocks) for i in range(1, blocks + 1)]


def test_decoding_stops_between_blocks(tmp_path: Path) -> None:
    _, checkpoint = autoencoder(VAE, tmp_path)

    def stop(done: int, total: int) -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        Decoder(VAE, checkpoint)(mx.zeros((1, 32, 2, 2)), stop)
