"""The fused transformer and text encoder against the plain networks, on the tiny and on the embedded model."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from linocut.errors import Cancelled, UsageError
from linocut.formats.folder import ModelFolder
from linocut.kernels import native
from linocut.kernels.dispatch import use_kernel
from linocut.models import flux2_cpu, text_encoder_cpu
from linocut.models.convert import build_and_load
from linocut.models.flux2 import Flux2Config, Flux2Transformer, image_position_ids, text_position_ids
from linocut.models.flux2_cpu import FusedTransformer
from linocut.models.linear import PackedLinear
from linocut.models.text_encoder import Qwen3Config, Qwen3Encoder
from linocut.models.text_encoder_cpu import FusedEncoder
from linocut.pipeline.generate import Pipeline
from linocut.quantize.policy import Policy, Rule
from linocut.quantize.stream import quantize_folder

if native.why_no_module() is not None:
    pytest.skip(f"{native.why_no_module()}", allow_module_level=True)

MODELS = ["embedded", "embedded-binary", "tiny"]


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest) -> ModelFolder:
    name = request.param
    return ModelFolder.open(request.getfixturevalue("tiny_model") if name == "tiny" else name)


def transformer_of(folder: ModelFolder) -> Flux2Transformer:
    with folder.checkpoint("transformer") as checkpoint:
        return build_and_load(Flux2Transformer, Flux2Config.from_dict(folder.config("transformer")), checkpoint)


def encoder_of(folder: ModelFolder) -> Qwen3Encoder:
    with folder.checkpoint("text_encoder") as checkpoint:
        return build_and_load(Qwen3Encoder, Qwen3Config.from_dict(folder.config("text_encoder")), checkpoint,
                              taps=tuple(folder.settings["text_taps"]))


def inputs(config: Flux2Config, batch: int = 1, text: int = 40, side: int = 6) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(batch, side * side, config.in_channels, generator=generator),
            torch.randn(batch, text, config.joint_attention_dim, generator=generator),
            torch.linspace(0.9, 0.3, batch), image_position_ids(side, side), text_position_ids(text))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@contextmanager
def rounded_projections(model: nn.Module) -> Iterator[None]:
    """Round to bfloat16 what the fused step keeps as bfloat16: q, k, v and the MLP's hidden units."""
    kept = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "linear_in", "to_qkv_mlp_proj")
    hooks = [layer.register_forward_hook(lambda _layer, _x, y: y.bfloat16().to(y.dtype))
             for name, layer in model.named_modules() if isinstance(layer, PackedLinear) and name.endswith(kept)]
    assert hooks
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def rounding_errors(model: nn.Module) -> Iterator[list[float]]:
    """What int8 rounding, a scale for 128 activations, takes from the input of each packed layer of blocks, in parts
    of its size: steps of max/127 have a variance of a twelfth of their square."""
    found: list[float] = []

    def note(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        groups = given[0].float().unflatten(-1, (-1, 128))
        steps = groups.abs().amax(-1) / 127
        found.append(float((steps.square().mean() / 12 / groups.square().mean()).sqrt()))

    hooks = [layer.register_forward_pre_hook(note) for name, layer in model.named_modules()
             if isinstance(layer, PackedLinear) and "blocks." in name]
    yield found
    for hook in hooks:
        hook.remove()


# --------------------------------------------------------------------------------------------------- transformer

def alone(model: Flux2Transformer) -> Iterator[str]:
    """Make each block in turn the model's only one, and yield its name. Over several blocks a difference in a last bit
    that turns the rounding of an activation grows into another rounding of everything."""
    doubles, singles = list(model.transformer_blocks), list(model.single_transformer_blocks)
    for i, block in enumerate(doubles + singles):
        is_double = i < len(doubles)
        model.transformer_blocks = nn.ModuleList([block] if is_double else [])
        model.single_transformer_blocks = nn.ModuleList([] if is_double else [block])
        yield f"{'double' if is_double else 'single'} block {i}"


@torch.no_grad()
def test_each_block_equals_the_plain_one_with_the_same_rounding(folder, monkeypatch):
    """With attention in float32 the two differ by the order of sums alone. In a few cases of ten thousand that turns
    the rounding of an activation, which is worth a step of 1/127 there."""
    monkeypatch.setenv("LINOCUT_ATTENTION", "baseline")
    model = transformer_of(folder)
    given, errors = inputs(model.config), {}
    for name in alone(model):
        with rounded_projections(model), use_kernel("int8"):
            wanted = model(*given)
        errors[name] = relative(FusedTransformer(model)(*given), wanted)
    assert len(errors) == model.config.num_layers + model.config.num_single_layers
    assert max(errors.values()) < 1e-3, errors


@torch.no_grad()
def test_step_is_near_the_plain_network_in_float(folder):
    """Each product rounds its activations once: steps of max/127, evenly spread, which is 0.3 to 2 % of what goes in.
    Much of a block's stream goes past its products, so its error is under what rounding does to one of them; errors of
    independent blocks add up as a random walk, and attention in bfloat16 adds less. How far a block's errors grow in
    those after it is the model's own; what it costs pictures, `benchmarks/activations.py` says.
    """
    model, errors, allowed = transformer_of(folder), [], []
    whole, given = FusedTransformer(model), inputs(model.config)
    with use_kernel("native"):
        wanted = model(*given)
    found = relative(whole(*given), wanted)
    for _ in alone(model):
        with use_kernel("native"), rounding_errors(model) as of_products:
            wanted = model(*given)
        errors.append(relative(FusedTransformer(model)(*given), wanted))
        allowed.append(0.85 * max(of_products))
    assert all(error < most for error, most in zip(errors, allowed, strict=True)), (errors, allowed)
    assert max(errors) < (0.012 if folder.name == "embedded" else 0.0105)  # as tight as these models allow
    assert found < 1.2 * sum(error**2 for error in errors) ** 0.5
    assert found < (0.025 if folder.name.startswith("embedded") else 0.02)  # random weights amplify nothing


@torch.no_grad()
def test_step_does_not_depend_on_threads_or_on_what_ran_before(tiny_model, monkeypatch):
    model = transformer_of(ModelFolder.open(tiny_model))
    step, given = FusedTransformer(model), inputs(model.config)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setenv("LINOCUT_THREADS", str(threads))
        results.append(step(*given))
        step(*inputs(model.config, text=7, side=9))  # other sizes take other memory
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@torch.no_grad()
def test_pictures_of_a_batch_are_computed_one_by_one(tiny_model):
    model = transformer_of(ModelFolder.open(tiny_model))
    step = FusedTransformer(model)
    latents, text, sigma, *ids = inputs(model.config, batch=2)
    seen = []
    both = step(latents, text, sigma, *ids, on_block=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]
    for i in range(2):
        part = slice(i, i + 1)
        assert relative(step(latents[part], text[part], sigma[part], *ids), both[part]) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 600, 1100])
def test_blocks_of_rows_give_the_same_bits(folder, rows):
    model = transformer_of(folder)
    given = inputs(model.config, text=40, side=34)  # 1196 tokens
    whole = FusedTransformer(model)
    wanted = whole(*given)
    step = FusedTransformer(model, rows)
    assert torch.equal(step(*given), wanted)
    assert len(step._memory.block.qkv) == max(rows, 512)
    assert len(whole._memory.block.qkv) == 1196


@torch.no_grad()
def test_prompts_are_not_mixed_up_between_steps(tiny_model):
    model = transformer_of(ModelFolder.open(tiny_model))
    step = FusedTransformer(model)
    latents, text, sigma, *ids = inputs(model.config)
    texts = [text, text + 1, text - 1]
    wanted = [FusedTransformer(model)(latents, each, sigma, *ids) for each in texts]
    for order in (0, 1, 2, 0, 1, 0, 2):
        assert torch.equal(step(latents, texts[order], sigma, *ids), wanted[order])


@torch.no_grad()
def test_cancelling_stops_within_a_block(tiny_model):
    model = transformer_of(ModelFolder.open(tiny_model))
    blocks: list[int] = []

    def cancel(done: int, total: int) -> None:
        blocks.append(done)
        if done == 2:
            raise Cancelled("cancelled")

    step, given = FusedTransformer(model), inputs(model.config)
    wanted = step(*given)
    with pytest.raises(Cancelled):
        step(*given, on_block=cancel)
    assert blocks == [1, 2]
    assert torch.equal(step(*given), wanted)  # and leaves nothing behind


def test_positions_must_fit(tiny_model):
    model = transformer_of(ModelFolder.open(tiny_model))
    latents, text, sigma, image_ids, text_ids = inputs(model.config)
    with pytest.raises(UsageError, match="one position id per token"):
        FusedTransformer(model)(latents, text[:, 1:], sigma, image_ids, text_ids)


def test_runner_leaves_what_it_cannot_run(tiny_model, dense_model):
    model = transformer_of(ModelFolder.open(tiny_model))
    assert isinstance(flux2_cpu.runner(model), FusedTransformer)
    with use_kernel("native"):
        assert flux2_cpu.runner(model) is model
    dense = transformer_of(ModelFolder.open(dense_model))
    assert flux2_cpu.runner(dense) is dense


def test_a_block_with_int8_weights_runs_layer_by_layer(dense_model, tmp_path):
    name = "single_transformer_blocks.1.attn.to_out"
    policy = Policy((Rule(re.escape(name), "int8"), *Policy.preset("flux2", "ternary").rules))
    quantize_folder(dense_model, tmp_path / "model", "ternary", policy)
    pipe = Pipeline.from_pretrained(tmp_path / "model", prompt_cache=False)
    assert name in str(pipe.why_not_fused("transformer"))
    model = transformer_of(pipe.folder)
    assert flux2_cpu.runner(model) is model
    assert pipe("a fox", seed=1, width=32, height=32, num_inference_steps=1).images


# -------------------------------------------------------------------------------------------------- text encoder

def prompt(vocabulary: int, tokens: int = 50, text: int = 21) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, vocabulary, (2, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, text:] = 0
    return ids, mask


@torch.no_grad()
def test_each_layer_equals_the_plain_one_with_the_same_rounding(folder, monkeypatch):
    """As for the transformer. The embedding is replaced, since ratios of its few values fall exactly between two
    steps, where a last bit decides; a seed keeps others from doing so by chance."""
    torch.manual_seed(0)
    monkeypatch.setenv("LINOCUT_ATTENTION", "baseline")
    model = encoder_of(folder)
    model.embed_tokens, model.taps = nn.Embedding(model.config.vocab_size, model.config.hidden_size), (1,)
    given, layers = prompt(model.config.vocab_size), list(model.layers)
    for layer in layers:
        model.layers = nn.ModuleList([layer])
        with use_kernel("int8"):
            wanted = model(*given)
        assert relative(FusedEncoder(model)(*given), wanted) < 1e-3


@torch.no_grad()
def test_features_are_near_the_plain_network_in_float(folder):
    model = encoder_of(folder)
    given = prompt(model.config.vocab_size)
    with use_kernel("native"):
        wanted = model(*given)
    assert relative(FusedEncoder(model)(*given), wanted) < 0.03


@torch.no_grad()
def test_layers_are_reported_and_may_stop(tiny_model):
    model = encoder_of(ModelFolder.open(tiny_model))
    ids, mask = prompt(model.config.vocab_size)
    seen: list[tuple[int, int]] = []
    FusedEncoder(model)(ids, mask, on_layer=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]

    def cancel(done: int, total: int) -> None:
        raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        FusedEncoder(model)(ids, mask, on_layer=cancel)


def test_a_mask_with_holes_is_refused(tiny_model):
    model = encoder_of(ModelFolder.open(tiny_model))
    ids, mask = prompt(model.config.vocab_size)
    mask[1, 3] = 0
    with pytest.raises(UsageError, match="padding on the right"):
        FusedEncoder(model)(ids, mask)


def test_encoder_runner_leaves_what_it_cannot_run(tiny_model, dense_model):
    model = encoder_of(ModelFolder.open(tiny_model))
    assert isinstance(text_encoder_cpu.runner(model), FusedEncoder)
    with use_kernel("reference"):
        assert text_encoder_cpu.runner(model) is model
    dense = encoder_of(ModelFolder.open(dense_model))
    assert text_encoder_cpu.runner(dense) is dense
