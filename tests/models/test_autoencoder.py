"""The autoencoder gives what diffusers gives, and strips give what one piece gives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from diffusers.models.attention_processor import Attention as ReferenceAttention
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image

from linocut.errors import Cancelled, FormatError, UsageError
from linocut.formats.folder import ModelFolder
from linocut.models.autoencoder import (
    Attention,
    Autoencoder,
    AutoencoderConfig,
    ResnetBlock,
    Upsample,
    fit_preview,
    patchify,
    subpixel_kernels,
    unpatchify,
    upsampled_rows,
)
from linocut.models.convert import build_and_load
from linocut.models.tiling import decode_in_strips

SHEET = Path(__file__).parent.parent.parent / "docs" / "sheet.webp"
SIZES = {"block_out_channels": (32, 64, 96, 96), "layers_per_block": 1, "latent_channels": 16, "norm_num_groups": 32}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def fill(model: torch.nn.Module) -> None:
    """Weights, biases and norms that are all far from their starting values."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise * (1.5 / parameter[0].numel()) ** 0.5
        else:
            parameter.data += 0.2 * noise


@pytest.fixture(scope="module", params=[None, (32, 32, 64, 64)], ids=["full", "small-decoder"])
def pair(request):
    reference = AutoencoderKLFlux2(**SIZES, decoder_block_out_channels=request.param).eval()
    fill(reference)
    reference.bn.running_mean.copy_(torch.randn(64, generator=torch.Generator().manual_seed(1)))
    reference.bn.running_var.copy_(torch.rand(64, generator=torch.Generator().manual_seed(2)) * 1e-3)
    model = Autoencoder(AutoencoderConfig.from_dict(dict(reference.config))).eval()
    model.load_state_dict(reference.state_dict())
    return reference, model


@torch.no_grad()
def test_encode_and_decode_equal_diffusers(pair):
    reference, model = pair
    image = torch.rand(2, 3, 96, 64) * 2 - 1
    posterior, (mean, logvar) = reference.encode(image).latent_dist, model.encode(image)
    assert mean.shape == (2, 16, 12, 8)
    assert relative_error(mean, posterior.mean) < 1e-5
    assert relative_error(logvar, posterior.logvar) < 1e-5
    assert relative_error(model.decode(mean), reference.decode(mean).sample) < 1e-5


@torch.no_grad()
def test_latents_equal_the_pipeline_of_diffusers(pair):
    reference, model = pair
    image = torch.rand(1, 3, 64, 96) * 2 - 1
    plain = Flux2KleinPipeline._patchify_latents(reference.encode(image).latent_dist.mode())
    mean = reference.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(reference.bn.running_var.view(1, -1, 1, 1) + reference.config.batch_norm_eps)
    latents = model.latents_from_image(image)
    assert latents.shape == (1, 64, 4, 6)
    assert relative_error(latents, (plain - mean) / deviation) < 1e-5
    decoded = reference.decode(Flux2KleinPipeline._unpatchify_latents(latents * deviation + mean)).sample
    assert relative_error(model.image_from_latents(latents), decoded) < 1e-5


def test_patchify_order():
    z = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(z)
    assert patches.shape == (2, 12, 2, 3)
    for c, i, j in ((0, 0, 1), (1, 1, 0), (2, 1, 1)):
        assert torch.equal(patches[:, 4 * c + 2 * i + j], z[:, c, i::2, j::2])
    assert torch.equal(unpatchify(patches), z)
    assert torch.equal(patches, Flux2KleinPipeline._patchify_latents(z))


def test_klein_has_the_published_number_of_parameters():
    with torch.device("meta"):
        full = Autoencoder(AutoencoderConfig())
        small = Autoencoder(AutoencoderConfig(decoder_block_out_channels=(96, 192, 384, 384)))
        reference = AutoencoderKLFlux2()
    assert sum(p.numel() for p in full.parameters()) == 84_046_115
    assert sum(p.numel() for p in small.parameters()) == 62_373_091
    assert {k: v.shape for k, v in full.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}


@torch.no_grad()
def test_blocks_at_the_size_of_klein():
    torch.manual_seed(0)
    x = torch.randn(1, 512, 12, 8)
    reference = ResnetBlock2D(in_channels=512, out_channels=512, temb_channels=None, eps=1e-6, groups=32)
    block = ResnetBlock(512, 512, 32)
    block.load_state_dict(reference.state_dict())
    assert relative_error(block(x), reference(x, None)) < 1e-5
    reference = ReferenceAttention(512, heads=1, dim_head=512, eps=1e-6, norm_num_groups=32, bias=True,
                                   residual_connection=True, upcast_softmax=True, _from_deprecated_attn_block=True)
    attention = Attention(512, 32)
    attention.load_state_dict(reference.state_dict())
    assert relative_error(attention(x), reference(x)) < 1e-5


# ----------------------------------------------------------------------------------------------------------- strips

@pytest.mark.parametrize("rows", [3, 16, 40, 1000])
@torch.no_grad()
def test_strips_equal_one_piece(pair, rows):
    _, model = pair
    latents = torch.randn(2, 64, 3, 5, generator=torch.Generator().manual_seed(3))
    whole, seen = model.image_from_latents(latents), []
    strips = model.image_from_latents(latents, tile=rows, on_tile=lambda done, total: seen.append((done, total)))
    assert whole.shape == strips.shape == (2, 3, 48, 80)
    assert float((whole - strips).abs().max()) < 1e-4
    assert relative_error(strips, whole) < 2e-5
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]


@torch.no_grad()
def test_strips_without_channel_changes_or_attention():
    config = AutoencoderConfig(block_out_channels=(32, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
                               mid_block_add_attention=False, use_post_quant_conv=False, use_quant_conv=False)
    model = Autoencoder(config).eval()
    fill(model)
    z = torch.randn(1, 4, 6, 6) + 5.0  # a mean far from zero is hard on one-pass variances
    assert relative_error(decode_in_strips(model, z, 4), model.decode(z)) < 2e-5


@torch.no_grad()
def test_strips_in_bfloat16_stay_close(pair):
    model = Autoencoder(pair[1].config).eval()
    model.load_state_dict(pair[1].state_dict())
    model.to(torch.bfloat16)
    latents = torch.randn(1, 64, 2, 2)
    strips, whole = model.image_from_latents(latents, tile=8), pair[1].image_from_latents(latents)
    assert strips.dtype == torch.bfloat16
    assert float((strips.float() - whole).square().mean().sqrt() / whole.std()) < 0.1


def test_strips_can_be_stopped_and_refuse_nonsense(pair):
    _, model = pair

    def stop(done, total):
        if done == 3:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        model.image_from_latents(torch.zeros(1, 64, 2, 2), tile=8, on_tile=stop)
    with pytest.raises(UsageError, match="at least 1 row"):
        model.image_from_latents(torch.zeros(1, 64, 2, 2), tile=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, 24])
@torch.no_grad()
def test_threads_do_not_move_a_bit(pair, dtype, rows):
    """At a size whose maps can be cut evenly neither by all of these numbers nor by vectors."""
    model = Autoencoder(pair[1].config).eval()
    model.load_state_dict(pair[1].state_dict())
    model.to(dtype=dtype, memory_format=torch.channels_last)
    latents = torch.randn(1, 64, 5, 9, generator=torch.Generator().manual_seed(4))
    before, pictures = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3, 4, 5, 7, 8):
            torch.set_num_threads(threads)
            pictures[threads] = model.image_from_latents(latents, tile=rows)
    finally:
        torch.set_num_threads(before)
    assert [threads for threads, picture in pictures.items() if not torch.equal(picture, pictures[1])] == []


@torch.no_grad()
def test_decoding_asks_torch_for_no_norm_that_some_versions_refuse(pair, monkeypatch):
    """Torch 2.11 raises for an eps of zero, later versions do not."""
    given = []
    own = torch.nn.functional.batch_norm
    monkeypatch.setattr(torch.nn.functional, "batch_norm", lambda *a, **k: given.append(k["eps"]) or own(*a, **k))
    with torch.no_grad():
        pair[1].decode(torch.zeros(1, 16, 4, 4))
    assert given
    assert min(given) > 0


def test_upsampling_by_parts_equals_upsampling_first(pair):
    upsample = Upsample(32)
    x = torch.randn(2, 32, 5, 7)
    with torch.enable_grad():
        expected = upsample(x)  # the plain way, as in training
    assert relative_error(upsample(x), expected) < 1e-6
    kernels = subpixel_kernels(upsample.conv.weight)
    for low, high in ((0, 1), (1, 4), (3, 10), (9, 10), (2, 8)):
        rows = upsampled_rows(x, kernels, upsample.conv.bias, low, high)
        assert relative_error(rows, expected[:, :, low:high]) < 1e-6


@torch.no_grad()
def test_bfloat16_costs_under_a_tenth_of_a_decibel():
    """On real weights and pictures, against the pictures themselves."""
    folder = ModelFolder.open("embedded")
    config = AutoencoderConfig.from_dict(folder.config("vae"))
    with folder.checkpoint("vae") as checkpoint:
        exact, half = (build_and_load(Autoencoder, config, checkpoint, dtype=torch.float32) for _ in range(2))
    half.decoder.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    if half.post_quant_conv is not None:
        half.post_quant_conv.to(torch.bfloat16)
    with Image.open(SHEET) as sheet:
        pixels = torch.from_numpy(np.array(sheet.convert("RGB"))[300:812, 300:812]).permute(2, 0, 1)[None] / 127.5 - 1
    latents = exact.latents_from_image(pixels)
    wanted, found = (model.image_from_latents(latents).float().clamp(-1, 1) for model in (exact, half))

    def decibels(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(-10 * torch.log10(((one - other) / 2).square().mean()))

    assert decibels(wanted, pixels) > 20
    assert abs(decibels(wanted, pixels) - decibels(found, pixels)) < 0.1
    assert decibels(wanted, found) > 50


# ------------------------------------------------------------------------------------------------ training, preview

def test_gradients_reach_every_parameter_and_statistics_stand_still(pair):
    _, model = pair
    model.train()
    before = model.bn.running_mean.clone()
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, logvar = model.encode(image)
    (model.decode(mean).square().mean() + logvar.mean()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(model.bn.running_mean, before)
    model.zero_grad(set_to_none=True)
    model.eval()


@torch.no_grad()
def test_preview_finds_a_linear_decoder(pair):
    config = AutoencoderConfig(**SIZES)
    model = Autoencoder(config)
    generator = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(3, 16, generator=generator) * 0.02, torch.tensor([0.4, 0.5, 0.6])

    def linear(z):
        colours = torch.einsum("bchw,rc->brhw", z, weight) + bias[:, None, None]
        return colours.repeat_interleave(8, 2).repeat_interleave(8, 3) * 2 - 1

    model.decode = linear
    found = fit_preview(model)
    assert relative_error(found[0], weight) < 0.05
    assert relative_error(found[1], bias) < 0.05
    latents = torch.randn(2, 64, 4, 4, generator=generator)
    preview = model.preview_rgb(latents)
    assert preview.shape == (2, 3, 8, 8)
    assert preview.min() >= 0
    assert preview.max() <= 1
    expected = linear(model.denormalize(latents))[:, :, ::8, ::8] / 2 + 0.5
    assert float((preview - expected.clamp(0, 1)).abs().mean()) < 0.02


def test_preview_travels_with_the_weights():
    first = Autoencoder(AutoencoderConfig(**SIZES))
    assert not any(name.startswith("preview") for name in first.state_dict())
    first.preview.weight, first.preview.bias = torch.rand(3, 16), torch.rand(3)
    state = first.state_dict()
    second = Autoencoder(AutoencoderConfig(**SIZES))
    second.load_state_dict(state)
    assert torch.equal(second.preview.weight, first.preview.weight)
    assert "preview.bias" in Autoencoder(AutoencoderConfig(**SIZES, preview=True)).state_dict()


def test_config_round_trip_and_refusals():
    config = AutoencoderConfig(**SIZES, decoder_block_out_channels=(32, 32, 64, 64))
    written = json.loads(json.dumps(config.to_dict()))
    assert AutoencoderConfig.from_dict(written) == config
    reference = AutoencoderKLFlux2.from_config({k: v for k, v in written.items() if k != "preview"})
    assert {k: v.shape for k, v in reference.state_dict().items()} == {
        k: v.shape for k, v in Autoencoder(config).state_dict().items()}
    for change in ({"act_fn": "relu"}, {"patch_size": [1, 1]}):
        with pytest.raises(FormatError, match="expected"):
            AutoencoderConfig.from_dict({**written, **change})
    with pytest.raises(UsageError, match="multiples of 16"):
        Autoencoder(config).encode(torch.zeros(1, 3, 40, 32))
