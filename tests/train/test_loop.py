"""Schedules, averages and weights on disk."""

import itertools
import math

import pytest
import torch
from torch import nn

from linocut.errors import LinocutError
from linocut.formats.checkpoint import Checkpoint
from linocut.train import loop
from linocut.train.loop import Average, Ranks, Schedule, load_weights, save_weights, set_rate
from linocut.train.recipe import StageSettings

ALONE = Ranks(0, 1, torch.device("cpu"))


def rates(**settings) -> list[float]:
    schedule = Schedule(StageSettings(**settings), ALONE)
    return [schedule.rate for _ in schedule]


def test_the_rate_warms_up_and_comes_down():
    found = rates(steps=1000, warmup=100)
    assert len(found) == 1000
    assert found[0] == pytest.approx(0.01, abs=0.001)
    assert max(found) == pytest.approx(1.0, abs=0.03)
    assert 95 <= found.index(max(found)) <= 105
    assert found[-1] == pytest.approx(0.01, abs=0.001)
    assert all(later <= earlier for earlier, later in itertools.pairwise(found[100:]))


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_schedules(steps):
    assert len(rates(steps=steps, warmup=0)) == steps


def test_a_slow_machine_gets_a_shorter_schedule_that_still_comes_down(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    schedule = Schedule(StageSettings(steps=1000, warmup=10, max_seconds=200), ALONE)
    last = math.inf
    for _ in schedule:
        now[0] += 1.0  # a step takes a second
        last = schedule.rate
    assert schedule.step == schedule.steps == pytest.approx(200, abs=2)
    assert last < 0.02
    assert "1000 ms a step, 20" in capsys.readouterr().out


def test_a_limit_that_has_passed_ends_the_schedule(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    schedule = Schedule(StageSettings(steps=1000, max_seconds=5), ALONE)
    for _ in schedule:
        now[0] += 1.0
    assert schedule.step <= 61  # the probe itself and one step


def test_log_every(capsys):
    schedule = Schedule(StageSettings(steps=7, log_every=3), ALONE)
    for step in schedule:
        schedule.log(lambda s=step: f"at {s}")
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["0", "3", "6"]


def test_average_is_of_the_path_and_starts_quickly():
    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)
    average = Average(module, 0.9)
    with torch.no_grad():
        for _ in range(200):
            module.weight.fill_(1.0)
            average.update()
    assert torch.allclose(average.shadow[0], torch.ones(1, 2), atol=1e-5)
    with torch.no_grad():
        module.weight.fill_(5.0)
    average.install()
    assert torch.equal(module.weight, average.shadow[0])
    assert module.weight.requires_grad


def test_young_averages_forget_faster():
    module = nn.Linear(1, 1, bias=False)
    average = Average(module, 0.999)
    with torch.no_grad():
        module.weight.copy_(average.shadow[0] + 1.0)
    before = average.shadow[0].clone()
    average.update()
    assert float(average.shadow[0] - before) == pytest.approx(9 / 11, abs=1e-5)  # decay (1 + 1) / (10 + 1)


def test_set_rate_scales_each_groups_own_rate():
    one, two = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.3}])
    for factor in (0.5, 0.25, 1.0):
        set_rate([optimizer], factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * factor, 0.3 * factor])


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


@pytest.mark.parametrize(("dtype", "stored"), [("F32", torch.float32), ("BF16", torch.bfloat16),
                                                ("F16", torch.float16)])
@pytest.mark.parametrize("part_bytes", [None, 1, 100, 10**6])
def test_weights_come_back(tmp_path, dtype, stored, part_bytes):
    module, again = small(), small()
    with torch.no_grad():
        for tensor in again.parameters():
            tensor.zero_()
    save_weights(tmp_path / "new" / "folder", module.state_dict(), dtype, part_bytes)
    load_weights(again, tmp_path / "new" / "folder")
    files = sorted((tmp_path / "new" / "folder").glob("*.safetensors"))
    assert len(files) == {None: 1, 1: 9, 10**6: 1}.get(part_bytes, len(files))
    assert part_bytes != 100 or len(files) > 1
    for name, tensor in module.state_dict().items():
        expected = tensor.to(stored).to(tensor.dtype) if tensor.is_floating_point() else tensor
        assert torch.equal(again.state_dict()[name], expected), name
    with Checkpoint.open(tmp_path / "new" / "folder") as checkpoint:
        assert {checkpoint.info(name).dtype for name in checkpoint.names} == {dtype, "I64"}


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(LinocutError, match="nowhere"):
        load_weights(small(), tmp_path / "nowhere")


def test_one_process_needs_no_messages():
    tensor = torch.tensor([1.0, 3.0])
    ALONE.average([tensor, None])
    ALONE.share(small())
    assert tensor.tolist() == [1.0, 3.0]
    assert ALONE.same(2.5) == 2.5
    assert ALONE.first
