"""The prompt cache: the same picture with it and without it, private, bounded, and never in the way."""

import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import write_tiny_model

from linocut.cli import main
from linocut.errors import UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.pipeline import embeddings
from linocut.pipeline.components import Components
from linocut.pipeline.embeddings import Entry, Place, PromptCache
from linocut.pipeline.generate import Pipeline

PROMPT = "a red apple"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a prompt cache that is on and empty."""
    monkeypatch.setenv("LINOCUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LINOCUT_PROMPT_CACHE")
    return tmp_path / "cache" / "prompts"


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


def draw(model: Path, prompt: str = PROMPT, **options) -> tuple[np.ndarray, int]:
    """The pixels of a picture from a fresh pipeline, and how many prompts came from the cache."""
    torch.set_num_threads(1)
    result = Pipeline.from_pretrained(model, **options)(prompt, seed=3, num_inference_steps=1)
    return np.asarray(result.images[0]), result.timings["encode"].get("cached", 0)


def entry(value: float = 1.0, dtype: torch.dtype = torch.float32) -> Entry:
    return Entry(torch.full((1, 4, 8), value, dtype=dtype), 4, 9)


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    return PromptCache(Place(tmp_path / "prompts", 10**6), {"weights": "w"})


# ------------------------------------------------------------------------------------------------- with a pipeline

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_known_prompt_gives_the_same_pixels_without_a_text_encoder(tiny_model, folder, monkeypatch, dtype):
    without, hits = draw(tiny_model, dtype=dtype, prompt_cache=False)
    assert (hits, files(folder)) == (0, [])
    first, hits = draw(tiny_model, dtype=dtype)
    assert (hits, len(files(folder))) == (0, 1)

    def use(self, name):
        assert name not in ("text_encoder", "tokenizer")
        return original(self, name)

    original = Components.use
    monkeypatch.setattr(Components, "use", use)
    again, hits = draw(tiny_model, dtype=dtype)
    assert hits == 1
    assert (without == first).all()
    assert (first == again).all()


def test_only_unknown_prompts_of_a_batch_are_read(tiny_model, folder):
    pipe = Pipeline.from_pretrained(tiny_model, keep_loaded=False)
    pipe(PROMPT, num_inference_steps=1)
    seen = []
    result = pipe([PROMPT, "two blue cups"], seed=1, num_inference_steps=1,
                  on_progress=lambda p: seen.append((p.done, p.total)) if p.phase == "encode" else None)
    assert result.timings["encode"]["cached"] == 1
    assert seen == [(1, 3), (2, 3), (3, 3)]  # the three layers, once
    assert len(files(folder)) == 2


def test_what_was_cut_off_is_told_from_the_cache_too(tiny_model, folder):
    pipe, long = Pipeline.from_pretrained(tiny_model), "a red apple " * 10 + "and the very end"
    with pytest.warns(UserWarning, match="cut off: .*and the very end") as first:
        pipe(long, num_inference_steps=1)
    with pytest.warns(UserWarning, match="cut off") as second:
        assert pipe(long, num_inference_steps=1).timings["encode"]["cached"] == 1
    assert str(first[0].message) == str(second[0].message)


def test_nobody_else_may_read_and_no_text_is_stored(tiny_model, folder):
    pipe = Pipeline.from_pretrained(tiny_model)
    pipe("a green secretword fox", num_inference_steps=1)
    (file,) = files(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert b"secretword" not in file.read_bytes()
    assert len(file.stem) == 64
    folder.chmod(0o755)
    pipe("a green secretword fox", num_inference_steps=1)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("change", ["weights", "tokenizer", "length", "dtype", "kernel", "prompt"])
def test_whatever_decides_the_features_is_in_the_key(tmp_path, folder, monkeypatch, change):
    root = write_tiny_model(tmp_path / "a")
    draw(root)
    options = {}
    if change == "weights":
        root = write_tiny_model(tmp_path / "b", seed=1)
    elif change == "tokenizer":
        file = root / "tokenizer" / "tokenizer.json"
        file.write_text(file.read_text() + "\n")
    elif change == "length":
        file = root / "model_index.json"
        file.write_text(file.read_text().replace('"text_length": 40', '"text_length": 41'))
    elif change == "dtype":
        options["dtype"] = "bfloat16"
    elif change == "kernel":
        now = Pipeline.from_pretrained(root).kernel(40, "text_encoder")
        monkeypatch.setenv("LINOCUT_KERNEL", "generic" if now == "reference" else "reference")
    _, hits = draw(root, PROMPT + "s" if change == "prompt" else PROMPT, **options)
    assert (hits, len(files(folder))) == (0, 2)


def test_an_encoder_without_hashes_is_not_cached(tiny_model, folder, monkeypatch):
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda self: pytest.fail("samples are no content"))
    whole = Checkpoint.open(tiny_model / "text_encoder")
    whole.sha256.popitem()
    monkeypatch.setattr("linocut.formats.folder.ModelFolder.checkpoint", lambda self, name: whole)
    assert embeddings.encoder_identity(Pipeline.from_pretrained(tiny_model).folder) is None


def test_a_damaged_entry_is_read_anew_and_replaced(tiny_model, folder):
    good, _ = draw(tiny_model)
    (file,) = files(folder)
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for wrong in (flipped, whole[:-7], whole[:100], b"", b"\0" * len(whole), whole + b"more"):
        file.write_bytes(wrong)
        pixels, hits = draw(tiny_model)
        assert hits == 0
        assert (pixels == good).all()
        assert file.read_bytes() == whole
    assert draw(tiny_model)[1] == 1


def test_a_whole_entry_under_another_name_is_not_believed(tiny_model, folder):
    draw(tiny_model)
    (file,) = files(folder)
    draw(tiny_model, "two blue cups")
    (other,) = set(files(folder)) - {file}
    file.write_bytes(other.read_bytes())
    assert draw(tiny_model)[1] == 0


def test_the_command_line_can_do_without(tiny_model, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["generate", PROMPT, "-m", str(tiny_model), "--steps", "1", "--seed", "1", "--force"]
    with pytest.raises(SystemExit):
        main([*arguments, "--no-prompt-cache"])
    assert not folder.exists()
    monkeypatch.setenv("LINOCUT_PROMPT_CACHE", "0")
    with pytest.raises(SystemExit):
        main(arguments)
    assert not folder.exists()
    monkeypatch.setenv("LINOCUT_PROMPT_CACHE", "1")
    with pytest.raises(SystemExit):
        main(arguments)
    assert len(files(folder)) == 1


def test_a_process_that_is_killed_leaves_nothing_that_counts(tiny_model, folder):
    """Killed between the writing of an entry and its renaming, again and again."""
    code = ("import os, signal, sys, torch\nfrom linocut.pipeline.generate import Pipeline\n"
            "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
            "Pipeline.from_pretrained(sys.argv[1])('a red apple', num_inference_steps=1)")
    done = subprocess.run([sys.executable, "-c", code, str(tiny_model)], check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == -signal.SIGKILL
    (left,) = files(folder)
    assert left.suffix == ".partial"
    assert draw(tiny_model)[1] == 0
    assert draw(tiny_model)[1] == 1
    os.utime(left, (time.time() - 7200,) * 2)
    draw(tiny_model, "two blue cups")
    assert not left.exists()


# ------------------------------------------------------------------------------------------------ the cache alone

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_come_back_bit_for_bit(cache, dtype):
    features = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert cache.get("x") is None
    assert cache.put("x", Entry(features, 7, 3))
    found = cache.get("x")
    assert found is not None
    assert found.features.dtype == dtype
    assert torch.equal(found.features, features)
    assert (found.tokens, found.characters) == (7, 3)
    assert PromptCache(cache.place, {"weights": "other"}).get("x") is None


def test_what_was_used_longest_ago_leaves_first(cache):
    cache.put("0", entry())
    nbytes = cache.path("0").stat().st_size
    small = PromptCache(Place(cache.place.folder, 3 * nbytes), {"weights": "w"})
    for number, text in enumerate("0123"):
        small.put(text, entry())
        os.utime(small.path(text), ns=(number, number))
        if text == "2":
            assert small.get("0") is not None  # used now, so "1" is the oldest
    assert [text for text in "0123" if small.get(text)] == ["0", "2", "3"]
    tiny = PromptCache(Place(cache.place.folder, nbytes - 1), {"weights": "w"})
    assert not tiny.put("4", entry())
    assert len(tiny.place.entries()) == 3  # nothing was thrown out for what does not fit anyway


def test_a_full_disk_is_no_obstacle(cache):
    """A limit on the size of files fails writes as a full disk does, in the midst of them."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, before[1]))
    try:
        assert not cache.put("x", entry())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert files(cache.place.folder) == []
    assert cache.put("x", entry())


def test_a_folder_that_cannot_be_made_is_no_obstacle(cache):
    cache.place.folder.parent.joinpath("prompts").write_text("a file")
    assert not cache.put("x", entry())
    assert cache.get("x") is None


def test_processes_share_the_folder(cache):
    """Several processes write, read and throw out the same few entries at once: what is found is always right."""
    code = ("import sys, torch\nfrom pathlib import Path\n"
            "from linocut.pipeline.embeddings import Entry, Place, PromptCache\n"
            "cache = PromptCache(Place(Path(sys.argv[1]), 3000), {'weights': 'w'})\n"
            "for i in range(300):\n"
            "    n = i * 7 % 5\n"
            "    found = cache.get(str(n))\n"
            "    assert found is None or (found.features == n).all()\n"
            "    cache.put(str(n), Entry(torch.full((1, 4, 8), float(n)), 4, 9))\n")
    workers = [subprocess.Popen([sys.executable, "-c", code, str(cache.place.folder)],
                                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert not list(cache.place.folder.glob("*.partial"))
    kept = cache.place.entries()
    assert len(kept) >= 1
    # two that write at the same moment may each leave one entry too many, no more
    assert sum(facts.st_size for _, facts in kept) <= 3000 + 3 * kept[0][1].st_size


def test_the_place_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("LINOCUT_PROMPT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LINOCUT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert embeddings.place() == Place(tmp_path / ".cache" / "linocut" / "prompts", 512 * 10**6)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert embeddings.place().folder == Path("/x/linocut/prompts")
    monkeypatch.setenv("LINOCUT_CACHE", "/y")
    monkeypatch.setenv("LINOCUT_PROMPT_CACHE", "7")
    assert embeddings.place() == Place(Path("/y/prompts"), 7 * 10**6)
    monkeypatch.setenv("LINOCUT_PROMPT_CACHE", "0")
    assert embeddings.place().why_not == "LINOCUT_PROMPT_CACHE=0"
    monkeypatch.setenv("LINOCUT_PROMPT_CACHE", "lots")
    with pytest.raises(UsageError, match="size in MB"):
        embeddings.place()
