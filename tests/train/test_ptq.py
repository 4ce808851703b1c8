"""The ladder of rounding methods on a small random model: every step helps, cuts lose nothing, what is said is true."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_dense import TINY

from linocut.cli import main
from linocut.errors import UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.formats.folder import ModelFolder
from linocut.models.convert import build_and_load
from linocut.models.flux2 import Flux2Config, Flux2Transformer, image_position_ids, text_position_ids
from linocut.models.synthetic import write_synthetic
from linocut.pipeline.generate import Pipeline
from linocut.quantize.source import open_source
from linocut.quantize.stream import SCRATCH, quantize_folder
from linocut.train.ptq import solver as solver_module
from linocut.train.ptq.ladder import LADDER, CalibrationSettings, read_prompts
from linocut.train.ptq.network import StreamedTransformer
from linocut.train.ptq.path import plan_path, read_text, walk
from linocut.train.ptq.solver import BlockSolver

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PROMPTS = tuple(f"a photo of {number} {thing}" for number in ("one", "two", "six") for thing in
                ("red apples", "cats", "old houses by the sea", "boats"))
SETTINGS = CalibrationSettings(PROMPTS, iterations=40, batch=5)


class Cut(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small only get slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """One block of each kind, whose weights differ in size from column to column, as those of real models do."""
    root = tmp_path_factory.mktemp("ptq") / "dense"
    write_synthetic(root, replace(TINY, transformer=replace(TINY.transformer, num_layers=1, num_single_layers=1)),
                    "bf16")
    return root


def make(model, target, method, encoding="ternary", settings=SETTINGS, on_progress=None):
    found = BlockSolver(LADDER[method], settings, CPU)
    return quantize_folder(model, target, encoding, solver=found, on_progress=on_progress)


def mean(values):
    return sum(values) / len(values)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def differing(first: Path, second: Path) -> list[str]:
    """Names of the transformer's tensors that are not the same in two models."""
    ours, theirs = (load_file(folder / WEIGHTS) for folder in (first, second))
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_looking_at_inputs_comes_nearer_to_the_teacher(model, tmp_path):
    errors = [mean(make(model, tmp_path / method, method).solving["velocity_error"]) for method in ("exact", "gptq")]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ternary", "binary"])
def test_every_step_of_the_ladder_comes_nearer_to_the_teacher(model, tmp_path, encoding):
    errors = {}
    for method in LADDER:
        report = make(model, tmp_path / method, method, encoding)
        errors[method] = mean(report.solving["velocity_error"])
        assert report.solving["held_out"] == 2
        assert not list(tmp_path.glob(".*"))
        assert not (tmp_path / method / SCRATCH).exists()
        packed = [tensor for tensor in report.of("transformer") if tensor.encoding == encoding]
        assert all(tensor.output_error is not None for tensor in packed)
    assert errors["exact"] <= errors["absmean"] * (1.0 if encoding == "binary" else 0.95)
    assert errors["folds"] < 1.02 * errors["exact"]
    assert errors["gptq"] < 0.9 * errors["folds"]
    assert errors["descent"] < errors["gptq"]
    assert errors["reconstruct"] < 1.03 * errors["descent"]  # random weights leave it little to find


def test_the_teachers_path_is_the_networks(model, tmp_path):
    """Block by block from disk, in batches, the velocity is that of the whole network in memory."""
    source = open_source(model, pack_text_encoder=True)
    settings = replace(SETTINGS, prompts=PROMPTS[:3], batch=2)
    quantize_folder(model, tmp_path / "plain", "ternary")
    path = plan_path(source, settings, tmp_path)
    read_text(path, source, tmp_path / "plain", settings, CPU)
    walk(path, StreamedTransformer(source.transformer, source.transformer_config, CPU), settings, lambda _: None)
    with Checkpoint.open(model / "transformer") as weights:
        network = build_and_load(Flux2Transformer, Flux2Config.from_dict(source.transformer_config), weights,
                                 dtype=torch.float32)
    ids = image_position_ids(*path.tokens), text_position_ids(path.text_length)
    text = path.text("teacher", slice(None))
    assert 0 < float((text - path.text("student", slice(None))).norm() / text.norm()) < 0.6  # four bits
    for step, level in enumerate(path.levels[:-1]):
        x, v = path.at(step, slice(None))
        with torch.no_grad(), solver_autocast():
            wanted = network(x, text, torch.full((3,), level), *ids).float()
        torch.testing.assert_close(v, wanted, rtol=0.02, atol=0.02)
    seeds = torch.cat([torch.randn((1, 64, *path.tokens), generator=torch.Generator().manual_seed(i))
                       for i in range(3)])
    assert torch.equal(path.at(0, slice(None))[0], seeds.flatten(2).transpose(1, 2))
    assert path.batches(2, 1) == [(slice(0, 2), False), (slice(2, 3), True)]
    source.close()


def solver_autocast():
    from linocut.train.loop import autocast
    return autocast(CPU)


def test_a_run_that_was_cut_goes_on_and_gives_the_same_bytes(model, tmp_path, monkeypatch):
    straight = make(model, tmp_path / "straight", "descent")
    solved = []
    gptq = solver_module.gptq
    monkeypatch.setattr(solver_module, "gptq", lambda *a: solved.append(1) or gptq(*a))

    def cut(done, total, name):
        if name == "single_transformer_blocks.0":
            raise Cut

    with pytest.raises(Cut):
        make(model, tmp_path / "again", "descent", on_progress=cut)
    assert not (tmp_path / "again").exists()
    before = len(solved)
    assert before > 0
    report = make(model, tmp_path / "again", "descent")
    assert len(solved) == before + 2  # the two layers of the block that was missing
    assert digest(tmp_path / "again") == digest(tmp_path / "straight")
    assert report.solving == straight.solving
    assert {t.name: t.output_error for t in report.tensors} == {t.name: t.output_error for t in straight.tensors}
    # other prompts or another method start over
    with pytest.raises(Cut):
        make(model, tmp_path / "third", "descent", on_progress=cut)
    solved.clear()
    make(model, tmp_path / "third", "gptq")
    assert len(solved) == 2 * 4 + 2


def test_threads_are_either_outside_or_inside(model, tmp_path):
    """Row blocks are rounded side by side by one thread each, products of whole layers by many threads."""
    seen, before = {}, torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        make(model, tmp_path / "made", "gptq",
             on_progress=lambda _done, _total, name: seen.setdefault(name.split(".")[0], torch.get_num_threads()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert (seen["text_encoder"], seen["transformer_blocks"], seen["transformer"]) == (1, 2, 1)


@pytest.mark.slow
def test_kills_lose_nothing(model, tmp_path):
    """Killed again and again at any moment, the command comes to the same bytes in the end."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    command = [sys.executable, "-m", "linocut", "quantize", str(model), str(tmp_path / "killed"), "--encoding",
               "binary", "--prompts", str(prompts), "--method", "descent", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}

    def straight(name: str) -> str:
        subprocess.run([*command[:5], str(tmp_path / name), *command[6:]], check=True, env=environment,
                       stdout=subprocess.DEVNULL)
        return digest(tmp_path / name)

    began = time.monotonic()
    wanted = straight("straight")
    whole = time.monotonic() - began
    kills = 0
    for share in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, None):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            assert process.wait(share and share * whole) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            if (tmp_path / "killed").exists():  # all was done but to end
                break
    assert kills > 0
    found = digest(tmp_path / "killed")
    if found != wanted:  # seen once, and then it was the uncut run that differed from all others before and after it
        agrees = "agrees with" if straight("again") == found else "differs from"
        pytest.fail(f"{differing(tmp_path / 'killed', tmp_path / 'straight')} differ; the run that was cut {agrees} "
                    "another uncut one")
    assert not list(tmp_path.glob(".*"))


def test_the_result_is_a_model_that_draws_and_hashes_hold(model, tmp_path):
    make(model, tmp_path / "out", "gptq", "binary")
    with ModelFolder.open(tmp_path / "out").checkpoint("transformer") as packed:
        assert packed.verify() == len(packed.names)
        assert {entry.encoding for entry in packed.packed.values()} == {"binary"}
    picture = Pipeline.from_pretrained(tmp_path / "out")("two cats", seed=1).images[0]
    assert picture.size == (64, 64)


def test_without_prompts_folds_are_made_and_nothing_is_measured(model, tmp_path):
    found = make(model, tmp_path / "folds", "folds", settings=CalibrationSettings())
    plain = quantize_folder(model, tmp_path / "exact", "ternary")
    assert found.solving == {"method": "folds", "prompts": 0}
    assert found.totals("transformer")["relative_error"] < 0.98 * plain.totals("transformer")["relative_error"]
    pictures = [np.asarray(Pipeline.from_pretrained(tmp_path / name)("a cat", seed=0).images[0]).astype(int)
                for name in ("folds", "exact")]
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 60  # other roundings of the same model


def test_the_command_says_how_far_the_model_is_from_its_source(model, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# comment\n\n" + "\n".join(f"task | {prompt}" for prompt in PROMPTS))
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(model), str(tmp_path / "out"), "--encoding", "ternary", "--prompts", str(prompts),
              "--calibrate", "8", "--device", "cpu", "--method", "gptq"])
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    assert "of outputs" in said
    assert "method gptq: velocity off by 0." in said
    assert "on 1 prompts that were not looked at" in said


@pytest.mark.parametrize(("arguments", "message"), [
    (["--method", "gptq"], "give it prompts (--prompts FILE)"),
    (["--prompts", "none.txt"], "none.txt: not a readable text file of prompts"),
    (["--prompts", "one.txt"], "at least two prompts are needed"),
    (["--method", "folds", "--tie-scales"], "tied scales go with plain rounding only"),
    (["--prompts", "two.txt", "--device", "gpu7"], "unknown device 'gpu7'"),
])
def test_mistakes_are_one_line(model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("a cat\n")
    Path("two.txt").write_text("a cat\na dog\n")
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(model), "out", "--encoding", "ternary", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["one.txt", "two.txt"]


def test_a_transformer_alone_cannot_be_calibrated(model, tmp_path):
    shutil.copytree(model / "transformer", tmp_path / "alone")
    with pytest.raises(UsageError, match="has no text encoder and no tokenizer"):
        make(tmp_path / "alone", tmp_path / "out", "gptq")
    report = make(tmp_path / "alone", tmp_path / "out", "folds", settings=CalibrationSettings())
    assert report.solving["prompts"] == 0


def test_prompts_are_spread_over_the_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"task | prompt {index}" for index in range(10)))
    assert read_prompts(file, 3) == ("prompt 0", "prompt 3", "prompt 6")
    assert len(read_prompts(file, 100)) == 10
    assert CalibrationSettings(("a", "b")).identity() != CalibrationSettings(("a", "c")).identity()


def test_the_command_knows_every_method():
    from linocut.cli.quantize import METHODS
    assert tuple(LADDER) == METHODS


def test_a_network_that_stays_on_its_device_is_read_once(model, monkeypatch):
    source = open_source(model, pack_text_encoder=True)
    network = StreamedTransformer(source.transformer, source.transformer_config, CPU)
    plain = network.block("transformer_blocks", 0).state_dict()
    network._keeps = True  # as on a GPU with room
    first = network.block("transformer_blocks", 0).state_dict()
    monkeypatch.setattr("linocut.train.ptq.network.tensor_from", lambda *_: pytest.fail("read again"))
    again = network.block("transformer_blocks", 0).state_dict()
    for name, tensor in plain.items():
        assert torch.equal(tensor, first[name])
        assert torch.equal(tensor, again[name])
        assert tensor.dtype == again[name].dtype == torch.float32


@pytest.mark.slow
def test_the_benchmark_at_kleins_size_tells_where_time_goes(tmp_path):
    """At toy size: once to the end, once cut off."""
    command = [sys.executable, str(ROOT / "benchmarks" / "ptq_klein.py"), "--toy", "--blocks", "1", "2", "--calibrate",
               "5", "--device", "cpu", "--work", str(tmp_path), "-o", str(tmp_path / "out.json"), "--method"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([*command, "descent"], env=env, check=True, capture_output=True)
    found = json.loads((tmp_path / "out.json").read_text())["descent"]
    assert found["done"]
    order = ["writing the text encoder", "reading the prompts", "teacher's step 1 of 4", "transformer_blocks.0",
             "single_transformer_blocks.0", "single_transformer_blocks.1", "writing"]
    times = [found["began"][name] for name in order]
    assert times == sorted(times)
    limit = str(found["began"]["single_transformer_blocks.0"] + 1)
    subprocess.run([*command, "reconstruct", "--limit", limit], env=env, check=True, capture_output=True)
    found = json.loads((tmp_path / "out.json").read_text())["reconstruct"]
    assert not found["done"]
    assert "writing" not in found["began"]
