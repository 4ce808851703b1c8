"""`benchmarks/judging.py`: runs go where there is room, and one that fails ends them all with its reason."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACE = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1], "gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
time.sleep(1)
"""


@pytest.fixture
def judging(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("judging")


def instead(monkeypatch, judging, script: str) -> None:
    """Start `script FOLDER` where the evaluation would start."""
    begin = judging.subprocess.Popen
    monkeypatch.setattr(judging.subprocess, "Popen", lambda command, **options: begin(
        [sys.executable, "-c", script, command[command.index("--out") + 1]], **options))


def test_runs_are_spread_over_the_gpus(tmp_path, monkeypatch, judging):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    instead(monkeypatch, judging, PLACE)
    folders = [tmp_path / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir()
    devices = ["cuda", "cuda", "cuda:1", "cuda"]
    judging.judge([judging.Judging(folder, ["--device", device])
                   for folder, device in zip(folders, devices, strict=True)], at_once=4)
    assert [(folder / "gpu").read_text() for folder in folders] == ["3", "5", "3,5", "3"]


def test_shards_of_a_run_share_its_folder_and_have_logs_of_their_own(tmp_path, monkeypatch, judging):
    begin = judging.subprocess.Popen
    monkeypatch.setattr(judging.subprocess, "Popen", lambda command, **options: begin(
        [sys.executable, "-c", "import sys; print(sys.argv[1:])", *command[3:]], **options))
    judging.judge([judging.Judging(tmp_path / "one", [], shard=f"{number}/2") for number in range(2)], at_once=2)
    for number in range(2):
        said = (tmp_path / f"one.{number}.log").read_text()
        assert f"'--shard', '{number}/2'" in said
        assert repr(str(tmp_path / "one")) in said


def test_a_run_that_fails_says_why(tmp_path, monkeypatch, judging, capsys):
    instead(monkeypatch, judging, "import sys; sys.exit('no detector there')")
    with pytest.raises(SystemExit, match="no detector there"):
        judging.judge([judging.Judging(tmp_path / "one", [])], at_once=1)
    assert "one, shard 0/1: exit code 1" in capsys.readouterr().out
