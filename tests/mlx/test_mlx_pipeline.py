"""Drawing on mlx: the picture that torch draws, and all that a pipeline does besides."""

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from tiny_dense import TINY
from tiny_model import write_tiny_model

from linocut import Pipeline
from linocut.cli import main
from linocut.errors import Cancelled, UsageError
from linocut.formats.timestep_table import WEIGHTS_FILE
from linocut.mlx import runtime
from linocut.models.synthetic import write_synthetic
from linocut.pipeline.device import choose
from linocut.pipeline.png import read_recipe
from linocut.pipeline.run import Progress, StepState
from linocut.pipeline.schedule import make_timestep_table
from linocut.quantize.stream import quantize_folder

PROMPT = "two red apples and a blue cup"
DECIBELS = 45.0


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.square(a.astype(np.float64) - b).mean())
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def drawn(pipe: Pipeline, **arguments: object) -> np.ndarray:
    return np.asarray(pipe(PROMPT, seed=7, **arguments).images[0])


def expect_same_picture(model: Path | str, **arguments: object) -> None:
    """That of torch with float activations throughout, as mlx has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINOCUT_KERNEL", "reference")
        wanted = drawn(Pipeline.from_pretrained(model, device="cpu"), **arguments)
    found = drawn(Pipeline.from_pretrained(model, device="mlx"), **arguments)
    assert wanted.std() > 5
    decibels = psnr(found, wanted)
    print(f"{model}: {decibels:.1f} dB")
    assert decibels > DECIBELS


@pytest.fixture
def pipe(tiny_model: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_model, device="mlx")


@pytest.mark.parametrize("encoding", ["binary", "ternary"])
def test_the_picture_is_that_of_torch(encoding: str, tmp_path: Path) -> None:
    expect_same_picture(write_tiny_model(tmp_path / "model", encoding), width=96, height=64)


def test_guidance_works_as_on_torch(tmp_path: Path) -> None:
    expect_same_picture(write_tiny_model(tmp_path / "model", distilled=False), guidance_scale=3.0,
                        num_inference_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["embedded", "embedded-binary"])
def test_the_embedded_models_draw_what_they_draw_on_torch(model: str) -> None:
    expect_same_picture(model, width=64, height=64, num_inference_steps=2)


def test_dense_models_and_timestep_tables_work(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "dense", TINY, "bf16")
    quantize_folder(tmp_path / "dense", tmp_path / "table", "binary", make_table=make_timestep_table)
    (tmp_path / "table" / "transformer" / WEIGHTS_FILE).unlink()
    expect_same_picture(tmp_path / "dense")
    expect_same_picture(tmp_path / "table")


def test_steps_are_shown_with_previews(pipe: Pipeline) -> None:
    seen = []

    def on_step(given: Pipeline, step: int, sigma: float, state: StepState) -> None:
        assert given is pipe
        seen.append((step, sigma, state["preview"].size, state["x0"].dtype, tuple(state["latents"].shape)))

    reports: list[Progress] = []
    result = pipe(PROMPT, seed=1, callback_on_step_end=on_step, on_progress=reports.append)
    assert [each[0] for each in seen] == [0, 1]
    assert seen[0][1] == 1.0
    assert {each[2:] for each in seen} == {((8, 8), torch.float32, (1, 16, 4, 4))}
    counted = {phase: [(each.done, each.total) for each in reports if each.phase == phase]
               for phase in ("encode", "denoise", "decode")}
    assert counted["encode"] == [(i, 3) for i in range(1, 4)]
    assert counted["denoise"] == [(i, 6) for i in range(1, 7)]
    assert counted["decode"][-1][0] == counted["decode"][-1][1] == len(counted["decode"])
    assert set(result.timings) == {"encode", "denoise", "decode"}


@pytest.mark.parametrize(("phase", "done"), [("encode", 2), ("denoise", 4), ("decode", 3)])
def test_a_run_can_be_cancelled_and_the_pipeline_goes_on(pipe: Pipeline, phase: str, done: int) -> None:
    wanted = drawn(pipe)
    stop, last = threading.Event(), []

    def on_progress(progress: Progress) -> None:
        last.append((progress.phase, progress.done))
        if last[-1] == (phase, done):
            stop.set()

    with pytest.raises(Cancelled):
        pipe(PROMPT, seed=7, cancel=stop, on_progress=on_progress)
    assert last[-1] == (phase, done), "it went on"
    assert np.array_equal(drawn(pipe), wanted)


def test_another_thread_draws_the_same(tiny_model: Path, pipe: Pipeline) -> None:
    wanted, found = drawn(pipe), []

    def work() -> None:
        found.append(drawn(pipe))  # weights were read in the main thread
        found.append(drawn(Pipeline.from_pretrained(tiny_model, device="mlx")))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert len(found) == 2
    assert all(np.array_equal(each, wanted) for each in found)


def test_networks_leave_memory_before_the_next_one_comes(tiny_model: Path) -> None:
    pipe = Pipeline.from_pretrained(tiny_model, device="mlx", keep_loaded=False)
    mx.clear_cache()
    before, held = mx.get_active_memory(), {}

    def on_progress(progress: Progress) -> None:
        held.setdefault(progress.phase, []).append(mx.get_active_memory() - before)

    wanted = drawn(Pipeline.from_pretrained(tiny_model, device="mlx"))
    assert np.array_equal(drawn(pipe, on_progress=on_progress), wanted)
    with pipe.folder.checkpoint("text_encoder") as checkpoint:
        assert max(held["encode"]) < checkpoint.tensor_nbytes, "all layers were held at a time"
    mx.clear_cache()
    assert mx.get_active_memory() - before < 10_000


def test_the_recipe_names_mlx_and_the_command_line_draws_with_it(
        tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw = ["generate", PROMPT, "--seed", "7", "-m", str(tiny_model)]
    with pytest.raises(SystemExit) as ended:
        main([*draw, "-o", "a.png", "--device", "mlx"])
    assert not ended.value.code
    recipe = read_recipe("a.png")
    assert (recipe.kernel, recipe.device) == ("mlx", f"mlx {runtime.device_name()}")
    assert recipe.versions["mlx"] == mx.__version__
    assert recipe.tile is None
    monkeypatch.setenv("LINOCUT_DEVICE", "mlx")
    with pytest.raises(SystemExit) as ended:
        main([*draw, "-o", "b.png"])
    assert not ended.value.code
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--from-image", "a.png", "-m", str(tiny_model), "-o", "c.png", "--device", "cpu"])
    assert not ended.value.code
    assert "drawn with kernel mlx" in capsys.readouterr().err


def test_text_features_are_cached_apart_from_those_of_torch(
        tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINOCUT_CACHE", str(tmp_path))
    monkeypatch.setenv("LINOCUT_PROMPT_CACHE", "8")
    counts = []
    for device in ("cpu", "mlx", "mlx"):
        pipe = Pipeline.from_pretrained(tiny_model, device=device)
        pipe(PROMPT, seed=0)
        counts.append(pipe.timings["encode"].get("cached", 0))
    assert counts == [0, 0, 1]
    assert len(list((tmp_path / "prompts").glob("*.safetensors"))) == 2


# ------------------------------------------------------------------------------------------- the choice of a device

def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(("found", "words"), [(None, "mlx is not installed"), ("0.32.0", "expected 0.32.4 or newer")])
def test_mlx_that_is_not_there_is_an_error_that_says_what_to_do(
        tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], found: str | None,
        words: str) -> None:
    monkeypatch.setattr(runtime, "version", lambda: found)
    with pytest.raises(UsageError, match=words):
        Pipeline.from_pretrained(tiny_model, device="mlx")
    for arguments in (("generate", PROMPT), ("serve",)):
        err = refused(capsys, *arguments, "--device", "mlx", "-m", str(tiny_model))
        assert words in err
        assert "pip install 'linocut[mlx]'" in err


def test_mlx_that_cannot_be_imported_is_an_error_too(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libmlx.so: cannot open shared object file")

    monkeypatch.setattr(runtime.importlib, "import_module", broken)
    with pytest.raises(UsageError, match=r"cannot be imported \(libmlx.*mlx\[cpu\]"):
        Pipeline.from_pretrained(tiny_model, device="mlx")


@pytest.mark.parametrize(("options", "words"), [
    (("--device", "tpu"), "auto, cpu, cuda, cuda:N, mps or mlx (found 'tpu')"),
    (("--device", "cuda"), "finds no CUDA device"),
    (("--device", "mlx", "--max-memory", "2GB"), "a memory limit can be kept on the CPU and on CUDA devices only"),
    (("--device", "mlx", "--dtype", "float16"), "needs float32 (found float16)"),
])
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is missing")
def test_impossible_devices_are_refused(tiny_model: Path, options: tuple[str, ...], words: str,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, "generate", PROMPT, "-m", str(tiny_model), *options)


def test_the_default_is_the_cpu_but_for_apple_silicon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LINOCUT_DEVICE", raising=False)
    monkeypatch.delenv("LINOCUT_KERNEL", raising=False)
    if sys.platform == "linux":
        assert choose().name == "cpu"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert choose().name == "cpu"
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    choice = choose()
    assert (choice.name, choice.reason, choice.automatic) == ("mlx", f"Apple silicon, with mlx {mx.__version__}", True)
    assert choose(max_memory="2GB").name == "cpu"
    monkeypatch.setenv("LINOCUT_KERNEL", "reference")
    assert "LINOCUT_KERNEL=reference" in choose().reason
    monkeypatch.setenv("LINOCUT_DEVICE", "mlx")
    assert (choose().name, choose("cpu").name) == ("mlx", "cpu")
    assert "LINOCUT_DEVICE=mlx" in choose().reason
    monkeypatch.setenv("LINOCUT_DEVICE", "auto")
    monkeypatch.delenv("LINOCUT_KERNEL")
    monkeypatch.setattr(runtime, "version", lambda: None)
    assert choose().name == "cpu"
    assert "mlx is not installed" in choose().reason


def test_nothing_imports_mlx_unless_it_was_chosen(tiny_model: Path) -> None:
    code = ("import sys\nfrom linocut import Pipeline\n"
            f"Pipeline.from_pretrained({str(tiny_model)!r}, device='cpu')('a red apple', seed=0)\n"
            "print('MLX', any(name.split('.')[0] == 'mlx' and name != 'mlx' for name in sys.modules))")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert "MLX False" in done.stdout, done.stdout + done.stderr


def test_small_models_are_kept(pipe: Pipeline) -> None:
    drawn(pipe)
    assert sorted(pipe.components.kept) == ["text_encoder", "tokenizer", "transformer", "vae"]
    pipe.close()
    assert pipe.components.kept == []
