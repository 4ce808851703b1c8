"""Rounds a FLUX.2 transformer block by block, in the memory of one block, by any method of the ladder.

Two models go through the blocks side by side on the same pictures and noise levels: the full-precision one, and one
whose blocks so far are rounded. A layer is rounded against the inputs that it will really see; the last prompts are not
looked at, and tell how far the two have come apart. What is done is on disk block by block: a run that was cut lets the
pictures run through the blocks that are there, and goes on.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linocut.formats.checkpoint import Checkpoint
from linocut.formats.packed import GROUP_SIZE, PackedTensor, dequantize, pack
from linocut.formats.writer import atomic_write_bytes, write_checkpoint
from linocut.kernels.columns import columns_for
from linocut.models.flux2 import Rope
from linocut.models.modulations import Modulations
from linocut.quantize.folds import fold_block
from linocut.quantize.gptq import corrected, gptq, outer_sum
from linocut.quantize.rounding import quantize_binary, quantize_ternary
from linocut.quantize.source import Source
from linocut.quantize.stream import SCRATCH, OnProgress, TensorReport
from linocut.train.ptq.ladder import CalibrationSettings, Method, check
from linocut.train.ptq.network import LAYERS, Inputs, States, StreamedTransformer, run_block
from linocut.train.ptq.path import TeacherPath, plan_path, read_text, walk
from linocut.train.ptq.reconstruct import reconstruct

SOLVED = ("binary", "ternary")
Codes = dict[str, tuple[Tensor, Tensor]]


class BlockSolver:
    """A `quantize.stream.Solver` for one method of the ladder."""

    def __init__(self, method: Method, settings: CalibrationSettings, device: torch.device) -> None:
        check(method, settings.prompts)
        self.method, self.settings, self.device = method, settings, device
        self.identity = json.dumps([asdict(method), settings.identity(), device.type, 1])

    def scratch_nbytes(self, source: Source, encodings: Mapping[str, str]) -> int:
        """Bytes of text features, of the teacher's path and of states on their way, and of the blocks done."""
        blocks = sum(source.transformer.info(f"{name}.weight").count // 4 for name, kind in encodings.items()
                     if kind in SOLVED)
        if not self.settings.prompts:
            return blocks
        path = plan_path(source, self.settings, Path())
        features = int(source.transformer_config["joint_attention_dim"])
        count, steps = path.tokens[0] * path.tokens[1], len(path.levels) - 1
        width = source.transformer.info("x_embedder.weight").shape[0]
        each = (2 * 2 * path.text_length * features + 2 * 4 * steps * count * source.transformer_config["in_channels"]
                + (2 * 4 * steps * (count + path.text_length) * width if self.device.type == "cpu" else 0))
        return int(blocks + len(self.settings.prompts) * each)

    @torch.no_grad()
    def solve(self, source: Source, encodings: Mapping[str, str], work: Path,
              on_progress: OnProgress | None) -> SolvedBlocks:
        """Round every block; see `quantize.stream.Solver`."""
        folder = work / SCRATCH
        folder.mkdir(exist_ok=True)
        network = StreamedTransformer(source.transformer, source.transformer_config, self.device)
        total = sum(source.transformer.info(f"{name}.weight").count for name, kind in encodings.items()
                    if kind in SOLVED)
        done = 0

        def say(what: str) -> None:
            if on_progress is not None:
                on_progress(done, total, what)

        summary = folder / "summary.json"
        if not summary.exists():
            journey: _Journey | None = None
            if self.settings.prompts:
                path = plan_path(source, self.settings, folder)
                say("reading the prompts")
                read_text(path, source, work, self.settings, self.device)
                walk(path, network, self.settings, say)
                journey = _Journey(path, network, self.settings)
            for kind, index in network.blocks():
                say(f"{kind}.{index}")
                done += self._block(network, kind, index, encodings, journey, folder)
            found = {} if journey is None else journey.figures()
            facts = {"method": self.method.name, "prompts": len(self.settings.prompts), **found}
            atomic_write_bytes(summary, json.dumps(facts).encode())
        return SolvedBlocks([Checkpoint.open(_file(folder, kind, index)) for kind, index in network.blocks()],
                            json.loads(summary.read_text("utf-8")))

    def _block(self, network: StreamedTransformer, kind: str, index: int, encodings: Mapping[str, str],
               journey: _Journey | None, folder: Path) -> int:
        """Round one block, or take it as an earlier run left it, and let the pictures pass. Returns its weights."""
        file, prefix = _file(folder, kind, index), f"{kind}.{index}."
        exact = network.block(kind, index)
        linears = {name: module for name, module in exact.named_modules() if isinstance(module, nn.Linear)}
        kinds = {name: encodings.get(prefix + name, "dense") for name in linears}
        solved = [name for name in linears if kinds[name] in SOLVED]
        if self.method.fold:
            weights = {name: layer.weight.data for name, layer in linears.items()}
            fold_block(weights, kinds, network.config.attention_head_dim)
            for name, layer in linears.items():
                layer.weight.data = weights[name]
        rounded = copy.deepcopy(exact)
        last = (kind, index) == network.blocks()[-1]
        if file.exists():
            with Checkpoint.open(file) as earlier:
                for name in solved:
                    values = torch.from_numpy(dequantize(earlier.packed_tensor(prefix + name)))
                    _weight(rounded, name).copy_(values)
            if journey is not None:
                journey.advance_exact(exact)
                journey.advance_rounded(rounded, exact, measure=False)
            return sum(linears[name].weight.numel() for name in solved)
        codes: Codes = {}
        for groups in LAYERS[kind]:
            self._round(exact, rounded, groups, kinds, journey, codes)
        if journey is not None:
            journey.advance_exact(exact)
            if self.method.reconstruct:
                batches = journey.known
                better = reconstruct(copy.deepcopy(rounded), {name: linears[name].weight for name in codes}, codes,
                                     kinds, journey.pair, batches, journey.path.text_length, last, self.settings)
                for name, found in better.items():
                    codes[name] = found
                    _weight(rounded, name).copy_(_decoded(*found))
        errors = {} if journey is None else journey.advance_rounded(rounded, exact, measure=True)
        packed, reports = {}, {}
        for name, (values, scales) in codes.items():
            full = prefix + name
            weight, decoded = linears[name].weight, _weight(rounded, name)
            packed[full] = pack(values.cpu().numpy(), scales.cpu().numpy(), kinds[name])
            reports[full] = asdict(TensorReport(
                "transformer", full, kinds[name], tuple(weight.shape), packed[full].nbytes, 0, "",
                float((weight - decoded).double().square().sum()), float(weight.double().square().sum()),
                errors.get(name)))
        write_checkpoint(file, packed or {"none": np.zeros(1, np.float32)}, {"reports": json.dumps(reports)})
        return sum(linears[name].weight.numel() for name in solved)

    def _round(self, exact: nn.Module, rounded: nn.Module, groups: tuple[tuple[str, ...], ...],
               kinds: Mapping[str, str], journey: _Journey | None, codes: Codes) -> None:
        """Round the layers of one set, whose groups of layers read the same inputs each."""
        firsts = [names[0] for names in groups]
        squares: dict[str, tuple[Tensor, Tensor]] = {}
        if self.method.gptq:
            assert journey is not None
            squares = journey.squares(exact, rounded, firsts)
        for names in groups:
            for encoding in SOLVED:
                alike = [name for name in names if kinds[name] == encoding]
                if not alike:
                    continue
                weight = torch.cat([_weight(exact, name) for name in alike])
                if self.method.gptq:
                    hessian, cross = squares[names[0]]
                    target = corrected(weight, hessian, cross, self.settings.correction, self.settings.damping)
                    values, scales = gptq(target, hessian, encoding, self.settings.damping, self.method.sweeps,
                                          columns_for(self.device))
                elif encoding == "binary":
                    values, scales = quantize_binary(weight)
                else:
                    values, scales = quantize_ternary(weight, self.method.rounding)
                rows = [len(_weight(exact, name)) for name in alike]
                for name, *found in zip(alike, values.split(rows), scales.split(rows), strict=True):
                    codes[name] = found[0], found[1]
                    _weight(rounded, name).copy_(_decoded(*codes[name]))


@dataclass
class SolvedBlocks:
    """A `quantize.stream.Solved` over the files of all blocks."""

    files: list[Checkpoint]
    summary: dict[str, Any]

    def weight(self, name: str) -> tuple[PackedTensor, TensorReport] | None:
        """The packed weight of a module and its figures."""
        for file in self.files:
            if name in file.packed:
                entry = json.loads(file.metadata["reports"])[name]
                return file.packed_tensor(name), TensorReport(**entry | {"shape": tuple(entry["shape"])})
        return None


class _Journey:
    """The pictures on their way through both models: every batch of prompts at every noise level of the path."""

    def __init__(self, path: TeacherPath, network: StreamedTransformer, settings: CalibrationSettings) -> None:
        self.path, self.network = path, network
        self.rope: Rope = network.rope(path.tokens, path.text_length)
        self.mods: list[Modulations] = network.modulations(path.levels[:-1])
        parts = path.batches(settings.batch, settings.held_out)
        self.items = [(part, step) for step in range(len(self.mods)) for part, _ in parts]
        held = [held_out for _ in self.mods for _, held_out in parts]
        self.known = [index for index, out in enumerate(held) if not out]
        self.held_out = [index for index, out in enumerate(held) if out]
        tokens = path.text_length + path.tokens[0] * path.tokens[1]
        shapes = [(part.stop - part.start, tokens, network.config.width) for part, _ in self.items]
        self.exact = States(path.folder / "exact.bin", shapes, network.device)
        self.rounded = States(path.folder / "rounded.bin", shapes, network.device)
        for index, (part, step) in enumerate(self.items):
            x = path.at(step, part)[0].to(network.device)
            self.exact[index] = network.enter(x, path.text("teacher", part).to(network.device))
            self.rounded[index] = network.enter(x, path.text("student", part).to(network.device))
        self.of_blocks: list[float] = []

    def run(self, block: nn.Module, index: int, states: Tensor) -> Tensor:
        """What a block makes of the states of one batch."""
        return run_block(block, states, self.mods[self.items[index][1]], self.rope, self.path.text_length)

    def squares(self, exact: nn.Module, rounded: nn.Module, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """For each layer the sums x x^T over what it sees in the rounded model, and y x^T with y what it should see."""
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for index in self.known:
            with Inputs(exact, names) as wanted:
                self.run(exact, index, self.exact[index])
            with Inputs(rounded, names) as seen:
                self.run(rounded, index, self.rounded[index])
            for name in names:
                x, y = seen[name], wanted[name]
                hessian, cross = outer_sum(x, x), outer_sum(y, x)
                if name in sums:
                    sums[name][0].add_(hessian)
                    sums[name][1].add_(cross)
                else:
                    sums[name] = hessian, cross
        return sums

    def pair(self, index: int) -> tuple[Any, Tensor]:
        """For `reconstruct`: the exact states are those after the block already, the rounded ones those before it."""
        states = self.rounded[index]
        return (lambda block: self.run(block, index, states)), self.exact[index]

    def advance_exact(self, block: nn.Module) -> None:
        """Let the exact states pass the exact block; those of held-out pictures before it are kept for measuring."""
        self.before = {index: self.exact[index].clone() for index in self.held_out}
        for index in range(len(self.exact)):
            self.exact[index] = self.run(block, index, self.exact[index])

    def advance_rounded(self, block: nn.Module, exact: nn.Module, measure: bool) -> dict[str, float]:
        """Let the rounded states pass the rounded block. Returns each layer's relative squared output error against the
        exact model on the held-out pictures, all errors of layers before it included."""
        errors: dict[str, float] = {}
        if measure:
            sums: dict[str, tuple[float, float]] = {}
            for index in self.held_out:
                wanted, found = _outputs(exact, self.run, index, self.before[index]), _outputs(
                    block, self.run, index, self.rounded[index])
                for name, y in wanted.items():
                    error, energy = sums.get(name, (0.0, 0.0))
                    sums[name] = (error + float((found[name] - y).double().square().sum()),
                                  energy + float(y.double().square().sum()))
            errors = {name: error / max(energy, 1e-30) for name, (error, energy) in sums.items()}
        for index in range(len(self.rounded)):
            self.rounded[index] = self.run(block, index, self.rounded[index])
        self.of_blocks.append(_relative((self.rounded[index] - self.exact[index], self.exact[index])
                                        for index in self.held_out))
        return errors

    def figures(self) -> dict[str, Any]:
        """How far the models have come apart on the held-out pictures, the teacher's states given to both: relative
        error (root of mean squares) of the velocity at each step of the sampler, and of all states after each block."""
        by_step = []
        for step in range(len(self.mods)):
            pairs = []
            for index in self.held_out:
                if self.items[index][1] == step:
                    v, wanted = (self.network.leave(states[index], self.mods[step], self.path.text_length)
                                 for states in (self.rounded, self.exact))
                    pairs.append((v - wanted, wanted))
            by_step.append(_relative(iter(pairs)))
        return {"held_out": sum(part.stop - part.start for part, step in
                                (self.items[index] for index in self.held_out) if step == 0),
                "levels": self.path.levels, "velocity_error": by_step, "block_error": self.of_blocks}


def _outputs(block: nn.Module, run: Callable[[nn.Module, int, Tensor], Tensor], index: int,
             states: Tensor) -> dict[str, Tensor]:
    """What each Linear of a block gives."""
    found: dict[str, Tensor] = {}
    hooks = [module.register_forward_hook(lambda _m, _i, y, name=name: found.__setitem__(name, y.float()))
             for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    run(block, index, states)
    for hook in hooks:
        hook.remove()
    return found


def _relative(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
    error = energy = 0.0
    for difference, wanted in pairs:
        error += float(difference.double().square().sum())
        energy += float(wanted.double().square().sum())
    return (error / max(energy, 1e-30)) ** 0.5


def _decoded(values: Tensor, scales: Tensor) -> Tensor:
    return values.float() * scales.float().repeat_interleave(GROUP_SIZE, dim=1)


def _weight(block: nn.Module, name: str) -> Tensor:
    weight = block.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.data


def _file(folder: Path, kind: str, index: int) -> Path:
    return folder / f"{kind}.{index}.safetensors"
