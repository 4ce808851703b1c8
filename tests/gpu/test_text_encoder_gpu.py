"""The text encoder as a GPU runs it: packed weights, bfloat16 layers under a float32 residual, and one graph."""

import pytest
import torch
from gpu_cases import relative

from linocut.errors import Cancelled
from linocut.formats.folder import ModelFolder
from linocut.kernels.dispatch import use_kernel
from linocut.models.configs import Qwen3Config
from linocut.models.convert import build_and_load
from linocut.models.text_encoder import Qwen3Encoder
from linocut.models.text_encoder_gpu import GpuEncoder


@pytest.fixture
def encoder(tiny_model, device) -> Qwen3Encoder:
    folder = ModelFolder.open(tiny_model)
    with folder.checkpoint("text_encoder") as checkpoint:
        return build_and_load(Qwen3Encoder, Qwen3Config.from_dict(folder.config("text_encoder")), checkpoint,
                              taps=tuple(folder.settings["text_taps"])).to(device)


def prompt(device: str, first: int = 3, length: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(first, first + 9)[None]
    return ids.to(device), (torch.arange(9) < length).long()[None].to(device)


@torch.no_grad()
def test_features_are_near_those_in_float(encoder, device):
    """bfloat16 rounds what goes into products; what layers are added to stays float32, and so do the features."""
    with use_kernel("reference"):
        wanted = encoder(*prompt(device))
        encoder.compute_in(torch.bfloat16)
        assert not torch.equal(encoder(*prompt(device)), wanted)
    with use_kernel("triton"):
        found = GpuEncoder(encoder)(*prompt(device))
    assert found.dtype == torch.float32
    # The interpreter cuts bfloat16 off instead of rounding it.
    assert relative(found, wanted) < (0.01 if device == "cuda" else 0.03)


@torch.no_grad()
def test_prompts_do_not_depend_on_those_before(encoder, device):
    """The first of a shape runs as it is written, the second is recorded, later ones replay it."""
    run = GpuEncoder(encoder)
    given = [prompt(device), prompt(device, 7, 8), prompt(device, 1, 2), prompt(device)]
    found = [run(*each) for each in given]
    for features, each in zip(found, given, strict=True):
        assert relative(features, encoder(*each)) < 1e-5
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[1])


def test_layers_are_counted_and_cancelled(encoder, device):
    run, seen = GpuEncoder(encoder), []
    run(*prompt(device), on_layer=lambda done, total: seen.append((done, total)))
    layers = len(encoder.layers)
    assert seen == [(done, layers) for done in range(1, layers + 1)]

    def cancel(done: int, total: int) -> None:
        raise Cancelled("cancelled")

    for _ in range(3):
        with pytest.raises(Cancelled):
            run(*prompt(device), on_layer=cancel)
    assert relative(run(*prompt(device)), encoder(*prompt(device))) < 1e-5
