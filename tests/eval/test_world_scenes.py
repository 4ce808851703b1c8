"""Training pictures of the detector: labels lie where the things are, whatever was done to the picture."""

import pytest
import torch
from tiny_detector import write_shapes

from linocut.eval import world_scenes
from linocut.eval.world_scenes import Labelled, WorldScenes, spoil, sprite_boxes, square_to, warp
from linocut.train.layout import Placement
from linocut.train.palette import COLOURS
from linocut.train.render import STEP
from linocut.train.scenes import Group, Scene
from linocut.train.vocabulary import objects

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return WorldScenes(write_shapes(tmp_path_factory.mktemp("sprites") / "all"), 128, CPU, None, 0, range(3), 64)


def extent_of(mask):
    """Box (left, top, right, bottom) around the true pixels of [H, W]."""
    rows, columns = mask.nonzero().unbind(1)
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


@pytest.mark.parametrize("thing", range(3))
def test_boxes_surround_what_the_renderer_draws(source, thing):
    looks = source.renderer.looks([Scene("single_object", (Group(thing),), None, "sky")])  # nothing throws a shadow
    table = source.renderer.table([[Placement(thing, None, 0.4, 0.6, 0.5)]])
    drawn, empty = source.renderer.draw(table, looks), source.renderer.draw(table * 0 - 1, looks)
    seen = extent_of((drawn - empty)[0].abs().amax(0) > 0.05)
    side = source.renderer.atlas.sizes[0] + STEP * table[0, :1, 2]
    box = sprite_boxes(source.renderer, torch.tensor([thing]), table[0, :1, 3:5].float(), side.float())[0]
    assert (box - seen).abs().max() <= 3  # of 64 pixels: an odd number of rows cannot be centred in an even one


def test_labels_after_warping(source, monkeypatch):
    """A white rectangle on black, moved and zoomed into two shapes: its box goes with it and stays inside."""
    monkeypatch.setattr(world_scenes, "BEND", ())
    torch.manual_seed(0)
    image = torch.full((40, 3, 128, 128), -1.0)
    image[:, :, 40:80, 30:90] = 1.0
    boxes = torch.zeros(40, 6, 4)
    boxes[:, 0] = torch.tensor([30.0, 40.0, 90.0, 80.0])
    classes = torch.full((40, 6), -1)
    classes[:, 0] = 0
    for shape in ((128, 128), (96, 160)):
        moved = warp(Labelled(image, classes, classes, boxes), shape)
        assert moved.image.shape == (40, 3, *shape)
        for picture, box in zip(moved.image, moved.boxes[:, 0], strict=True):
            assert (extent_of(picture[0] > 0) - box).abs().max() <= 1.0
            assert box.min() >= 0
            assert box[2] <= shape[1]
            assert box[3] <= shape[0]
        assert moved.boxes[:, 0].std(0).min() > 2, "nothing moved"


def test_what_is_in_the_pictures(source):
    torch.manual_seed(1)
    batch = source.draw(100)
    there = batch.classes >= 0
    assert set(batch.classes.unique().tolist()) == {-1, 0, 1, 2}
    assert set(there.sum(1).unique().tolist()) == {1, 2, 3, 4, 5, 6}
    assert (batch.colours[~there] == -1).all()
    natural = torch.tensor([objects()[thing].natural for thing in range(3)])
    tinted = batch.colours >= 0
    assert not (tinted & natural[batch.classes.clamp_min(0)]).any()
    assert set(batch.colours[tinted].unique().tolist()) == set(range(len(COLOURS)))
    boxes = batch.boxes[there]
    assert boxes.min() >= 0
    assert boxes.max() <= 128
    assert (boxes[:, 2:] - boxes[:, :2]).min() > 5


def test_things_can_be_told_from_their_background(source, monkeypatch):
    monkeypatch.setattr(world_scenes, "BEND", ())
    torch.manual_seed(2)
    batch = source.draw(60)
    for picture, classes, boxes in zip(batch.image, batch.classes, batch.boxes, strict=True):
        left, top, right, bottom = boxes[0].round().int().tolist()
        inside = picture[:, top:bottom, left:right].flatten(1)
        assert classes[0] >= 0
        assert inside.std(1).max() > 0.03


@pytest.mark.parametrize("shape", [(64, 64), (64, 96)])
def test_spoilt_pictures_stay_pictures(source, shape):
    torch.manual_seed(3)
    fresh = source.draw(20, shape).image
    spoilt = spoil(fresh, None)
    assert spoilt.shape == fresh.shape
    assert float(spoilt.min()) >= -1
    assert float(spoilt.max()) <= 1
    changed = (spoilt - fresh).abs().mean((1, 2, 3))
    assert changed.min() > 0.005
    assert changed.mean() < 0.3


def test_a_square_picture_in_another_shape():
    image = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert torch.equal(square_to(image, (4, 4)), image)
    wide = square_to(image, (4, 8))
    assert torch.equal(wide[..., 2:6], image)
    assert torch.equal(wide[..., 0], image[..., 0])
    assert square_to(image, (6, 2)).shape == (1, 3, 6, 2)
