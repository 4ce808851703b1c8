"""Stages `ternary` and `binary` of a recipe for a model that exists: its quantized student learns from prompts alone.

What a stage leaves in `RUN/<encoding>` is a dense model folder whose block weights are the latent weights of the
student and whose other tensors are as they were trained; and in `RUN/model-<encoding>` the model packed from it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linocut.errors import UsageError
from linocut.formats.folder import ModelFolder
from linocut.formats.writer import CheckpointWriter, atomic_write_bytes
from linocut.models.autoencoder import Autoencoder
from linocut.models.configs import AutoencoderConfig
from linocut.models.convert import build_and_load, set_rounding
from linocut.models.synthetic import share_parts, write_synthetic
from linocut.pipeline.sampler import sigmas
from linocut.quantize.stream import quantize_folder
from linocut.train.autoencoder import save_grid
from linocut.train.calibrate import Batch, calibrate
from linocut.train.critic import make_critic
from linocut.train.guidance import Guided
from linocut.train.journeys import Journeys, Network
from linocut.train.loop import Ranks, Schedule, autocast
from linocut.train.model_parts import TOKEN_SIDE, Drawer, Parts, load_parts, random_parts
from linocut.train.model_recipe import ModelQatSettings, ModelRecipe
from linocut.train.monitor import coded_layers
from linocut.train.objective import Objective
from linocut.train.optimize import Average
from linocut.train.prompt_stream import PromptReader, PromptStream
from linocut.train.qat import Distillation
from linocut.train.sharding import deal_out, recompute_blocks, whole
from linocut.train.snapshot import Snapshot

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
_SHARED = ("text_encoder", "tokenizer", "vae", "scheduler")


def distil_model(recipe: ModelRecipe, encoding: str, run: Path, ranks: Ranks) -> None:
    """Train a student of the recipe's model, write it, and pack it. Goes on from a saved state."""
    target = run / encoding
    source = recipe.source
    if recipe.shapes is not None:
        source = str(run / "source")
        if ranks.first and not (run / "source" / "model_index.json").exists():
            write_synthetic(source, recipe.shapes, "bf16")
        ranks.same(0.0)
    if not (target / WEIGHTS).is_file():
        learner = Learner(recipe, encoding, load_parts(source, encoding, getattr(recipe, encoding).residual,
                                                       ranks.device), target, run / f"{encoding}.jsonl", ranks)
        folder = ModelFolder.open(source)
        learner.folder = folder if recipe.held_out and folder.has("vae") else None
        learner.learn()
        learner.write(folder, target)
    if ranks.first and not (run / f"model-{encoding}").exists():
        quantize_folder(target, run / f"model-{encoding}", encoding, method=getattr(recipe, encoding).rounding)
    ranks.same(0.0)


class Learner:
    """A student with all that its training needs. `folder` is the source, if its sample sheets can be drawn."""

    folder: ModelFolder | None = None

    def __init__(self, recipe: ModelRecipe, encoding: str, parts: Parts, target: Path, log: Path,
                 ranks: Ranks) -> None:
        self.recipe, self.parts, self.ranks, self.log = recipe, parts, ranks, log
        settings: ModelQatSettings = getattr(recipe, encoding)
        self.settings = settings
        student = parts.student
        set_rounding(student, settings.rounding)
        stream = PromptStream([recipe.folder / name for name in recipe.prompts.files], recipe.prompts.composed,
                              recipe.prompts.seed, ranks, self._forbidden())
        self.reader = PromptReader(stream, parts.tokenizer, parts.teacher_encoder, parts.student_encoder, ranks.device)
        fresh = not (target / "state" / "current.json").is_file()
        if settings.calibrate and fresh:
            self._calibrate(encoding)
        ranks.share(student)
        if settings.recompute:
            recompute_blocks(student)
        self.sharded = settings.shard and deal_out(student, ranks)
        self.average = Average(student, settings.ema)
        self.optimizers = [_optimizer(student, settings)]
        self.snapshot = Snapshot(target, student, self.average, self.optimizers, ranks, self.sharded)
        done, self.saved = self.snapshot.restore()
        self.schedule = Schedule(settings, ranks, done)
        if done and not self.saved:  # another number of processes: prompts that were read are passed over
            self.reader.position = done * settings.accumulate * settings.batch
        torch.manual_seed(recipe.prompts.seed + 200 + ranks.rank + done * ranks.world)

    def learn(self) -> None:
        """All steps of the schedule; the student then holds the averaged weights."""
        settings, ranks = self.settings, self.ranks
        if self.schedule.steps > self.schedule.step:
            distillation = Distillation(
                settings, ranks, Drawer(self.parts.student, (1, 1), self.parts.text_length, ranks.device),
                self.parts.student, self.average, self.optimizers, self.snapshot, self.schedule,
                Objective(settings.loss, settings.contrast, self.recipe.path.grid, ranks), self.log, self.sharded,
                self.sheet if self.folder is not None else None,
                make_critic(settings.critic, self.parts.config, ranks, self.saved), self.saved)
            if self.settings.sheet_every and self.folder is not None and not self.saved:
                self._draw(self.parts.teacher, self.parts.teacher_encoder, "teacher")
            distillation.run(self.batches(distillation))
        self.average.install()

    def batches(self, distillation: Distillation) -> list[Journeys]:
        """One batch on its way for every size."""
        made, empty = [], self.reader.empty()
        for index, size in enumerate(self.recipe.sizes):
            tokens = size[1] // TOKEN_SIDE, size[0] // TOKEN_SIDE
            count = tokens[0] * tokens[1]
            teacher, student = (Drawer(network, tokens, self.parts.text_length, self.ranks.device)
                                for network in (self.parts.teacher, self.parts.student))
            made.append(Journeys(
                self.recipe.path, sigmas(count, self.recipe.path.grid).tolist(),
                Guided(teacher, self.recipe.path.guidance, empty), self.reader,
                self.settings.batch, (count, self.parts.config.in_channels),
                (self.parts.text_length, self.parts.config.joint_attention_dim), self.ranks.device,
                self.recipe.prompts.seed + index, bool(self.settings.contrast), distillation.saved_batch(index),
                student))
        return made

    def sheet(self, step: int) -> None:
        """The student draws the held-out prompts into a PNG beside the log; every process takes part."""
        self._draw(self.parts.student, self.parts.student_encoder, str(step))

    @torch.no_grad()
    def _draw(self, network: nn.Module, encoder: nn.Module, name: str) -> None:
        assert self.folder is not None
        device, size = self.ranks.device, self.recipe.sizes[0]
        tokens, channels = (size[1] // TOKEN_SIDE, size[0] // TOKEN_SIDE), self.parts.config.in_channels
        levels = sigmas(tokens[0] * tokens[1], self.recipe.path.grid).tolist()
        drawer: Network = Drawer(network, tokens, self.parts.text_length, device)
        if network is self.parts.teacher:
            drawer = Guided(drawer, self.recipe.path.guidance, self.reader.empty())
        pictures = []
        with self.folder.checkpoint("vae") as weights:
            vae = build_and_load(Autoencoder, AutoencoderConfig.from_dict(self.folder.config("vae")), weights,
                                 dtype=torch.float32).to(device)
        for seed, prompt in enumerate(self.recipe.held_out):
            ids, mask = (tensor.to(device) for tensor in self.parts.tokenizer.encode([prompt]))
            with autocast(device):
                text = encoder(ids, mask).float()
            noise = torch.randn((1, channels, *tokens), generator=torch.Generator().manual_seed(seed))
            x = drawer.walk(noise.flatten(2).transpose(1, 2).to(device), text, levels)
            if self.ranks.first:
                pictures.append(vae.image_from_latents(x.transpose(1, 2).unflatten(2, tokens)).cpu())
        if self.ranks.first:
            save_grid(torch.cat(pictures), 8, self.log.with_suffix(f".{name}.png"))

    def write(self, source: ModelFolder, target: Path) -> None:
        """Latent weights and norms (float32) and dense matrices (float16) as a model folder; the saved state goes."""
        coded = {f"{name}.weight" for name in coded_layers(self.parts.student)}
        shapes = {name: tuple(tensor.shape) for name, tensor in self.parts.student.state_dict().items()}
        fine = {name for name, shape in shapes.items() if name in coded or len(shape) == 1}
        if not self.ranks.first:
            for _ in whole(self.parts.student):
                pass
        else:
            (target / "transformer").mkdir(parents=True, exist_ok=True)
            share_parts(source.root, target, tuple(part for part in _SHARED if source.has(part)))
            index = source.index
            if self.recipe.path.guidance > 1:  # its students need none
                settings = index.get("linocut", {}) | {"default_steps": self.recipe.path.grid}
                index = index | {"is_distilled": True, "linocut": settings}
            for name, content in (("transformer/config.json", source.config("transformer")),
                                  ("model_index.json", index)):
                atomic_write_bytes(target / name, (json.dumps(content, indent=2) + "\n").encode())
            declared = [(name, "F32" if name in fine else "F16", shape) for name, shape in shapes.items()]
            with CheckpointWriter(target / WEIGHTS, declared, {"format": "pt"}) as writer:
                for name, tensor in whole(self.parts.student):
                    value = tensor.detach().float().cpu()
                    writer.write(name, (value if name in fine else value.half()).numpy())
            self.snapshot.drop()
        self.ranks.same(0.0)

    def _forbidden(self) -> list[str]:
        lines = list(self.recipe.held_out)
        for name in self.recipe.prompts.exclude:
            file = self.recipe.folder / name
            try:
                lines += file.read_text(encoding="utf-8").splitlines()
            except OSError as error:
                raise UsageError(f"{file}: not a readable text file of prompts: {error}") from error
        return lines

    @torch.no_grad()
    def _calibrate(self, encoding: str) -> None:
        """Start from GPTQ's codes on states of the teacher's path, the same on every process."""
        from linocut.quantize.policy import Policy

        recipe, device, length = self.recipe, self.ranks.device, self.parts.text_length
        size = recipe.sizes[0]
        tokens = size[1] // TOKEN_SIDE, size[0] // TOKEN_SIDE
        teacher = Drawer(self.parts.teacher, tokens, length, device)
        levels = sigmas(tokens[0] * tokens[1], recipe.path.grid).tolist()
        guided = Guided(teacher, recipe.path.guidance, self.reader.empty())
        batches, generator = [], torch.Generator().manual_seed(recipe.prompts.seed + 300)
        for _ in range(0, self.settings.calibrate, 4):
            text, own = self.reader.read(4)
            x = torch.randn(4, tokens[0] * tokens[1], self.parts.config.in_channels, generator=generator).to(device)
            for here, there in pairwise(levels):
                batches.append(Batch(x, own, torch.full((4,), here, device=device)))
                x = guided.walk(x, text, [here, there])
        plain = Plain(self.parts.student)
        with plain as network:
            calibrate(network, batches, teacher.image_ids, teacher.text_ids, Policy.preset("flux2", encoding))


class Plain:
    """A student whose quantized layers compute, inside the block, with their latent weights as they are."""

    def __init__(self, student: nn.Module) -> None:
        self.student, self.layers = student, coded_layers(student)

    def __enter__(self) -> Any:
        self.eps = [layer.eps for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.eps = 1.0
        return self.student

    def __exit__(self, *_: object) -> None:
        for layer, eps in zip(self.layers.values(), self.eps, strict=True):
            layer.eps = eps


def _optimizer(student: nn.Module, settings: ModelQatSettings) -> torch.optim.Optimizer:
    coded = {id(layer.weight) for layer in coded_layers(student).values()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in student.parameters() if (id(p) in coded) == latent], "lr": lr}
        for latent, lr in ((True, settings.lr), (False, settings.dense_lr))]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=next(student.parameters()).is_cuda)


def benchmark(recipe: ModelRecipe, encoding: str, run: Path, ranks: Ranks, steps: int, price: float) -> dict[str, Any]:
    """Some steps with random weights of the source's shapes: memory, pictures a second, and what the full run takes.

    `price` is of one GPU for an hour, in whatever money. A picture is one row of a batch for one step of the grid.
    """
    recipe = recipe.at_random()
    assert recipe.shapes is not None
    settings = replace(getattr(recipe, encoding), steps=steps, log_every=10**9, save_every=10**9, calibrate=0,
                       max_seconds=1e9)
    quick = replace(recipe, **{encoding: settings})
    parts = random_parts(recipe.shapes, encoding, settings.residual, ranks.device)
    learner = Learner(quick, encoding, parts, run / "benchmark", run / "benchmark.jsonl", ranks)
    marks = []
    update = learner.average.update

    def mark() -> None:
        update()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.monotonic())

    learner.average.update = mark  # type: ignore[method-assign]
    with contextlib.redirect_stdout(sys.stderr):
        learner.learn()
    each = _median([b - a for a, b in pairwise(marks[1:])])
    full: ModelQatSettings = getattr(recipe, encoding)
    rows = full.batch * full.accumulate * ranks.world
    memory = torch.cuda.max_memory_allocated(ranks.device) if ranks.device.type == "cuda" else _resident()
    most = int(_largest(memory, ranks))
    samples = full.steps * full.batch * full.accumulate * recipe.gpus
    gpu_hours = samples * each * ranks.world / rows / 3600
    table = [{"gpus": count, "hours": gpu_hours / count, "cost": gpu_hours * price} for count in (1, 2, 8, 64)]
    return {"recipe": recipe.name, "encoding": encoding, "processes": ranks.world, "device": str(ranks.device),
            "sharded": learner.sharded, "batch": full.batch, "accumulate": full.accumulate, "sizes": recipe.sizes,
            "seconds_a_step": each, "samples_per_second": rows / each, "samples_in_all": samples,
            "peak_bytes_per_process": most, "gpu_hours": gpu_hours, "price_per_gpu_hour": price,
            "full_run": table}


def print_benchmark(found: dict[str, Any]) -> Iterator[str]:
    """The lines that tell a benchmark's result."""
    yield (f"{found['recipe']} {found['encoding']}: {found['processes']} x {found['device']}"
           f"{', dealt out (FSDP2)' if found['sharded'] else ''}, {found['batch']} rows x {found['accumulate']} a step")
    yield (f"memory {found['peak_bytes_per_process'] / 1e9:.1f} GB a process, {found['seconds_a_step']:.3f} s a step, "
           f"{found['samples_per_second']:.2f} samples a second")
    yield f"the full run: {found['samples_in_all']:,} samples, {found['gpu_hours']:.1f} GPU hours"
    for row in found["full_run"]:
        yield (f"  {row['gpus']:3d} GPUs: {row['hours']:8.1f} hours, {row['cost']:10.0f} at "
               f"{found['price_per_gpu_hour']:g} an hour" + ("" if row["gpus"] == found["processes"] else
                                                             " (if speed grows with their number)"))


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _resident() -> int:
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _largest(value: float, ranks: Ranks) -> float:
    if ranks.world == 1:
        return value
    import torch.distributed as dist
    box: Tensor = torch.tensor([value], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return float(box)
