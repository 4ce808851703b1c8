"""What depends on the noise level alone, evaluated apart from the transformer that it belongs to."""

from pathlib import Path

import pytest
import torch

from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.formats.timestep_table import VECTORS
from linocut.models.convert import build_and_load, packed_state, quantize_
from linocut.models.flux2 import Flux2Blocks, Flux2Config, Flux2Transformer, image_position_ids, text_position_ids
from linocut.models.modulations import Modulations, TimestepNetwork, tabulate
from linocut.quantize.policy import Policy

CONFIG = Flux2Config(in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=128, num_attention_heads=1,
                     joint_attention_dim=384)
SIGMAS = [1.0, 0.958, 0.884, 0.7175]


@pytest.fixture(scope="module", params=["float32", "bfloat16", "packed"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.manual_seed(0)
    model = Flux2Transformer(CONFIG)
    if request.param == "packed":
        quantize_(model, Policy.preset("flux2-embedded", "ternary"))
    file: Path = tmp_path_factory.mktemp(request.param) / "model.safetensors"
    write_checkpoint(file, packed_state(model, torch.bfloat16 if request.param == "bfloat16" else None))
    return Checkpoint.open(file)


@torch.no_grad()
def test_a_table_holds_what_the_network_computes(checkpoint: Checkpoint) -> None:
    network = build_and_load(TimestepNetwork, CONFIG, checkpoint)
    rows = tabulate(network, SIGMAS)
    assert rows.shape == (len(SIGMAS), VECTORS, CONFIG.width)
    found, wanted = Modulations.from_rows(rows), network.modulations(torch.tensor(SIGMAS))
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape == (len(SIGMAS), 1, CONFIG.width)
            # the kernels of packed layers round activations; the table never does
            torch.testing.assert_close(one, other, rtol=0, atol=0.02 if checkpoint.packed else 1e-5)
    assert rows.std() > 0.01  # not zeros on both sides


def test_a_row_depends_on_neither_company_nor_threads(checkpoint: Checkpoint) -> None:
    network = build_and_load(TimestepNetwork, CONFIG, checkpoint)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([tabulate(network, [sigma]) for sigma in SIGMAS])
        torch.set_num_threads(3)
        assert torch.equal(tabulate(network, SIGMAS[::-1]).flip(0), alone)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_the_two_parts_share_nothing_and_draw_as_the_whole(checkpoint: Checkpoint) -> None:
    whole, blocks, network = (build_and_load(kind, CONFIG, checkpoint)
                              for kind in (Flux2Transformer, Flux2Blocks, TimestepNetwork))
    names = [set(model.state_dict()) for model in (blocks, network)]
    assert not names[0] & names[1]
    assert names[0] | names[1] == set(whole.state_dict()) == set(checkpoint.names)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 6, CONFIG.in_channels, generator=generator)
    text = torch.randn(1, 5, CONFIG.joint_attention_dim, generator=generator)
    ids = image_position_ids(2, 3), text_position_ids(5)
    modulations = Modulations.from_rows(tabulate(network, [0.884]))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        found = blocks(latents.to(dtype), text.to(dtype), modulations, *ids)
        wanted = whole(latents.to(dtype), text.to(dtype), torch.tensor([0.884]), *ids)
        assert found.dtype == dtype
        allowed = max(tolerance, 0.05 if checkpoint.packed else 0)
        assert (found - wanted).abs().max() <= allowed * wanted.abs().max()
