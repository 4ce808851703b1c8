"""A recipe that distils a model that exists, from prompts alone: one TOML file that names it and fixes all the rest.

`linocut train` knows it by its key `source`. Its stages are `ternary` and `binary`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from linocut.errors import UsageError
from linocut.models.configs import AutoencoderConfig, Flux2Config, Qwen3Config
from linocut.models.synthetic import KNOWN, SyntheticModel
from linocut.train.recipe import PathSettings, QatSettings, read_held_out, section

TOY = SyntheticModel(
    transformer=Flux2Config(in_channels=64, num_layers=1, num_single_layers=2, num_attention_heads=1,
                            joint_attention_dim=384, timestep_guidance_channels=128),
    text_encoder=Qwen3Config(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                             num_attention_heads=2, num_key_value_heads=1, head_dim=64),
    vae=AutoencoderConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=16),
    text_taps=(1, 2, 3), text_length=64, default_size=(64, 64), ordinary_tokens=300)
"""What a rehearsal trains on instead: klein's structure with random weights, small enough for any machine."""


@dataclass(frozen=True)
class PromptSettings:
    """Text files with one prompt a line, beside the recipe; a share `composed` is made by the grammar of scenes, all
    where there are no files. Lines of `exclude`, such as prompts of benchmarks, are left out."""

    files: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    composed: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class ModelQatSettings(QatSettings):
    """`batch` is per process and size of picture. Dense tensors learn with `dense_lr`. With `shard` several processes
    deal the student out among them (FSDP2), else each holds all of it; with `recompute` blocks compute twice to store
    less."""

    dense_lr: float = 1e-5
    shard: bool = True
    recompute: bool = True


@dataclass(frozen=True)
class ModelRecipe:
    """`source` is a dense model: a folder or a name on the hub. Batches of `sizes` (width, height) take turns. `gpus`
    is how many processes the numbers of steps are meant for; on fewer, raise `accumulate` to see as many samples."""

    name: str
    source: str
    folder: Path
    sizes: tuple[tuple[int, int], ...]
    prompts: PromptSettings = field(default_factory=PromptSettings)
    path: PathSettings = field(default_factory=PathSettings)
    ternary: ModelQatSettings = field(default_factory=ModelQatSettings)
    binary: ModelQatSettings = field(default_factory=ModelQatSettings)
    held_out: tuple[str, ...] = ()
    gpus: int = 8
    shapes: SyntheticModel | None = None  # of random weights: in rehearsals and benchmarks

    @classmethod
    def from_table(cls, table: dict[str, Any], path: Path) -> ModelRecipe:
        """Read a recipe that names a `source`. Raises UsageError for unknown keys and settings that do not fit."""
        known = {f.name for f in fields(cls)} - {"folder", "shapes"}
        if set(table) - known:
            raise UsageError(f"{path}: unknown sections {sorted(set(table) - known)}; known are {sorted(known)}")
        missing = [key for key in ("name", "source", "sizes") if key not in table]
        if missing:
            raise UsageError(f"{path}: a recipe for a model needs name, source and sizes; missing are "
                             f"{', '.join(missing)}")
        held_out: tuple[str, ...] = ()
        if "held_out" in table:
            lines = read_held_out(path, table["held_out"])
            held_out = tuple(line.rpartition("|")[2].strip() for line in lines if line.strip() and line[0] != "#")
        students = [section(ModelQatSettings, table, name, path) for name in ("ternary", "binary")]
        recipe = cls(table["name"], table["source"], path.parent, tuple(tuple(size) for size in table["sizes"]),
                     section(PromptSettings, table, "prompts", path), section(PathSettings, table, "path", path),
                     students[0], students[1], held_out, int(table.get("gpus", 8)))
        for name in ("ternary", "binary"):
            block = getattr(recipe, name).batch // recipe.path.grid
            if getattr(recipe, name).batch % recipe.path.grid or (getattr(recipe, name).contrast and block % 2):
                raise UsageError(f"{path}: {name}.batch must be a multiple of path.grid = {recipe.path.grid}, and of "
                                 f"twice that with contrast; found {getattr(recipe, name).batch}")
            if getattr(recipe, name).pixels:
                raise UsageError(f"{path}: {name}.pixels is for recipes with an autoencoder; take it out")
            if getattr(recipe, name).tasks:
                raise UsageError(f"{path}: {name}.tasks is for recipes with scenes; take it out, and see [prompts]")
            if getattr(recipe, name).start:
                raise UsageError(f"{path}: {name}.start is for recipes that train their own teacher; take it out")
        if not recipe.sizes or any(len(size) != 2 for size in recipe.sizes):
            raise UsageError(f"{path}: sizes is a list of [width, height], found {table['sizes']}")
        if len(recipe.path.substeps) != recipe.path.grid:
            raise UsageError(f"{path}: path.substeps needs one number per step of the grid ({recipe.path.grid})")
        return recipe

    def rehearsal(self) -> ModelRecipe:
        """The same recipe for a toy with random weights, in a few steps."""
        def short(settings: ModelQatSettings) -> ModelQatSettings:
            return replace(settings, steps=8, batch=2 * self.path.grid, accumulate=min(2, settings.accumulate),
                           warmup=2, log_every=2, save_every=3, calibrate=min(4, settings.calibrate),
                           freeze=0.3 if settings.freeze else 0.0)

        return replace(self, shapes=TOY, sizes=((64, 64), (96, 64)), ternary=short(self.ternary),
                       binary=short(self.binary), prompts=replace(self.prompts, files=(), exclude=()))

    def at_random(self) -> ModelRecipe:
        """The same recipe for random weights of the source's shapes, which must be known (klein-4b)."""
        if self.shapes is not None:
            return self
        if self.source not in KNOWN:
            raise UsageError(f"the shapes of {self.source} are not known here; known are {', '.join(KNOWN)}")
        return replace(self, shapes=KNOWN[self.source], prompts=replace(self.prompts, files=(), exclude=()))


def read_recipe(path: Path) -> ModelRecipe | None:
    """The recipe in a file if it is one for a model that exists, else None."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: not a readable recipe: {error}") from error
    return ModelRecipe.from_table(table, path) if "source" in table else None
