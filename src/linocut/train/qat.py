"""The loop of quantization-aware distillation: one or several batches on their way, one update, and again.

Weights are quantized in every forward pass with straight-through gradients; every dense tensor and norm trains too. The
loop knows neither where prompts come from nor what the networks are; `distill` and `klein` do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from linocut.models.convert import set_eps
from linocut.train.critic import Critic
from linocut.train.endgame import freeze_codes, hold_signs, keep_codes
from linocut.train.journeys import Journeys, Network
from linocut.train.loop import Ranks, Schedule, autocast
from linocut.train.monitor import Monitor, plot, require_gradients
from linocut.train.objective import Objective
from linocut.train.optimize import Average, set_rate
from linocut.train.recipe import QatSettings
from linocut.train.snapshot import Snapshot, part_of


@dataclass
class Distillation:
    """A student in the making. `transformer` is what trains inside `student`; `sharded` if it is dealt out (FSDP2);
    `sheet(step)` draws with the averaged student; `log` is the file of the monitor's lines."""

    settings: QatSettings
    ranks: Ranks
    student: Network
    transformer: nn.Module
    average: Average
    optimizers: Sequence[torch.optim.Optimizer]
    snapshot: Snapshot
    schedule: Schedule
    objective: Objective
    log: Path
    sharded: bool = False
    sheet: Callable[[int], None] | None = None
    critic: Critic | None = None
    saved: dict[str, Tensor] = field(default_factory=dict)

    def run(self, batches: Sequence[Journeys]) -> None:
        """All steps of the schedule. `batches` take turns; each makes one step of its own at its turn.

        Raises KernelError where quantized weights get no gradient.
        """
        settings, schedule, ranks = self.settings, self.schedule, self.ranks
        parameters = list(self.transformer.parameters())
        monitor = Monitor(self.log, self.transformer, ranks, schedule.step)
        frozen = bool(self.saved["frozen"]) if self.saved else False
        mean: Tensor | None = None
        if self.saved:
            mean = self.saved["mean"].to(ranks.device)
            self.objective.unit.copy_(self.saved["unit"])
            self.snapshot.restore_random(self.saved)
        first = schedule.step
        for step in schedule:
            if settings.residual:
                left = max(0.0, 1 - schedule.progress / max(settings.anneal, 1e-9))
                set_eps(self.transformer, settings.residual * left)
            if settings.freeze and not frozen and schedule.progress >= 1 - settings.freeze:
                freeze_codes(self.transformer, self.average, self.optimizers)
                frozen = True
            loss, errors = self._learn(step, batches)
            if step == first:
                require_gradients(self.transformer)
            if not self.sharded:  # else the gradients are averaged as they are dealt out
                ranks.average(p.grad for p in parameters)
            if frozen:
                keep_codes(self.transformer)
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            set_rate(self.optimizers, schedule.rate)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if frozen:
                hold_signs(self.transformer, self.average)
            self.average.update()
            mean = errors if mean is None else torch.lerp(mean, errors, 0.05)
            schedule.log(lambda m=mean: "error by step " + " ".join(f"{e:.4f}" for e in m.tolist()))
            if schedule.looks:
                seen = self.objective.sensitivity
                monitor.look(step=step, seconds=round(time.monotonic() - ranks.began, 1), rate=schedule.rate,
                             loss=float(loss), errors=errors.tolist(), gradient=_number(norm), frozen=frozen,
                             sensitivity=None if seen is None else float(seen),
                             margin=None if self.critic is None else float(self.critic.margin))
            if settings.sheet_every and step and step % settings.sheet_every == 0 and self.sheet is not None:
                set_eps(self.transformer, 0.0)  # until the next step
                with self.average.installed():
                    self.sheet(step)
            if schedule.saves:
                own = {"frozen": torch.tensor(frozen), "mean": mean, "unit": self.objective.unit}
                if self.critic is not None:
                    own |= {f"critic.{name}": value for name, value in self.critic.saved().items()}
                for index, batch in enumerate(batches):
                    own |= {f"batch.{index}.{name}": value for name, value in batch.saved().items()}
                self.snapshot.save(step + 1, own)
        if ranks.first and schedule.step:
            try:
                plot(self.log, self.log.with_suffix(".svg"))
            except Exception as error:  # a picture of curves is not worth a trained student
                print(f"  no curves: {error}", flush=True)

    def saved_batch(self, index: int) -> dict[str, Tensor]:
        """What a batch left when the state was saved, empty at a fresh start."""
        return part_of(self.saved, f"batch.{index}.")

    def _learn(self, step: int, batches: Sequence[Journeys]) -> tuple[Tensor, Tensor]:
        """Gradients of one update. Returns the loss and the errors by step of the grid [K], both means over batches."""
        settings, progress = self.settings, self.schedule.progress
        losses, errors = [], []
        for turn in range(step * settings.accumulate, (step + 1) * settings.accumulate):
            batch, own = batches[turn % len(batches)], turn // len(batches)
            batch.depart(own, settings.on_policy * min(1.0, max(0.0, (progress - 0.2) / 0.3)))
            target = batch.target(own)
            sigma, stage = batch.sigma(own), batch.stage(own)
            with autocast(self.ranks.device):
                v = (batch.student or self.student).velocity(batch.x, batch.student_text, sigma)
            loss = self.objective(v, target, batch.x, sigma, stage, batch.weight)
            losses.append(loss.detach())
            if self.critic is not None and self.critic.looks(own, progress):  # each batch as often
                rows = batch.last(own)
                loss = loss + self.critic(batch.teacher, v[rows], target[rows], batch.x[rows], sigma[rows],
                                          batch.teacher_text[rows], self.objective.last_counts(batch.weight), progress)
            (loss / settings.accumulate if settings.accumulate > 1 else loss).backward()
            batch.move(own, v.detach(), target)
            errors.append(self.objective.errors)
        return torch.stack(losses).mean(), torch.stack(errors).mean(0)


def _number(value: Tensor) -> float:
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return float(whole)

