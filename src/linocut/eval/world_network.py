"""The network that finds the things of the embedded world: a small convolutional one, objects as points.

A residual tower down to a thirty-second of the picture, brought back up to an eighth (STRIDE); there one channel says
where centres of objects are (Zhou et al. 2019, "Objects as points"), and from the features at a centre small heads tell
class, colour and box. A heat map for all classes together is enough, since objects of one picture do not share centres.

Shape letters: B batch, H and W of the picture in pixels (any multiples of 32), h and w an eighth of these, K points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 8
PEAKS = 24  # candidates looked at per picture


@dataclass(frozen=True)
class NetworkConfig:
    """Channels of the tower at a quarter, an eighth, a sixteenth and a thirty-second; `head` those of the heads."""

    widths: tuple[int, int, int, int] = (48, 96, 160, 224)
    head: int = 192


class ConvNorm(nn.Sequential):
    """A convolution without bias and a batch norm."""

    def __init__(self, inside: int, outside: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outside))


class Residual(nn.Module):
    """relu(x + two 3x3 convolutions of x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(channels, channels), ConvNorm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class WorldNetwork(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] to a heat map and features, and features at points to what is there."""

    def __init__(self, config: NetworkConfig, classes: int, colours: int) -> None:
        super().__init__()
        quarter, eighth, sixteenth, last = config.widths
        self.stem = nn.Sequential(ConvNorm(3, quarter // 2, stride=2), nn.ReLU(),
                                  ConvNorm(quarter // 2, quarter, stride=2), nn.ReLU(), Residual(quarter))
        self.eighth = _stage(quarter, eighth)
        self.sixteenth = _stage(eighth, sixteenth)
        self.last = _stage(sixteenth, last)
        self.beside = nn.ModuleList([ConvNorm(eighth, config.head, 1), ConvNorm(sixteenth, config.head, 1),
                                     ConvNorm(last, config.head, 1)])
        self.merge = nn.Sequential(ConvNorm(config.head, config.head), nn.ReLU())
        self.heat = nn.Conv2d(config.head, 1, 1)
        nn.init.constant_(self.heat.bias, -4.0)  # type: ignore[arg-type]  # centres are rare
        self.of_class = _head(config.head, classes)
        self.of_colour = _head(config.head, colours)
        self.of_box = _head(config.head, 4)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Heat [B, h, w] as logits, and features [B, head, h, w]."""
        eighth = self.eighth(self.stem(image))
        sixteenth = self.sixteenth(eighth)
        up = _twice(self.beside[2](self.last(sixteenth))) + self.beside[1](sixteenth)
        features = self.merge(F.relu(_twice(up) + self.beside[0](eighth)))
        return self.heat(features)[:, 0], features

    def at(self, features: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is at points `cells` int64 [B, K] (row * w + column) of the map: logits of the classes [B, K, classes]
        and of the colours [B, K, colours], and boxes [B, K, 4]: offset of the centre from the middle of its cell
        (x, y), logarithms of width and height, all in cells.
        """
        index = cells[:, None, :].expand(-1, features.shape[1], -1)
        points = features.flatten(2).gather(2, index).transpose(1, 2)
        return self.of_class(points), self.of_colour(points), self.of_box(points)


def _stage(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(ConvNorm(inside, outside, stride=2), nn.ReLU(), Residual(outside), Residual(outside))


def _head(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, inside), nn.ReLU(), nn.Linear(inside, outside))


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


@dataclass(frozen=True)
class Peaks:
    """The PEAKS surest points of each picture: score [B, K] in 0..1, probabilities of the classes [B, K, classes] and
    of the colours [B, K, colours], boxes [B, K, 4] as left, top, right, bottom in pixels."""

    score: Tensor
    classes: Tensor
    colours: Tensor
    boxes: Tensor


def find_peaks(network: WorldNetwork, image: Tensor) -> Peaks:
    """Local maxima of the heat map, all on the device of `image` [B, 3, H, W] in [-1, 1]."""
    logits, features = network(image)
    heat = logits.float().sigmoid()[:, None]
    peak = torch.where(F.max_pool2d(heat, 3, 1, 1) == heat, heat, 0.0).flatten(1)
    score, cells = peak.topk(min(PEAKS, peak.shape[1]))
    classes, colours, box = (each.float() for each in network.at(features, cells))
    columns = logits.shape[-1]
    x, y = cells % columns + 0.5 + box[..., 0], cells // columns + 0.5 + box[..., 1]
    half = box[..., 2:].exp() / 2
    boxes = STRIDE * torch.stack([x - half[..., 0], y - half[..., 1], x + half[..., 0], y + half[..., 1]], -1)
    limit = boxes.new_tensor([image.shape[-1], image.shape[-2]] * 2)
    return Peaks(score, classes.softmax(-1), colours.softmax(-1), torch.minimum(boxes.clamp_min(0), limit))


def fold_norms(module: nn.Module) -> None:
    """Merge every batch norm into the convolution before it, in place; what is computed stays the same (in eval)."""
    for child in module.modules():
        if isinstance(child, ConvNorm):
            conv, norm = child
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            child[0], child[1] = torch.nn.utils.fuse_conv_bn_eval(conv, norm), nn.Identity()


def overlap(boxes: Tensor) -> Tensor:
    """Intersection over union of every two boxes [..., K, 4]: [..., K, K]."""
    a, b = boxes[..., :, None, :], boxes[..., None, :, :]
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0)
    common = sides.prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    return common / (area[..., :, None] + area[..., None, :] - common).clamp_min(1e-6)


def without_doubles(peaks: Peaks, limit: float = 0.6) -> Tensor:
    """bool [B, K]: peaks that do not overlap a surer one by more than `limit`. Peaks come sorted."""
    close = overlap(peaks.boxes) > limit
    keep = torch.ones_like(peaks.score, dtype=torch.bool)
    for k in range(1, keep.shape[1]):
        keep[:, k] = ~(close[:, k, :k] & keep[:, :k]).any(1)
    return keep


