"""`linocut pull` against a hub on this machine, through the real client: what is fetched, and all that goes wrong."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, environment, git_sha, linocut_program, serving, tree_entry

from linocut.formats.checkpoint import Checkpoint, write_checkpoint
from linocut.formats.folder import ModelFolder

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
NEVER = ("flux-single.safetensors", "README.md", "text_encoder/pytorch_model.bin", "preview.png")


class Place:
    """A hub with org/tiny, and a home for its cache."""

    def __init__(self, hub: Hub, address: str, home: Path) -> None:
        self.hub, self.address, self.home = hub, address, home

    def env(self, **more: str) -> dict[str, str]:
        return environment(self.home, self.address, **more)

    def run(self, *arguments: object, **more: str) -> "subprocess.CompletedProcess[str]":
        return linocut_program(*arguments, env=self.env(**more))

    def fails(self, *arguments: object, **more: str) -> str:
        """Run what ends with one line and exit code 2; returns the line."""
        done = self.run(*arguments, **more)
        lines = done.stderr.splitlines()
        assert done.returncode == 2, done
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
        return lines[0]

    def snapshot(self, name: str = "org/tiny") -> Path:
        root = self.home / "hub" / f"models--{name.replace('/', '--')}"
        return root / "snapshots" / (root / "refs" / "main").read_text()

    def begun(self, path: str) -> list[int]:
        """First bytes of the ranges asked of the storage for a file; looks at the header do not count."""
        return [int(headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
                for method, asked, headers in self.hub.requests
                if method == "GET" and f"/{path}?" in asked and headers.get("Range", "-").endswith("-")]


@pytest.fixture
def place(tiny_model, tmp_path):
    hub = Hub()
    files = {path.relative_to(tiny_model).as_posix(): path.read_bytes() for path in tiny_model.rglob("*")
             if path.is_file()}
    hub.add("org/tiny", files | dict.fromkeys(NEVER, b"x" * 3000))
    with serving(hub) as address:
        yield Place(hub, address, tmp_path / "home")


def same(root: Path, source: Path) -> None:
    """A folder holds the files of the source, and no others."""
    found = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert found == {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*")
                     if path.is_file()}


def test_only_what_is_needed_and_offline_afterwards(place, tiny_model):
    done = place.run("pull", "org/tiny")
    assert done.returncode == 0, done.stderr
    for words in ("ternary", "to fetch", "are free in", "to draw 64x64", "10 files have the hub's checksums",
                  "313 tensors, 313 hashes", "next: linocut generate"):
        assert words in done.stdout
    same(place.snapshot(), tiny_model)
    assert not set(NEVER) & set(place.hub.fetched())
    before = len(place.hub.requests)
    assert place.run("plan", "org/tiny").returncode == 0
    assert len(place.hub.requests) == before, "a model in the cache is used without asking the network"
    again = place.run("pull", "org/tiny")
    assert "everything was here already" in again.stdout
    assert not any("/resolve/" in path for _, path, _ in place.hub.requests[before:])
    for command in (["inspect", "org/tiny", "--verify"], ["pull", "org/tiny", "--verify"]):
        offline = place.run(*command, HF_HUB_OFFLINE="1")
        assert offline.returncode == 0, offline.stderr
    assert "offline, so the hub was not asked" in offline.stdout


def test_other_commands_fetch_what_they_are_asked_for(place, tmp_path):
    drawn = place.run("generate", "a red apple", "--model", "org/tiny", "--seed", "1", "-o", tmp_path / "a.png")
    assert drawn.returncode == 0, drawn.stderr
    assert "org/tiny is not here yet: fetching 0.00 GB" in drawn.stderr
    with open(tmp_path / "a.png", "rb") as file:
        assert b'"model":"org/tiny"' in file.read().replace(b": ", b":")


def test_the_library_finds_it_in_its_own_cache(place):
    """The cache's layout is the library's: it finds the snapshot, and has nothing to complain about."""
    assert place.run("pull", "org/tiny").returncode == 0
    code = ("import huggingface_hub as h\ninfo = h.scan_cache_dir()\nassert not info.warnings, info.warnings\n"
            "(repo,) = info.repos\nprint(repo.repo_id, repo.nb_files, len(repo.refs), repo.size_on_disk)\n"
            "print(h.snapshot_download('org/tiny', local_files_only=True))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=place.env())
    first, path = done.stdout.splitlines()
    assert first.split()[:3] == ["org/tiny", "10", "1"]
    assert Path(path) == place.snapshot()


def test_the_forecast_comes_before_the_bytes(place, tiny_model):
    report = json.loads(place.run("pull", "org/tiny", "--dry-run", "--json").stdout)
    assert not (place.home / "hub").exists(), "nothing is kept"
    planned = json.loads(place.run("plan", tiny_model, "--json").stdout)
    assert report["plan"]["peak"] == planned["peak"]
    assert report["plan"]["disk"] == planned["disk"]
    assert report["bytes"] == report["missing_bytes"] == sum(file["size"] for file in report["files"])
    asked = [headers.get("Range") for method, path, headers in place.hub.requests
             if method == "GET" and path.startswith("/storage/")]
    assert len(asked) == 3, "the headers of three files of weights"
    assert all(span is not None and span.startswith("bytes=0-") for span in asked)


def test_a_cut_connection_goes_on_at_the_byte(place, tiny_model):
    # The first two are the answers to the forecast's look at the header, which is cut once, too.
    place.hub.cuts = {WEIGHTS: [100, 2**62, 700_000, 5]}
    done = place.run("pull", "org/tiny")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    same(place.snapshot(), tiny_model)
    assert place.begun(WEIGHTS)[-2:] == [700_000, 700_005]


def test_a_header_is_asked_for_again_only_where_that_may_help(place):
    place.hub.statuses = {f"/resolve/{place.hub.repos['org/tiny'].refs['main']}/{WEIGHTS}": [404] * 9}
    assert "404 Not Found" in place.fails("pull", "org/tiny", "--dry-run")
    assert place.hub.fetched().count(WEIGHTS) == 1
    place.hub.requests.clear()
    place.hub.statuses = {f"/{WEIGHTS}": [503, 429]}
    assert place.run("pull", "org/tiny", "--dry-run").returncode == 0
    assert place.hub.fetched().count(WEIGHTS) == 3


def test_a_server_that_knows_no_ranges(place, tiny_model):
    place.hub.ranges, place.hub.cuts = False, {WEIGHTS: [300_000, 700_000]}
    done = place.run("pull", "org/tiny")
    assert done.returncode == 0, done.stderr
    same(place.snapshot(), tiny_model)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_pull_goes_on_in_another_process(place, tiny_model, how):
    plan = place.run("pull", "org/tiny", "--dry-run")
    assert plan.returncode == 0
    blob = place.home / "hub" / "models--org--tiny" / "blobs" / hashlib.sha256((tiny_model / WEIGHTS).read_bytes()
                                                                              ).hexdigest()
    place.hub.stalls = {WEIGHTS: [2**62, 900_000]}  # the forecast's look at the header passes
    process = subprocess.Popen([sys.executable, "-m", "linocut", "pull", "org/tiny"], env=place.env(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial = blob.with_name(blob.name + ".incomplete")
    _wait_for(lambda: partial.exists() and partial.stat().st_size == 900_000)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    assert "Traceback" not in said
    if how != signal.SIGKILL:
        assert said.splitlines() == ["stopped; the same command goes on where it stopped"]
    assert not (place.home / "hub" / "models--org--tiny" / "snapshots").exists(), "no half model gets a name"
    place.hub.go.set()
    assert partial.stat().st_size == 900_000
    assert place.run("pull", "org/tiny").returncode == 0
    assert place.begun(WEIGHTS)[-1] == 900_000
    same(place.snapshot(), tiny_model)


def _wait_for(condition) -> None:
    for _ in range(1200):  # a minute: tests run beside others on two cores
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it did not come to that")


@pytest.mark.slow
def test_a_connection_that_stays_lost_is_one_line_and_goes_on_later(place, tiny_model):
    place.hub.cuts = {WEIGHTS: [2**62, 500_000, *[0] * 20]}
    assert place.fails("pull", "org/tiny") == (
        f"error: org/tiny/{WEIGHTS}: the connection was lost with 0.5 of 1.7 MB here; run the same command again, it "
        "goes on there")
    place.hub.cuts = {}
    assert place.run("pull", "org/tiny").returncode == 0
    assert place.begun(WEIGHTS)[-1] == 500_000
    same(place.snapshot(), tiny_model)


@pytest.mark.parametrize("path", [WEIGHTS, "vae/config.json"])
def test_wrong_bytes_are_found_and_not_kept(place, tiny_model, path):
    data = bytearray((tiny_model / path).read_bytes())
    data[-5] ^= 1
    place.hub.lies = {path: [bytes(data)] * 2}  # a large file is looked at twice: header first
    line = place.fails("pull", "org/tiny")
    good, bad = (hashlib.sha256(blob).hexdigest() if path == WEIGHTS else git_sha(blob)
                 for blob in ((tiny_model / path).read_bytes(), bytes(data)))
    assert line.startswith(f"error: org/tiny/{path}: does not match the hub's checksum (expected {good}, found {bad})")
    left = {file.name for file in (place.home / "hub").rglob("*") if file.is_file()}
    assert not {good, bad, f"{good}.incomplete", "model_index.json"} & left
    place.hub.lies = {}
    assert place.run("pull", "org/tiny").returncode == 0
    same(place.snapshot(), tiny_model)


def test_a_damaged_beginning_is_fetched_anew(place, tiny_model):
    blob = hashlib.sha256((tiny_model / WEIGHTS).read_bytes()).hexdigest()
    blobs = place.home / "hub" / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{blob}.incomplete").write_bytes(b"not what it was" * 50_000)
    assert place.run("pull", "org/tiny").returncode == 0
    same(place.snapshot(), tiny_model)


def test_damage_on_this_disk_is_found_by_verify(place):
    assert place.run("pull", "org/tiny").returncode == 0
    blob = (place.snapshot() / WEIGHTS).resolve()
    data = bytearray(blob.read_bytes())
    data[-5] ^= 1
    blob.write_bytes(data)
    done = place.run("pull", "org/tiny", "--verify")
    assert done.returncode == 2
    assert f"{blob}: does not match the hub's checksum" in done.stderr


def test_what_was_damaged_before_it_was_published_is_never_used(place, tiny_model, tmp_path):
    repo = place.hub.repos["org/tiny"]
    data = bytearray((tiny_model / WEIGHTS).read_bytes())
    data[-5] ^= 1
    place.hub.add("org/tiny", repo.commits[repo.refs["main"]] | {WEIGHTS: bytes(data)})
    for command in (["pull", "org/tiny"], ["pull", "org/tiny"], ["pull", "org/tiny", "--to", tmp_path / "here"]):
        assert "data does not match its SHA-256" in place.run(*command).stderr
        assert not (place.snapshot() / "model_index.json").exists()
    done = place.run("generate", "a red apple", "--model", "org/tiny", "-o", tmp_path / "a.png")
    assert "data does not match its SHA-256" in done.stderr
    assert not (tmp_path / "here").exists()
    assert not (tmp_path / "a.png").exists()


def test_a_file_of_another_size_is_refused(place, tiny_model):
    place.hub.lies = {WEIGHTS: [(tiny_model / WEIGHTS).read_bytes(), (tiny_model / WEIGHTS).read_bytes()[:-7]] * 3}
    done = place.run("pull", "org/tiny")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: org/tiny/{WEIGHTS}: has not the size that the hub names (expected ")


GATED = "org/gated/model_index.json: its authors ask you to accept their terms on the hub first"


@pytest.mark.parametrize(("name", "more", "words"), [
    ("org/absent", {}, "org/absent: the hub has no such repository, or it is private"),
    ("org/secret", {}, "org/secret: the hub has no such repository, or it is private"),
    ("org/gated", {}, GATED), ("org/gated", {"HF_TOKEN": TOKEN}, GATED),
    ("org/tiny@v9", {}, "org/tiny: the hub's repository has no such revision"),
    ("org/tiny", {"HF_TOKEN": "hf_wrong"}, "org/tiny: the hub does not accept your token"),
    ("org/tiny", {"HF_HUB_OFFLINE": "1"}, "org/tiny: offline (HF_HUB_OFFLINE is set) and not in the cache"),
    ("org/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "org/tiny: offline (the hub cannot be reached)"),
    ("org/other", {}, "org/other: no model in a form that is known (expected transformer/ with .safetensors files, "
                      "found 'config.json', 'pytorch_model.bin')"),
    ("org/part", {}, "org/part: no model: transformer/ is there, but not the model_index.json that says"),
    ("nonsense", {}, "'nonsense' is no name on the hub (expected org/name, org/name@revision, or one of klein-4b"),
    ("org/broken", {}, "org/broken: the hub has trouble of its own (status 500); try again later"),
])
def test_what_cannot_be_had_is_one_line(place, name, more, words):
    place.hub.add("org/gated", {"model_index.json": b"{}", "transformer/model.safetensors": b"x"}, gated=True)
    place.hub.add("org/secret", {"model_index.json": b"{}"}, private=True)
    place.hub.add("org/other", {"pytorch_model.bin": b"x", "config.json": b"{}"})
    place.hub.add("org/part", {WEIGHTS: b"x" * 3000, "transformer/config.json": b"{}"})
    place.hub.statuses = {"/org/broken/revision/main": [500] * 9}
    assert words in place.fails("pull", name, **more)
    assert not list(place.home.rglob("*.safetensors"))


def test_an_existing_folder_is_safe(place, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    for extra in ((), ("--force",)):
        assert f"{tmp_path / 'mine'}: " in place.fails("pull", "org/tiny", "--to", tmp_path / "mine", *extra)
    assert (tmp_path / "mine" / "notes").read_text() == "mine"
    assert place.hub.requests == []


@pytest.mark.parametrize("bad", [
    {"rfilename": "../../evil.json"}, {"rfilename": "/etc/evil"}, {"rfilename": "a\\..\\b"}, {"size": -1},
    {"size": None}, {"blobId": "../../evil"}, {"rfilename": "a/\x1b[2J"},
    {"lfs": {"sha256": "/" * 64, "size": 2, "pointerSize": 1}}])
def test_a_list_that_leads_elsewhere_is_refused(place, bad):
    place.hub.listing = [{"rfilename": "model_index.json", "size": 2, "blobId": git_sha(b"{}")} | bad]
    assert "the hub lists a file that makes no sense" in place.fails("pull", "org/tiny")


def test_a_disk_that_is_too_small(place):
    """What cannot fit is refused before it begins; what fails on the way ends in one line."""
    listing = [{"rfilename": path, "size": 2, "blobId": git_sha(b"{}")} for path in ("model_index.json",
                                                                                  "transformer/config.json")]
    large = {"rfilename": WEIGHTS, "size": 10**15, "blobId": "0" * 40,
             "lfs": {"sha256": "0" * 64, "size": 10**15, "pointerSize": 1}}
    place.hub.add("org/tiny", {"model_index.json": b"{}", "transformer/config.json": b"{}",
                               WEIGHTS: (2).to_bytes(8, "little") + b"{}"})
    place.hub.listing = [*listing, large]
    line = place.fails("pull", "org/tiny", "--json")
    assert "not enough room on the disk (1000000.00 GB needed" in line


def test_a_write_that_fails(place):
    process = subprocess.run(
        [sys.executable, "-m", "linocut", "pull", "org/tiny"], env=place.env(), capture_output=True, text=True,
        check=False, timeout=60, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)))
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"error: cannot write {place.home}/hub/models--org--tiny/blobs/")
    assert "File too large" in line
    assert place.run("pull", "org/tiny").returncode == 0
    assert place.begun(WEIGHTS)[-1] > 0, "what was written before is used"


def test_a_plain_folder(place, tiny_model, tmp_path):
    done = place.run("pull", "org/tiny", "--to", tmp_path / "here")
    assert done.returncode == 0, done.stderr
    assert f"--model {tmp_path / 'here'}" in done.stdout
    same(tmp_path / "here", tiny_model)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert not (place.home / "hub").exists()
    assert place.run("pull", "org/tiny").returncode == 0
    before = len(place.hub.requests)
    assert place.run("pull", "org/tiny", "--to", tmp_path / "here", "--force").returncode == 0
    same(tmp_path / "here", tiny_model)
    again = [path for method, path, _ in place.hub.requests[before:] if "/storage/" in path]
    assert again == [], "weights in the cache are not fetched again"


def test_what_a_folder_would_take_is_what_it_takes(place, tiny_model, tmp_path):
    def foretold(*options: str) -> int:
        done = place.run("pull", "org/tiny", "--to", tmp_path / "here", "--dry-run", "--json", *options)
        return json.loads(done.stdout)["missing_bytes"]

    shutil.copytree(tiny_model, tmp_path / "here")  # is to be replaced, so nothing of it counts
    everything = sum(path.stat().st_size for path in tiny_model.rglob("*") if path.is_file())
    assert foretold() == everything
    place.hub.statuses = {WEIGHTS: [404] * 9}
    place.fails("pull", "org/tiny", "--to", tmp_path / "here", "--force")
    place.hub.statuses = {}
    begun = foretold()
    assert 0 < begun < everything
    assert foretold("--optional") == everything, "begun for another choice of files"
    assert place.run("pull", "org/tiny").returncode == 0
    assert foretold() == 0, "the cache has the rest"


def test_nothing_is_copied_to_a_disk_that_is_too_small(place, tmp_path):
    assert place.run("pull", "org/tiny").returncode == 0
    repo = place.hub.repos["org/tiny"]
    place.hub.listing = [{"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
                         | ({"lfs": entry["lfs"] | {"sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {})
                         for entry in map(tree_entry, repo.commits[repo.refs["main"]].items())]
    weights = next(entry for entry in place.hub.listing if entry["rfilename"] == WEIGHTS)
    weights["size"] = 10**15
    done = place.run("pull", "org/tiny", "--to", tmp_path / "here")
    assert "not enough room on the disk (1000000.0" in done.stderr
    assert not list((tmp_path / ".here.partial").rglob("*.safetensors"))


def test_revisions(place, tiny_model):
    repo = place.hub.repos["org/tiny"]
    repo.refs["v1"] = old = repo.refs["main"]
    index = json.loads((tiny_model / "model_index.json").read_text()) | {"is_distilled": False}
    repo.commit(repo.commits[old] | {"model_index.json": json.dumps(index).encode()})
    for name, distilled in (("org/tiny@v1", True), ("org/tiny", False), (f"org/tiny@{old}", True)):
        assert place.run("pull", name).returncode == 0
        report = json.loads(place.run("inspect", name, "--json", HF_HUB_OFFLINE="1").stdout)
        assert (report["name"], report["settings"]["is_distilled"]) == (name, distilled)


def test_a_private_repository_and_its_storage(place, tiny_model):
    place.hub.repos["org/tiny"].private = True
    assert place.run("pull", "org/tiny", HF_TOKEN=TOKEN).returncode == 0
    asked = [headers for _, path, headers in place.hub.requests if path.startswith("/storage/")]
    assert asked
    assert not any("Authorization" in headers for headers in asked), "the token is for the hub alone"
    same(place.snapshot(), tiny_model)


def test_two_at_a_time_share_the_work(place, tiny_model):
    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen([sys.executable, "-m", "linocut", "pull", "org/tiny"], env=place.env(),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def seen() -> int:
        return sum(method == "GET" and f"/{WEIGHTS}?" in path for method, path, _ in place.hub.requests)

    place.hub.stalls = {WEIGHTS: [2**62, 900_000]}  # the forecast's look at the header passes
    both = [start()]
    _wait_for(lambda: seen() == 2)
    both.append(start())
    _wait_for(lambda: seen() >= 3)  # the second's look at the header
    place.hub.go.set()
    for process in both:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    size = (tiny_model / WEIGHTS).stat().st_size
    assert sum(size - first for first in place.begun(WEIGHTS)) == size, "one of them fetched it, once"
    same(place.snapshot(), tiny_model)
    assert not list(place.home.rglob("*.incomplete"))


def split_text_encoder(root: Path) -> None:
    """Store the text encoder as klein's is: shards behind an index, the last one with what nobody uses."""
    folder = root / "text_encoder"
    with Checkpoint.open(folder) as checkpoint:
        arrays = {name: (checkpoint.array(name).copy(), checkpoint.info(name).dtype) for name in checkpoint}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    shards: dict[str, dict] = {}
    for name, array in arrays.items():
        layer = int(name.split("layers.")[1].split(".")[0]) if "layers." in name else 0 if "embed" in name else 9
        number = 1 if layer < 2 else 2 if layer < 3 else 3
        shards.setdefault(f"model-0000{number}-of-00003.safetensors", {})[name] = array
    for file, part in shards.items():
        write_checkpoint(folder / file, part)
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}))


@pytest.mark.slow
def test_klein_by_its_alias_without_shards_that_nobody_uses(place, dense_model, tmp_path):
    shutil.copytree(dense_model, tmp_path / "klein")
    split_text_encoder(tmp_path / "klein")
    (tmp_path / "klein" / "flux-2-klein-4b.safetensors").write_bytes(b"x" * 9999)
    place.hub.add("black-forest-labs/FLUX.2-klein-4B", tmp_path / "klein")
    done = place.run("pull", "klein-4b")
    assert done.returncode == 0, done.stderr
    assert "next: linocut quantize klein-4b FOLDER --encoding ternary" in done.stdout
    assert "dense" in done.stdout
    fetched = set(place.hub.fetched())
    assert "text_encoder/model-00002-of-00003.safetensors" in fetched
    assert not {"text_encoder/model-00003-of-00003.safetensors", "flux-2-klein-4b.safetensors"} & fetched
    options = ("--encoding", "ternary", "--json")
    assert "already" in place.fails("quantize", "klein-4b", tmp_path / "klein", *options)
    for source, target in (("klein-4b", "a"), (dense_model, "b")):
        made = place.run("quantize", source, tmp_path / target, *options, HF_HUB_OFFLINE="1")
        assert made.returncode == 0, made.stderr
    assert ModelFolder.open(tmp_path / "a").hash() == ModelFolder.open(tmp_path / "b").hash()
    assert ModelFolder.open(tmp_path / "a").settings["base_model"] == "black-forest-labs/FLUX.2-klein-4B"


@pytest.mark.slow
def test_bonsai_by_its_alias_is_converted_first(place, tiny_model, tmp_path):
    from linocut.integrations.convert import convert

    convert(tiny_model, tmp_path / "mlx", "mlx")
    place.hub.add("prism-ml/bonsai-image-ternary-4B-mlx-2bit", tmp_path / "mlx")
    done = place.run("pull", "bonsai-ternary")
    assert done.returncode == 0, done.stderr
    assert "in transformer-packed-mflux" in done.stdout
    assert "next: linocut convert bonsai-ternary FOLDER --to linocut" in done.stdout
    line = place.fails("plan", "bonsai-ternary", HF_HUB_OFFLINE="1")
    assert "in the form of another program" in line
    assert "linocut convert prism-ml/bonsai-image-ternary-4B-mlx-2bit FOLDER --to linocut" in line
    listed = place.run("inspect", "bonsai-ternary", HF_HUB_OFFLINE="1")
    assert "transformer-packed-mflux: diffusion_pytorch_model.safetensors" in listed.stdout
    back = place.run("convert", "bonsai-ternary", tmp_path / "own", "--to", "linocut", HF_HUB_OFFLINE="1")
    assert back.returncode == 0, back.stderr
    ours, theirs = (Checkpoint.open(root / "transformer") for root in (tmp_path / "own", tiny_model))
    assert all((ours.packed_tensor(name).codes == theirs.packed_tensor(name).codes).all() for name in theirs.packed)


def test_it_needs_no_torch(place):
    code = ("import sys\nfrom linocut.cli import main\ntry:\n    main(['pull', 'org/tiny', '--json'])\nfinally:\n"
            "    print('torch' in sys.modules, file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=place.env())
    assert done.stderr.strip() == "False"
    assert json.loads(done.stdout)["verified"] == {"tensors": 313, "hashes": 313}
    assert os.path.isdir(json.loads(done.stdout)["path"])
