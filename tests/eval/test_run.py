"""A run end to end on a tiny model: cut and gone on with, in shards, reported. The detector here tells by pixels."""

import hashlib
import json
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from linocut.errors import FormatError, UsageError
from linocut.eval.arms import Arm, Field, Shot, label_of
from linocut.eval.detector import Sight
from linocut.eval.prompts import seed_of
from linocut.eval.report import as_text, failure_sheet, make_report, write_report
from linocut.eval.rules import GENEVAL_TASKS, Found, Thresholds
from linocut.eval.run import Shard, describe, evaluate, read_results, results
from linocut.train.prompts import sample_prompts

pytestmark = pytest.mark.filterwarnings("ignore:the prompt takes")
PROMPTS, IMAGES = sample_prompts("dev", 12), 2


class HashDetector:
    """Finds everything that is asked for in about half of all pictures, decided by a hash of their pixels."""

    identity, thresholds, accuracy = "hash", Thresholds(), {"plain": {"counting": {"accuracy": 0.5}}}
    classes = colours = frozenset()

    def look(self, pictures):
        sights = []
        for picture in pictures:
            lucky = hashlib.sha256(np.asarray(picture).tobytes()).digest()[0] < 128
            found = [Found(entry["class"], 0.95, (0, 0, 9, 9)) for metadata in PROMPTS for entry in metadata["include"]
                     for _ in range(entry["count"] if metadata["tag"] == "counting" else 1)]
            sights.append(Sight(found if lucky else [], lambda taken: ["red"] * len(taken)))
        return sights


@pytest.fixture(scope="module")
def arm(tiny_model):
    return Arm("tiny", str(tiny_model), steps=1)


def run(root, arm, shard=None, keep="failures"):
    detector = HashDetector()
    describe(root, PROMPTS, {"detector": detector.identity, "images": IMAGES, "detector_accuracy": detector.accuracy,
                             "arms": {arm.label: arm.facts}})
    return evaluate(arm, detector, PROMPTS, IMAGES, root, shard, keep)


def lines_of(root, arm):
    return sorted(results(root, arm.label), key=lambda line: (line["prompt"], line["image"]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, arm):
    root = tmp_path_factory.mktemp("runs") / "whole"
    assert run(root, arm) == 24
    return root


@pytest.fixture
def whole(finished, tmp_path):
    """A finished run of one's own."""
    return Path(shutil.copytree(finished, tmp_path / "whole"))


def test_every_picture_is_judged_once(whole, arm):
    lines = results(whole, arm.label)
    assert [(line["prompt"], line["image"]) for line in lines] == [
        (metadata["prompt"], image) for metadata in PROMPTS for image in range(IMAGES)]
    assert {line["seed"] for line in lines} == {seed_of(line["prompt"], line["image"]) for line in lines}
    assert {line["correct"] for line in lines} == {True, False}
    assert all(bool(line["reason"]) != line["correct"] for line in lines)
    assert len(list((whole / "tiny" / "pictures").glob("*.webp"))) == sum(not line["correct"] for line in lines)


def test_a_finished_run_has_nothing_left_to_do(whole, arm):
    before = (whole / "tiny" / "results.jsonl").read_bytes()
    assert run(whole, arm) == 0
    assert (whole / "tiny" / "results.jsonl").read_bytes() == before


def test_a_cut_run_goes_on_and_ends_the_same(whole, arm):
    """Cut in the middle of a line, as a kill may do."""
    file = whole / "tiny" / "results.jsonl"
    data = file.read_bytes()
    at = data.index(b"\n", len(data) // 2) + 20
    file.write_bytes(data[:at])
    assert run(whole, arm) == 24 - data[:at].count(b"\n")
    assert file.read_bytes() == data


def test_a_killed_process_leaves_whole_lines(tiny_model, tmp_path, arm, whole):
    """A process that dies while it draws the second chunk of pictures has the first one on disk."""
    code = f"""
import os, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
import linocut.eval.run as module
from linocut.eval.arms import Arm
from test_run import run
from pathlib import Path
module._CHUNK = 5
draw = Arm.draw
def dying(self, shots):
    for number, picture in enumerate(draw(self, shots)):
        if number == 8:
            os.kill(os.getpid(), 9)
        yield picture
Arm.draw = dying
run(Path({str(tmp_path / "killed")!r}), Arm("tiny", {str(tiny_model)!r}, steps=1))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr
    assert len(results(tmp_path / "killed", "tiny")) == 5
    assert run(tmp_path / "killed", arm) == 19
    assert lines_of(tmp_path / "killed", arm) == lines_of(whole, arm)


def test_shards_equal_the_whole(whole, arm, tmp_path):
    root = tmp_path / "shards"
    assert [run(root, arm, Shard(index, 5)) for index in (3, 0, 4)] == [4, 6, 4]
    with pytest.raises(UsageError, match="10 of 24 pictures are not judged yet"):
        make_report(root)
    assert [run(root, arm, Shard(index, 5)) for index in (1, 2)] == [6, 4]
    assert lines_of(root, arm) == lines_of(whole, arm)
    assert make_report(root) == make_report(whole)


@pytest.mark.parametrize("text", ["1", "2/2", "a/b", "-1/2", "0/0"])
def test_shards_with_mistakes(text):
    with pytest.raises(UsageError, match="a shard is I/N"):
        Shard.parse(text)


def test_another_run_in_the_folder_is_refused(whole, arm, tiny_model, monkeypatch):
    facts = {"detector": "hash", "images": IMAGES, "arms": {}}
    with pytest.raises(UsageError, match="holds another run \\(detector was 'hash', now 'other'\\)"):
        describe(whole, PROMPTS, facts | {"detector": "other"})
    with pytest.raises(UsageError, match="holds another run \\(prompts was"):
        describe(whole, PROMPTS[1:], facts)
    with pytest.raises(UsageError, match="tiny was another model or drew otherwise"):
        describe(whole, PROMPTS, facts | {"arms": {"tiny": Arm("tiny", str(tiny_model), steps=2).facts}})
    with monkeypatch.context() as patch:
        patch.setenv("LINOCUT_KERNEL", "reference")
        slow = Arm("tiny", str(tiny_model), steps=1).facts
    with pytest.raises(UsageError, match="drew otherwise"):
        describe(whole, PROMPTS, facts | {"arms": {"tiny": slow}})
    describe(whole, PROMPTS, facts | {"arms": {"second": arm.facts}})
    assert set(json.loads((whole / "run.json").read_text())["arms"]) == {"tiny", "second"}


def test_results_that_are_none(whole, tmp_path):
    file = whole / "tiny" / "results.jsonl"
    file.write_text('{"prompt": "a"}\n' + file.read_text())
    with pytest.raises(FormatError, match="line 1 is no line of results"):
        read_results(file)
    with pytest.raises(UsageError, match="no run in this folder"):
        make_report(tmp_path)


def test_report_and_sheet(whole, arm, tiny_model):
    two = Arm("two-steps", str(tiny_model), steps=2)
    run(whole, two)
    report = make_report(whole)
    by_task = {task: [line["correct"] for line in results(whole, "tiny") if line["tag"] == task]
               for task in GENEVAL_TASKS}
    own = report["scores"]["tiny"]
    assert {task: row["mean"] for task, row in own["tasks"].items()} == {
        task: np.mean(right) for task, right in by_task.items()}
    assert own["overall"]["value"] == pytest.approx(np.mean([np.mean(right) for right in by_task.values()]))
    compared = report["comparisons"][0]
    right = {label: [line["correct"] for line in lines_of(whole, each)]
             for label, each in (("tiny", arm), ("two-steps", two))}
    pairs = list(zip(*right.values(), strict=True))
    assert compared["only_first_right"] == pairs.count((True, False))
    assert compared["only_second_right"] == pairs.count((False, True))
    assert compared["difference"]["value"] == pytest.approx(
        report["scores"]["two-steps"]["overall"]["value"] - own["overall"]["value"])
    text = write_report(whole, report)
    assert (whole / "report.txt").read_text() == text == as_text(report)
    assert "Detector on held-out scenes of known content" in text
    assert "50.00" in text
    assert json.loads((whole / "report.json").read_text()) == report
    assert Image.open(failure_sheet(whole)).width == 1920


def test_against_results_of_before(whole, arm, tmp_path):
    """The committed results of a teacher, say: retention can be had without drawing its pictures again."""
    earlier = tmp_path / "teacher.jsonl"
    lines = [json.loads(text) | {"correct": True} for text in
             (whole / "tiny" / "results.jsonl").read_text().splitlines()]
    earlier.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = make_report(whole, earlier)
    compared = report["comparisons"][0]
    assert (compared["first"], compared["second"]) == ("teacher", "tiny")
    assert compared["retained"]["value"] == pytest.approx(report["scores"]["tiny"]["overall"]["value"])
    assert report["scores"]["teacher"]["overall"]["value"] == 1.0
    itself = make_report(whole, whole / "tiny")
    assert itself["comparisons"][0]["difference"]["value"] == 0.0
    assert set(itself["scores"]) == {"tiny before", "tiny"}
    earlier.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    with pytest.raises(UsageError, match="teacher: 1 of 24 pictures are not judged yet"):
        make_report(whole, earlier)


@pytest.mark.parametrize("distilled", [True, False])
def test_pictures_in_batches_are_those_of_the_pipeline(distilled, tmp_path, monkeypatch):
    """What a GPU does: the same noise, schedule, guidance and networks, several pictures at once."""
    from tiny_model import write_tiny_model

    tiny_model = write_tiny_model(tmp_path / "model", distilled=distilled)
    monkeypatch.setenv("LINOCUT_KERNEL", "reference")  # neither fused blocks nor bfloat16
    shots = [Shot(metadata["prompt"], seed_of(metadata["prompt"], 1)) for metadata in PROMPTS[:5]]
    one_by_one, together = (Arm("tiny", str(tiny_model), width=64, height=32, steps=3, batched=batched)
                            for batched in (False, True))
    for alone, batched in zip(one_by_one.draw(shots), together.draw(shots), strict=True):
        difference = np.abs(np.asarray(alone).astype(int) - np.asarray(batched).astype(int))
        assert alone.size == batched.size == (64, 32)
        assert difference.mean() < 0.05
    assert together.facts.get("guidance") == (None if distilled else 4.0)
    noise = Field(together).noise([shots[0].seed, shots[1].seed])
    assert not np.allclose(noise[0], noise[1])
    assert len(list(islice(together.draw([]), 1))) == 0


@pytest.mark.parametrize(("text", "expected"), [
    ("embedded", ("embedded", "embedded")), ("./runs/klein 4B/", ("klein-4B", "./runs/klein 4B/")),
    ("org/name", ("name", "org/name")), ("t=./x", ("t", "./x")),
])
def test_labels(text, expected):
    assert label_of(text) == expected


@pytest.mark.parametrize("text", ["../x=embedded", "=embedded", "a/b=c"])
def test_labels_are_names_of_folders(text):
    with pytest.raises(UsageError, match="a label may hold"):
        label_of(text)
    with pytest.raises(UsageError, match="two models are labelled"):
        label_of("x/embedded", ["embedded"])
