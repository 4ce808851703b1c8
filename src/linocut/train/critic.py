"""Students' last steps made as sharp as the teacher's: a critic that tells the pictures of both apart.

A student that cannot hold all that the teacher knows, and learns by squared errors, draws the mean of what it cannot
tell apart: a blur. The critic learns to tell its finished latents from those that the teacher gets to from the same
state, and the student learns to leave it no reason. As in latent adversarial diffusion distillation (Sauer et al. 2024)
the critic sees both through the frozen teacher: with noise added, by the tokens that leave each of its blocks, which
have read the prompt. Only small heads on these tokens learn, with the hinge loss.

Shape letters: B pictures, I image tokens, C channels, K blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, relu, silu

from linocut.models.configs import Flux2Config
from linocut.train.journeys import Network
from linocut.train.loop import Ranks, autocast
from linocut.train.snapshot import part_of

_HIDDEN = 128
_RAMP = (0.3, 0.5)  # of the schedule, over which a student comes to be moved as strongly as the share says
_SELDOM = 8  # before that, every so many steps the heads learn alone; what a GPU compiles for them is ready then
_OFTEN = 2  # then it takes part in every so many, as strongly on average: a GPU spends a third of such a step on it
_NOISE = (0.05, 0.8)  # of what the teacher is shown: from small parts to layout
_RATE = 5e-4


class Heads(nn.Module):
    """For each of `blocks` a layer norm and two linear layers, all side by side: a GPU starts few kernels for them."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(blocks, 1, width))
        self.shift = nn.Parameter(torch.zeros(blocks, 1, width))
        self.inner, self.inner_bias = (_spread(blocks, rows, _HIDDEN, width) for rows in (width, 1))
        self.outer, self.outer_bias = (_spread(blocks, rows, 1, _HIDDEN) for rows in (_HIDDEN, 1))

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """What the head of each block says of its tokens [B, I, C]: [K, B * I]."""
        x = torch.stack(list(tokens)).float().flatten(1, 2)
        x = layer_norm(x, x.shape[-1:]) * self.scale + self.shift
        hidden = silu(torch.baddbmm(self.inner_bias, x, self.inner))
        return torch.baddbmm(self.outer_bias, hidden, self.outer).squeeze(-1)


def _spread(blocks: int, rows: int, columns: int, inputs: int) -> nn.Parameter:
    """As torch begins linear layers of so many inputs."""
    return nn.Parameter((2 * torch.rand(blocks, rows, columns) - 1) / inputs ** 0.5)


class Critic:
    """A head for each of the teacher's `blocks`, `width` wide, and their optimizer. `share`: how strongly a student is
    moved on average, as a part of how strongly the squared errors of its last steps move it."""

    def __init__(self, blocks: int, width: int, share: float, ranks: Ranks,
                 saved: Mapping[str, Tensor] | None = None) -> None:
        self.share, self.ranks = share, ranks
        self.heads = Heads(blocks, width).to(ranks.device)
        self.optimizer = torch.optim.AdamW(self.heads.parameters(), _RATE, betas=(0.5, 0.99), weight_decay=0.01)
        self.margin = torch.zeros((), device=ranks.device)  # of the teacher's over the student's
        ranks.share(self.heads)
        if saved:
            self._restore(saved)

    def looks(self, step: int, progress: float) -> bool:
        """Whether this step of a batch is one that the critic takes part in."""
        return step % (_SELDOM if progress < _RAMP[0] else _OFTEN) == 0

    def __call__(self, teacher: Network, v: Tensor, target: Tensor, x: Tensor, sigma: Tensor, text: Tensor,
                 weight: Tensor, progress: float) -> Tensor:
        """A loss for the velocities v [B, I, C] of last steps, whose value means nothing and whose gradient does.

        `target`: the teacher's velocities at the same states x and noise levels sigma [B], `text` what it reads,
        `weight` ([] or [C]) what the mean squared error of these rows counts in the student's loss, `progress` the part
        of the schedule that is over. The heads learn on the way.
        """
        length = sigma[:, None, None]
        wanted = x - length * target
        drawn = (x - length * v).detach().requires_grad_(True)
        low, high = _NOISE
        level = low + (high - low) * torch.rand(len(x), device=x.device)
        noise = torch.randn_like(x)
        tokens = self._tokens(teacher, drawn, text, level, noise)
        (push,) = torch.autograd.grad(-self.heads(tokens).mean(), drawn)
        push = -length * push  # to the velocity
        usual = 2 * weight * (v - target).detach() / v.numel()
        begin, full = _RAMP
        share = self.share * _OFTEN * min(1.0, max(0.0, (progress - begin) / (full - begin)))
        push = push * (share * usual.norm() / push.norm().clamp_min(1e-12))
        with torch.no_grad():
            real = self._tokens(teacher, wanted, text, level, noise)
        self._learn(real, [token.detach() for token in tokens])
        return (push * v).sum()

    @staticmethod
    def _tokens(teacher: Network, z: Tensor, text: Tensor, level: Tensor, noise: Tensor) -> list[Tensor]:
        with autocast(z.device):
            return teacher.features(z + level[:, None, None] * (noise - z), text, level)

    def _learn(self, real: list[Tensor], drawn: list[Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        good, bad = self.heads(real), self.heads(drawn)
        (relu(1 - good).mean() + relu(1 + bad).mean()).backward()
        self.margin = (good.mean() - bad.mean()).detach()
        self.ranks.average(p.grad for p in self.heads.parameters())
        self.optimizer.step()

    def saved(self) -> dict[str, Tensor]:
        """All that is needed to go on."""
        state = dict(self.heads.state_dict())
        for number, parameter in enumerate(self.heads.parameters()):
            state |= {f"optimizer.{number}.{name}": value for name, value in self.optimizer.state[parameter].items()}
        return state

    def _restore(self, saved: Mapping[str, Tensor]) -> None:
        self.heads.load_state_dict({name: value for name, value in saved.items() if not name.startswith("optimizer.")})
        for number, parameter in enumerate(self.heads.parameters()):
            self.optimizer.state[parameter] = {
                name: value if name == "step" else value.to(parameter.device)
                for name, value in part_of(saved, f"optimizer.{number}.").items()}


def make_critic(share: float, config: Flux2Config, ranks: Ranks, saved: Mapping[str, Tensor]) -> Critic | None:
    """A critic by a teacher of this shape, going on from what was `saved`; none without a share."""
    if not share:
        return None
    return Critic(config.num_layers + config.num_single_layers, config.width, share, ranks, part_of(saved, "critic."))
