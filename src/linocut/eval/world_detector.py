"""The detector of the embedded world: `world_network` with its weights, names and measured accuracy, from a folder.

The folder holds `detector.json` (names of classes and colours, thresholds, accuracy) and `model.safetensors` (batch
norms merged; each channel's weights in int8 with a scale). `linocut eval detector` makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from linocut.errors import FormatError, ModelNotFoundError
from linocut.eval.detector import Sight
from linocut.eval.rules import Found, Thresholds
from linocut.eval.world_network import NetworkConfig, Peaks, WorldNetwork, find_peaks, fold_norms, without_doubles
from linocut.train.weights import read_weights, save_weights

if TYPE_CHECKING:
    from PIL.Image import Image

SHIPPED = Path(__file__).parent.parent / "data" / "detector"  # where the package has its own, if it has one
CONFIG, WEIGHTS, VERSION = "detector.json", "model.safetensors", 2
_SCALE = ".scale"  # of a tensor's name: what one step of its int8 codes is worth, for each output channel
THRESHOLDS = Thresholds(0.3, 0.4)  # its scores are the product of two probabilities, so counting asks for less than 0.9
_LEAST = 0.05  # candidates below are not told of at all
_AT_ONCE = 16  # pictures through the network together


class WorldDetector:
    """Finds the things of the embedded world. Raises ModelNotFoundError or FormatError for a folder that is not one."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
            raise ModelNotFoundError(f"{folder}: no detector ({CONFIG} and {WEIGHTS}); train one with 'linocut eval "
                                     "detector recipes/embedded/detector.toml --out DIR'")
        try:
            config: dict[str, Any] = json.loads((folder / CONFIG).read_text("utf-8"))
            self.names, self.colour_names = tuple(config["classes"]), tuple(config["colours"])
            self.thresholds = Thresholds(**config["thresholds"])
            network = NetworkConfig(tuple(config["network"]["widths"]), config["network"]["head"])
            version = config["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError("not a detector's description", path=folder / CONFIG, found=repr(error),
                              advice="train the detector again") from error
        if version != VERSION:
            raise FormatError("detector of another version", path=folder / CONFIG, expected=VERSION, found=version,
                              advice="train the detector again")
        self.device = torch.device(device)
        self.network = _folded(network, len(self.names), len(self.colour_names))
        self.network.load_state_dict(_decoded(read_weights(folder)))
        self.network.to(self.device)
        if self.device.type == "cpu":
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.classes, self.colours = frozenset(self.names), frozenset(self.colour_names)
        self.accuracy: dict[str, dict[str, dict[str, float]]] = config.get("accuracy", {})
        self.identity = f"world {hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:12]}"

    def look(self, pictures: Sequence[Image]) -> list[Sight]:
        """What is in each picture; their sides are padded to multiples of 32 by repeating the edge."""
        sights: list[Sight | None] = [None] * len(pictures)
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, picture in enumerate(pictures):
            by_size.setdefault(picture.size, []).append(index)
        for indices in by_size.values():
            for start in range(0, len(indices), _AT_ONCE):
                part = indices[start:start + _AT_ONCE]
                pixels = np.stack([_pixels(pictures[index]) for index in part])
                image = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
                for index, sight in zip(part, self.look_at(image), strict=True):
                    sights[index] = sight
        return [sight for sight in sights if sight is not None]

    @torch.no_grad()
    def look_at(self, image: Tensor) -> list[Sight]:
        """As `look`, for pictures as a tensor [B, 3, H, W] in [-1, 1], sides multiples of 32."""
        found = find_peaks(self.network, image.to(self.device).contiguous(memory_format=torch.channels_last))
        # What follows is small and asks for single numbers, for each of which a device would have to be waited for.
        peaks = Peaks(found.score.cpu(), found.classes.cpu(), found.colours.cpu(), found.boxes.cpu())
        return self._sights(peaks, without_doubles(peaks))

    def _sights(self, peaks: Peaks, keep: Tensor) -> list[Sight]:
        """An object is told of under every class that is likely enough, as detectors do that score classes apart."""
        chances = peaks.score[..., None] * peaks.classes * keep[..., None]
        sights: list[Sight] = []
        for row in range(len(chances)):
            boxes = peaks.boxes[row].tolist()
            colours = peaks.colours[row].argmax(-1).tolist()
            k, c = (chances[row] > _LEAST).nonzero(as_tuple=True)
            found = [Found(self.names[j], float(s), tuple(boxes[i]), i)
                     for i, j, s in zip(k.tolist(), c.tolist(), chances[row][k, c].tolist(), strict=True)]
            sights.append(Sight(found, partial(_told, [self.colour_names[colour] for colour in colours])))
        return sights


def _told(by_peak: Sequence[str], taken: Sequence[Found]) -> list[str]:
    return [by_peak[each.handle] for each in taken]


def save_detector(folder: Path, network: WorldNetwork, config: NetworkConfig, names: Sequence[str],
                  colours: Sequence[str]) -> None:
    """Write a detector. Its batch norms are merged in place."""
    fold_norms(network.eval())
    save_weights(folder, _coded(network.state_dict()))
    write_description(folder, {"version": VERSION, "network": asdict(config), "thresholds": asdict(THRESHOLDS),
                               "classes": list(names), "colours": list(colours)})


def _coded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of layers as int8 and a scale for each output channel; all else as it is."""
    coded = dict(state)
    for name, value in state.items():
        if value.ndim > 1:
            rows = value.float().flatten(1)
            scale = (rows.abs().amax(1) / 127).clamp_min(1e-12)
            coded[name] = (rows / scale[:, None]).round().to(torch.int8).view(value.shape)
            coded[name + _SCALE] = scale
    return coded


def _decoded(coded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `_coded` took."""
    return {name: value * coded[name + _SCALE].view(-1, *[1] * (value.ndim - 1)) if name + _SCALE in coded else value
            for name, value in coded.items() if not name.endswith(_SCALE)}


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write `detector.json`."""
    from linocut.formats.writer import atomic_write_bytes

    atomic_write_bytes(folder / CONFIG, (json.dumps(description, indent=1) + "\n").encode())


def _folded(config: NetworkConfig, classes: int, colours: int) -> WorldNetwork:
    """A network without batch norms, in eval mode, ready for a detector's weights."""
    network = WorldNetwork(config, classes, colours).eval().requires_grad_(False)
    fold_norms(network)
    return network


def _pixels(picture: Image) -> np.ndarray:
    """uint8 [H, W, 3], sides multiples of 32."""
    pixels = np.asarray(picture.convert("RGB"))
    return np.pad(pixels, ((0, -pixels.shape[0] % 32), (0, -pixels.shape[1] % 32), (0, 0)), mode="edge")
