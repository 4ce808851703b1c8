"""How much each channel of the latents shows in the picture.

Latents are normalized: every channel varies as much as any other, yet the decoder turns some into whole colours and
others into next to nothing. A network that learns latents with equal weights spends as much of what it can hold on
channels that nobody sees, which are the hardest to foretell besides. A small change dz of the latents changes the
picture by J dz, so a channel counts as the mean square of its column of J.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PICTURES = 16  # that a weight is measured on


def channel_weights(decode: Callable[[Tensor], Tensor], latents: Tensor, share: float) -> Tensor:
    """Weights [C], mean 1, for the squared errors of latents [B, C, h, w], which `decode` turns into pictures.

    A `share` of each weight is in proportion to E |dI/dz_c|^2, the rest is equal for all channels. The expectation is
    over the latents given; |.|^2 is estimated without bias from gradients of random projections of the picture.
    """
    generator = torch.Generator().manual_seed(0)
    squares = torch.zeros(latents.shape[1], device=latents.device)
    for part in latents.split(4):  # maps of whole pictures are large
        with torch.enable_grad():
            z = part.detach().float().requires_grad_(True)
            picture = decode(z)
            projection = torch.randn(picture.shape, generator=generator).to(picture)
            (gradient,) = torch.autograd.grad(picture, z, projection)
        squares += gradient.float().square().sum((0, 2, 3))
    return share * squares / squares.mean() + (1 - share)
