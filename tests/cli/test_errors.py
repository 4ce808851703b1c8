"""Every mistake a user can make ends in one line on stderr, exit code 2, no traceback, and no file."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from linocut.cli import error_line, main
from linocut.errors import LinocutError


@pytest.fixture
def fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command line that must fail; returns its one line of error, without the prefix."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = capsys.readouterr()
        assert ended.value.code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return err.removeprefix("error: ")

    return run


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "no prompt"), (("  ",), "the prompt is empty"), (("a", "-p", "b"), "one prompt"),
    (("a", "--size", "100x64"), "width must be a multiple of 32 (found 100); use 96 or 128"),
    (("a", "--size", "64x-64"), "height must be positive"), (("a", "-W", "0"), "width must be positive"),
    (("a", "-H", "-32"), "height must be positive"), (("a", "--size", "64by64"), "no size; write it like 512x768"),
    (("a", "--size", "1000000x1000000"), "would need"), (("a", "--size", "16384x16384"), "would need"),
    (("a", "-W", "32" + "0" * 400), "larger than a PNG can be"),
    (("a", "--size", "64x64", "-W", "64"), "not both"), (("a", "--steps", "0"), "steps must be"),
    (("a", "--steps", "-3"), "steps must be"), (("a", "--seed", "abc"), "not a valid integer"),
    (("a", "--seed", "-1"), "a seed must lie in"), (("a", "--seed", str(2**64)), "a seed must lie in"),
    (("a", "-n", "0"), "number of images"), (("a", "--threads", "0"), "--threads"),
    (("a", "--dtype", "int8"), "--dtype"),
    (("a", "--guidance", "4"), "distilled"), (("a", "-o", "."), "is a folder"),
    (("a", "-o", "nowhere/a.png"), "nowhere does not exist"), (("a", "-n", "2", "-o", "a.png"), "put {seed}"),
    (("a", "-n", "100000", "-o", "a.png"), "put {seed}"),
    (("a", "-n", "2", "-o", "-"), "single picture"), (("a", "-o", "-", "--json"), "choose one"),
    (("a", "-o", "/dev/full"), "No space left on device"), (("a", "-o", "/proc/x.png"), "cannot write"),
    (("--prompt-file", "none.txt"), "none.txt"), (("--prompt-file", "/dev/null"), "holds no prompt"),
    (("--prompt-file", "."), "cannot read"), (("a", "--frobnicate"), "--frobnicate"),
    (("--from-image", "none.png"), "does not exist"), (("a", "--from-image", "x.png"), "leave out the prompt"),
    (("--from-image", "x.png", "--seed", "1"), "leave out the seed"),
])
def test_mistakes(fail, tiny_model: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in fail("generate", *arguments, "-m", str(tiny_model))


@pytest.mark.parametrize("model", ["no-such-model", "./no/such/folder", ".", "/", "/dev/null", ""])
def test_unknown_models(fail, model: str) -> None:
    assert fail("generate", "a red apple", "-m", model) == fail("plan", model)


def test_unknown_command_names_the_near_one(fail) -> None:
    assert "did you mean 'generate'?" in fail("genrate", "a red apple")


def test_existing_output_is_kept(fail, tiny_model: Path) -> None:
    Path("a.png").write_bytes(b"precious")
    assert "--force" in fail("generate", "a red apple", "-o", "a.png", "-m", str(tiny_model))
    assert Path("a.png").read_bytes() == b"precious"


def test_existing_previews_are_kept(fail, tiny_model: Path) -> None:
    Path("steps").mkdir()
    Path("steps/7-1-step2.png").write_bytes(b"precious")
    message = fail("generate", "a red apple", "-s", "6", "-n", "2", "-o", "{seed}.png", "--preview-dir", "steps", "-m",
                   str(tiny_model))
    assert message.startswith("steps/7-1-step2.png exists")
    assert Path("steps/7-1-step2.png").read_bytes() == b"precious"


def test_a_benchmark_that_cannot_draw_is_refused_before_anything_is_made(fail) -> None:
    assert "drawing needs all parts" in fail("bench", "synthetic", "klein-4b", "--out", "m", "--parts", "vae")
    assert "multiple of 32" in fail("bench", "synthetic", "klein-4b", "--out", "m", "--size", "100x100")


def test_pictures_without_a_recipe(fail) -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    Path("text.png").write_text("no picture")
    assert "no linocut recipe" in fail("generate", "--from-image", "plain.png")
    assert "not a PNG" in fail("generate", "--from-image", "text.png")


def test_prompt_file_that_is_no_text(fail) -> None:
    Path("prompts.txt").write_bytes(b"caf\xe9\n")
    assert "not UTF-8 text (byte 3)" in fail("generate", "--prompt-file", "prompts.txt")


@pytest.mark.parametrize(("file", "damage"), [
    ("transformer/diffusion_pytorch_model.safetensors", lambda data: data[:-100]),
    ("transformer/diffusion_pytorch_model.safetensors", lambda data: b"\x80\x02PK" + data[4:]),
    ("text_encoder/model.safetensors", lambda data: b""),
    ("vae/config.json", lambda data: b"{"),
    ("model_index.json", lambda data: b"[]"),
    ("tokenizer/tokenizer.json", lambda data: data[:50]),
    ("transformer/config.json", lambda data: data.replace(b'"num_layers": 1', b'"num_layers": 2')),
    ("transformer/config.json", lambda data: data.replace(b'"num_layers": 1', b'"num_layers": "x"')),
])
def test_corrupt_models(fail, tiny_model: Path, tmp_path: Path, file: str, damage) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    (broken / file).write_bytes(damage((broken / file).read_bytes()))
    fail("generate", "a red apple", "-m", str(broken), "-o", "a.png")


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae", "tokenizer"])
def test_incomplete_models(fail, tiny_model: Path, tmp_path: Path, component: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    shutil.rmtree(broken / component)
    fail("generate", "a red apple", "-m", str(broken), "-o", "a.png")


def test_a_file_size_limit_is_a_full_disk(tiny_model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "linocut", "generate", "a red apple", "-m", str(tiny_model), "-o", "a.png"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: cannot write a.png: the file would pass the size limit of this process\n"
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_error(tiny_model: Path) -> None:
    done = subprocess.run(f"{sys.executable} -m linocut plan {tiny_model} | true", shell=True, capture_output=True,
                          text=True, check=False)
    assert done.stderr == ""


def test_an_error_is_one_printable_line() -> None:
    assert error_line(LinocutError("bad\n  name \x1b[31m\x07")) == "bad name ?[31m?"
    assert error_line(OSError(28, "No space left on device", "a.png")) == "a.png: No space left on device"
    assert "smaller size" in error_line(MemoryError())
