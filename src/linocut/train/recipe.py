"""A training recipe: one TOML file that fixes the networks, the data, and the length and settings of each stage.

Stages, in order: `vae` (autoencoder), `teacher` (text encoder and transformer, flow matching), `ternary` and `binary`
(quantization-aware distillation, to few steps and guidance 1 like klein), `export`.
Every stage leaves its result in the run folder and can be run again from there.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from linocut.errors import UsageError
from linocut.models.configs import AutoencoderConfig, Flux2Config, Qwen3Config
from linocut.quantize.policy import FLUX2_PRESETS, Policy
from linocut.quantize.rounding import FAKE_METHODS
from linocut.train.scenes import TASKS

T = TypeVar("T")
LOSSES = ("velocity", "normalized", "balanced")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UsageError(f"{name} is a share: expected 0 to 1, found {value}")


def _are_shares(tasks: object) -> bool:
    return isinstance(tasks, Mapping) and set(tasks) <= set(TASKS) and all(
        type(share) in (int, float) and 0 <= share < math.inf for share in tasks.values()) and any(tasks.values())


@dataclass(frozen=True)
class DataSettings:
    """Scenes: `size` pixels a side, `scenes` per process, `captions` wordings of each, `text_length` tokens.

    Teacher and students also see pictures of other `shapes`, (width, height) in pixels: half of what they learn from
    is square, and these share the rest. A model that saw squares alone composes squares, whatever it is asked for."""

    size: int = 256
    shapes: tuple[tuple[int, int], ...] = ()
    scenes: int = 300_000
    captions: int = 3
    text_length: int = 64
    vocab_size: int = 2048
    seed: int = 0


@dataclass(frozen=True)
class StageSettings:
    """Length and optimizer of a stage. `batch` is per process; `max_seconds` shortens the schedule if needed.

    Every `save_every` steps all that is needed to go on after a cut is written. The learning rate stays at its peak for
    the share `constant` of the schedule.
    """

    steps: int = 1000
    batch: int = 256
    lr: float = 6e-4
    warmup: int = 100
    max_seconds: float = 1e9
    ema: float = 0.999
    log_every: int = 100
    save_every: int = 1500
    constant: float = 0.0


@dataclass(frozen=True)
class VaeSettings(StageSettings):
    """`crop` pixels a side until `whole_from` of the schedule, whole pictures after; `kl` weighs the prior.

    `start` is a model folder, relative to the recipe's, whose autoencoder the stage goes on from; empty: from nothing.
    Its `norm_num_groups` may be another one. `stay` weighs the distance from that one's latents, in parts of their
    variance. With `decoder` the decoder learns alone, to read the latents of `start`, whose statistics stay, disturbed
    by up to `noise` of their deviation.
    `compile` fuses the network on a GPU; it pays only when the stage runs for many minutes.
    """

    compile: bool = False
    crop: int = 128
    whole_from: float = 0.75
    kl: float = 2e-4
    start: str = ""
    stay: float = 0.0
    decoder: bool = False
    noise: float = 0.0

    def __post_init__(self) -> None:
        if (self.stay or self.decoder) and not self.start:
            raise UsageError("vae.stay and vae.decoder need a model folder whose latents to keep: set vae.start")


@dataclass(frozen=True)
class TeacherSettings(StageSettings):
    """`muon` orthogonalizes the updates of block matrices; `naming` weighs the loss of the naming head at the start.
    A share `pixels` of what a latent channel counts goes by how much it shows in the picture (`visibility`).
    `start` is a model folder, relative to the recipe's, whose weights the teacher begins with; empty: from nothing.
    With `keep_text` its text encoder and tokenizer stay as they are, and students of either encoding can take the place
    of those in that folder one by one. At every step, `fresh` new scenes (on average) take the place of the oldest that
    each process learns from: scenes that come again and again are learned by heart."""

    muon: bool = True
    weight_decay: float = 0.01
    naming: float = 0.05
    pixels: float = 0.0
    start: str = ""
    keep_text: bool = False
    fresh: int = 0

    def __post_init__(self) -> None:
        _check_share("pixels", self.pixels)
        if self.fresh < 0:
            raise UsageError(f"teacher.fresh is a number of scenes per step, found {self.fresh}")
        if self.keep_text and not self.start:
            raise UsageError("teacher.keep_text needs a model folder whose text encoder to keep: set teacher.start")


@dataclass(frozen=True)
class PathSettings:
    """How the teacher draws for its students: `grid` steps of the sampler, each in `substeps`. The students learn each
    step of the grid in one; `weights` say how much an error in each counts (equally if left out). A share `jitter` of
    the paths has other levels between the ends, so that the students can also draw in more steps. The teacher draws
    with `guidance` (`train.guidance`; 1 for none), the students without."""

    grid: int = 4
    substeps: tuple[int, ...] = (1, 1, 1, 2)
    weights: tuple[float, ...] = ()
    jitter: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.guidance, bool) or not 1 <= self.guidance <= 100:  # also catches NaN
            raise UsageError(f"path.guidance must lie in 1 (none) to 100, found {self.guidance}")


@dataclass(frozen=True)
class QatSettings(StageSettings):
    """`scenes` captions per process (times data.captions), of tasks by their shares `tasks` (any sum; those of
    `train.scenes` if left out), which GPTQ sees, too; `residual` share of the float weights, annealed to 0 over
    `anneal` of the schedule; by half of it a share `on_policy` of the states are the student's own. With `calibrate`
    prompts (0 for none) the student starts from GPTQ codes; with `start`, a folder relative to the recipe's, from what
    another run made: latent weights that this stage left there, or a packed model with a student of this encoding
    (`warm`). `rounding` of ternary weights: "tied"
    (`quantize.rounding`) or BitNet's "absmean", to compare with.

    `loss` is the mean squared error of the "velocity", or that divided by what part of the velocity prompts decide at
    each step of the grid ("normalized": the variance over prompts of the clean picture that the teacher foresees) or by
    how large it was lately there ("balanced": a step counts by how much its error changes in proportion).
    `contrast` weighs the error of the difference that another prompt makes to the velocity, at the first half of the
    grid, where rows then go in pairs with the same noise. For the last share `freeze` of the schedule codes stay as the
    average has them, and scales and dense tensors learn on. Gradients of `accumulate` batches make one update. Every
    `sheet_every` steps (0 for never) the averaged student draws the held-out prompts. `muon` orthogonalizes the updates
    of block matrices; `dense_lr` (0: the same as `lr`) is the learning rate of all other tensors. A share `pixels` of
    what a latent channel counts goes by how much it shows in the picture (`visibility`). With `critic` the last steps
    also learn to pass for the teacher's, on average moved that much as strongly as by their squared errors."""

    scenes: int = 100_000
    calibrate: int = 0
    start: str = ""
    rounding: str = "tied"
    residual: float = 0.5
    anneal: float = 0.25
    on_policy: float = 0.5
    loss: str = "velocity"
    contrast: float = 0.0
    freeze: float = 0.0
    accumulate: int = 1
    sheet_every: int = 0
    muon: bool = False
    dense_lr: float = 0.0
    pixels: float = 0.0
    critic: float = 0.0
    tasks: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UsageError(f"unknown loss {self.loss!r}; choose from {', '.join(LOSSES)}")
        if self.rounding not in FAKE_METHODS:
            raise UsageError(f"unknown rounding {self.rounding!r}; choose from {', '.join(FAKE_METHODS)}")
        if self.rounding != "tied" and (self.calibrate or self.freeze or self.start):
            raise UsageError(f"calibrate, freeze and start place weights for the rounding tied, not for "
                             f"{self.rounding}; set the first two to 0 and take the third out")
        if not 0 <= self.freeze < 1 or self.accumulate < 1 or self.contrast < 0:
            raise UsageError(f"a stage needs 0 <= freeze < 1, accumulate >= 1 and contrast >= 0; found {self.freeze}, "
                             f"{self.accumulate} and {self.contrast}")
        _check_share("pixels", self.pixels)
        _check_share("critic", self.critic)  # beyond 1 it could drive errors up for ever
        if self.tasks != {} and not _are_shares(self.tasks):
            raise UsageError(f"tasks are finite shares, 0 or more and not all 0, of {', '.join(TASKS)}; "
                             f"found {self.tasks}")


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs. `text_taps` are hidden-state indices as in transformers (0 is the embedding). `policy` is
    the preset that says which of the students' layers are packed, and how."""

    name: str
    transformer: Flux2Config
    text_encoder: Qwen3Config
    autoencoder: AutoencoderConfig
    text_taps: tuple[int, ...]
    data: DataSettings = field(default_factory=DataSettings)
    vae: VaeSettings = field(default_factory=VaeSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    path: PathSettings = field(default_factory=PathSettings)
    ternary: QatSettings = field(default_factory=QatSettings)
    binary: QatSettings = field(default_factory=QatSettings)
    held_out: tuple[str, ...] = ()
    policy: str = "flux2-embedded"
    default_steps: int | None = None  # what the exported model draws in unless told otherwise; None: path.grid

    @classmethod
    def from_file(cls, path: Path) -> Recipe:
        """Read a recipe. Raises UsageError for an unreadable file, an unknown key or networks that do not fit."""
        try:
            table = tomllib.loads(path.read_text("utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"{path}: not a readable recipe: {error}") from error
        unknown = set(table) - {f.name for f in fields(cls)}
        if unknown:
            raise UsageError(f"{path}: unknown sections {sorted(unknown)}; known are {[f.name for f in fields(cls)]}")
        needed = ("name", "text_taps", "transformer", "text_encoder", "autoencoder")
        missing = [name for name in needed if name not in table]
        if missing:
            raise UsageError(f"{path}: a recipe needs {', '.join(needed)}; missing are {', '.join(missing)}")
        prompts = table.pop("held_out", None)
        lines = read_held_out(path, prompts) if prompts else []
        held_out = tuple(line.split("|", 1)[-1].strip() for line in lines
                         if line.strip() and not line.startswith("#"))
        recipe = cls(
            name=table["name"], text_taps=tuple(table["text_taps"]), held_out=held_out,
            default_steps=table.get("default_steps"), policy=table.get("policy", cls.policy),
            transformer=Flux2Config.from_dict(table["transformer"]),
            text_encoder=Qwen3Config.from_dict(table["text_encoder"]),
            autoencoder=AutoencoderConfig.from_dict(table["autoencoder"]),
            data=section(DataSettings, table, "data", path), vae=section(VaeSettings, table, "vae", path),
            teacher=section(TeacherSettings, table, "teacher", path),
            path=section(PathSettings, table, "path", path),
            ternary=section(QatSettings, table, "ternary", path), binary=section(QatSettings, table, "binary", path))
        for name in ("vae", "teacher", "ternary", "binary"):
            if start := getattr(recipe, name).start:
                folder = path.parent / start
                if not folder.is_dir():
                    raise UsageError(f"{path}: {name}.start is no folder: {folder}; name another, or take it out to "
                                     "begin anew")
                recipe = replace(recipe, **{name: replace(getattr(recipe, name), start=str(folder))})
        recipe.check(path)
        return recipe

    def rehearsal(self) -> Recipe:
        """The same recipe with a few steps per stage on little data; shapes, and so what is compiled, are the same."""
        def short(settings: T, **changes: int) -> T:
            return replace(settings, steps=12, log_every=4, **changes)  # type: ignore[type-var]

        return replace(self, data=replace(self.data, scenes=min(self.data.scenes, 2048)), vae=short(self.vae),
                       teacher=short(self.teacher), ternary=short(self.ternary, scenes=1024, calibrate=4),
                       binary=short(self.binary, scenes=1024, calibrate=4))

    def check(self, path: Path) -> None:
        """Raises UsageError if parts do not fit one another; `path` is where they were read."""
        if self.policy not in FLUX2_PRESETS:
            raise UsageError(f"{path}: unknown policy {self.policy!r}; choose from {', '.join(FLUX2_PRESETS)}")
        for shape in self.data.shapes:
            pair = isinstance(shape, tuple) and len(shape) == 2 and all(isinstance(side, int) for side in shape)
            if not pair or any(side % self.token_side or side < self.token_side for side in shape):
                raise UsageError(f"{path}: data.shapes are [[width, height], ...] in multiples of {self.token_side} "
                                 f"pixels, found {shape!r}")
        features = len(self.text_taps) * self.text_encoder.hidden_size
        if features != self.transformer.joint_attention_dim:
            raise UsageError(f"{path}: joint_attention_dim must be taps x hidden_size = {features}, "
                             f"found {self.transformer.joint_attention_dim}")
        if self.transformer.in_channels != 4 * self.autoencoder.latent_channels:
            raise UsageError(f"{path}: in_channels must be 4 x latent_channels = "
                             f"{4 * self.autoencoder.latent_channels}, found {self.transformer.in_channels}")
        if len(self.path.substeps) != self.path.grid or len(self.path.weights) not in (0, self.path.grid):
            raise UsageError(f"{path}: path.substeps and path.weights need one number per step of the grid "
                             f"({self.path.grid})")
        for name in ("ternary", "binary"):
            if getattr(self, name).batch % self.path.grid:
                raise UsageError(f"{path}: {name}.batch must be a multiple of path.grid = {self.path.grid}, "
                                 f"found {getattr(self, name).batch}")
            if getattr(self, name).contrast and getattr(self, name).batch // self.path.grid % 2:
                raise UsageError(f"{path}: with {name}.contrast rows go in pairs; {name}.batch must be a multiple of "
                                 f"{2 * self.path.grid}, found {getattr(self, name).batch}")

    def packing(self, encoding: str) -> Policy:
        """Which layers of a student of that encoding are packed."""
        return Policy.preset(self.policy, encoding)

    @property
    def token_side(self) -> int:
        """Pixels of a token's side."""
        return 2 * 2 ** (len(self.autoencoder.block_out_channels) - 1)

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows and columns of a square picture's tokens."""
        side = self.data.size // self.token_side
        return side, side

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of tokens by turn: squares at every other one if there are further shapes."""
        others = [(height // self.token_side, width // self.token_side) for width, height in self.data.shapes]
        return [grid for other in others for grid in (self.tokens, other)] or [self.tokens]


def read_held_out(path: Path, name: str) -> list[str]:
    """Lines of the file of prompts that the recipe at `path` names. Raises UsageError for one that cannot be read."""
    try:
        return (path.parent / name).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: held_out is to be a text file of prompts, and {path.parent / name} cannot be read "
                         f"({error}); bring it along with the recipe") from error


def section(kind: type[T], table: Mapping[str, Any], name: str, path: Path) -> T:
    """The settings of a table in a recipe. Raises UsageError for a key that they do not have."""
    values = dict(table.get(name, {}))
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if set(values) - known:
        raise UsageError(f"{path}: unknown keys {sorted(set(values) - known)} in [{name}]; known are {sorted(known)}")
    return kind(**{key: _frozen(value) for key, value in values.items()})


def _frozen(value: Any) -> Any:
    """Lists as tuples, those within lists too."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
