"""Mask2Former and CLIP as judges of photographs, as in GenEval's own program, through transformers.

Mask2Former (Cheng et al. 2022) finds COCO's 80 classes with masks; CLIP (Radford et al. 2021) tells the colour of what
a mask cuts out. GenEval ran the former in mmdetection (Swin-S) and the latter in OpenCLIP (ViT-L/14, OpenAI's weights).
What those two do around the networks is done here in the same way: sizes, scores of instances, boxes around masks, gray
around what is cut out, three wordings per colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from linocut.errors import FormatError, ModelNotFoundError, UsageError
from linocut.eval.detector import Sight
from linocut.eval.rules import GENEVAL_COLOURS, Found, Thresholds

if TYPE_CHECKING:
    from PIL.Image import Image

MASK2FORMER, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
MOST_INSTANCES = 100  # per picture, before the thresholds
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels that pictures are scaled to
_MEAN, _SPREAD = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
_CLIP_MEAN, _CLIP_SPREAD = np.array([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]],
                                    np.float32)
_GRAY = (0x99, 0x99, 0x99)
_WORDINGS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
COCO = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
"""COCO's classes in COCO's order, under the names that GenEval gives them."""


class CocoDetector:
    """Finds COCO's classes. `detector` and `clip` are model folders or hub ids.

    Raises UsageError without transformers, ModelNotFoundError for models that cannot be had, FormatError for a detector
    of other classes.
    """

    thresholds = Thresholds()

    def __init__(self, detector: str = MASK2FORMER, clip: str = CLIP, device: str = "cpu",
                 short_side: int = SHORT_SIDE) -> None:
        try:
            from transformers import AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation
        except ImportError as error:
            raise UsageError(f"judging photographs needs transformers ({error}); pip install 'linocut[eval]'") from None
        self.device, self.short_side = torch.device(device), short_side
        self.finder: Any = _loaded(Mask2FormerForUniversalSegmentation, detector, self.device)
        self.clip: Any = _loaded(CLIPModel, clip, self.device)
        self.tokenizer: Any = _loaded(AutoTokenizer, clip, None)
        labels = self.finder.config.num_labels
        if labels != len(COCO):
            raise FormatError("a detector of other classes than COCO's", path=detector, expected=len(COCO),
                              found=labels, advice="take a checkpoint trained on COCO instances")
        self.classes, self.colours = frozenset(COCO), frozenset(GENEVAL_COLOURS)
        self.accuracy: dict[str, dict[str, dict[str, float]]] = {}
        self.identity = f"coco {detector} {clip}"
        self._wordings: dict[str, Tensor] = {}

    def look(self, pictures: Sequence[Image]) -> list[Sight]:
        """What is in each picture, one picture at a time."""
        return [self._look(picture.convert("RGB")) for picture in pictures]

    @torch.no_grad()
    def _look(self, picture: Image) -> Sight:
        pixels, size = scaled(picture, self.short_side)
        output = self.finder(pixel_values=pixels.to(self.device),
                             pixel_mask=_inside(pixels, size).to(self.device))
        classes, scores, masks = instances(output.class_queries_logits[0].float(),
                                           output.masks_queries_logits[0].float(), pixels.shape[-2:], size,
                                           (picture.height, picture.width))
        found = [Found(COCO[kind], score, box_of(mask), index) for index, (kind, score, mask) in
                 enumerate(zip(classes.tolist(), scores.tolist(), masks, strict=True))]
        return Sight(found, partial(self._tell, picture, masks.cpu().numpy()))

    @torch.no_grad()
    def _tell(self, picture: Image, masks: np.ndarray, taken: Sequence[Found]) -> list[str]:
        """The colour of each object, all of one class, by CLIP."""
        if not taken:
            return []
        crops = torch.stack([cut_out(picture, masks[each.handle], each.box, self.clip.config.vision_config.image_size)
                             for each in taken])
        seen = F.normalize(_pooled(self.clip.get_image_features(pixel_values=crops.to(self.device))), dim=-1)
        return [GENEVAL_COLOURS[index] for index in (seen @ self._wording(taken[0].name).T).argmax(-1).tolist()]

    def _wording(self, name: str) -> Tensor:
        """What CLIP makes of the colours of a class: unit vectors [colours, D]."""
        if name not in self._wordings:
            rows = []
            for colour in GENEVAL_COLOURS:
                texts = [each.format(colour=colour, name=name) for each in _WORDINGS]
                tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
                read = _pooled(self.clip.get_text_features(input_ids=tokens["input_ids"],
                                                           attention_mask=tokens["attention_mask"]))
                rows.append(F.normalize(F.normalize(read, dim=-1).mean(0), dim=-1))
            self._wordings[name] = torch.stack(rows)
        return self._wordings[name]


def scaled(picture: Image, short_side: int = SHORT_SIDE) -> tuple[Tensor, tuple[int, int]]:
    """A picture as the network takes it: float32 [1, 3, H, W], and the part (h, w) of it that is no padding.

    The shorter side becomes `short_side` unless the longer one would pass LONG_SIDE; both are padded to multiples
    of 32.
    """
    from PIL import Image as Images

    limit = LONG_SIDE * short_side / SHORT_SIDE
    factor = min(short_side / min(picture.size), limit / max(picture.size))
    width, height = (int(side * factor + 0.5) for side in picture.size)
    small = np.asarray(picture.resize((width, height), Images.Resampling.BILINEAR), np.float32) / 255
    pixels = torch.from_numpy((small - _MEAN) / _SPREAD).permute(2, 0, 1)[None]
    return F.pad(pixels, (0, -width % 32, 0, -height % 32)), (height, width)


def _inside(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    mask = torch.zeros(1, *pixels.shape[-2:], dtype=torch.long)
    mask[:, :size[0], :size[1]] = 1
    return mask


def instances(class_logits: Tensor, mask_logits: Tensor, padded: Sequence[int], size: tuple[int, int],
              whole: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The MOST_INSTANCES surest pairs of a query and a class: classes [n], scores [n], masks bool [n, H, W].

    `class_logits` [Q, classes + 1] (the last: nothing), `mask_logits` [Q, h, w] over the `padded` picture, of which
    `size` is the picture scaled from `whole`. A score is the probability of the class times the mean probability inside
    the mask; pairs whose mask is empty are left out.
    """
    chances = class_logits.softmax(-1)[:, :-1]
    score, index = chances.flatten().topk(min(MOST_INSTANCES, chances.numel()))
    query, kind = index // chances.shape[1], index % chances.shape[1]
    used, back = query.unique(return_inverse=True)  # a query may stand for several classes
    logits = F.interpolate(mask_logits[used][None], tuple(padded), mode="bilinear", align_corners=False)
    logits = F.interpolate(logits[..., :size[0], :size[1]], whole, mode="bilinear", align_corners=False)[0]
    inside = logits > 0
    area = inside.flatten(1).sum(1)
    sure = (logits.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6)
    there = area[back] > 0
    return kind[there], (score * sure[back])[there], inside[back][there]


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """Left, top, right, bottom around the true pixels of a mask [H, W] that has some."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def cut_out(picture: Image, mask: np.ndarray, box: Sequence[float], side: int) -> Tensor:
    """What a mask shows, gray around it, cropped to its box and scaled for CLIP: float32 [3, side, side]."""
    from PIL import Image as Images

    crop = Images.composite(picture, Images.new("RGB", picture.size, _GRAY), Images.fromarray(mask))
    left, top, right, bottom = (round(each) for each in box)
    crop = crop.crop((left, top, right, bottom))
    factor = side / min(crop.size)
    crop = crop.resize((max(side, round(crop.width * factor)), max(side, round(crop.height * factor))),
                       Images.Resampling.BICUBIC)
    left, top = round((crop.width - side) / 2), round((crop.height - side) / 2)
    pixels = np.asarray(crop.crop((left, top, left + side, top + side)), np.float32) / 255
    return torch.from_numpy((pixels - _CLIP_MEAN) / _CLIP_SPREAD).permute(2, 0, 1)


def _pooled(features: Any) -> Tensor:
    """Features as a tensor, in float32; newer versions of transformers wrap them."""
    tensor: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return tensor.float()


def _loaded(kind: Any, name: str, device: torch.device | None) -> Any:
    """A model or tokenizer of transformers, ready to judge."""
    try:
        loaded = kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise ModelNotFoundError(f"{name}: {kind.__name__} cannot be loaded from there: {line}") from error
    return loaded if device is None else loaded.to(device).eval().requires_grad_(False)
