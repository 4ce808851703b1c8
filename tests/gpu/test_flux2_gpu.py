"""The GPU's step against the plain network, and against the CPU's step: the same picture on both."""

import copy

import pytest
import torch
from gpu_cases import relative
from torch import Tensor

from linocut.errors import Cancelled, UsageError
from linocut.formats.folder import ModelFolder
from linocut.kernels.dispatch import use_kernel
from linocut.kernels.gpu import accuracy, routes, tuning
from linocut.models import flux2_gpu
from linocut.models.configs import Flux2Config
from linocut.models.convert import build_and_load
from linocut.models.flux2 import Flux2Transformer, image_position_ids, text_position_ids
from linocut.models.flux2_gpu import GpuTransformer
from linocut.models.modulations import Modulations


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LINOCUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LINOCUT_GPU_TUNE", "0")


@pytest.fixture(scope="module", params=["ternary", "binary"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Flux2Transformer:
    from tiny_model import write_tiny_model

    root = write_tiny_model(tmp_path_factory.mktemp("gpu") / request.param, request.param)
    return load(ModelFolder.open(root))


def load(folder: ModelFolder) -> Flux2Transformer:
    with folder.checkpoint("transformer") as checkpoint:
        return build_and_load(Flux2Transformer, Flux2Config.from_dict(folder.config("transformer")), checkpoint)


def there(model: Flux2Transformer, device: str) -> Flux2Transformer:
    return copy.deepcopy(model).to(device)


def inputs(config: Flux2Config, device: str = "cpu", batch: int = 1, text: int = 5, side: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [each.to(device) for each in (
        torch.randn(batch, side * side, config.in_channels, generator=generator),
        torch.randn(batch, text, config.joint_attention_dim, generator=generator), torch.linspace(0.9, 0.3, batch),
        image_position_ids(side, side), text_position_ids(text))]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("level", ["exact", "rows", "fast"])
def test_step_is_near_the_plain_network_in_float(model, device, level, monkeypatch):
    """Rounding of activations, bfloat16 between products, and with "fast" scales in seven bits."""
    monkeypatch.setenv("LINOCUT_GPU_ACCURACY", level)
    with use_kernel("reference"):
        wanted = model(*inputs(model.config))
    step = GpuTransformer(there(model, device))
    found = step(*inputs(model.config, device))
    assert relative(found, wanted) < {"exact": 0.02, "rows": 0.03, "fast": 0.05}[level]
    assert {choice.route.name for choice in step.choices.values()} <= set(accuracy.LEVELS[level])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", [each for each in accuracy.KIND if each != "blocks"])
def test_every_route_draws(model, device, name, monkeypatch):
    """One route for all products, so that each meets every shape and form of activations that a step has."""
    def choose(table, shape, where, allowed):
        return tuning.Choice(routes.Route(name, routes.tiles(name, shape, where)[0]), "asked for")

    monkeypatch.setattr(tuning.Table, "choose", choose)
    with use_kernel("reference"):
        wanted = model(*inputs(model.config))
    limit = {"int8": 0.02, "rows": 0.03, "fp8": 0.08 if device == "cuda" else 0.2, "float": 0.02}[accuracy.KIND[name]]
    assert relative(GpuTransformer(there(model, device))(*inputs(model.config, device)), wanted) < limit


@torch.no_grad()
def test_step_equals_the_fused_one_of_the_cpu(model, device):
    """The same rounding of activations: what differs is bfloat16 of attention, and sums."""
    from linocut.kernels import fused
    from linocut.models.flux2_cpu import FusedTransformer

    if fused.why_not(model.config.attention_head_dim, None, "cpu") is not None:
        pytest.skip("the C++ module is missing")
    wanted = FusedTransformer(model)(*inputs(model.config))
    assert relative(GpuTransformer(there(model, device))(*inputs(model.config, device)), wanted) < 0.015


@pytest.mark.slow
@torch.no_grad()
def test_calls_do_not_depend_on_what_ran_before(model, device):
    """The first call runs as it is written, the second is captured as a graph, later ones replay it."""
    step, given = GpuTransformer(there(model, device)), inputs(model.config, device)
    first = step(*given)
    for _ in range(3):
        assert torch.equal(step(*given), first)
    other = inputs(model.config, device, side=2)
    another = step(*other)
    assert another.shape == (1, 4, model.config.velocity_channels)
    assert torch.equal(step(*given), first)
    moved = [given[0] + 1, given[1] * 0.5, *given[2:]]
    fresh = GpuTransformer(there(model, device))(*moved)
    assert torch.equal(step(*moved), fresh)


@pytest.mark.slow
@torch.no_grad()
def test_pictures_of_different_noise_are_computed_one_by_one(model, device):
    step, seen = GpuTransformer(there(model, device)), []
    latents, text, sigma, *ids = inputs(model.config, device, batch=2)
    both = step(latents, text, sigma, *ids, on_block=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 6), (6, 6)]
    mod = model.to("cpu").modulations(sigma.cpu())
    for i in range(2):
        part = slice(i, i + 1)
        one = Modulations(*(tuple(vector[part].to(device) for vector in vectors) for vectors in mod))
        assert relative(step(latents[part], text[part], one, *ids), both[part]) < 1e-4


@torch.no_grad()
def test_pictures_of_the_same_noise_go_through_together(model, device, monkeypatch):
    """As many as a limit of memory allows; each comes out as it does alone."""
    step, seen = GpuTransformer(there(model, device)), []
    latents, text, sigma, *ids = inputs(model.config, device, batch=3)
    mod = model.modulations(sigma[:1].cpu())
    mod = Modulations(*(tuple(vector.to(device) for vector in vectors) for vectors in mod))
    alone = torch.cat([step(latents[i:i + 1], text[i:i + 1], mod, *ids) for i in range(3)])
    columns = 3 * model.config.width + 2 * model.config.mlp_width
    monkeypatch.setattr(flux2_gpu, "BATCH_BYTES", 2 * (2 * (9 + 5) * columns) + 1)  # two pictures, bfloat16
    together = step(latents, text, mod, *ids, on_block=lambda done, total: seen.append((done, total)))
    assert seen == [(6, 9), (9, 9)]
    assert relative(together, alone) < (1e-4 if device == "cpu" else 0.02)  # a GPU adds up in another order
    backwards = step(latents.flip(0), text.flip(0), mod, *ids)  # on a GPU as a graph, of which both parts are replays
    assert torch.equal(backwards.flip(0)[1:], together[1:])
    assert relative(backwards.flip(0), alone) < (1e-4 if device == "cpu" else 0.02)


@pytest.mark.slow
@torch.no_grad()
def test_cancelling_leaves_nothing_behind(model, device):
    step, given = GpuTransformer(there(model, device)), inputs(model.config, device)
    wanted = step(*given)

    def cancel(done: int, total: int) -> None:
        raise Cancelled("cancelled")

    with pytest.raises(Cancelled):
        step(*given, on_block=cancel)
    assert torch.equal(step(*given), wanted)


def test_positions_must_fit(model, device):
    latents, text, *rest = inputs(model.config, device)
    with pytest.raises(UsageError, match="one position id per token"):
        GpuTransformer(there(model, device))(latents, text[:, 1:], *rest)


@torch.no_grad()
def test_joining_weights_shares_their_memory(model):
    block = copy.deepcopy(model.transformer_blocks[0].attn)
    layers = [block.to_q, block.to_k, block.to_v]
    before = [layer.dequantize() for layer in layers]
    whole = flux2_gpu.joined(layers)
    assert whole.o == 3 * block.to_q.out_features
    assert all(layer.codes.untyped_storage().data_ptr() == whole.codes.untyped_storage().data_ptr() for layer in layers)
    assert all(torch.equal(layer.dequantize(), wanted) for layer, wanted in zip(layers, before, strict=True))


def test_runner_leaves_what_it_cannot_run(model, dense_model, device, monkeypatch):
    assert isinstance(flux2_gpu.runner(there(model, device)), GpuTransformer)
    dense = load(ModelFolder.open(dense_model)).to(device)
    assert flux2_gpu.runner(dense) is dense
    assert "neither" in str(flux2_gpu.why_not(dense))
    monkeypatch.setenv("LINOCUT_KERNEL", "reference")
    packed = there(model, device)
    assert flux2_gpu.runner(packed) is packed
