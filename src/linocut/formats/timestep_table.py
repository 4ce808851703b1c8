"""The timestep table of a transformer: what it computes from the noise level alone, for schedules known beforehand.

FLUX.2's modulations depend on nothing but sigma, and a sampler asks for a few values of sigma that follow from the
number of image tokens and of steps. A row of 17 vectors per sigma replaces 341 MB of klein's weights; these then lie in
a file of their own, which a model works without (normative text: docs/format.md, section 6).

Shape letters: R rows (noise levels), P schedules, L sum of the schedules' steps, D width of the transformer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from linocut.errors import FormatError
from linocut.formats.checkpoint import Checkpoint

TABLE_FILE = "timestep_table.safetensors"
WEIGHTS_FILE = "timestep_weights.safetensors"
CONFIG_KEY = "timestep_table"
TABLE_VERSION = 1
VECTORS = 17
"""Vectors per row: shift, scale, gate of attention and MLP for image and text (12), of single blocks (3), last norm."""
_MOST_ROWS, _MOST_SCHEDULES, _MOST_TOKENS, _MOST_STEPS = 1 << 20, 1 << 12, 1 << 24, 1000


class TimestepTable:
    """An opened and checked table.

    `schedules` maps (image tokens, steps) to the numbers of their rows, `sigmas` [R] are the rows' noise levels,
    `width` is that of the transformer, `checkpoint` the file behind it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.width = self._check_shapes()
        self.sigmas: np.ndarray = checkpoint.array("sigmas")
        levels, counts = checkpoint.array("levels"), checkpoint.array("schedules")
        self._check_sigmas()
        self.schedules: dict[tuple[int, int], np.ndarray] = {}
        first = 0
        for tokens, steps in counts.tolist():
            if not (1 <= tokens <= _MOST_TOKENS and 1 <= steps <= _MOST_STEPS):
                raise self._wrong("schedules", f"1..{_MOST_TOKENS} tokens and 1..{_MOST_STEPS} steps", [tokens, steps])
            if (tokens, steps) in self.schedules:
                raise self._wrong("schedules", "each pair of tokens and steps once", [tokens, steps])
            rows = levels[first : first + steps]
            first += steps
            if len(rows) < steps:
                raise self._wrong("levels", "a row number for every step of every schedule", f"{len(levels)} numbers")
            if rows[0] < 0 or rows[-1] >= len(self.sigmas) or (np.diff(rows) <= 0).any():
                raise self._wrong("levels", f"rising row numbers in 0..{len(self.sigmas) - 1}", rows.tolist()[:8])
            self.schedules[tokens, steps] = rows
        if first != len(levels):
            raise self._wrong("levels", f"{first} numbers, one for every step", f"{len(levels)} numbers")

    @classmethod
    def open(cls, path: Path) -> TimestepTable:
        """Open the file `path`. Raises ModelNotFoundError or FormatError."""
        return cls(Checkpoint.open(path))

    def _check_shapes(self) -> int:
        """Check every tensor's dtype and shape, and return the width."""
        rows, schedules, levels = (self._size(name, 0) for name in ("sigmas", "schedules", "levels"))
        width = self._size("modulations", -1)
        expected: dict[str, tuple[str, tuple[int, ...]]] = {
            "sigmas": ("F32", (rows,)), "schedules": ("I32", (schedules, 2)), "levels": ("I32", (levels,)),
            "modulations": ("F32", (rows, VECTORS, width))}
        for name, wanted in expected.items():
            info = self.checkpoint.info(name)
            if (info.dtype, info.shape) != wanted:
                raise self._wrong(name, f"{wanted[0]} {list(wanted[1])}", f"{info.dtype} {list(info.shape)}")
        for name in self.checkpoint:
            if name not in expected:
                raise self._wrong(name, f"no tensors but {', '.join(expected)}", "another")
        if not 1 <= rows <= _MOST_ROWS or not 1 <= schedules <= _MOST_SCHEDULES:
            raise self._wrong("sigmas", f"1..{_MOST_ROWS} rows for 1..{_MOST_SCHEDULES} schedules",
                              f"{rows} rows for {schedules}")
        return width

    def _size(self, name: str, axis: int) -> int:
        shape = self.checkpoint.info(name).shape  # raises if there is no such tensor
        return shape[axis] if shape else 0

    def _check_sigmas(self) -> None:
        sigmas = self.sigmas
        # Written so that NaN fails.
        if not (sigmas[0] <= 1 and sigmas[-1] > 0 and bool((sigmas[1:] < sigmas[:-1]).all())):
            raise self._wrong("sigmas", "strictly falling values in 1..0, 0 excluded", sigmas[:8].tolist())

    def _wrong(self, tensor: str, expected: object, found: object) -> FormatError:
        return FormatError("the timestep table is malformed", path=self.checkpoint.path, tensor=tensor,
                           expected=expected, found=found, advice="make it again, or download it again")

    def rows(self, tokens: int, steps: int) -> np.ndarray:
        """The modulations of a schedule, a copy: float32 [steps, 17, D]. Raises FormatError if they are not finite."""
        rows: np.ndarray = self.checkpoint.array("modulations")[self.schedules[tokens, steps]]
        if not np.isfinite(rows).all():
            raise self._wrong("modulations", "finite numbers", "NaN or inf")
        return rows


def table_tensors(schedules: Mapping[tuple[int, int], Sequence[float]], sigmas: Sequence[float],
                  modulations: np.ndarray) -> dict[str, np.ndarray]:
    """What the file holds: `schedules` {(tokens, steps): noise levels}, `sigmas` all of them once, falling, and
    `modulations` float32 [R, 17, D] their rows."""
    place = {sigma: row for row, sigma in enumerate(sigmas)}
    return {"sigmas": np.array(sigmas, dtype=np.float32), "schedules": np.array(sorted(schedules), dtype=np.int32),
            "levels": np.array([place[sigma] for key in sorted(schedules) for sigma in schedules[key]], dtype=np.int32),
            "modulations": modulations.astype(np.float32, copy=False)}


def has_table(config: Mapping[str, Any], path: Path) -> bool:
    """Whether a transformer's config says that there is a table. Raises FormatError for a version not known here."""
    entry = config.get(CONFIG_KEY)
    if entry is None:
        return False
    version = entry.get("format_version") if isinstance(entry, Mapping) else None
    if type(version) is not int:
        raise FormatError(f"key {CONFIG_KEY!r} has the wrong form", path=path,
                          expected=f'{{"format_version": {TABLE_VERSION}}}', found=repr(entry)[:80])
    if version != TABLE_VERSION:
        raise FormatError("unknown version of the timestep table", path=path, expected=TABLE_VERSION, found=version,
                          advice="update linocut" if version > TABLE_VERSION else None)
    return True
