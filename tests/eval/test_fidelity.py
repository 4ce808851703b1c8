"""Fidelity measures by hand: SSIM window by window, and a student whose errors are known."""

import numpy as np
import pytest
import torch

from linocut.errors import UsageError
from linocut.eval import fidelity
from linocut.eval.arms import Arm, Field
from linocut.eval.fidelity import as_text, measure_fidelity, ssim

pytestmark = pytest.mark.filterwarnings("ignore:the prompt takes")
PROMPTS = ["a red apple", "two cups", "a fox", "a blue car"]


def test_ssim_of_flat_pictures_is_known():
    a, b = torch.full((1, 3, 16, 16), 0.3), torch.full((1, 3, 16, 16), 0.6)
    assert float(ssim(a, a)) == pytest.approx(1)
    assert float(ssim(a, b)) == pytest.approx((2 * 0.3 * 0.6 + 1e-4) / (0.09 + 0.36 + 1e-4), rel=1e-6)


def test_ssim_window_by_window():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 14, 13))
    place = np.arange(11) - 5
    weight = np.exp(-(place[:, None] ** 2 + place**2) / 4.5)
    weight /= weight.sum()
    values = []
    for plane_a, plane_b in zip(a, b, strict=True):
        for top in range(4):
            for left in range(3):
                x, y = plane_a[top:top + 11, left:left + 11], plane_b[top:top + 11, left:left + 11]
                mx, my = (weight * x).sum(), (weight * y).sum()
                vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
                cov = (weight * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    found = ssim(torch.from_numpy(a)[None], torch.from_numpy(b)[None])
    assert float(found) == pytest.approx(np.mean(values), rel=1e-9)


@pytest.fixture
def pair(tiny_model):
    return tuple(Arm(label, str(tiny_model), width=32, height=32, steps=3) for label in ("teacher", "student"))


def test_a_student_whose_velocity_is_a_tenth_too_large(pair, monkeypatch):
    """Its error at any state is 0.1, its sensitivity 1.1, and the move between two prompts a tenth too far."""
    velocity = Field.velocity
    monkeypatch.setattr(Field, "velocity", lambda self, x, text, step: velocity(self, x, text, step) * (
        1.1 if self.pipe is pair[1].pipe else 1.0))
    monkeypatch.setattr(fidelity, "_AT_ONCE", 3)  # the last prompt is alone in its batch
    found = measure_fidelity(*pair, PROMPTS)
    assert found["prompts"] == 4
    for name in ("on_teacher_path", "on_student_path"):
        assert found[name] == pytest.approx([0.1, 0.1, 0.1], rel=1e-4)
    assert found["sensitivity"] == pytest.approx([1.1, 1.1], rel=1e-4)
    assert found["contrast"] == pytest.approx([0.1, 0.1], rel=1e-3)
    assert 0 < found["latents"] < 1
    assert 5 < found["psnr"]["mean"] < 60
    assert "0.100 0.100 0.100" in as_text({"student": found})


def test_a_student_that_reads_no_prompt(pair, monkeypatch):
    read = Field.read
    monkeypatch.setattr(Field, "read", lambda self, prompts: read(self, prompts) if self.pipe is pair[0].pipe else
                        read(self, ["a fox"] * len(prompts)))
    found = measure_fidelity(*pair, PROMPTS)
    assert found["sensitivity"] == [0, 0]
    assert found["contrast"] == [1, 1]


def test_what_cannot_be_compared(pair, tiny_model):
    with pytest.raises(UsageError, match="two prompts or more"):
        measure_fidelity(*pair, PROMPTS[:1])
    with pytest.raises(UsageError, match="goes through other noise levels"):
        measure_fidelity(pair[0], Arm("other", str(tiny_model), width=32, height=32, steps=2), PROMPTS)
