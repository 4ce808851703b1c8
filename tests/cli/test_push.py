"""`linocut push` against a hub on this machine, through the real client: what arrives, and what is refused."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, environment, linocut_program, serving
from huggingface_hub import ModelCard

from linocut.integrations.card import is_ours

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


class Place:
    """A hub, a home with a token, and a model folder to be pushed."""

    def __init__(self, hub: Hub, address: str, home: Path, model: Path) -> None:
        self.hub, self.address, self.home, self.model = hub, address, home, model

    def run(self, *arguments: object, **more: str) -> "subprocess.CompletedProcess[str]":
        return linocut_program(*arguments, env=environment(self.home, self.address, **({"HF_TOKEN": TOKEN} | more)))

    def push(self, *arguments: object, **more: str) -> "subprocess.CompletedProcess[str]":
        return self.run("push", self.model, "me/tiny", *arguments, **more)

    def refused(self, *arguments: object, **more: str) -> str:
        """Push what is refused with one line and exit code 2; returns the line."""
        done = self.push(*arguments, **more)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("the card names no")]
        assert done.returncode == 2, done
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
        return lines[0]

    @property
    def there(self) -> dict[str, bytes]:
        repo = self.hub.repos["me/tiny"]
        return repo.commits[repo.refs["main"]]

    def written(self) -> list[str]:
        """What was sent to the hub that changes something."""
        return [path for method, path, _ in self.hub.requests if method in ("PUT", "POST")]


@pytest.fixture
def place(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "tiny")
    (tmp_path / "tiny" / "LICENSE").write_text("                Apache License\n          Version 2.0, January 2004\n")
    hub = Hub()
    with serving(hub) as address:
        yield Place(hub, address, tmp_path / "home", tmp_path / "tiny")


def test_what_is_pushed_is_what_pull_brings(place, tmp_path):
    (place.model / "weights.pt").write_bytes(b"\x80")
    (place.model / ".secret").write_text("mine")
    done = place.push("--base-model", "klein-4b", "--message", "First")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "verified 313 tensors" in done.stdout
    assert "not taken along: .secret, weights.pt" in done.stdout
    assert f"{place.address}/me/tiny (commit {place.hub.repos['me/tiny'].refs['main'][:10]})" in done.stdout
    assert place.hub.repos["me/tiny"].messages == ["initial commit", "First"], "one commit"
    sent = {path.relative_to(place.model).as_posix(): path.read_bytes() for path in place.model.rglob("*")
            if path.is_file() and path.suffix != ".pt" and path.name != ".secret"}
    there = dict(place.there)
    card = there.pop("README.md").decode()
    assert there.pop(".gitattributes")
    assert there == sent
    back = place.run("pull", "me/tiny", "--to", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    got = {path.relative_to(tmp_path / "back").as_posix(): path.read_bytes() for path in (tmp_path / "back").rglob("*")
           if path.is_file()}
    assert got == sent

    data = ModelCard(card).data
    assert data.base_model == "black-forest-labs/FLUX.2-klein-4B"
    assert (data.library_name, data.license, data.pipeline_tag) == ("linocut", "apache-2.0", "text-to-image")
    assert {"linocut", "ternary"} <= set(data.tags)
    for words in ("linocut pull me/tiny", 'from_pretrained("me/tiny")', "import linocut.integrations.diffusers",
                  "851,968 weights, 1.745 bits a weight", "1,724,224"):
        assert words in card
    assert is_ours(card)


def test_a_second_push_sends_what_changed(place):
    assert place.push().returncode == 0
    first = place.hub.repos["me/tiny"].refs["main"]
    place.hub.requests.clear()
    assert place.push().returncode == 0
    assert place.hub.repos["me/tiny"].refs["main"] == first, "nothing changed, so no commit"
    (place.model / "NOTICE").write_text("new")
    done = place.push("--json")
    report = json.loads(done.stdout)
    assert place.there["NOTICE"] == b"new"
    assert report["commit"] == place.hub.repos["me/tiny"].refs["main"] != first
    assert place.hub.parents[-1] == first, "a commit in between would be refused"
    assert not [path for method, path, _ in place.hub.requests if method == "PUT"], "weights are there already"


def test_a_card_edited_on_the_hub_is_kept(place, tmp_path):
    assert place.push().returncode == 0
    edited = place.there["README.md"] + b"\nIt draws well.\n"
    place.hub.repos["me/tiny"].commit(place.there | {"README.md": edited, "examples/a.png": b"png"})
    place.hub.requests.clear()
    assert "its README.md was edited" in place.refused()
    assert place.there["README.md"] == edited
    assert place.written() == []
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    done = place.push("--card", tmp_path / "card.md")
    assert done.returncode == 0, done.stderr
    assert place.there["README.md"] == (tmp_path / "card.md").read_bytes()
    assert "left alone there: examples/a.png" in done.stdout
    assert "its README.md was edited" in place.refused()
    assert place.push("--replace-card").returncode == 0
    assert is_ours(place.there["README.md"].decode())


@pytest.mark.parametrize(("status", "words"), [(500, "trouble of its own"), (429, "left alone for a while")])
def test_a_hub_that_does_not_say_what_is_there_is_not_written_to(place, status, words):
    place.hub.add("me/tiny", {"README.md": b"# Mine\n"})
    place.hub.statuses = {"/me/tiny/revision/main": [status] * 9}
    assert words in place.refused()
    assert place.written() == []


def test_a_card_edited_here_is_kept(place):
    (place.model / "README.md").write_text("# My own words\n")
    line = place.refused()
    assert f"--card {place.model / 'README.md'}" in line
    assert place.hub.requests == []
    assert place.push("--card", place.model / "README.md").returncode == 0
    assert place.there["README.md"] == b"# My own words\n"


def test_dry_run_and_card_only_ask_no_network(place):
    card = place.push("--card-only", HF_TOKEN="")
    assert card.returncode == 0, card.stderr
    assert ModelCard(card.stdout).data.pipeline_tag == "text-to-image"
    done = place.push("--dry-run", HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    assert f"1,724,224  {WEIGHTS}" in done.stdout
    assert card.stdout in done.stdout
    assert "the card names no base model; --base-model does" in done.stderr
    report = json.loads(place.push("--dry-run", "--json", HF_TOKEN="").stdout)
    assert report["files"][WEIGHTS] == 1_724_224
    assert report["card"] == card.stdout
    assert place.hub.requests == []


def test_a_damaged_or_partial_model_is_not_sent(place):
    data = bytearray((place.model / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (place.model / WEIGHTS).write_bytes(data)
    assert "data does not match its SHA-256" in place.refused()
    (place.model / WEIGHTS).unlink()
    assert "holds no whole model" in place.refused()
    assert place.hub.requests == []


@pytest.mark.parametrize(("arguments", "more", "words"), [
    ([], {"HF_TOKEN": ""}, "not logged in to the hub; run 'hf auth login', or set HF_TOKEN"),
    ([], {"HF_TOKEN": "hf_wrong"}, "me/tiny: "), ([], {"HF_ENDPOINT": "http://127.0.0.1:9"}, "me/tiny: offline"),
    (["--base-model", "no id"], {}, "'no id' is no name on the hub"),
    (["--report", "/nothing"], {}, "/nothing: cannot be read"),
    (["--card", "/nothing"], {}, "/nothing: cannot be read"),
])
def test_what_is_refused_is_one_line(place, arguments, more, words):
    assert words in place.refused(*arguments, **more)
    assert "me/tiny" not in place.hub.repos


def test_the_name_must_be_a_repository(place):
    for name in ("tiny", "me/tiny@v1", "klein-4b", "../x"):
        done = place.run("push", place.model, name)
        assert done.returncode == 2
        assert "is no name of a repository" in done.stderr


def test_private_and_scores(place, tmp_path):
    estimate = {"value": 0.5, "standard_error": 0.01, "low": 0.48, "high": 0.52}
    report = {"count": 553, "images": 4, "detector": "world", "scores": {
        "teacher": {"overall": estimate, "tasks": {"single_object": {"mean": 0.9}}},
        "ternary": {"overall": estimate | {"value": 0.45}, "tasks": {"single_object": {"mean": 0.85}}}},
        "comparisons": [{"first": "teacher", "second": "ternary", "difference": {"value": -0.05, "low": -0.07,
                                                                                 "high": -0.03}}]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert place.push("--private", "--report", tmp_path).returncode == 0
    assert place.hub.repos["me/tiny"].private
    card = place.there["README.md"].decode()
    assert "| ternary | 85.00 | 45.00 ± 1.00 |" in card
    assert "ternary against teacher: -5.00 points, 95 % interval [-7.00, -3.00]" in card
    (tmp_path / "report.json").write_text('{"scores": {"a": {}}}')
    assert "is a report of another form" in place.refused("--report", tmp_path)
