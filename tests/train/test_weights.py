"""Weights and states on disk."""

from pathlib import Path

import pytest
import torch
from torch import nn

from linocut.errors import LinocutError
from linocut.formats.checkpoint import Checkpoint
from linocut.train.optimize import Average, make_optimizers
from linocut.train.weights import State, load_weights, read_weights, save_weights, slim


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


@pytest.mark.parametrize(("dtype", "stored"), [("F32", torch.float32), ("BF16", torch.bfloat16),
                                                ("F16", torch.float16)])
def test_weights_come_back(tmp_path, dtype, stored):
    module, again = small(), small()
    with torch.no_grad():
        for tensor in again.parameters():
            tensor.zero_()
    save_weights(tmp_path / "new" / "folder", module.state_dict(), dtype)
    load_weights(again, tmp_path / "new" / "folder")
    for name, tensor in module.state_dict().items():
        expected = tensor.to(stored).to(tensor.dtype) if tensor.is_floating_point() else tensor
        assert torch.equal(again.state_dict()[name], expected), name
    with Checkpoint.open(tmp_path / "new" / "folder") as checkpoint:
        assert {checkpoint.info(name).dtype for name in checkpoint.names} == {dtype, "I64"}


@pytest.mark.parametrize(("eight_bits", "most"), [(False, 2**-8), (True, 0.5 / 127)])
def test_weights_take_less_on_their_way(tmp_path, eight_bits, most):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 96), nn.BatchNorm1d(96), nn.Linear(96, 256))
    save_weights(tmp_path / "own", module.state_dict())
    slim(tmp_path / "own", tmp_path / "slim", eight_bits)
    found = read_weights(tmp_path / "slim")
    assert found.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        scale = tensor.abs().max().item()
        assert torch.allclose(found[name].to(tensor.dtype), tensor, atol=most * scale, rtol=0), name
    own, less = ((tmp_path / each / "model.safetensors").stat().st_size for each in ("own", "slim"))
    assert less < (0.42 if eight_bits else 0.53) * own
    load_weights(module, tmp_path / "slim")


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(LinocutError, match="nowhere"):
        load_weights(small(), tmp_path / "nowhere")


class Learner:
    """A small network that learns something; the same seed makes the same one."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.module = nn.ModuleDict({"blocks": nn.Linear(6, 6), "out": nn.Linear(6, 2)})
        self.average = Average(self.module, 0.9)
        self.optimizers = make_optimizers(self.module, 0.01, 0.0, muon=True)
        self.state = State(folder, self.module, self.average, self.optimizers)

    def learn(self, steps: range) -> None:
        for step in steps:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            (self.module["out"](self.module["blocks"](x)) - x[:, :2]).square().mean().backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.average.update()


def test_after_a_cut_training_goes_on_as_if_there_had_been_none(tmp_path):
    straight, cut = Learner(tmp_path / "a"), Learner(tmp_path / "b")
    straight.learn(range(20))
    cut.learn(range(12))
    cut.state.save(12)
    cut.learn(range(12, 15))  # lost
    again = Learner(tmp_path / "b")
    assert again.state.restore() == 12
    again.learn(range(12, 20))
    for a, b in zip(straight.module.parameters(), again.module.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(straight.average.shadow, again.average.shadow, strict=True):
        torch.testing.assert_close(a, b)
    assert again.average.steps == 20
    again.state.drop()
    assert not list((tmp_path / "b").iterdir())


def test_a_fresh_start(tmp_path):
    assert Learner(tmp_path).state.restore() == 0
