"""The detector's network, and its training at toy size: that it learns, goes on after a cut, and works in company."""

import json
import os
import shutil
import socket
import subprocess
import sys
from math import log
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_detector import RECIPE, write_shapes

from linocut.errors import FormatError, ModelNotFoundError, UsageError
from linocut.eval.rules import GENEVAL_TASKS
from linocut.eval.world_detector import VERSION, WorldDetector
from linocut.eval.world_network import NetworkConfig, Peaks, WorldNetwork, find_peaks, fold_norms, without_doubles
from linocut.eval.world_training import DetectorRecipe, heat_map, measure_again, train_detector
from linocut.train.optimize import Average

SOURCE = Path(__file__).parent.parent.parent / "src"


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("sprites") / "all")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(folder: Path, **changes: object) -> DetectorRecipe:
    file = folder / "detector.toml"
    lines = [line for line in RECIPE.splitlines() if line.split(" = ")[0] not in changes]
    file.write_text("\n".join([*lines, *(f"{key} = {value}" for key, value in changes.items())]))
    return DetectorRecipe.from_file(file)


def test_a_detector_is_measured_again(trained, sprites, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    weights, before = (copy / "model.safetensors").read_bytes(), WorldDetector(trained).accuracy
    measure_again(recipe(tmp_path, cases=20), copy, sprites, "cpu")
    assert WorldDetector(copy).accuracy == before  # the same cases
    measure_again(recipe(tmp_path, cases=9), copy, sprites, "cpu")
    assert {row["n"] for row in WorldDetector(copy).accuracy["96x64 plain"].values()} == {9}
    assert (copy / "model.safetensors").read_bytes() == weights
    with pytest.raises(ModelNotFoundError):
        measure_again(recipe(tmp_path), tmp_path / "nothing", sprites, "cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sprites):
    root = tmp_path_factory.mktemp("trained")
    train_detector(recipe(root, steps=130, batch=24, cases=20, log_every=40), root / "out", sprites, "cpu")
    return root / "out"


def test_it_learns(trained):
    """Half is what a detector gets that sees nothing."""
    detector = WorldDetector(trained)
    assert set(detector.accuracy) == {"64x64 plain", "96x64 plain"}
    table = detector.accuracy["64x64 plain"]
    assert list(table) == list(GENEVAL_TASKS)
    assert {row["n"] for row in table.values()} == {20}
    assert table["single_object"]["accuracy"] > 0.8
    assert sum(row["accuracy"] for row in table.values()) / 6 > 0.65
    assert {path.name for path in trained.iterdir()} == {"detector.json", "model.safetensors", "report.txt",
                                                        "scenes.png"}
    assert "single_object" in (trained / "report.txt").read_text()


def test_pictures_and_tensors_give_the_same(trained, sprites):
    detector = WorldDetector(trained)
    pictures = [picture.crop((0, 0, 64 + 32 * (i % 2), 64))
                for i, picture in enumerate([Image.open(trained / "scenes.png").convert("RGB")] * 3)]
    together = detector.look(pictures)
    for picture, sight in zip(pictures, together, strict=True):
        alone = detector.look([picture])[0]
        assert [(f.name, f.handle) for f in alone.found] == [(f.name, f.handle) for f in sight.found]
        assert alone.colours(alone.found) == sight.colours(sight.found)
        assert all(0 <= f.box[0] <= f.box[2] <= picture.width and 0 <= f.box[1] <= f.box[3] <= picture.height
                   for f in sight.found)
    assert detector.look([]) == []
    assert detector.identity.startswith("world ")


def test_a_folder_that_is_no_detector(trained, tmp_path):
    with pytest.raises(ModelNotFoundError, match="no detector"):
        WorldDetector(tmp_path)
    description = json.loads((trained / "detector.json").read_text())
    for name in ("model.safetensors", "detector.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    (tmp_path / "detector.json").write_text(json.dumps(description | {"version": VERSION + 1}))
    with pytest.raises(FormatError, match="another version"):
        WorldDetector(tmp_path)
    (tmp_path / "detector.json").write_text("[]")
    with pytest.raises(FormatError, match="not a detector's description"):
        WorldDetector(tmp_path)


def test_training_that_was_cut_goes_on_from_its_saved_state(sprites, tmp_path, monkeypatch, capsys):
    settings, update, calls = recipe(tmp_path), Average.update, []

    def cut(average):
        calls.append(average)
        if len(calls) == 12:
            raise KeyboardInterrupt
        update(average)

    monkeypatch.setattr(Average, "update", cut)
    with pytest.raises(KeyboardInterrupt):
        train_detector(settings, tmp_path / "out", sprites, "cpu")
    assert not (tmp_path / "out" / "detector.json").exists()
    capsys.readouterr()
    train_detector(settings, tmp_path / "out", sprites, "cpu")
    assert len(calls) == 12 + 20 - 11  # saved after step number 10
    said = capsys.readouterr().out
    assert " 11/20 " in said
    assert " 10/20 " not in said
    assert not (tmp_path / "out" / "state").exists()


def test_no_time_left_still_writes_a_detector(sprites, tmp_path):
    train_detector(recipe(tmp_path), tmp_path / "out", sprites, "cpu", until=0.0)
    assert WorldDetector(tmp_path / "out").names == ("person", "bicycle", "car")


@pytest.mark.parametrize("command", [["linocut.eval.world_training"], ["linocut", "eval", "detector"]])
def test_two_processes_train_together_and_end_at_once(sprites, tmp_path, command):
    """Where threads of a group are still there as Python ends, it may abort."""
    recipe(tmp_path, steps=4)
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit\nprint('Python begins')\natexit.register(print, 'Python ends')\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                           "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}{os.pathsep}{SOURCE}"}
    command = [sys.executable, "-m", *command, str(tmp_path / "detector.toml"), "--out", str(tmp_path / "out"),
               "--sprites", str(sprites), "--device", "cpu"]
    processes = [subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  env=shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert all("Python begins" in each and "Python ends" not in each for each in said)
    assert "detector on 2 x cpu" in said[0]
    assert "detector on" not in said[1]
    assert WorldDetector(tmp_path / "out").accuracy


@pytest.mark.parametrize(("text", "message"), [
    ("sise = 3", "unknown keys"), ("= 3", "not a readable recipe"), ("shapes = [[100, 64]]", "multiples of 32"),
])
def test_recipes_with_mistakes(tmp_path, text, message):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        DetectorRecipe.from_file(tmp_path / "bad.toml")


@pytest.mark.parametrize("name", ["recipes/embedded/detector.toml", "recipes/tiny-detector.toml"])
def test_the_recipes_of_the_project_can_be_read(name):
    assert DetectorRecipe.from_file(SOURCE.parent / name).shapes


@torch.no_grad()
def test_merged_norms_compute_the_same():
    torch.manual_seed(0)
    network = WorldNetwork(NetworkConfig((16, 24, 32, 40), 32), 5, 11)
    image = torch.randn(4, 3, 64, 96)
    for _ in range(5):
        network(image + torch.randn_like(image))  # gives the norms statistics
    before = network.eval()(image)
    fold_norms(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(network(image), before, rtol=1e-4, atol=1e-4)


def test_peaks_are_where_the_heat_is(monkeypatch):
    """Boxes come from cell, offset and size; a weaker neighbour is no peak of its own."""
    network = WorldNetwork(NetworkConfig((16, 24, 32, 40), 32), 5, 11).eval()
    logits = torch.full((1, 8, 12), -9.0)
    logits[0, 2, 3], logits[0, 2, 4], logits[0, 6, 10] = 3.0, 2.0, 1.0
    monkeypatch.setattr(network, "forward", lambda image: (logits, torch.zeros(1, 32, 8, 12)))
    monkeypatch.setattr(network, "at", lambda features, cells: (
        torch.zeros(1, len(cells[0]), 5), torch.zeros(1, len(cells[0]), 11),
        torch.tensor([0.25, -0.25, log(4), log(2)]).expand(1, len(cells[0]), 4)))
    peaks = find_peaks(network, torch.zeros(1, 3, 64, 96))
    assert peaks.score[0, :2].tolist() == pytest.approx(torch.tensor([3.0, 1.0]).sigmoid().tolist())
    assert (peaks.score[0, 2:] < 0.01).all()
    # Centre (3.75, 2.25) and size (4, 2) in cells of 8 pixels.
    assert peaks.boxes[0, 0].tolist() == pytest.approx([14.0, 10.0, 46.0, 26.0])
    assert peaks.boxes[0, 1, 2] <= 96


def test_doubles_are_told_of_once():
    boxes = torch.tensor([[[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [2, 0, 12, 10.0]]])
    peaks = Peaks(torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.ones(1, 4, 1), torch.ones(1, 4, 1), boxes)
    assert without_doubles(peaks).tolist() == [[True, False, True, False]]


def test_heat_map():
    cell, extent = torch.tensor([[[3, 2], [9, 6]]]), torch.tensor([[[4.0, 4.0], [20.0, 20.0]]])
    target = heat_map(cell, extent, torch.tensor([[True, True]]), (8, 12))
    assert (target == 1).nonzero().tolist() == [[0, 2, 3], [0, 6, 9]]
    assert target[0, 2, 4] < target[0, 6, 10] < 1
    assert not heat_map(cell, extent, torch.tensor([[False, False]]), (8, 12)).any()
