"""`benchmarks/quality.py`: what it tells of a study is what the verdicts say, and the whole chain runs at toy size."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from linocut.eval.run import PROMPTS
from linocut.train.prompts import sample_prompts
from linocut.train.recipe import Recipe
from linocut.train.study import REPORT

ROOT = Path(__file__).parents[2]
TRAINED = {"psnr_default": 21.5, "edges_default": 0.93, "steps": 1501}


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("quality")


def write_results(judged: Path, label: str, prompts, right) -> None:
    folder = judged / label / label
    folder.mkdir(parents=True)
    (judged / label / PROMPTS).write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (folder / "results.jsonl").write_text("".join(
        json.dumps({"prompt": prompt["prompt"], "tag": prompt["tag"], "image": image,
                    "correct": bool(right(number, image))}) + "\n"
        for number, prompt in enumerate(prompts) for image in range(4)))


def test_the_table_tells_what_was_judged(tmp_path, quality):
    prompts, judged = sample_prompts("test", 60), tmp_path / "judged"
    for label, right in {"teacher": lambda *_: True, "usual.binary": lambda _, image: image < 2,
                         "ours.binary": lambda number, image: image < 2 + (number // 6) % 2}.items():
        write_results(judged, label, prompts, right)
    for arm in ("ours", "usual"):
        (tmp_path / arm).mkdir()
        (tmp_path / arm / REPORT.format("binary")).write_text(json.dumps(TRAINED))
    found = quality.compared(tmp_path, [("ours", "binary"), ("usual", "binary")], judged)
    ours, usual = found["binary"]["ours"], found["binary"]["usual"]
    assert (found["teacher"]["score"]["value"], usual["score"]["value"]) == (1.0, 0.5)
    assert ours["score"]["value"] == ours["keeps"]["value"] == 0.625
    assert ours["difference"]["value"] == 0.125
    assert ours["gap_closed"]["value"] == 0.25
    assert 0 < ours["gap_closed"]["low"] < 0.25 < ours["gap_closed"]["high"] < 0.5
    assert ours["mcnemar_p"] == pytest.approx(2.0 ** -29)  # 30 pictures that the usual way alone gets wrong
    assert "difference" not in usual
    lines = quality.table(found)
    assert lines[4].startswith("| binary | ours | 1,501 | 62.50 +- ")
    assert "| +12.5 (+" in lines[4]
    assert "| 25 (" in lines[4]
    assert "| 50.0 (50.0 to 50.0) |  |  | -12.5 (-" in lines[5]
    assert lines[5].endswith(" | 21.50 | 0.930 |")
    assert quality.interval({"value": -1e-9, "low": -0.01, "high": 1e-9}, sign="+") == "+0.0 (-1.0 to +0.0)"
    quality.plot(found, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width == 650


def test_arms_that_came_home_as_transformers_are_completed(tmp_path, quality):
    whole, bare = tmp_path / "ours" / "model-binary", tmp_path / "usual" / "model-ternary"
    for model in (whole, bare):
        (model / "transformer").mkdir(parents=True)
        (model / "transformer" / "weights").write_text(model.name)
    quality.complete(tmp_path, [bare])  # nothing to complete with
    assert [path.name for path in bare.iterdir()] == ["transformer"]
    (whole / "vae").mkdir()
    (whole / "vae" / "weights").write_text("shared")
    (whole / "model_index.json").write_text("{}")
    quality.complete(tmp_path, [bare])
    assert {path.name for path in bare.iterdir()} == {"transformer", "vae", "model_index.json"}
    assert (bare / "transformer" / "weights").read_text() == "model-ternary"


def test_students_are_compared_in_four_steps_of_the_teacher_and_in_equal_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    students, prompts = importlib.import_module("students"), sample_prompts("test", 60)
    for name, steps, right in (("teacher", 4, 2), ("teacher", 8, 4), ("binary", 8, 3)):
        results = tmp_path / f"{name}-256x256-{steps}"
        write_results(tmp_path, results.name, prompts, lambda _, image, right=right: image < right)
        (results / results.name).rename(results / name)
    recipe = Recipe.from_file(ROOT / "recipes" / "embedded" / "recipe.toml")
    lines = students.table(recipe, tmp_path, 60)
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["4", "8", "8"]
    assert lines[4].startswith("| 256x256 | binary | 8 | 75.00 |")
    assert lines[4].endswith("| 150.0 (150.0 to 150.0) | 75.0 (75.0 to 75.0) |")
    assert [line.split("|")[-4].strip() for line in lines[2:]] == ["", "", "25.00 +- 0.00"]
    (tmp_path / "teacher-256x256-8" / "teacher" / "results.jsonl").unlink()  # a run that was cut
    fewer = students.table(recipe, tmp_path, 12)
    assert [line.split("|")[3].strip() for line in fewer[2:]] == ["4", "8"]
    assert "teacher-256x256-8 is left out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_from_its_training_to_its_table(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "train"))
    tiny = importlib.import_module("tiny_recipe")
    tiny.write_sprites(tmp_path / "sprites")
    tiny.write_recipe(tmp_path)
    (tmp_path / "study.toml").write_text('recipe = "recipe.toml"\nseconds = 20\n[arms.ours]\n[arms.usual.qat]\n'
                                         'rounding = "absmean"\ncalibrate = 0\n[arms.never-trained]\n')
    arms = [f"--arm={arm}" for arm in ("ours", "usual")]
    where = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    stages = ["--stage", "vae", "--stage", "teacher", "--sprites", str(tmp_path / "sprites")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run("-m", "linocut.train.stages", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run"), *stages,
        "--device", "cpu")
    with pytest.raises(AssertionError, match="not trained yet: never-trained, ours, usual; run"):
        run(str(ROOT / "benchmarks" / "quality.py"), str(tmp_path / "study.toml"), *where)
    run("-m", "linocut.train.study", str(tmp_path / "study.toml"), *where, *arms, "--encoding", "ternary")
    command = [str(ROOT / "benchmarks" / "quality.py"), str(tmp_path / "study.toml"), *where, "-n", "6",
               "--at-once", "2"]
    told = run(*command)
    assert told.count("exit code 0") == 3  # the teacher and two students
    assert told.count("| ternary |") == 2
    assert told.endswith(run(*command, "--table"))
    found = json.loads((tmp_path / "out" / "judged-6" / "quality.json").read_text())
    assert set(found["ternary"]) == {"ours", "usual"}
    assert found["ternary"]["ours"]["training"]["errors"] != found["ternary"]["usual"]["training"]["errors"]
    assert torch.tensor(list(found["ternary"]["ours"]["tasks"].values())).mean() == pytest.approx(
        found["ternary"]["ours"]["score"]["value"])
    one = [*command[:-4], "-n", "7", "--shards", "2", "--arm"]
    told = run(*one, "usual")
    assert (told.count("exit code 0"), told.count("shard 1/2"), told.count("| ternary |")) == (4, 2, 1)
    assert run(*one, "ours").count("| ternary |") == 2  # what was judged before is told again
    with pytest.raises(AssertionError, match="not trained yet: never-trained; run"):
        run(*command, "--arm", "never-trained", "--arm", "ours")
    with pytest.raises(AssertionError, match=r"unknown arms \['mine'\]; the study has ours, usual, never-trained"):
        run(*command, "--arm", "mine")
