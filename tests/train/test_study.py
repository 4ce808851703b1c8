"""Arms of a study: equal beginnings, reports by the same measure, nothing done twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import ROOT, write_recipe, write_sprites

from linocut.errors import UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.packed import dequantize
from linocut.quantize.rounding import quantize_tensor
from linocut.train import distill
from linocut.train.dataset import edges
from linocut.train.export import export
from linocut.train.recipe import Recipe
from linocut.train.scenes import TASKS
from linocut.train.stages import run_stage
from linocut.train.study import REPORT, Study, run_arm, table

ARMS = """recipe = "recipe.toml"
seconds = 30
[arms.plain]
[arms.muon.qat]
muon = true
lr = 1e-3
dense_lr = 1e-4
"""
USUAL = '[arms.usual.qat]\nrounding = "absmean"\ncalibrate = 0\n'


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a study, and a run with the tiny recipe's autoencoder and teacher."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("study")
    recipe = Recipe.from_file(write_recipe(root))
    write_sprites(root / "sprites")
    for stage in ("vae", "teacher"):
        run_stage(stage, recipe, root / "run", root / "sprites", "cpu")
    (root / "study.toml").write_text(ARMS)
    return root


def test_arms_vary_what_they_say_and_nothing_else(trained):
    study = Study.from_file(trained / "study.toml", seconds=7)
    plain, muon = study.arms["plain"], study.arms["muon"]
    assert plain.ternary.max_seconds == muon.binary.max_seconds == 7
    assert (muon.ternary.muon, muon.ternary.lr, muon.ternary.dense_lr) == (True, 1e-3, 1e-4)
    assert plain.ternary.lr == study.base.ternary.lr
    assert muon.ternary.batch == plain.ternary.batch
    assert muon.path == plain.path == study.base.path


def test_all_arms_share_what_the_study_says_and_draw_squares(trained):
    text = (trained / "recipe.toml").read_text().replace("[data]", "[data]\nshapes = [[64, 32]]")
    (trained / "shapes.toml").write_text(text)
    (trained / "shared.toml").write_text('recipe = "shapes.toml"\nseconds = 3\n[qat]\nlr = 5e-3\nwarmup = 2\n[arms.a]\n'
                                         '[arms.b.qat]\nlr = 6e-3\n')
    a, b = Study.from_file(trained / "shared.toml").arms.values()
    assert (a.binary.lr, a.ternary.warmup, b.binary.lr, b.binary.warmup) == (5e-3, 2, 6e-3, 2)
    assert a.grids == b.grids == [a.tokens]


def test_a_path_of_all_arms_is_what_they_vary_and_are_measured_by(trained):
    (trained / "path.toml").write_text('recipe = "recipe.toml"\nseconds = 3\n[path]\ngrid = 4\n'
                                       "substeps = [1, 1, 1, 2]\n[arms.a]\n[arms.b.path]\nsubsteps = [1, 1, 1, 1]\n")
    study = Study.from_file(trained / "path.toml")
    assert Recipe.from_file(trained / "recipe.toml").path.grid == 2
    assert study.base.path == study.arms["a"].path
    assert (study.base.path.grid, study.base.path.substeps) == (4, (1, 1, 1, 2))
    assert (study.arms["b"].path.grid, study.arms["b"].path.substeps) == (4, (1, 1, 1, 1))


def test_arms_that_would_take_too_long_are_left(trained, tmp_path):
    command = [sys.executable, "-m", "linocut.train.study", str(trained / "study.toml"), "--run", str(trained / "run"),
               "--out", str(tmp_path), "--until", "1"]
    said = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True,
                          check=True).stdout
    assert said.startswith("no time for plain ternary, plain binary, muon ternary, muon binary\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "found"), [
    ('recipe = "recipe.toml"\nseconds = 1\n', "not a readable study"),
    (ARMS + "[arms.x]\nlr = 1\n", "unknown tables.*known are qat and path"),
    (ARMS + "[arms.x.qat]\nrate = 1\n", "unknown keys.*rate"),
    (ARMS + '[arms.x.qat]\nrounding = "exact"\n', "unknown rounding 'exact'; choose from tied, absmean"),
    (ARMS + '[arms.x.qat]\nrounding = "absmean"\n', "calibrate, freeze and start place weights for the rounding tied"),
    (ARMS + '[arms.x.qat]\nstart = "run/binary"\n', "all arms of a study have one beginning"),
    (ARMS + "[arms.x.path]\ngrid = 3\n", r"one number per step of the grid \(3\)"),
])
def test_a_study_that_makes_no_sense_is_refused(trained, tmp_path, text, found):
    write_recipe(tmp_path)
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(UsageError, match=found):
        Study.from_file(tmp_path / "study.toml")


def test_edges_tell_a_blur():
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert edges(picture) == pytest.approx(2 / 3, rel=0.05)  # the mean distance of two random numbers, across and down
    assert edges(torch.nn.functional.avg_pool2d(picture, 3, stride=1)) < 0.4 * edges(picture)
    assert edges(torch.ones(1, 3, 4, 4)) == 0


def test_the_command_runs_every_arm_once(trained):
    command = [sys.executable, "-m", "linocut.train.study", str(trained / "study.toml"), "--run", str(trained / "run"),
               "--out", str(trained / "out"), "--encoding", "ternary", "--device", "cpu", "--devices", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    first = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    reports = {arm: trained / "out" / arm / REPORT.format("ternary") for arm in ("plain", "muon")}
    found = {arm: json.loads(path.read_text()) for arm, path in reports.items()}
    assert found["plain"]["errors"] != found["muon"]["errors"]
    for report in found.values():
        assert len(report["errors"]) == 2
        assert min(report["errors"]) > 0
        assert report["picture"] > 0
        assert 0.2 < report["edges_default"] < 5
    times = {path: path.stat().st_mtime_ns for path in reports.values()}
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout == first
    assert {path: path.stat().st_mtime_ns for path in reports.values()} == times
    rows = first.splitlines()[1:]
    best = max(found, key=lambda arm: found[arm]["psnr_default"])
    assert rows[0].split()[0] == best
    assert table(trained / "out", ["muon"]).count("\n") == 1


def test_an_arm_that_breaks_fails_the_command_but_not_the_others(trained, tmp_path):
    (tmp_path / "plain").write_text("where its folder should be")
    command = [sys.executable, "-m", "linocut.train.study", str(trained / "study.toml"), "--run", str(trained / "run"),
               "--out", str(tmp_path), "--encoding", "binary", "--device", "cpu", "--devices", "2"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"an arm broke: see the logs in {tmp_path}" in done.stderr
    assert "FileExistsError" in (tmp_path / "plain.binary.log").read_text()
    assert "muon" in done.stdout
    assert (tmp_path / "muon" / REPORT.format("binary")).is_file()
    assert (tmp_path / "muon" / "model-binary" / "model_index.json").is_file()


def test_what_else_might_help_is_compared_with_ours():
    ours, plain = (Study.from_file(ROOT / "recipes" / "embedded" / f"{name}.toml").arms[arm]
                   for name, arm in (("quality", "ours"), ("study", "plain")))
    assert ours == plain


def test_an_arm_reads_the_kinds_of_prompts_that_it_asks_for(trained, tmp_path, monkeypatch):
    text = (trained / "study.toml").read_text() + "[arms.counting.qat]\ntasks = {counting = 1}\n"
    (trained / "counting.toml").write_text(text)
    study, seen = Study.from_file(trained / "counting.toml"), []
    made = distill.caption_bank
    monkeypatch.setattr(distill, "caption_bank", lambda *given: seen.append(given[-1]) or made(*given))
    monkeypatch.setattr("linocut.train.study.measure", lambda *_: {})
    for arm in ("counting", "plain"):
        run_arm(study.arms[arm], study.base, "binary", trained / "run", tmp_path / arm, "cpu")
    assert seen == [{"counting": 1}, TASKS]


def test_an_arm_is_measured_by_the_path_of_the_recipe(trained, tmp_path, monkeypatch):
    text = (trained / "study.toml").read_text() + "[arms.single.path]\nsubsteps = [1, 1]\n"
    (trained / "single.toml").write_text(text)
    study = Study.from_file(trained / "single.toml")
    assert study.arms["single"].path.substeps == (1, 1)
    seen = []
    monkeypatch.setattr("linocut.train.study.measure", lambda recipe, *_: seen.append(recipe.path.substeps) or {})
    run_arm(study.arms["single"], study.base, "binary", trained / "run", tmp_path / "single", "cpu")
    assert seen == [(1, 2)]


def test_students_with_the_usual_rounding_are_packed_as_they_were_trained(trained, tmp_path):
    (trained / "usual.toml").write_text((trained / "study.toml").read_text() + USUAL)
    study = Study.from_file(trained / "usual.toml")
    arm = study.arms["usual"]
    run_arm(arm, study.base, "ternary", trained / "run", tmp_path / "usual", "cpu")
    export(arm, tmp_path / "usual", tmp_path / "model", {"ternary": "transformer"})
    latent = load_file(tmp_path / "usual" / "ternary" / "model.safetensors")
    name = "single_transformer_blocks.0.attn.to_out"
    weight = latent[f"transformer.{name}.weight"].float()
    with Checkpoint.open(tmp_path / "model" / "transformer") as packed:
        found = dequantize(packed.packed_tensor(name))
    assert np.array_equal(found, dequantize(quantize_tensor(weight, "ternary", "absmean")))
    assert not np.array_equal(found, dequantize(quantize_tensor(weight, "ternary", "tied")))
