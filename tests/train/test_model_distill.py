"""Distilling a model that exists: a rehearsal end to end, cuts, processes that share one student, and figures."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_recipe import ROOT

from linocut.cli import main
from linocut.errors import UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.folder import ModelFolder
from linocut.pipeline.generate import Pipeline
from linocut.quantize.rounding import quantize_tensor
from linocut.train.loop import Ranks
from linocut.train.model_distill import WEIGHTS, distil_model
from linocut.train.model_recipe import ModelRecipe, read_recipe
from linocut.train.monitor import read_lines
from linocut.train.prompt_stream import PromptStream

KLEIN = ROOT / "recipes" / "klein-4b.toml"
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small only get slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rehearsal(**changes) -> ModelRecipe:
    recipe = read_recipe(KLEIN)
    assert recipe is not None
    recipe = recipe.rehearsal()
    return replace(recipe, ternary=replace(recipe.ternary, **changes), held_out=recipe.held_out[:2])


def weights(folder: Path) -> dict[str, np.ndarray]:
    with Checkpoint.open(folder / WEIGHTS) as checkpoint:
        return {name: checkpoint.array(name).copy() for name in checkpoint.names}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("klein") / "run"
    distil_model(rehearsal(sheet_every=5, calibrate=4, critic=0.5), "ternary", run, ALONE)
    return run


def test_a_rehearsal_leaves_a_model_that_draws(rehearsed):
    assert Pipeline.from_pretrained(rehearsed / "model-ternary")("two cats", seed=1).images[0].size == (64, 64)
    with ModelFolder.open(rehearsed / "model-ternary").checkpoint("transformer") as packed:
        assert packed.verify() == len(packed.names)
        assert len(packed.packed) == 12 + 2 * 2
        assert packed.info("x_embedder.weight").dtype == "F16"
        latent = weights(rehearsed / "ternary")
        for name in packed.packed:  # what is packed is what was trained
            wanted = quantize_tensor(torch.from_numpy(latent[f"{name}.weight"]), "ternary", "tied")
            assert np.array_equal(packed.packed_tensor(name).codes, wanted.codes)
            assert np.array_equal(packed.packed_tensor(name).scales, wanted.scales)
    assert {path.name for path in rehearsed.iterdir()} >= {"ternary.jsonl", "ternary.svg", "ternary.teacher.png",
                                                           "ternary.5.png"}
    assert not (rehearsed / "ternary" / "state").exists()
    with ModelFolder.open(rehearsed / "model-ternary").checkpoint("text_encoder") as text:
        assert {entry.encoding for entry in text.packed.values()} == {"affine4"}


def test_every_tensor_learns(rehearsed):
    before, after = weights(rehearsed / "source"), weights(rehearsed / "ternary")
    assert before.keys() == after.keys()
    for name, value in before.items():
        source = (value.astype(np.uint32) << 16).view(np.float32)  # BF16
        assert np.abs(after[name] - source).max() > 1e-6, name
    lines = read_lines(rehearsed / "ternary.jsonl")
    assert lines[-1]["step"] == 7
    assert all(0 < line["zeros"] < 0.6 for line in lines)
    assert lines[-1]["sensitivity"] > 0 != lines[-1]["margin"]
    assert [line["frozen"] for line in lines] == [False, False, False, True, True]
    assert lines[-1]["flips"] == 0.0


def test_a_student_of_a_guided_teacher_needs_no_guidance(rehearsed, tmp_path):
    found = {}
    for scale in (1.0, 3.0):
        run = tmp_path / str(scale)
        shutil.copytree(rehearsed / "source", run / "source")
        index = json.loads((run / "source" / "model_index.json").read_text())
        (run / "source" / "model_index.json").write_text(json.dumps(index | {"is_distilled": False}))
        recipe = rehearsal(steps=2, freeze=0.0)
        distil_model(replace(recipe, path=replace(recipe.path, guidance=scale), held_out=()), "ternary", run, ALONE)
        found[scale] = ModelFolder.open(run / "model-ternary").settings, weights(run / "ternary")["proj_out.weight"]
    assert [found[scale][0]["is_distilled"] for scale in found] == [False, True]
    assert found[3.0][0]["default_steps"] == recipe.path.grid
    assert not np.array_equal(found[1.0][1], found[3.0][1])


def test_a_run_that_was_cut_ends_with_the_very_same_weights(rehearsed, tmp_path, monkeypatch):
    from linocut.train.optimize import Average
    update, calls = Average.update, []

    def cut(average: Average) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        update(average)

    monkeypatch.setattr(Average, "update", cut)
    recipe = rehearsal(sheet_every=5, calibrate=4, critic=0.5)
    with pytest.raises(KeyboardInterrupt):
        distil_model(recipe, "ternary", tmp_path, ALONE)
    distil_model(recipe, "ternary", tmp_path, ALONE)
    assert len(calls) == 6 + 8 - 4  # saved after step 3, the fourth
    straight, again = weights(rehearsed / "ternary"), weights(tmp_path / "ternary")
    assert all(np.array_equal(straight[name], again[name]) for name in straight)


# Ends the process as `kill -9` does, at a given update.
KILLED = """import os, signal, sys
from linocut.cli import main
from linocut.train.optimize import Average
update, calls = Average.update, []
def kill(average):
    calls.append(1)
    if len(calls) == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    update(average)
Average.update = kill
main(sys.argv[1:])
"""


def torchrun(arguments: list[str], world: int, kill_at: int = 0) -> list[int]:
    """Exit codes of `world` processes that run the program together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
                           "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "KILL_AT": str(kill_at)}
    started = [subprocess.Popen([sys.executable, "-c", KILLED, *arguments], text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
               for rank in range(world)]
    try:
        said = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    assert kill_at or codes == [0] * world, said
    return codes


def arguments(out: Path, recipe: Path = KLEIN) -> list[str]:
    return ["train", str(recipe), "--out", str(out), "--stage", "ternary", "--rehearse", "--device", "cpu"]


@pytest.mark.slow
def test_two_processes_share_one_student_and_survive_kills(tmp_path):
    """FSDP2 over gloo: both hold half; killed with SIGKILL they go on to the very same weights."""
    text = KLEIN.read_text().replace("contrast = 0.25", "contrast = 0.25\ncritic = 0.5")
    (tmp_path / "critic.toml").write_text(text.replace("embedded/", f"{ROOT}/recipes/embedded/"))
    a, b = (arguments(tmp_path / name, tmp_path / "critic.toml") for name in "ab")
    torchrun(a, 2)
    state = tmp_path / "b" / "ternary" / "state"
    assert -signal.SIGKILL in torchrun(b, 2, kill_at=6)
    facts = json.loads((state / "current.json").read_text())
    assert (facts["sharded"], facts["world"], facts["step"]) == (True, 2, 4)
    sizes = []
    for rank in range(2):
        with Checkpoint.open(state / facts["folder"] / f"rank.{rank}.safetensors") as part:
            sizes.append(sum(part.info(name).count for name in part.names if name.startswith("weight.")))
            assert any(name.startswith("own.critic.") for name in part.names)
    with Checkpoint.open(tmp_path / "a" / "ternary" / WEIGHTS) as whole:
        assert sum(sizes) == sum(whole.info(name).count for name in whole.names)
    assert max(sizes) < 0.6 * sum(sizes)
    assert not (tmp_path / "b" / "ternary" / WEIGHTS).exists()
    assert -signal.SIGKILL in torchrun(b, 2, kill_at=4)  # now in the endgame
    torchrun(b, 2)
    straight, again = weights(tmp_path / "a" / "ternary"), weights(tmp_path / "b" / "ternary")
    assert all(np.array_equal(straight[name], again[name]) for name in straight)


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_cut(tmp_path):
    torchrun(arguments(tmp_path), 2, kill_at=6)
    torchrun(arguments(tmp_path), 1)
    assert read_lines(tmp_path / "ternary.jsonl")[-1]["step"] == 7
    assert (tmp_path / "model-ternary" / "model_index.json").is_file()


@pytest.mark.slow
def test_what_two_processes_compute_is_what_one_does(tmp_path):
    """Dealt out among two or whole in each: the same gradients, up to the order of sums."""
    text = KLEIN.read_text().replace("shard = true", "shard = false")
    (tmp_path / "whole.toml").write_text(text.replace("embedded/", f"{ROOT}/recipes/embedded/"))
    torchrun(arguments(tmp_path / "dealt"), 2)
    torchrun(["train", str(tmp_path / "whole.toml"), *arguments(tmp_path / "whole")[2:]], 2)
    dealt, whole = weights(tmp_path / "dealt" / "ternary"), weights(tmp_path / "whole" / "ternary")
    for name, value in dealt.items():
        if value.dtype == np.float32:
            assert np.abs(value - whole[name]).max() < 5e-4 * np.abs(value).max() + 1e-4, name
    logs = [read_lines(tmp_path / name / "ternary.jsonl") for name in ("dealt", "whole")]
    assert logs[0][0]["loss"] == pytest.approx(logs[1][0]["loss"], rel=1e-4)
    assert logs[0][0]["gradient"] == pytest.approx(logs[1][0]["gradient"], rel=1e-3)


def test_the_benchmark_tells_memory_speed_and_cost(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*arguments(tmp_path), "--benchmark", "4", "--price", "2", "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples_per_second"] == pytest.approx(8 * 2 / found["seconds_a_step"])
    assert found["peak_bytes_per_process"] > 1e8
    assert found["samples_in_all"] == 8 * 8 * 2 * 8  # steps of a rehearsal, rows, batches, GPUs that it is meant for
    assert found["gpu_hours"] == pytest.approx(found["samples_in_all"] / found["samples_per_second"] / 3600)
    by_gpus = {row["gpus"]: row for row in found["full_run"]}
    assert by_gpus[8]["hours"] == pytest.approx(by_gpus[1]["hours"] / 8)
    assert by_gpus[8]["cost"] == pytest.approx(by_gpus[1]["cost"]) == pytest.approx(2 * found["gpu_hours"])


def test_prompts_come_once_each_and_are_the_same_every_time(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt number {index}" for index in range(30)) + "\nA forbidden one!\n")
    streams = [PromptStream([file], 0.0, 1, Ranks(rank, 2, torch.device("cpu")), ["a forbidden one"])
               for rank in range(2)]
    seen = [stream[position] for position in range(15) for stream in streams]
    assert sorted(seen) == sorted(f"prompt number {index}" for index in range(30))
    assert streams[0][3] == PromptStream([file], 0.0, 1, Ranks(0, 2, torch.device("cpu")), ["a forbidden one"])[3]
    mixed = PromptStream([file], 0.3, 1, ALONE)
    composed = sum("prompt number" not in mixed[position] and "forbidden" not in mixed[position]
                   for position in range(400))
    assert 80 < composed < 160
    alone = PromptStream([], 0.0, 1, ALONE)
    assert len({alone[position] for position in range(50)}) > 45


def test_the_klein_recipe_is_complete():
    recipe = read_recipe(KLEIN)
    assert recipe is not None
    assert recipe.at_random().shapes is not None
    for settings in (recipe.ternary, recipe.binary):
        assert settings.batch * settings.accumulate * 8 == 256
        assert settings.batch * settings.accumulate * 8 * settings.steps >= 5_000_000
        assert settings.loss == "normalized"
        assert (settings.contrast, settings.freeze, settings.on_policy) == (0.25, 0.08, 0.5)
    assert read_recipe(ROOT / "recipes" / "embedded" / "recipe.toml") is None


@pytest.mark.parametrize(("change", "message"), [
    (('source = "klein-4b"', 'source = "klein-4b"\npages = 3'), "unknown sections ['pages']"),
    (("sizes =", "# sizes ="), "missing are sizes"),
    (("batch = 8  ", "batch = 6  "), "ternary.batch must be a multiple of path.grid = 4"),
    (("composed = 0.2", "compose = 0.2"), "unknown keys ['compose'] in [prompts]"),
    (("prompts.txt", "none.txt"), "none.txt cannot be read"),
    (("[ternary]", "[ternary]\ntasks = {counting = 1}"), "ternary.tasks is for recipes with scenes"),
    (("[ternary]", '[ternary]\nstart = "runs"'), "ternary.start is for recipes that train their own teacher"),
])
def test_recipes_that_do_not_fit_are_refused(tmp_path, change, message):
    text = KLEIN.read_text().replace("embedded/", f"{ROOT}/recipes/embedded/")
    assert change[0] in text
    (tmp_path / "r.toml").write_text(text.replace(*change))
    with pytest.raises(UsageError) as refused:
        read_recipe(tmp_path / "r.toml")
    assert message in str(refused.value)


@pytest.mark.parametrize(("words", "message"), [
    (["--stage", "vae"], "has the stages ternary and binary, found vae"),
    (["--stage", "ternary"], "no model 'klein-4b'"),
])
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["train", str(KLEIN), "--out", str(tmp_path / "run"), "--device", "cpu", *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error or "klein" in error
    assert error.count("\n") == 1
