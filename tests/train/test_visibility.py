"""Channels of the latents count by how much they show in the decoded picture."""

import pytest
import torch
from torch import nn

from linocut.errors import UsageError
from linocut.train.loop import Ranks
from linocut.train.objective import Objective
from linocut.train.recipe import QatSettings, TeacherSettings
from linocut.train.visibility import channel_weights


def decoder(*norms):
    """A linear decoder whose columns have these norms; it enlarges, as decoders do."""
    conv = nn.ConvTranspose2d(len(norms), 3, 4, 4, bias=False)
    with torch.no_grad():
        for column, norm in zip(conv.weight, norms, strict=True):
            column.mul_(norm / column.norm())
    return conv


def test_a_channel_counts_as_the_square_of_what_it_changes():
    weights = channel_weights(decoder(1.0, 2.0, 0.0, 3.0), torch.randn(8, 4, 16, 16), 1.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 4.0, 0.0, 9.0]) * 4 / 14, rtol=0.1, atol=1e-6)
    assert float(weights.mean()) == pytest.approx(1.0)


def test_the_derivative_is_taken_where_the_latents_are():
    """A channel that is squared shows twice as strongly where it is twice as large."""
    latents = torch.stack([torch.full((32, 32), 1.0), torch.full((32, 32), 2.0)]).expand(4, 2, 32, 32)
    weights = channel_weights(lambda z: z.square(), latents, 1.0)
    torch.testing.assert_close(weights, torch.tensor([0.4, 1.6]), rtol=0.1, atol=0)


def test_a_share_of_the_weight_is_equal_for_all():
    latents = torch.randn(4, 2, 8, 8)
    whole, half, none = (channel_weights(decoder(1.0, 0.0), latents, share) for share in (1.0, 0.5, 0.0))
    torch.testing.assert_close(whole, torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(half, torch.tensor([1.5, 0.5]))
    torch.testing.assert_close(none, torch.ones(2))


def test_it_works_where_gradients_are_off():
    with torch.no_grad():
        assert channel_weights(decoder(1.0, 1.0), torch.randn(4, 2, 8, 8), 0.5).isfinite().all()


def test_the_loss_is_weighted_and_the_reported_error_is_not():
    v, target = torch.zeros(4, 3, 2), torch.tensor([1.0, 2.0]).expand(4, 3, 2)
    sigma, stage, even = torch.ones(4), torch.tensor([0, 0, 1, 1]), torch.ones(2)
    objective = Objective("velocity", 0.0, 2, Ranks(0, 1, torch.device("cpu")), torch.tensor([2.0, 0.0]))
    assert float(objective(v, target, target, sigma, stage, even)) == pytest.approx(1.0)  # (2 * 1 + 0 * 4) / 2
    torch.testing.assert_close(objective.errors, torch.full((2,), 2.5))


@pytest.mark.parametrize("settings", [TeacherSettings, QatSettings])
def test_a_share_beyond_one_is_refused(settings):
    with pytest.raises(UsageError, match=r"pixels is a share: expected 0 to 1, found 1\.5"):
        settings(pixels=1.5)
