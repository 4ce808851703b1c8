"""The ladder of rounding methods, from the plainest to the best, and the settings of those that look at prompts.

Each step adds one thing to the step before, but for the first two, which are plain roundings:

| method | adds |
|---|---|
| absmean | BitNet's rounding: scale mean|w|, nearest value |
| exact | scale and threshold with the least squared error of the weights |
| folds | exact changes of the weights that make them round better (`quantize.folds`) |
| gptq | errors are passed on to columns that follow, against the inputs that a layer sees; joint scales |
| descent | sweeps over the codes, each to its best value given all others |
| reconstruct | the weights of each block trained, rounded as they are, towards the block's outputs in full precision |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from linocut.errors import UsageError


@dataclass(frozen=True)
class Method:
    """One step of the ladder. `rounding` is a method of `quantize.rounding`, used where `gptq` is not."""

    name: str
    rounding: str = "exact"
    fold: bool = False
    gptq: bool = False
    sweeps: int = 0
    reconstruct: bool = False


LADDER = {method.name: method for method in (
    Method("absmean", "absmean"),
    Method("exact"),
    Method("folds", fold=True),
    Method("gptq", fold=True, gptq=True),
    Method("descent", fold=True, gptq=True, sweeps=3),
    Method("reconstruct", fold=True, gptq=True, sweeps=3, reconstruct=True),
)}
BEST = "reconstruct"


@dataclass(frozen=True)
class CalibrationSettings:
    """What is looked at. The last fifth of the prompts is only measured with (`held_out`).

    `size` is that of the pictures in pixels (None: the model's own, at most 512 a side), `steps` those of the sampler
    (None: the model's own). `damping` is a share of the inputs' mean square, `correction` the share of the error of
    earlier layers that a layer is asked to make up for. `iterations` and `rate` are those of the reconstruction; a
    step moves a weight by up to `rate` of its layer's mean magnitude.
    """

    prompts: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    steps: int | None = None
    batch: int = 8
    damping: float = 0.05
    correction: float = 0.5
    iterations: int = 200
    rate: float = 0.01
    seed: int = 0

    @property
    def held_out(self) -> int:
        """How many prompts, the last ones, are measured with and not calibrated on."""
        return max(1, len(self.prompts) // 5) if self.prompts else 0

    def identity(self) -> str:
        """A digest of all of this."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def read_prompts(path: Path, most: int | None = None) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines and lines that begin with # are passed over.

    In lines such as "task | prompt" only what follows the last bar counts. With `most`, that many spread over the file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a readable text file of prompts: {error}") from error
    prompts = [line.rpartition("|")[2].strip() for line in lines if line.strip() and not line.startswith("#")]
    if len(prompts) < 2:
        raise UsageError(f"{path}: at least two prompts are needed, one a line; found {len(prompts)}")
    if most is not None and most < len(prompts):
        prompts = [prompts[index * len(prompts) // most] for index in range(most)]
    return tuple(prompts)


def method_named(name: str) -> Method:
    """A step of the ladder by name."""
    if name not in LADDER:
        raise UsageError(f"unknown method {name!r}; choose from {', '.join(LADDER)}")
    return LADDER[name]


def check(method: Method, prompts: Sequence[str]) -> None:
    """Refuse a method that looks at prompts without any."""
    if method.gptq and not prompts:
        raise UsageError(f"method {method.name} looks at what goes through the model; give it prompts (--prompts FILE)")
