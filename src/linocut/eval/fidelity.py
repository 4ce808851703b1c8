"""How closely a student follows its teacher, on the same prompts and noise: cheap, and paired picture by picture.

- PSNR and SSIM (Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5) of the pictures, both in 0..1 per channel;
- relative velocity error: |v_S - v_T| / |v_T|, at the teacher's own states and at the student's own;
- conditioning sensitivity: how far the velocity moves when another prompt is read at the same state, relative to the
  teacher's, |dv_S| / |dv_T|, and how wrong that move is, |dv_S - dv_T| / |dv_T|. A student that falls towards the same
  picture for all prompts has a small sensitivity long before errors of the velocity show it.

Norms are root mean squares over all pictures of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from linocut.errors import UsageError
from linocut.eval.arms import Arm, Field
from linocut.eval.prompts import seed_of

_AT_ONCE = 16  # prompts in hand together
_CONTRAST_STEPS = 2  # of the path's beginning, where the prompt decides about the composition
OnBatch = Callable[[int, int, str], None]


def measure_fidelity(teacher: Arm, student: Arm, prompts: Sequence[str],
                     on_batch: OnBatch | None = None) -> dict[str, Any]:
    """All measures over `prompts`, one picture each.

    Raises UsageError for fewer than two prompts or if the two models do not go through the same noise levels.
    """
    if len(prompts) < 2:
        raise UsageError(f"sensitivity to the prompt needs two prompts or more, found {len(prompts)}")
    first, second = Field(teacher), Field(student)
    if first.levels != second.levels or first.channels != second.channels:
        raise UsageError(f"{student.label} goes through other noise levels than the teacher "
                         f"({second.levels} and {first.levels}), so they cannot be compared state by state")
    steps = len(first.levels) - 1
    sums = {name: np.zeros((2, steps)) for name in ("on_teacher_path", "on_student_path", "sensitivity", "contrast")}
    latent, pictures = np.zeros(2), []
    for start in range(0, len(prompts), _AT_ONCE):
        part = list(prompts[start:start + _AT_ONCE])
        noise = first.noise([seed_of(prompt, 0) for prompt in part])
        read = first.read(part), second.read(part)
        ends = []
        for name, leader, follower, own, others in (("on_teacher_path", first, second, *read),
                                                    ("on_student_path", second, first, *read[::-1])):
            for step, x, v in leader.states(noise, own):
                if step == steps:
                    ends.append(x)
                    continue
                v_leader, v_follower = v, follower.velocity(x, others, step)
                v_teacher = v_leader if leader is first else v_follower
                sums[name][:, step] += _squares(v_leader - v_follower), _squares(v_teacher)
                if leader is first and step < _CONTRAST_STEPS and len(part) > 1:
                    _contrast(sums, first, second, x, read, (v_leader, v_follower), step)
        latent += _squares(ends[1] - ends[0]), _squares(ends[0])
        pictures.append(_compare_pictures(first.decode(ends[0]), second.decode(ends[1])))
        if on_batch is not None:
            on_batch(min(start + _AT_ONCE, len(prompts)), len(prompts), "")
    psnr, ssim = np.concatenate(pictures, axis=1)
    return {"prompts": len(prompts), "psnr": _mean(psnr), "ssim": _mean(ssim), "latents": _root(*latent),
            **{name: [_root(*column) for column in sums[name].T] for name in ("on_teacher_path", "on_student_path")},
            **{name: [_root(*column) for column in sums[name].T[:_CONTRAST_STEPS]]
               for name in ("sensitivity", "contrast")}}


def _contrast(sums: dict[str, np.ndarray], first: Field, second: Field, x: Tensor, read: tuple[Tensor, Tensor],
              there: tuple[Tensor, Tensor], step: int) -> None:
    """Add what the next prompt of the batch would change at each state."""
    moved = [field.velocity(x, text.roll(1, 0), step) - v
             for field, text, v in zip((first, second), read, there, strict=True)]
    sums["sensitivity"][:, step] += _squares(moved[1]), _squares(moved[0])
    sums["contrast"][:, step] += _squares(moved[1] - moved[0]), _squares(moved[0])


def _squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def _root(part: float, whole: float) -> float:
    return float(np.sqrt(part / whole)) if whole else float("nan")


def _mean(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "standard_error": float(values.std(ddof=1) / len(values) ** 0.5)}


def _compare_pictures(a: Tensor, b: Tensor) -> np.ndarray:
    """PSNR in dB and SSIM of each pair of pictures [B, 3, H, W] in 0..1: [2, B]."""
    error = (a - b).double().square().flatten(1).mean(1).clamp_min(1e-12)
    return np.stack([(-10 * error.log10()).cpu().numpy(), ssim(a, b).cpu().numpy()])


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of pictures [B, C, H, W] in 0..1, the mean over all whole windows and channels: [B]."""
    place = torch.arange(11, dtype=torch.float64, device=a.device) - 5
    bell = torch.exp(-place.square() / (2 * 1.5**2))
    window = (bell[:, None] * bell / bell.sum() ** 2).expand(a.shape[1], 1, 11, 11)

    def local(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=x.shape[1])

    a, b = a.double(), b.double()
    mean_a, mean_b = local(a), local(b)
    spread_a, spread_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    together = local(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = ((2 * mean_a * mean_b + c1) * (2 * together + c2)
             / ((mean_a**2 + mean_b**2 + c1) * (spread_a + spread_b + c2)))
    return index.flatten(1).mean(1)


def as_text(measured: dict[str, dict[str, Any]]) -> str:
    """The measures as a table for people."""
    lines = [f"{'model':<22}{'PSNR dB':>9}{'SSIM':>8}{'latents':>9}  velocity error by step on the teacher's path, "
             "on its own; sensitivity; error of the contrast"]
    for label, row in measured.items():
        def series(name: str, row: dict[str, Any] = row) -> str:
            return " ".join(f"{value:.3f}" for value in row[name])
        lines.append(f"{label:<22}{row['psnr']['mean']:9.2f}{row['ssim']['mean']:8.4f}{row['latents']:9.4f}  "
                     + "; ".join(series(name) for name in ("on_teacher_path", "on_student_path", "sensitivity",
                                                          "contrast")))
    return "\n".join(lines)
