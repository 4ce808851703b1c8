"""Trains the embedded world's detector on rendered scenes, by the clock, and measures it on scenes of known content.

    python -m linocut.eval.world_training recipes/embedded/detector.toml --out runs/detector

Runs alone or once per GPU under torchrun. SIGTERM, and the time that is over, end the steps; then the weights are
averaged, batch norms measured anew, and the folder written: `detector.json`, `model.safetensors`, `report.txt`,
`scenes.png` (what it trained on). A run that was cut goes on from its saved state.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linocut.errors import UsageError
from linocut.eval.ground_truth import Case, make_cases, measure, renderer_of
from linocut.eval.world_detector import CONFIG, WorldDetector, save_detector, write_description
from linocut.eval.world_network import STRIDE, NetworkConfig, WorldNetwork
from linocut.eval.world_scenes import Labelled, WorldScenes, redraw, square_to
from linocut.models.autoencoder import Autoencoder
from linocut.train.autoencoder import save_grid
from linocut.train.loop import Ranks, Schedule, autocast, chosen_device, leave_group, stop_in_order
from linocut.train.optimize import Average, set_rate
from linocut.train.palette import COLOURS
from linocut.train.recipe import StageSettings
from linocut.train.vocabulary import objects
from linocut.train.weights import State

_WEIGHTS = {"heat": 1.0, "class": 1.0, "colour": 0.5, "box": 0.5}


@dataclass(frozen=True)
class DetectorRecipe(StageSettings):
    """`size` of the scenes in pixels; `shapes` (width, height) of the pictures trained on, the first most often;
    `cases` per task to measure with; `things` limits the classes to the first so many (0: all); `vae` redraws some
    pictures: a model folder, or "" for none."""

    size: int = 256
    shapes: tuple[tuple[int, int], ...] = ((256, 256), (320, 192))
    widths: tuple[int, int, int, int] = (48, 96, 160, 224)
    head: int = 192
    cases: int = 500
    things: int = 0
    layouts: int = 8192
    vae: str = "embedded"
    seed: int = 0
    settle: int = 60  # batches that the batch norms are measured on at the end

    @classmethod
    def from_file(cls, path: Path) -> DetectorRecipe:
        """Read a TOML file. Raises UsageError for one that cannot be read, or has unknown keys."""
        try:
            table: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"{path}: not a readable recipe: {error}") from error
        known = {each.name for each in fields(cls)}
        if set(table) - known:
            raise UsageError(f"{path}: unknown keys {sorted(set(table) - known)}; known are {sorted(known)}")
        if "shapes" in table:
            table["shapes"] = tuple((width, height) for width, height in table["shapes"])
        if "widths" in table:
            table["widths"] = tuple(table["widths"])
        recipe = cls(**table)
        if any(side % 32 for shape in recipe.shapes for side in shape):
            raise UsageError(f"{path}: shapes must be multiples of 32, found {recipe.shapes}")
        return recipe

    @property
    def network(self) -> NetworkConfig:
        return NetworkConfig(self.widths, self.head)


def train_detector(recipe: DetectorRecipe, out: Path, sprites: Path, device: str | None = None,
                   until: float = math.inf) -> None:
    """Train, measure and write a detector into `out`. Steps are over by `until` (seconds since 1970)."""
    ranks = Ranks.start(device, until)
    stop_in_order()
    torch.manual_seed(recipe.seed)
    things = list(range(recipe.things or len(objects())))
    network = WorldNetwork(recipe.network, len(things), len(COLOURS)).to(ranks.device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    ranks.share(network)
    torch.manual_seed(recipe.seed + 1 + ranks.rank)
    random.seed(recipe.seed + 1 + ranks.rank)
    scenes = WorldScenes(sprites, recipe.size, ranks.device, _autoencoder(recipe.vae, ranks.device),
                         recipe.seed + ranks.rank, things, recipe.layouts)
    average = Average(network, recipe.ema)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.lr, betas=(0.9, 0.98), weight_decay=0.02,
                                  fused=ranks.device.type == "cuda")
    state = State(out, network, average, [optimizer])
    schedule = Schedule(recipe, ranks, state.restore())
    if ranks.first:
        size = sum(p.numel() for p in network.parameters())
        print(f"detector on {ranks.world} x {ranks.device}: {size:,} parameters, {len(things)} classes, "
              f"ready after {time.monotonic() - ranks.began:.0f} s", flush=True)
        save_grid(scenes.spoilt(16).image, 8, out / "scenes.png")
    network.train()
    for _ in schedule:
        width, height = recipe.shapes[0] if random.random() < 0.7 else random.choice(recipe.shapes)
        batch = scenes.spoilt(recipe.batch, (height, width))
        with autocast(ranks.device):
            parts = losses(network, batch)
        loss = sum((_WEIGHTS[name] * part for name, part in parts.items()), torch.zeros((), device=ranks.device))
        loss.backward()
        ranks.average(p.grad for p in network.parameters())
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        set_rate([optimizer], schedule.rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        schedule.log(lambda p=parts: "  ".join(f"{name} {float(part.detach()):.4f}" for name, part in p.items()))
        if schedule.due:
            state.save(schedule.step + 1)
    average.install()
    if ranks.first:
        _settle(network, scenes, recipe)
        save_detector(out, network, recipe.network, [objects()[thing].name for thing in things], COLOURS)
        state.drop()
        report(recipe, out, scenes, things)
    ranks.same(0.0)


def losses(network: WorldNetwork, batch: Labelled) -> dict[str, Tensor]:
    """Penalty-reduced focal loss of the heat map; cross entropy of class and colour, and absolute error of the box, at
    the cell of each centre and at a random one beside it."""
    logits, features = network(batch.image.contiguous(memory_format=torch.channels_last))
    logits = logits.float()
    there = batch.classes >= 0
    centre, extent = (batch.boxes[..., :2] + batch.boxes[..., 2:]) / 2 / STRIDE, \
        (batch.boxes[..., 2:] - batch.boxes[..., :2]) / STRIDE
    rows, columns = logits.shape[-2:]
    limit = torch.tensor([columns - 1, rows - 1], device=centre.device)
    cell = torch.minimum(centre.long().clamp_min(0), limit)
    count = there.sum().clamp_min(1)
    result = {"heat": _focal(logits, heat_map(cell, extent, there, (rows, columns))) / count}
    beside = torch.minimum((cell + torch.randint(-1, 2, cell.shape, device=cell.device)).clamp_min(0), limit)
    both = torch.cat([cell, beside], 1)
    classes, colours, box = (each.float() for each in network.at(features, both[..., 1] * columns + both[..., 0]))
    wanted = torch.cat([centre.repeat(1, 2, 1) - both - 0.5, extent.clamp_min(0.5).log().repeat(1, 2, 1)], -1)
    twice = there.repeat(1, 2)
    result["class"] = F.cross_entropy(classes.transpose(1, 2), batch.classes.repeat(1, 2), ignore_index=-1)
    tinted = (batch.colours.repeat(1, 2) >= 0) & twice
    told = F.cross_entropy(colours.transpose(1, 2), batch.colours.repeat(1, 2).clamp_min(0), reduction="none")
    result["colour"] = (told * tinted).sum() / tinted.sum().clamp_min(1)
    result["box"] = ((box - wanted).abs().sum(-1) * twice).sum() / (2 * count)
    return result


def heat_map(cell: Tensor, extent: Tensor, there: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B, h, w]: 1 at the cells [B, K, 2] (x, y) of centres, falling off around them as a bell a twelfth as wide as the
    thing, `extent` [B, K, 2] in cells."""
    y = torch.arange(shape[0], device=cell.device)[:, None]
    x = torch.arange(shape[1], device=cell.device)
    squared = (x - cell[..., 0, None, None]) ** 2 + (y - cell[..., 1, None, None]) ** 2
    width = (extent.mean(-1) / 12).clamp_min(0.7)[..., None, None]
    bell = torch.exp(-squared / (2 * width.square())) * there[..., None, None]
    return bell.amax(1)


def _focal(logits: Tensor, target: Tensor) -> Tensor:
    p = logits.sigmoid()
    at_centres = torch.where(target > 0.999, (1 - p).square() * F.logsigmoid(logits), 0.0)
    elsewhere = torch.where(target > 0.999, 0.0, (1 - target) ** 4 * p.square() * F.logsigmoid(-logits))
    return -(at_centres + elsewhere).sum()


@torch.no_grad()
def _settle(network: WorldNetwork, scenes: WorldScenes, recipe: DetectorRecipe) -> None:
    """Measure the batch norms' statistics for the averaged weights."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    network.train()
    for number in range(recipe.settle):
        width, height = recipe.shapes[0] if number % 10 < 7 else recipe.shapes[number % len(recipe.shapes)]
        image = scenes.spoilt(recipe.batch, (height, width)).image.contiguous(memory_format=torch.channels_last)
        with autocast(scenes.device):
            network(image)


def measure_again(recipe: DetectorRecipe, out: Path, sprites: Path, device: str | None = None) -> None:
    """Measure the detector in `out` as after its training, with the recipe's autoencoder as it is now.

    Raises ModelNotFoundError where there is no detector.
    """
    things = list(range(recipe.things or len(objects())))
    chosen = chosen_device(device)
    WorldDetector(out, chosen)  # before the scenes are made
    scenes = WorldScenes(sprites, recipe.size, chosen, _autoencoder(recipe.vae, chosen), recipe.seed, things,
                         recipe.layouts)
    report(recipe, out, scenes, things)


@torch.no_grad()
def report(recipe: DetectorRecipe, out: Path, scenes: WorldScenes, things: list[int]) -> None:
    """Measure what was written, at every shape: plain scenes, and scenes redrawn by the autoencoder."""
    detector = WorldDetector(out, scenes.device)
    cases = make_cases(recipe.cases, things if recipe.things else None)
    plain = renderer_of(scenes.renderer)
    tables, lines = {}, []
    for width, height in recipe.shapes:
        for way, vae in [("plain", None)] + ([] if scenes.vae is None else [("redrawn", scenes.vae)]):
            def draw(part: Sequence[Case], shape: tuple[int, int] = (height, width),
                     vae: Autoencoder | None = vae) -> Tensor:
                image = square_to(plain(part), shape)
                return image if vae is None else redraw(image, vae, disturb=False)

            table = measure(cases, draw, detector.look_at, detector.thresholds)
            tables[f"{width}x{height} {way}"] = table
            mean = sum(row["accuracy"] for row in table.values()) / len(table)
            lines.append(f"{width}x{height} {way:8s} " + "  ".join(
                f"{task} {100 * row['accuracy']:.2f}" for task, row in table.items()) + f"  mean {100 * mean:.2f} %")
    description = json.loads((out / CONFIG).read_text("utf-8"))
    write_description(out, description | {"accuracy": tables})
    text = "\n".join(lines)
    print(text, flush=True)
    (out / "report.txt").write_text(text + "\n", "utf-8")


def _autoencoder(name: str, device: torch.device) -> Autoencoder | None:
    """The autoencoder of a model folder, frozen."""
    if not name:
        return None
    from linocut.formats.folder import ModelFolder
    from linocut.models.configs import AutoencoderConfig
    from linocut.models.convert import build_and_load

    folder = ModelFolder.open(name)
    with folder.checkpoint("vae") as checkpoint:
        vae = build_and_load(Autoencoder, AutoencoderConfig.from_dict(folder.config("vae")), checkpoint,
                             dtype=torch.float32)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return vae.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sprites", type=Path, default=Path(".cache/sprites"))
    parser.add_argument("--device")
    parser.add_argument("--until", type=float, default=math.inf, help="steps end by then, in seconds since 1970")
    parser.add_argument("--measure", action="store_true", help="do not train; measure again what is in the folder")
    options = parser.parse_args()
    if options.measure:
        measure_again(DetectorRecipe.from_file(options.recipe), options.out, options.sprites, options.device)
        return
    train_detector(DetectorRecipe.from_file(options.recipe), options.out, options.sprites, options.device,
                   options.until)
    leave_group()


if __name__ == "__main__":
    main()
