"""`linocut generate`, `plan` and `completions` as a user meets them, on a tiny model."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny_model import write_tiny_model

from linocut.cli import COMMANDS, main
from linocut.pipeline.png import read_recipe, write_png


@pytest.fixture
def linocut(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, model: bool = True) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *(["-m", str(tiny_model)] if model else [])])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_a_prompt_becomes_a_file_with_its_seed_printed(linocut, tmp_path: Path) -> None:
    code, out, err = linocut("generate", "a Red apple!", "--seed", "7")
    assert (code, err) == (0, "")
    assert out == "a-red-apple-7.png  seed 7  64x64\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a-red-apple-7.png"]
    assert read_recipe("a-red-apple-7.png").prompt == "a Red apple!"


def test_the_recipe_draws_the_same_pixels(linocut) -> None:
    linocut("generate", "-p", "a red apple", "-o", "a.png", "--size", "96x64", "--steps", "3")
    code, _, err = linocut("generate", "--from-image", "a.png", "-o", "b.png")
    assert (code, err) == (0, "")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_other_weights_under_the_same_recipe_give_a_warning(linocut, tmp_path: Path) -> None:
    linocut("generate", "a red apple", "-o", "a.png")
    other = write_tiny_model(tmp_path / "tiny", seed=1)
    code, _, err = linocut("generate", "--from-image", "a.png", "-o", "b.png", "-m", str(other), model=False)
    assert code == 0
    assert err.startswith("warning: the picture was drawn with other weights of tiny (hash ")
    assert err.count("\n") == 1


def test_another_kernel_under_the_same_recipe_gives_a_warning(linocut, monkeypatch: pytest.MonkeyPatch) -> None:
    linocut("generate", "a red apple", "-o", "a.png")
    now = "generic" if read_recipe("a.png").kernel == "reference" else "reference"
    monkeypatch.setenv("LINOCUT_KERNEL", now)
    code, _, err = linocut("generate", "--from-image", "a.png", "-o", "b.png")
    assert code == 0
    assert f"this one with {now}" in err


def test_what_a_picture_says_cannot_play_with_the_terminal(linocut) -> None:
    linocut("generate", "a red apple", "-o", "a.png")
    with Image.open("a.png") as image:
        image.load()
    recipe = read_recipe("a.png")
    write_png(image, "evil.png", replace(recipe, kernel="\x1b[2J", model_hash="\nerror: all is lost"))
    code, _, err = linocut("generate", "--from-image", "evil.png", "-o", "b.png")
    assert code == 0
    assert "\x1b" not in err
    assert all(line.startswith("warning: ") for line in err.splitlines())


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux")
def test_a_file_name_that_is_no_text(tiny_model: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "linocut", "generate", "a red apple", "-m", str(tiny_model), "-o",
                           b"\xff.png"], cwd=tmp_path, capture_output=True, check=False,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff.png"]


def test_a_picture_does_not_decide_which_model_is_opened(linocut) -> None:
    linocut("generate", "a red apple", "-o", "a.png")
    code, _, err = linocut("generate", "--from-image", "a.png", "-o", "b.png", model=False)
    assert code == 2
    assert "say where it is with --model" in err


def test_many_pictures(linocut, tmp_path: Path) -> None:
    Path("prompts.txt").write_text("\ufeffa red apple\n\n  two blue cups \n", encoding="utf-8")
    code, out, _ = linocut("generate", "--prompt-file", "prompts.txt", "-s", "1", "-s", "5", "-n", "2",
                           "-o", "{index}-{seed}.png", "--steps", "1")
    assert code == 0
    names = [f"{index}-{seed}.png" for index, seed in enumerate([1, 2, 5, 6, 1, 2, 5, 6])]
    assert [line.split()[0] for line in out.splitlines()] == names
    assert [read_recipe(name).prompt for name in names] == ["a red apple"] * 4 + ["two blue cups"] * 4


def test_prompts_from_stdin(linocut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a red apple\ntwo blue cups\n")))
    code, out, _ = linocut("generate", "--prompt-file", "-", "--seed", "1")
    assert (code, len(out.splitlines())) == (0, 2)


def test_json_tells_everything(linocut) -> None:
    code, out, err = linocut("generate", "a red apple " * 12, "-o", "a.png", "--json")
    document = json.loads(out)
    assert (code, err) == (0, document["warnings"] and f"warning: {document['warnings'][0]}\n")
    assert document["pictures"][0]["path"] == "a.png"
    assert document["pictures"][0]["recipe"]["seed"] == document["pictures"][0]["seed"]
    assert set(document["timings"]) == {"encode", "denoise", "decode"}
    assert document["planned_peak"] > 10**8


def test_a_cut_prompt_is_told(linocut) -> None:
    code, _, err = linocut("generate", "a red apple " * 12 + "unreachable", "-o", "a.png")
    assert code == 0
    assert err.startswith("warning: the prompt takes ")
    assert "unreachable" in err
    assert err.count("\n") == 1


def test_previews_are_written_per_step(linocut) -> None:
    linocut("generate", "a red apple", "-o", "a.png", "--seed", "3", "--steps", "2", "--preview-dir", "steps")
    assert sorted(path.name for path in Path("steps").iterdir()) == ["3-0-step1.png", "3-0-step2.png"]
    with Image.open("steps/3-0-step1.png") as preview:
        assert preview.size == (64, 64)


def test_threads_are_set_for_torch_and_kernels(linocut, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    before = torch.get_num_threads()
    monkeypatch.setenv("LINOCUT_THREADS", "1")
    try:
        assert linocut("generate", "a red apple", "-o", "a.png", "--threads", "2")[0] == 0
        assert torch.get_num_threads() == 2
        assert os.environ["LINOCUT_THREADS"] == "2"
    finally:
        torch.set_num_threads(before)


def test_plan_needs_no_torch_and_agrees_with_generate(tiny_model: Path, tmp_path: Path) -> None:
    script = ("import sys\nfrom linocut.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
              "    assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", script, "plan", str(tiny_model), "--size", "96x64", "--json"],
                          capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert (document["width"], document["height"]) == (96, 64)
    assert document["peak"] == max(phase["peak"] for phase in document["phases"].values())


def test_plan_for_people(linocut, tiny_model: Path) -> None:
    code, out, _ = linocut("plan", str(tiny_model), model=False)
    assert code == 0
    for word in ("on disk", "peak memory", "highest", "tiny, 64x64"):
        assert word in out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions(linocut, shell: str) -> None:
    code, out, _ = linocut("completions", shell, model=False)
    assert code == 0
    assert "_LINOCUT_COMPLETE" in out


def test_completion_offers_commands_and_options(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("_LINOCUT_COMPLETE", "bash_complete")
    for words, expected in (("linocut gen", "plain,generate"), ("linocut generate --st", "plain,--steps")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        with pytest.raises(SystemExit):
            main([])
        assert expected in capsys.readouterr().out.splitlines()


def test_help_lists_the_commands_that_exist(linocut) -> None:
    code, out, _ = linocut("--help", model=False)
    assert code == 0
    assert {"generate", "plan", "completions"} <= {line.split()[0] for line in out.splitlines() if line.strip()}
    assert "generate" in COMMANDS


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
@pytest.mark.parametrize("delay", [0.0, 0.7])
def test_ctrl_c_prints_one_line_and_leaves_nothing(tiny_model: Path, tmp_path: Path, delay: float) -> None:
    command = [sys.executable, "-m", "linocut", "generate", "a red apple", "-m", str(tiny_model), "--steps", "1000",
               "--size", "512x512", "--preview-dir", "steps"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("steps/*step1.png")):  # drawing has begun
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["steps"]
    assert not list(tmp_path.glob("steps/.*"))


def test_documentation_names_every_option() -> None:
    from linocut.cli.generate import command as generate
    from linocut.cli.plan import command as plan

    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for command in (generate, plan):
        for parameter in command.params:
            for name in parameter.opts:
                assert name in text or not name.startswith("-"), name


def test_examples_run(tiny_model: Path, tmp_path: Path) -> None:
    folder, model = Path(__file__).parents[2] / "examples", str(tiny_model)
    for script, arguments, product in (("draw.py", ["a red apple", model], "picture.png"),
                                       ("watch_and_stop.py", ["60", model], "fox.png"),
                                       ("compare_models.py", [model, model], "comparison.png")):
        subprocess.run([sys.executable, str(folder / script), *arguments], cwd=tmp_path, check=True,
                       capture_output=True)
        assert (tmp_path / product).exists()
