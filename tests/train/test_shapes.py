"""Scenes of other shapes than squares: things fit, tokens know what covers them, all networks learn them in turn."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_recipe import write_recipe, write_sprites

from linocut.errors import UsageError
from linocut.models.flux2 import Flux2Transformer
from linocut.train.layout import Placement, place
from linocut.train.naming import names_of
from linocut.train.painter import Painter, grid_levels
from linocut.train.recipe import Recipe
from linocut.train.render import SceneRenderer
from linocut.train.scenes import Group, Scene, sample_scene
from linocut.train.snapshot import Snapshot
from linocut.train.stages import run_stage

CPU = torch.device("cpu")
SIDE, WIDE, TALL = 256, (192, 320), (320, 192)  # height, width


@pytest.fixture(scope="module")
def sprites(tmp_path_factory) -> Path:
    return write_sprites(tmp_path_factory.mktemp("sprites") / "all")


@pytest.fixture(scope="module")
def renderer(sprites) -> SceneRenderer:
    return SceneRenderer(sprites, SIDE, things=range(8), least=min(WIDE))


def scenes_of(count: int) -> list[Scene]:
    rng = random.Random(3)
    # What stands on something touches it only with the sprites' true heights.
    found = [scene for scene in (sample_scene(rng) for _ in range(2 * count)) if scene.relation != "on"][:count]
    return [Scene(s.task, tuple(Group(i, g.count, g.colour, g.size) for i, g in enumerate(s.groups)), s.relation, "sky",
                  s.spot) for s in found]


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_things_are_inside_and_apart(renderer, shape):
    """But for corners of sprites that are all square here, as many pixels are covered as by the things one by one."""
    shaped, scenes = renderer.reshaped(*shape), scenes_of(60)
    placements = [place(scene, random.Random(index)) for index, scene in enumerate(scenes)]
    table, looks = shaped.table(placements), shaped.looks(scenes)
    images = shaped.draw(table, looks)
    assert images.shape == (60, 3, *shape)
    empty = shaped.draw(torch.full_like(table, -1), looks)
    drawn = ((images - empty).abs().amax(1) > 0).flatten(1).sum(1)
    sides = renderer.atlas.sizes[0] + 8 * table[..., 2]
    there = table[..., 2] >= 0
    alone = torch.where(there, sides.square(), 0).sum(1)
    assert (drawn > 0.97 * alone).all()
    assert (drawn == alone).float().mean() > 0.85
    corners = table[there][:, 3:]
    assert (corners >= 0).all()
    assert (corners + sides[there][:, None] <= torch.tensor(shape[::-1])).all()
    for scene, things in zip(scenes, placements, strict=True):
        count = scene.groups[0].count
        if scene.relation == "left of":
            assert max(p.x for p in things[:count]) < min(p.x for p in things[count:])


def test_a_square_is_what_it_was(renderer):
    scenes = scenes_of(20)
    placements = [place(scene, random.Random(index)) for index, scene in enumerate(scenes)]
    square = renderer.reshaped(SIDE, SIDE)
    table, looks = renderer.table(placements), renderer.looks(scenes)
    assert torch.equal(square.table(placements), table)
    assert torch.equal(square.draw(table, looks), renderer.draw(table, looks))
    assert torch.equal(square.covers(table, 16), renderer.covers(table, 16))


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_what_stands_on_a_line_stands_there_on_any_canvas(renderer, shape):
    things = [Placement(0, None, x, 0.75, size, size / 2) for x, size in ((0.25, 0.2), (0.75, 0.4))]
    for _, _, level, _, top in renderer.reshaped(*shape).table([things])[0, :2].tolist():
        foot = top + renderer.atlas.sizes[level]
        assert foot == pytest.approx(0.75 * shape[0], abs=4)  # sides are in steps of 8


def test_tokens_know_what_covers_them(renderer):
    shaped = renderer.reshaped(*WIDE)
    table = shaped.table([[Placement(5, 2, 5 / 6, 0.5, 0.9)]])
    names = names_of(shaped, table, 64)[0].unflatten(0, (3, 5))
    assert (names[:, :2, 0] == renderer.things).all()
    assert names[1, 4].tolist() == [5, 3]


def write_shaped(folder: Path) -> Path:
    path = write_recipe(folder)
    path.write_text(path.read_text().replace("size = 32", "size = 32\nshapes = [[48, 32], [32, 64]]"))
    return path


def test_half_of_the_turns_are_squares(tmp_path):
    recipe = Recipe.from_file(write_shaped(tmp_path))
    assert recipe.data.shapes == ((48, 32), (32, 64))
    assert recipe.grids == [(2, 2), (2, 3), (2, 2), (4, 2)]
    assert grid_levels(recipe, (4, 2)) != grid_levels(recipe)
    assert Recipe.from_file(write_recipe(tmp_path)).grids == [(2, 2)]


@pytest.mark.parametrize("shapes", ["[[48, 40]]", "[[48]]", "[[0, 32]]", "[48, 32]", '[["48", 32]]', "[[48.0, 32]]"])
def test_shapes_that_make_no_sense_are_refused(tmp_path, shapes):
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("size = 32", f"size = 32\nshapes = {shapes}"))
    with pytest.raises(UsageError, match=r"data\.shapes are \[\[width, height\], \.\.\.\] in multiples of 16 pixels"):
        Recipe.from_file(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sprites) -> tuple[Recipe, Path, dict[str, list[tuple[int, ...]]]]:
    """A recipe with shapes, its run, and the tokens that teacher and student were asked for as they learned."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("shapes")
    recipe, seen = Recipe.from_file(write_shaped(root)), dict[str, list[tuple[int, ...]]]()
    with pytest.MonkeyPatch.context() as patch:
        own = Flux2Transformer.forward
        for stage in ("vae", "teacher", "ternary"):
            def forward(self, latents, text, sigma, image_ids, *rest, stage=stage, **options):
                if torch.is_grad_enabled():
                    assert latents.shape[1] == len(image_ids)
                    seen.setdefault(stage, []).append(tuple((image_ids.amax(0) + 1).int().tolist()[1:3]))
                return own(self, latents, text, sigma, image_ids, *rest, **options)

            patch.setattr(Flux2Transformer, "forward", forward)
            run_stage(stage, recipe, root / "run", sprites, "cpu")
    return recipe, root / "run", seen


@pytest.mark.parametrize("stage", ["teacher", "ternary"])
def test_every_shape_has_its_turn(trained, stage):
    recipe, _, seen = trained
    turns = recipe.grids
    assert seen[stage][:8] == [turns[step % 4] for step in range(len(seen[stage][:8]))]
    assert set(seen[stage]) == set(turns)


def test_a_student_that_was_cut_goes_on_in_every_shape(trained, tmp_path, monkeypatch):
    recipe, run, _ = trained
    for name in ("vae", "teacher", "tokenizer"):
        (tmp_path / name).symlink_to(run / name)
    saving = replace(recipe, ternary=replace(recipe.ternary, save_every=2))
    own = Snapshot.save

    def save_and_die(self, step, *rest, **options):
        own(self, step, *rest, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Snapshot, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run_stage("ternary", saving, tmp_path, tmp_path, "cpu")
    monkeypatch.setattr(Snapshot, "save", own)
    run_stage("ternary", saving, tmp_path, tmp_path, "cpu")
    ours, theirs = (Painter.load(recipe, folder / "ternary", CPU).state_dict() for folder in (tmp_path, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
