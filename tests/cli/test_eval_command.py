"""`linocut eval` with the embedded models: real pictures, a detector of all their things that has learned nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linocut.cli import main
from linocut.eval import world_detector
from linocut.eval.rules import GENEVAL_TASKS
from linocut.eval.world_detector import save_detector
from linocut.eval.world_network import NetworkConfig, WorldNetwork
from linocut.train.palette import COLOURS
from linocut.train.vocabulary import objects

SOURCE = Path(__file__).parent.parent.parent / "src"
pytestmark = pytest.mark.filterwarnings("ignore:the prompt takes")


def linocut(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in ("eval", *arguments)])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors") / "blind"
    torch.manual_seed(0)
    config = NetworkConfig((16, 16, 16, 16), 16)
    network = WorldNetwork(config, len(objects()), len(COLOURS))
    save_detector(folder, network, config, [thing.name for thing in objects()], COLOURS)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "dev.jsonl"
    assert linocut("prompts", file, "-n", 6) == 0
    return file


def test_prompts(prompts, capsys, tmp_path):
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    assert sorted(each["tag"] for each in lines) == sorted(GENEVAL_TASKS)
    assert linocut("prompts", prompts) == 2
    assert "exists already" in capsys.readouterr().err
    assert linocut("prompts", tmp_path / "many.jsonl", "-n", 2500, "--split", "test") == 0
    said = capsys.readouterr().out
    assert "2500 prompts (test)" in said
    assert "standard error to expect with 4 pictures each: 0.41 points" in said


def test_one_command_judges_both_variants(prompts, detector, tmp_path, capsys):
    command = ("geneval", "--out", tmp_path / "run", "--detector", detector, "--prompts", prompts, "--images", 1,
               "--size", "128x128")
    assert linocut(*command) == 0
    said = capsys.readouterr().out
    assert "6 prompts x 1 images, detector world" in said
    assert "embedded-binary against embedded: " in said
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["scores"]) == {"embedded", "embedded-binary"}
    assert report["scores"]["embedded"]["overall"]["value"] == 0.0
    assert (tmp_path / "run" / "failures.png").is_file()
    results = tmp_path / "run" / "embedded" / "results.jsonl"
    before = results.read_bytes()
    assert before.count(b"\n") == 6
    assert linocut(*command, "--json") == 0
    assert json.loads(capsys.readouterr().out) == report
    assert results.read_bytes() == before
    other = ("geneval", "--out", tmp_path / "run", "--detector", detector, "-n", 12)
    assert linocut(*other) == 2
    assert "holds another run (prompts was" in capsys.readouterr().err
    assert linocut("report", tmp_path / "run", "--against", results) == 0
    assert "embedded against results: +0.00 points" in capsys.readouterr().out


def test_shards_at_another_size(prompts, detector, tmp_path, capsys):
    command = ("geneval", "--out", tmp_path / "run", "--detector", detector, "--prompts", prompts, "--images", 1,
               "-m", "t=embedded", "--size", "160x96", "--steps", 1)
    assert linocut(*command, "--shard", "1/2") == 0
    assert "shard 1/2 is judged" in capsys.readouterr().out
    assert linocut("report", tmp_path / "run") == 2
    assert "3 of 6 pictures are not judged yet" in capsys.readouterr().err
    assert linocut(*command, "--shard", "0/2") == 0
    assert linocut("report", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["arms"]["t"]["width"] == 160


def test_fidelity_of_the_embedded_models(prompts, capsys):
    assert linocut("fidelity", "embedded", "embedded", "b=embedded-binary", "--prompts", prompts, "-n", 3,
                   "--size", "128x96", "--steps", 2, "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    itself, other = measured["embedded"], measured["b"]
    assert itself["psnr"]["mean"] > 100
    assert itself["ssim"]["mean"] == pytest.approx(1)
    assert itself["on_teacher_path"] == itself["on_student_path"] == [0, 0]
    assert itself["sensitivity"] == [1, 1]
    assert itself["contrast"] == [0, 0]
    assert other["psnr"]["mean"] < 40
    assert all(0.01 < error < 2 for name in ("on_teacher_path", "on_student_path", "contrast") for error in other[name])


@pytest.mark.parametrize(("arguments", "message"), [
    (("geneval",), "Missing option '--out'"),
    (("geneval", "--out", "x", "--detector", "none"), "none: no detector"),
    (("geneval", "--out", "x", "--detector", "none", "--shard", "3"), "a shard is I/N"),
    (("geneval", "--out", "x", "--detector", "none", "-m", "embedded", "-m", "embedded"), "two models are labelled"),
    (("report", "nowhere"), "no run in this folder"),
    (("detector", "none.toml", "--out", "x"), "not a readable recipe"),
    (("fidelity", "embedded", "embedde"), "no model 'embedde'"),
    (("prompts", "p.jsonl", "-n", 3), "Invalid value for '-n'"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert linocut(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_package_s_own_detector(prompts, detector, tmp_path, monkeypatch, capsys):
    command = ("geneval", "--out", tmp_path / "run", "--prompts", prompts, "--images", 1, "-m", "embedded", "--size",
               "64x64", "--steps", 1)
    monkeypatch.setattr(world_detector, "SHIPPED", tmp_path / "none")
    assert linocut(*command) == 2
    assert "this installation has no detector of its own" in capsys.readouterr().err
    monkeypatch.setattr(world_detector, "SHIPPED", detector)
    assert linocut(*command) == 0


def test_help_loads_no_torch():
    code = ("import sys\nfrom linocut.cli import main\ntry:\n    main(['eval', 'geneval', '--help'])\n"
            "except SystemExit:\n    assert not {'torch', 'numpy'} & set(sys.modules)\n    print('lean')")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(SOURCE)})
    assert said.stdout.endswith("lean\n"), said.stderr
