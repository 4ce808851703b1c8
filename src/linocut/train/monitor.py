"""What can be seen of a student while it learns: one JSON line per look, and the curves of them all as a picture.

Of each look: `step`, `seconds`, `rate`, `loss`, `errors` by step of the sampler, `gradient` norm before clipping; of
the quantized weights `flips` (share of codes that changed since the look before), `moved` (since the first look, where
no cut came between), `zeros`, `dead` (share of groups without a kept weight), `scale` (mean, relative to the first
look); `sensitivity` (how far another prompt moves the student's velocity, relative to how far it moves the teacher's)
where prompts come in pairs; `margin` by which a critic, where there is one, tells teacher and student apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from linocut.errors import KernelError
from linocut.formats.packed import GROUP_SIZE
from linocut.models.linear import FakeQuantLinear
from linocut.quantize.rounding import quantize_binary, quantize_ternary
from linocut.train.loop import Ranks, local

_CODED = ("binary", "ternary")


def coded_layers(module: nn.Module) -> dict[str, FakeQuantLinear]:
    """The layers with binary or ternary weights, by path."""
    return {name: layer for name, layer in module.named_modules()
            if isinstance(layer, FakeQuantLinear) and layer.encoding in _CODED}


@torch.no_grad()
def codes_of(layer: FakeQuantLinear) -> tuple[Tensor, Tensor]:
    """Values int8 [O, N] and scales float32 [O, G] that a layer computes with: this process's rows."""
    weight = local(layer.weight.detach())
    if not len(weight):
        return weight.to(torch.int8), weight[:, :: GROUP_SIZE]
    return quantize_binary(weight) if layer.encoding == "binary" else quantize_ternary(weight, layer.method)


def require_gradients(module: nn.Module) -> None:
    """Raise KernelError if a quantized layer got no gradient: such a student learns with its dense tensors alone, and
    looks as if it had learned what it can."""
    still = [name for name, layer in coded_layers(module).items()
             if layer.weight.grad is None or (local(layer.weight.grad).numel() and not local(layer.weight.grad).any())]
    if still:
        raise KernelError(f"{len(still)} quantized layers get no gradient and would never change, {still[0]} among "
                          f"them; torch {torch.__version__} may compile them wrongly: try another version")


class Monitor:
    """Appends to `file`; looks at the codes of every quantized layer of `module`."""

    def __init__(self, file: Path, module: nn.Module, ranks: Ranks, begun: int) -> None:
        self.file, self.layers, self.ranks = file, coded_layers(module), ranks
        self.before: list[Tensor] = []
        self.first: list[Tensor] | None = None if begun else []  # what the first codes were is not saved
        self.scale = 0.0
        if ranks.first:
            file.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_lines(file) if line["step"] < begun]
            file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def look(self, **facts: Any) -> dict[str, Any]:
        """Write a line of `facts` and of the codes; every process calls this at the same steps."""
        found, sums = [], torch.zeros(6, dtype=torch.float64)
        for index, layer in enumerate(self.layers.values()):
            values, scales = codes_of(layer)
            found.append(values.cpu())  # of a big model they would take a tenth of a GPU's memory
            before, first = (codes[index].to(values.device) if codes else None for codes in (self.before, self.first))
            groups = values.view(len(values), -1, GROUP_SIZE)
            sums += torch.tensor([
                values.numel(), float((values == 0).sum()), float((groups == 0).all(-1).sum()), float(scales.sum()),
                0.0 if before is None else float((values != before).sum()),
                0.0 if first is None else float((values != first).sum())], dtype=torch.float64)
        if self.ranks.world > 1:
            sums = sums.to(self.ranks.device)
            dist.all_reduce(sums)
        weights, zeros, dead, scale, flips, moved = sums.tolist()
        groups_in_all = max(1.0, weights / GROUP_SIZE)
        self.scale = self.scale or scale / groups_in_all
        line = facts | {"flips": flips / max(1.0, weights) if self.before else None,
                        "moved": moved / max(1.0, weights) if self.first else None,
                        "zeros": zeros / max(1.0, weights), "dead": dead / groups_in_all,
                        "scale": scale / groups_in_all / max(self.scale, 1e-30)}
        self.first = found if self.first == [] else self.first
        self.before = found
        if self.ranks.first:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return line


def read_lines(file: Path) -> list[dict[str, Any]]:
    """All lines of a log; one that a kill has cut is left out."""
    lines = []
    for text in file.read_text("utf-8").splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def plot(file: Path, target: Path) -> bool:
    """Draw the curves of a log. False where matplotlib is not installed or there is nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = read_lines(file)
    if len(lines) < 2:
        return False
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    errors, codes, shares = figure.subplots(1, 3)
    for stage in range(len(lines[0]["errors"])):
        errors.plot(steps, [line["errors"][stage] for line in lines], label=f"step {stage + 1}")
    errors.set(title="error of the velocity, by step of the sampler", yscale="log", xlabel="training step")
    codes.plot(steps[1:], [line["flips"] or float("nan") for line in lines[1:]], label="changed since the look before")
    codes.plot(steps[1:], [line["moved"] or float("nan") for line in lines[1:]], label="changed since the first look")
    codes.set(title="codes", yscale="log", xlabel="training step")
    for name in ("zeros", "dead", "scale", "sensitivity"):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            shares.plot(*zip(*points, strict=True), label=name)
    shares.set(title="zeros, dead groups, scales, sensitivity", xlabel="training step")
    for axes in (errors, codes, shares):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(target)
    return True
