"""While the teacher learns, a head says half-way through the network what covers each image token, and in which colour.

Flow matching alone takes long to find out which words belong to which place of the picture. Naming it with what the
renderer knows pulls inner features there early (after REPA, Yu et al. 2025, whose targets are another network's
features). The head is not part of the model, and its loss fades out before training ends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linocut.models.flux2 import Flux2Transformer
from linocut.train.palette import COLOURS
from linocut.train.render import SceneRenderer

UNTIL = 0.7  # of the schedule, where its loss has faded to nothing
_IGNORED = -1


class NamingHead(nn.Module):
    """Cross-entropy of things (number `things` is none) and, where a thing is, of colours (0 is natural)."""

    def __init__(self, transformer: Flux2Transformer, things: int) -> None:
        super().__init__()
        width, blocks = transformer.config.width, transformer.single_transformer_blocks
        self.things, self.features = things, torch.empty(0)
        self.norm = nn.RMSNorm(width)
        self.name = nn.Linear(width, things + 1 + len(COLOURS) + 1)
        nn.init.zeros_(self.name.weight)
        nn.init.zeros_(self.name.bias)
        blocks[len(blocks) // 3].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: object, output: Tensor) -> None:
        self.features = output

    def loss(self, names: Tensor) -> Tensor:
        """Mean over tokens for the transformer's latest pass; colours count where a thing is. `names` as `names_of`."""
        image, self.features = self.features[:, -names.shape[1]:], torch.empty(0)
        scores = self.name(self.norm(image.float())).float().flatten(0, 1)
        thing, colour = scores.split((self.things + 1, len(COLOURS) + 1), -1)
        wanted = names.long().flatten(0, 1)
        colours = F.cross_entropy(colour, wanted[:, 1], ignore_index=_IGNORED, reduction="sum")
        return F.cross_entropy(thing, wanted[:, 0]) + colours / (wanted[:, 1] >= 0).sum().clamp_min(1)


def names_of(renderer: SceneRenderer, table: Tensor, patch: int) -> Tensor:
    """What covers each token of scenes: int16 [B, I, 2], the thing's row in the atlas (or their number: none), its
    colour (0 natural; -1 where there is no thing). `table` as `SceneRenderer.table` makes it."""
    owner = renderer.covers(table, patch).flatten(1)
    chosen = table.long().gather(1, owner.clamp_min(0)[..., None].expand(-1, -1, table.shape[-1]))
    empty = owner < 0
    thing = torch.where(empty, renderer.things, chosen[..., 1])
    return torch.stack([thing, torch.where(empty, _IGNORED, chosen[..., 0])], -1).to(torch.int16)
