"""Optimizers, rates and averages."""

import pytest
import torch
from torch import nn

from linocut.train.optimize import Average, Muon, make_optimizers, orthogonalize, set_rate


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_is_torchs_muon_for_many_matrices_at_once(decay):
    shapes = [(8, 16), (16, 8), (8, 16), (12, 12), (8, 16)]
    source = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=source)) for shape in shapes]
    theirs = [nn.Parameter(value.detach().clone()) for value in ours]
    mine = Muon(ours, 0.1, decay)
    other = torch.optim.Muon(theirs, 0.1, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=source)
            b.grad = a.grad.clone()
        before = [value.detach().clone() for value in ours]
        mine.step()
        other.step()
        for a, b, old in zip(ours, theirs, before, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.01)  # bfloat16 inside
            assert float((a.detach() - old).square().mean().sqrt()) == pytest.approx(0.1 * 0.2, rel=0.4)


def test_muon_passes_over_what_has_no_gradient():
    with_grad, without = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    with_grad.grad = torch.randn(4, 4)
    Muon([with_grad, without], 0.1).step()
    assert torch.equal(without, torch.ones(4, 4))
    assert not torch.equal(with_grad, torch.ones(4, 4))


@pytest.mark.parametrize("shape", [(3, 10, 30), (2, 30, 10), (1, 16, 16)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x).float())
    assert values.shape == (shape[0], min(shape[1:]))
    assert 0.4 < float(values.min()) < float(values.max()) < 1.4


def test_which_optimizer_takes_what():
    module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)]), "out": nn.Linear(4, 2)})
    adam, muon = make_optimizers(module, 0.1, 0.0, muon=True)
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(4, 4)]
    assert len(adam.param_groups[0]["params"]) == 3
    (only,) = make_optimizers(module, 0.1, 0.0, muon=False)
    assert len(only.param_groups[0]["params"]) == 4


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
