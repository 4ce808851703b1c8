"""Which noise levels a picture goes through, and where the transformer's answers to them come from.

The levels follow from the number of image tokens and of steps (`sampler.sigmas`). A model that carries the layers that
see the noise level evaluates them; one that carries a timestep table instead can only go through the schedules in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linocut.errors import UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.folder import ModelFolder
from linocut.formats.timestep_table import WEIGHTS_FILE, table_tensors
from linocut.models.configs import Flux2Config
from linocut.models.convert import build_and_load
from linocut.models.modulations import TimestepNetwork, tabulate
from linocut.pipeline.sampler import empirical_mu, sigmas

PRESET_SIZES = (
    (256, 256), (512, 512), (768, 768), (1024, 1024),
    (640, 480), (768, 512), (1024, 576), (1024, 768), (1280, 704), (1216, 832), (1152, 896), (1344, 768),
    (480, 640), (512, 768), (576, 1024), (768, 1024), (704, 1280), (832, 1216), (896, 1152), (768, 1344),
)
"""Sizes that a timestep table is made for: squares, then 4:3, 3:2, 16:9 and the sizes near one megapixel that picture
models are used with, lying and standing."""
TOKEN_SIDE = 16  # pixels of a token's side in klein


@dataclass(frozen=True)
class Schedule:
    """Noise levels float32 [steps + 1], from 1 down to 0, as they belong to pictures of `tokens` image tokens.

    `tabulated`: the model's timestep table has their modulations. `note` tells the user if they are another size's.
    """

    sigmas: Tensor
    tokens: int
    tabulated: bool = False
    note: str | None = None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def choose_schedule(folder: ModelFolder, tokens: int, steps: int, asked: int | None = None) -> Schedule:
    """The schedule of a picture of `tokens` image tokens, or the one of `asked` tokens that a recipe names instead.

    Raises UsageError if the model has nothing but a table, and that has no schedule of so many steps.
    """
    wanted = tokens if asked is None else asked
    table = folder.timestep_table()
    if table is None:
        return Schedule(sigmas(wanted, steps), wanted)
    tabulated = sorted(count for count, each in table.schedules if each == steps)
    if wanted in tabulated:
        nearest = wanted
    elif folder.timestep_weights() is not None:
        return Schedule(sigmas(wanted, steps), wanted)
    elif not tabulated:
        known = sorted({each for _, each in table.schedules})
        raise UsageError(f"{folder.name} holds noise levels for {' or '.join(map(str, known))} steps only (found "
                         f"{steps}); choose --steps {known[-1]}, or put its optional file {WEIGHTS_FILE} into its "
                         f"folder {folder.transformer_dir}, with which any number works")
    else:
        nearest = min(tabulated, key=lambda count: abs(empirical_mu(count, steps) - empirical_mu(wanted, steps)))
    note = None if nearest == wanted else (
        f"{folder.name} holds no noise levels for pictures of {wanted} tokens (of {TOKEN_SIDE}x{TOKEN_SIDE} pixels), "
        f"so those of {nearest} were used, the nearest; its optional file {WEIGHTS_FILE} would give the exact ones")
    levels = torch.from_numpy(table.sigmas[table.schedules[nearest, steps]])
    return Schedule(torch.cat([levels, torch.zeros(1)]), nearest, True, note)


def make_timestep_table(config: Mapping[str, Any], settings: Mapping[str, Any],
                        weights: Checkpoint) -> dict[str, np.ndarray]:
    """The tensors of a timestep table for pictures of the preset sizes and the model's own, in its number of steps.

    config is the transformer's, settings are `ModelFolder.settings`, weights hold the layers that see the noise level.
    """
    schedules, steps = {}, int(settings["default_steps"])
    for width, height in (*PRESET_SIZES, settings["default_size"]):
        tokens = (width // TOKEN_SIDE) * (height // TOKEN_SIDE)
        schedules[tokens, steps] = sigmas(tokens, steps)[:-1].tolist()
    levels = sorted({level for each in schedules.values() for level in each}, reverse=True)
    with torch.no_grad():
        rows = tabulate(build_and_load(TimestepNetwork, Flux2Config.from_dict(config), weights), levels)
    return table_tensors(schedules, levels, rows.numpy())
