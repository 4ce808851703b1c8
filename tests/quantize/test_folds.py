"""Folds: the block computes what it did, and its weights round with less error."""

import pytest
import torch
from torch import nn

from linocut.models.configs import Flux2Config
from linocut.models.flux2 import DoubleBlock, SingleBlock, image_position_ids, rope_tables, text_position_ids
from linocut.quantize.folds import fold_block, head_rotations, hidden_sizes
from linocut.quantize.rounding import quantize_binary, quantize_ternary

CONFIG = Flux2Config(in_channels=64, num_attention_heads=2, joint_attention_dim=384)
WIDTH = CONFIG.width
ENCODINGS = ("binary", "ternary")


def make(kind, seed=0):
    torch.manual_seed(seed)
    block = kind(CONFIG).requires_grad_(False)
    for parameter in block.parameters():
        if parameter.ndim == 2:
            spread = torch.randn(parameter.shape[1]).mul(0.7).exp()  # columns of very different size
            parameter.copy_(torch.randn_like(parameter) * spread / parameter.shape[1] ** 0.5)
        else:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return block


def linears(block):
    return {name: module.weight.clone() for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def run(block):
    torch.manual_seed(9)
    ids = torch.cat([text_position_ids(5), image_position_ids(3, 4)])
    rope = rope_tables(ids, CONFIG.axes_dims_rope, CONFIG.rope_theta)
    image, text = torch.randn(2, 12, WIDTH), torch.randn(2, 5, WIDTH)
    vectors = tuple(torch.randn(2, 1, WIDTH) for _ in range(12))
    if isinstance(block, DoubleBlock):
        return torch.cat(block(image, text, vectors[:6], vectors[6:], rope), dim=1)
    return block(torch.cat([text, image], dim=1), vectors[:3], rope)


def error(weight, encoding):
    values, scales = quantize_binary(weight) if encoding == "binary" else quantize_ternary(weight)
    rounded = values.float() * scales.repeat_interleave(128, dim=1)
    return float((weight - rounded).square().sum() / weight.square().sum())


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", [DoubleBlock, SingleBlock])
def test_a_folded_block_computes_what_it_did(kind, encoding):
    block = make(kind)
    before, weights = run(block), linears(block)
    folded = dict(weights)
    made = fold_block(folded, dict.fromkeys(weights, encoding), CONFIG.attention_head_dim)
    assert made == (["values", "hidden", "hidden of the text"] if kind is DoubleBlock else ["values", "hidden"])
    for name, weight in folded.items():
        block.get_submodule(name).weight.copy_(weight)
    torch.testing.assert_close(run(block), before, rtol=1e-4, atol=1e-4)
    changed = {name for name in weights if not torch.equal(weights[name], folded[name])}
    assert not changed & {"attn.to_q", "attn.to_k", "attn.add_q_proj", "attn.add_k_proj"}
    readers = ["attn.to_out.0", "attn.to_add_out", "ff.linear_out", "ff_context.linear_out", "attn.to_out"]
    for name in changed & set(readers):
        assert error(folded[name], encoding) < 0.93 * error(weights[name], encoding)
    for name in changed - set(readers):  # rows that are turned or grow stay as good as they were
        assert error(folded[name], encoding) < 1.03 * error(weights[name], encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_turning_lowers_the_error_of_gaussian_heads_as_much_as_is_known(encoding):
    """Of values that are Gaussian: .361 to about .30 (binary) and .187 to about .15 (ternary)."""
    torch.manual_seed(0)
    weight = torch.randn(512, 256)
    turn = head_rotations([weight], encoding)
    torch.testing.assert_close(turn @ turn.transpose(1, 2), torch.eye(128).expand(2, -1, -1), rtol=0, atol=1e-5)
    turned = (weight.unflatten(1, (2, 128)).transpose(0, 1) @ turn).transpose(0, 1).flatten(1)
    assert error(turned, encoding) < 0.88 * error(weight, encoding)


def test_a_head_that_rounds_exactly_is_left_so():
    torch.manual_seed(0)
    weight = torch.randint(-1, 2, (64, 128)).float()
    assert error(weight @ head_rotations([weight], "ternary")[0], "ternary") < 1e-6


def test_dead_columns_keep_finite_factors():
    down = torch.randn(8, 16)
    down[:, 3] = 0
    size = hidden_sizes(down)
    assert bool(torch.isfinite(size).all())
    assert float((1 / size).max()) < float("inf")


@pytest.mark.parametrize("kind", [DoubleBlock, SingleBlock])
def test_layers_that_stay_dense_are_not_folded_into(kind):
    block = make(kind)
    weights = linears(block)
    out = "attn.to_out.0" if kind is DoubleBlock else "attn.to_out"
    kinds = dict.fromkeys(weights, "ternary") | {out: "dense"}
    folded = dict(weights)
    made = fold_block(folded, kinds, CONFIG.attention_head_dim)
    assert "values" not in made
    assert torch.equal(folded[out], weights[out])
    assert made == (["hidden", "hidden of the text"] if kind is DoubleBlock else [])


def test_absmean_is_bitnets_rounding():
    torch.manual_seed(0)
    weight = torch.randn(16, 256)
    values, scales = quantize_ternary(weight, "absmean")
    mean = weight.view(16, 2, 128).abs().mean(-1)
    torch.testing.assert_close(scales, mean, rtol=1e-3, atol=0)
    wanted = (weight / scales.repeat_interleave(128, 1)).round().clamp(-1, 1)
    assert torch.equal(values.float(), wanted)
    zeros = float((values == 0).float().mean())
    assert 0.28 < zeros < 0.34  # .31 of a Gaussian
