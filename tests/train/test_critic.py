"""The critic: what it tells apart, which way it moves a student, and when."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from linocut.train.critic import Critic, Heads
from linocut.train.loop import Ranks
from linocut.train.qat import Distillation

ALONE = Ranks(0, 1, torch.device("cpu"))
COUNTS = torch.tensor(0.25)


class Plain:
    """A teacher whose two blocks hand on what they get, beside a constant to measure it by."""

    def features(self, latents: Tensor, text: Tensor, sigma: Tensor) -> list[Tensor]:
        return [torch.cat([latents, torch.full_like(latents[..., :1], constant)], dim=-1) for constant in (1.0, 3.0)]


def states(rows: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, noise levels, text features, and finished latents of values -1 and 1."""
    x, finished = torch.randn(rows, 6, 4), torch.randn(rows, 6, 4).sign()
    return x, torch.full((rows,), 0.7), torch.zeros(rows, 3, 5), finished


def velocity(x: Tensor, sigma: Tensor, finished: Tensor) -> Tensor:
    return (x - finished) / sigma[:, None, None]


@pytest.mark.parametrize("counts", [COUNTS, COUNTS * torch.tensor([3.7, 0.1, 0.1, 0.1])], ids=["even", "by channel"])
def test_a_student_moves_as_strongly_as_the_share_says(counts):
    torch.manual_seed(0)
    critic = Critic(2, 5, 0.5, ALONE)
    x, sigma, text, finished = states()
    target = velocity(x, sigma, finished)
    v = (target + 0.1 * torch.randn_like(target)).requires_grad_(True)
    (usual,) = torch.autograd.grad((counts * (v - target).square()).mean(), v)
    (push,) = torch.autograd.grad(critic(Plain(), v, target, x, sigma, text, counts, 1.0), v)
    taking_part = sum(critic.looks(step, 1.0) for step in range(24)) / 24
    assert taking_part * push.norm().item() == pytest.approx(0.5 * usual.norm().item(), rel=1e-4)
    assert torch.nn.functional.cosine_similarity(push.flatten(), usual.flatten(), dim=0) < 0.9  # another direction


def test_what_is_pale_becomes_as_strong_as_the_teachers():
    torch.manual_seed(0)
    critic = Critic(2, 5, 0.5, ALONE)
    strength = torch.tensor(0.3, requires_grad=True)  # the student draws all as the teacher does, but pale
    optimizer = torch.optim.SGD([strength], 5.0)
    margins = []
    for _ in range(300):
        x, sigma, text, finished = states()
        v, target = velocity(x, sigma, strength * finished), velocity(x, sigma, finished)
        optimizer.zero_grad()
        critic(Plain(), v, target, x, sigma, text, COUNTS, 1.0).backward()
        optimizer.step()
        margins.append(float(critic.margin))
    assert 0.7 < strength.item() < 1.4
    assert max(margins) > 0.05  # it did see the difference


def test_a_critic_goes_on_where_it_was():
    torch.manual_seed(0)
    x, sigma, text, finished = states()
    target = velocity(x, sigma, finished)
    v = (target + torch.randn_like(target)).requires_grad_(True)
    first = Critic(2, 5, 0.5, ALONE)
    for _ in range(3):
        first(Plain(), v, target, x, sigma, text, COUNTS, 1.0)
    again = Critic(2, 5, 0.5, ALONE, {name: value.clone() for name, value in first.saved().items()})
    for critic in (first, again):
        torch.manual_seed(1)
        critic(Plain(), v, target, x, sigma, text, COUNTS, 1.0)
    assert first.saved().keys() == again.saved().keys()
    assert all(torch.equal(value, again.saved()[name]) for name, value in first.saved().items())
    fresh = Critic(2, 5, 0.5, ALONE, Critic(2, 5, 0.5, ALONE).saved())  # saved before its first batch
    fresh(Plain(), v, target, x, sigma, text, COUNTS, 1.0)


def test_heads_side_by_side_are_torchs_layers_one_by_one():
    torch.manual_seed(0)
    heads = Heads(3, 5)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    tokens = [torch.randn(2, 6, 5) for _ in range(3)]
    for block, found in enumerate(heads(tokens)):
        norm, inner, outer = torch.nn.LayerNorm(5), torch.nn.Linear(5, 128), torch.nn.Linear(128, 1)
        weights = ((norm.weight, heads.scale[block, 0]), (norm.bias, heads.shift[block, 0]),
                   (inner.weight, heads.inner[block].T), (inner.bias, heads.inner_bias[block, 0]),
                   (outer.weight, heads.outer[block].T), (outer.bias, heads.outer_bias[block, 0]))
        with torch.no_grad():
            for parameter, value in weights:
                parameter.copy_(value)
            expected = torch.nn.Sequential(norm, inner, torch.nn.SiLU(), outer)(tokens[block]).flatten()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_batch_meets_the_critic_in_every_other_of_its_steps(count, accumulate):
    met: Counter[int] = Counter()
    critic = Critic(2, 5, 0.5, ALONE)
    x = torch.zeros(4, 6, 4)

    class Counting:
        looks = critic.looks

        def __call__(self, teacher: int, v: Tensor, *_: object) -> Tensor:
            met[teacher] += 1
            return v.sum()

    class Objective:
        errors = torch.zeros(2)

        def __call__(self, v: Tensor, *_: object) -> Tensor:
            return v.square().mean()

        def last_counts(self, weight: Tensor) -> Tensor:
            return weight

    def batch(number: int) -> SimpleNamespace:
        network = SimpleNamespace(velocity=lambda *_: torch.zeros_like(x).requires_grad_(True))
        return SimpleNamespace(
            teacher=number, student=network, x=x, student_text=x, teacher_text=x, weight=torch.ones(()),
            depart=lambda *_: None, target=lambda _: x, sigma=lambda _: torch.ones(4), stage=lambda _: torch.zeros(4),
            last=lambda _: slice(0, 2), move=lambda *_: None)

    loop = SimpleNamespace(settings=SimpleNamespace(on_policy=0.5, accumulate=accumulate), ranks=ALONE, student=None,
                           schedule=SimpleNamespace(progress=1.0), critic=Counting(), objective=Objective())
    batches = [batch(number) for number in range(count)]
    for step in range(24):
        Distillation._learn(loop, step, batches)  # type: ignore[arg-type]
    assert met == dict.fromkeys(range(count), 24 * accumulate // count // 2)
