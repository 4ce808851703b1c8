"""The judge of photographs: tiny networks of the true classes from local folders, and its arithmetic by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from linocut.errors import FormatError, ModelNotFoundError
from linocut.eval.coco_detector import COCO, CocoDetector, box_of, cut_out, instances, scaled
from linocut.eval.rules import GENEVAL_COLOURS, Found
from linocut.train.vocabulary import FILES, objects


def write_finder(folder, labels=80):
    torch.manual_seed(0)
    swin = SwinConfig(image_size=64, embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
                      out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
                               encoder_feedforward_dim=32, dim_feedforward=32, num_attention_heads=2, encoder_layers=1,
                               decoder_layers=2, num_queries=8, num_labels=labels)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)


def write_clip(folder):
    torch.manual_seed(0)
    folder.mkdir()
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77).save_pretrained(folder)
    network = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(projection_dim=8, vision_config=network | {"image_size": 32, "patch_size": 8},
                         text_config=network | {"vocab_size": len(vocabulary), "max_position_embeddings": 77,
                                                "eos_token_id": len(vocabulary) - 1})).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("judges")
    write_finder(root / "finder")
    write_clip(root / "clip")
    return root


@pytest.fixture(scope="module")
def detector(folders):
    return CocoDetector(str(folders / "finder"), str(folders / "clip"), short_side=64)


def photograph(width=96, height=64):
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height))


def test_looks_at_pictures(detector):
    """Weights are random, so nearly everything is found everywhere; boxes, scores and names are as they have to be."""
    pictures = [photograph(), photograph(50, 70)]
    for picture, sight in zip(pictures, detector.look(pictures), strict=True):
        assert 1 <= len(sight.found) <= 100
        assert {each.name for each in sight.found} <= set(COCO)
        for each in sight.found:
            assert 0 < each.score < 1
            left, top, right, bottom = each.box
            assert 0 <= left < right <= picture.width
            assert 0 <= top < bottom <= picture.height
        first = sight.found[0].name
        told = sight.colours([each for each in sight.found if each.name == first])
        assert set(told) <= set(GENEVAL_COLOURS)
        assert sight.colours([]) == []
    assert detector.identity.startswith("coco ")


def test_its_classes_are_those_of_the_benchmark(detector):
    assert len(set(COCO)) == 80
    assert {"computer mouse", "tv remote", "hair drier"} <= detector.classes
    assert FILES[0] == "geneval"
    assert [name for name in COCO if name in {thing.name for thing in objects()[:67]}] == [
        thing.name for thing in objects()[:67]]


def test_models_that_do_not_fit(folders, tmp_path, monkeypatch):
    write_finder(tmp_path / "other", 5)
    with pytest.raises(FormatError, match="other classes than COCO's"):
        CocoDetector(str(tmp_path / "other"), str(folders / "clip"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        CocoDetector(str(tmp_path / "none"), str(folders / "clip"))


def test_instances_by_hand():
    """Two queries and two classes on a picture of 8 x 6 that was scaled by two and padded to 32."""
    classes = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 3.0]])
    masks = torch.full((2, 32, 32), -4.0)
    masks[0, :6, :8] = 4.0  # the upper left quarter of the picture
    kind, score, inside = instances(classes, masks, (32, 32), (12, 16), (6, 8))
    first = classes[0].softmax(0)
    assert kind.tolist() == [0, 1]  # the second query sees no pixel, and its pairs are left out
    assert score[0] / score[1] == pytest.approx(float(first[0] / first[1]), rel=1e-5)
    assert 0.9 * first[0] < score[0] < first[0]
    assert inside.shape == (2, 6, 8)
    assert box_of(inside[0]) == (0, 0, 4, 3)


def test_mean_probability_inside_the_mask_weighs_the_score():
    sure, unsure = (instances(torch.tensor([[5.0, -5.0]]), torch.full((1, 8, 8), level), (8, 8), (8, 8), (8, 8))[1][0]
                    for level in (9.0, 0.1))
    assert float(sure) == pytest.approx(float(torch.tensor([5.0, -5.0]).softmax(0)[0]), rel=1e-3)
    assert float(unsure) == pytest.approx(float(sure) * torch.tensor(0.1).sigmoid().item(), rel=1e-2)


@pytest.mark.parametrize(("size", "expected"), [((512, 512), (800, 800)), ((1024, 512), (667, 1333)),
                                                ((600, 800), (1067, 800))])
def test_pictures_are_scaled_as_for_the_published_detector(size, expected):
    pixels, inside = scaled(Image.new("RGB", size, (124, 116, 104)))
    assert inside == expected
    assert all(side % 32 == 0 and side - whole < 32 for side, whole in zip(pixels.shape[-2:], inside, strict=True))
    assert pixels[..., :inside[0], :inside[1]].abs().max() < 0.02  # the mean colour becomes zero


def test_what_is_cut_out_stands_on_gray():
    picture = Image.new("RGB", (60, 40), (255, 0, 0))
    mask = np.zeros((40, 60), bool)
    mask[10:30, 20:30] = True
    mask[10, 20] = False
    crop = cut_out(picture, mask, (20.0, 10.0, 30.0, 30.0), 20)
    assert crop.shape == (3, 20, 20)
    spread = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    rgb = crop.numpy() * spread + np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    np.testing.assert_allclose(rgb[:, 10, 10], (1, 0, 0), atol=0.01)
    wide = cut_out(picture, np.zeros_like(mask), (0.0, 0.0, 60.0, 40.0), 16)
    np.testing.assert_allclose(wide.numpy() * spread + np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None],
                               0.6, atol=0.001)


@torch.no_grad()
def test_colours_are_the_nearest_wordings(detector):
    """Each colour is the mean of three wordings, computed here one by one."""
    rows = []
    for colour in GENEVAL_COLOURS:
        read = [detector.clip.get_text_features(**detector.tokenizer([text], return_tensors="pt")) for text in (
            f"a photo of a {colour} dog", f"a photo of a {colour}-colored dog", f"a photo of a {colour} object")]
        vectors = [(each if isinstance(each, torch.Tensor) else each.pooler_output)[0] for each in read]
        rows.append(sum(vector / vector.norm() for vector in vectors))
    wanted = torch.stack([row / row.norm() for row in rows])
    torch.testing.assert_close(detector._wording("dog"), wanted, rtol=1e-4, atol=1e-5)
    sight = detector.look([photograph()])[0]
    one = Found("dog", 0.9, sight.found[0].box, sight.found[0].handle)
    assert sight.colours([one, one]) == 2 * sight.colours([one])
