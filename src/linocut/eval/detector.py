"""What a detector is to the benchmark: something that looks at pictures and says what is in them, with boxes.

Two exist: `world_detector` for the embedded models' world, and `coco_detector` (Mask2Former and CLIP) for photographs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from linocut.eval.rules import Colours, Found, Thresholds

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Sight:
    """What was seen in one picture. `colours` tells the colours of some of the objects, all of one class."""

    found: list[Found]
    colours: Colours


class Detector(Protocol):
    """Looks at pictures. `identity` goes into every result; `classes` and `colours` are the names it knows."""

    identity: str
    thresholds: Thresholds
    classes: frozenset[str]
    colours: frozenset[str]
    accuracy: dict[str, dict[str, dict[str, float]]]  # how well it judges scenes of known content, if that was measured

    def look(self, pictures: Sequence[Image]) -> list[Sight]:
        """What is in each picture."""
        ...
