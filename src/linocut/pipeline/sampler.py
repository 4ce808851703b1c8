"""The sampler of FLUX.2 klein: flow matching, Euler steps, noise levels shifted by an empirical mu.

The model sees sigma in [0, 1]: x = (1 - sigma) * clean + sigma * noise, and predicts velocity = noise - clean.
`sigmas` equals diffusers' FlowMatchEulerDiscreteScheduler (dynamic shifting, exponential) to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from linocut.errors import UsageError


def empirical_mu(tokens: int, steps: int) -> float:
    """Shift of the noise levels, from the number of noise tokens (references not counted) and of steps.

    Two fitted lines in the number of tokens, for 10 and for 200 steps, are interpolated in the number of steps;
    above 4300 tokens the line for 200 steps is used alone. Constants: FLUX.2, as in diffusers' klein pipeline.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return float(at_200)
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return float(slope * steps + (at_200 - 200.0 * slope))


def sigmas(tokens: int, steps: int) -> Tensor:
    """Noise levels of a run, from 1 down to 0: float32 [steps + 1]."""
    if tokens < 1 or steps < 1:
        raise UsageError(f"at least one token and one step are needed, found {tokens} tokens and {steps} steps")
    # The arithmetic is float32 in numpy, as in diffusers: doing it in float64 would change the last bit.
    uniform = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    shift = math.exp(empirical_mu(tokens, steps))
    shifted = shift / (shift + (1 / uniform - 1))
    return torch.cat([torch.from_numpy(shifted.astype(np.float32)), torch.zeros(1)])


def euler(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor,
          on_step: Callable[[int, float, Tensor, Tensor], None] | None = None) -> Tensor:
    """Integrate from noise to clean latents: x <- x + (sigma[i+1] - sigma[i]) * v. Returns the last x, in float32.

    velocity(x, sigma) gets x in float32 and sigma as a float32 scalar tensor on x's device, and returns v of x's shape
    in any dtype. x is kept in float32 throughout. on_step(i, sigma, x, x0) is called after step i (from 0) with the
    sigma the step started from, the new x and the predicted clean latents x0 = x - sigma * v; it may raise to stop.
    """
    x, levels = x.float(), sigmas.to(device=x.device, dtype=torch.float32)
    for i in range(len(levels) - 1):
        v = velocity(x, levels[i]).float()
        x0 = x - levels[i] * v if on_step is not None else None
        x = x + (levels[i + 1] - levels[i]) * v
        if on_step is not None and x0 is not None:
            on_step(i, float(levels[i]), x, x0)
    return x
