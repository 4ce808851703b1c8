"""The parts of distillation: losses, the endgame, what is logged, and that a kill changes nothing in the end."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_recipe import ROOT, write_recipe
from torch import nn

from linocut.errors import KernelError, UsageError
from linocut.formats.checkpoint import Checkpoint
from linocut.models.linear import FakeQuantLinear
from linocut.quantize.rounding import fake_quantize
from linocut.train.autoencoder import load_vae
from linocut.train.dataset import make_tokenizer
from linocut.train.endgame import freeze_codes, hold_signs, keep_codes
from linocut.train.loop import Ranks
from linocut.train.monitor import Monitor, codes_of, plot, read_lines, require_gradients
from linocut.train.objective import Objective
from linocut.train.optimize import Average
from linocut.train.painter import Painter
from linocut.train.recipe import QatSettings, Recipe
from linocut.train.snapshot import Snapshot, from_json, to_json
from linocut.train.stages import run_stage
from linocut.train.weights import save_weights

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
STAGE = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
SIGMA = torch.tensor([1.0] * 4 + [0.5] * 4)
EVEN = torch.ones(2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small only get slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(seed=0):
    torch.manual_seed(seed)
    x, target = torch.randn(8, 6, 4), torch.randn(8, 6, 4)
    return target + 0.1 * torch.randn(8, 6, 4), target, x


def test_the_plain_loss_is_the_weighted_mean_squared_error():
    v, target, x = batch()
    objective = Objective("velocity", 0.0, 2, ALONE)
    errors = (v - target).square().mean((1, 2))
    weights = torch.tensor([3.0, 1.0])
    loss = objective(v, target, x, SIGMA, STAGE, weights)
    torch.testing.assert_close(loss, (errors * weights[STAGE]).mean())
    torch.testing.assert_close(objective.errors, torch.stack([errors[:4].mean(), errors[4:].mean()]))


def test_the_normalized_loss_counts_errors_in_units_of_what_prompts_decide():
    """Where all prompts lead to nearly the same picture, the same error is worth more."""
    torch.manual_seed(0)
    noise = torch.randn(8, 6, 4)
    pictures = torch.cat([0.1 * torch.randn(4, 6, 4), torch.randn(4, 6, 4)])  # of small variance at step 0
    target = noise - pictures
    x = pictures + SIGMA[:, None, None] * target
    v = target + 0.01
    objective = Objective("normalized", 0.0, 2, ALONE)
    loss = objective(v, target, x, SIGMA, STAGE, EVEN)
    wanted = torch.stack([pictures[:4].var(0).mean(), pictures[4:].var(0).mean() / 0.25])
    torch.testing.assert_close(objective.unit, wanted)
    assert float(loss) == pytest.approx(float((1e-4 / wanted).mean()), rel=1e-3)
    before = objective.unit.clone()
    objective(v, target, x + pictures, SIGMA, STAGE, EVEN)  # pictures twice as far apart
    torch.testing.assert_close(objective.unit, 1.03 * before)  # a running mean


def test_the_balanced_loss_counts_errors_in_proportion():
    """A step where errors are ten times as large as at another one pulls no harder: its gradient is that of a log."""
    v, target, x = batch()
    v[4:] = target[4:] + 10 * (v[4:] - target[4:])
    v.requires_grad_(True)
    objective = Objective("balanced", 0.0, 2, ALONE)
    loss = objective(v, target, x, SIGMA, STAGE, EVEN)
    errors = torch.stack([(v - target)[rows].square().mean() for rows in (slice(4), slice(4, 8))])
    torch.testing.assert_close(loss, errors.mean())  # what is reported stays a mean squared error
    logs = torch.autograd.grad(errors.log().sum() * errors.mean().detach() / 2, v, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, v), logs)
    before = objective.unit.clone()
    objective(target + 2 * (v.detach() - target), target, x, SIGMA, STAGE, EVEN)  # errors four times as large
    torch.testing.assert_close(objective.unit, 1.03 * before)  # a running mean


def test_contrast_sees_a_student_that_reads_no_prompt():
    _v, target, x = batch()
    blind = target.clone()
    blind[0::2] = blind[1::2] = (target[0::2] + target[1::2]) / 2  # the same for both of a pair
    blind.requires_grad_(True)
    objective = Objective("velocity", 1.0, 2, ALONE)
    plain = Objective("velocity", 0.0, 2, ALONE)
    loss = objective(blind, target, x, SIGMA, STAGE, EVEN) - plain(blind, target, x, SIGMA, STAGE, EVEN)
    assert float(loss.detach()) == pytest.approx(1.0)
    assert float(objective.sensitivity) == 0.0
    loss.backward()
    assert float(blind.grad[:4].abs().sum()) > 0
    assert float(blind.grad[4:].abs().sum()) == 0  # the second half of the grid has no part in it
    shifted = target + 1.0  # wrong, but by the same for every prompt
    assert float(objective(shifted, target, x, SIGMA, STAGE, EVEN)) == pytest.approx(
        float(plain(shifted, target, x, SIGMA, STAGE, EVEN)))
    assert float(objective.sensitivity) == pytest.approx(1.0)


@pytest.mark.parametrize("encoding", ["ternary", "binary"])
def test_in_the_endgame_codes_stay_and_scales_learn(encoding):
    torch.manual_seed(0)
    module = nn.Sequential(FakeQuantLinear(256, 64, encoding), nn.Linear(64, 64, bias=False))
    average, optimizer = Average(module, 0.9), torch.optim.AdamW(module.parameters(), 1e-3, weight_decay=0.0)

    def learn(steps, frozen):
        for _ in range(steps):
            x = torch.randn(16, 256)
            (module(x) - x[:, :64]).square().mean().backward()
            if frozen:
                keep_codes(module)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update()

    learn(20, False)
    with average.installed():
        wanted = codes_of(module[0])[0]
    freeze_codes(module, average, [optimizer])
    values, scales = codes_of(module[0])
    assert torch.equal(values, wanted)
    assert torch.equal(fake_quantize(module[0].weight, encoding), module[0].weight)
    assert module[0].weight not in optimizer.state
    dense = module[1].weight.clone()
    learn(30, True)
    after, learned = codes_of(module[0])
    assert torch.equal(after, values)
    assert float((learned / scales - 1).abs().mean()) > 0.01
    assert not torch.equal(module[1].weight, dense)
    average.install()
    assert torch.equal(codes_of(module[0])[0], values)


@pytest.mark.parametrize("encoding", ["ternary", "binary"])
def test_a_scale_that_learns_towards_zero_turns_no_code(encoding):
    torch.manual_seed(0)
    module = nn.Sequential(FakeQuantLinear(128, 8, encoding))
    average, optimizer = Average(module, 0.9), torch.optim.SGD(module.parameters(), 300.0)
    freeze_codes(module, average, [optimizer])
    values, wanted = codes_of(module[0])[0].clone(), -module[0].weight.detach().clone()  # all signs the other way
    for _ in range(20):
        (module[0].weight - wanted).square().mean().backward()
        keep_codes(module)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        hold_signs(module, average)
        average.update()
    assert torch.equal(codes_of(module[0])[0], values)
    average.install()
    assert torch.equal(codes_of(module[0])[0], values)


def test_the_log_tells_flips_zeros_and_scales(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(FakeQuantLinear(128, 4, "ternary"))
    monitor = Monitor(tmp_path / "run" / "a.jsonl", module, ALONE, 0)
    codes = codes_of(module[0])[0]
    first = monitor.look(step=0, errors=[1.0, 2.0])
    assert first["flips"] is None
    assert first["zeros"] == pytest.approx(float((codes == 0).float().mean()))
    with torch.no_grad():
        module[0].weight[0] *= -2
    second = monitor.look(step=1, errors=[0.5, 1.0])
    assert second["flips"] == second["moved"] == pytest.approx(int((codes[0] != 0).sum()) / 512)
    assert 1.1 < second["scale"] < 1.5
    with torch.no_grad():
        module[0].weight.zero_()
    assert monitor.look(step=2, errors=[0.5, 1.0])["dead"] == 1.0
    assert [line["step"] for line in read_lines(monitor.file)] == [0, 1, 2]
    with monitor.file.open("a") as file:
        file.write('{"step": 3, "er')  # a kill while it wrote
    again = Monitor(monitor.file, module, ALONE, 2)
    assert [line["step"] for line in read_lines(again.file)] == [0, 1]
    assert again.look(step=2, errors=[0.1, 0.1])["moved"] is None
    assert plot(again.file, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().lstrip().startswith("<?xml")


def test_a_layer_without_gradient_is_told(tmp_path):
    learning, still = FakeQuantLinear(128, 4, "binary"), FakeQuantLinear(128, 4, "ternary")
    module = nn.Sequential(learning, nn.Linear(4, 4), still)
    learning(torch.randn(2, 128)).sum().backward()
    still.weight.grad = torch.zeros_like(still.weight)
    with pytest.raises(KernelError, match=r"1 quantized layers get no gradient .* 2 among them; torch .* another"):
        require_gradients(module)
    still.weight.grad[0, 0] = 1e-9
    require_gradients(module)


def test_numbers_survive_to_the_last_digit(tmp_path):
    value = {"a": [0.1 + 0.2, 1e-17], "b": None}
    assert from_json(to_json(value)) == value
    module = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    snapshot = Snapshot(tmp_path, module, Average(module, 0.9), [optimizer], ALONE)
    assert snapshot.restore() == (0, {})
    snapshot.save(3, {"x": torch.tensor([True, False])})
    drawn = torch.randn(3)
    step, own = snapshot.restore()
    snapshot.restore_random(own)
    assert step == 3
    assert own["x"].tolist() == [True, False]
    assert torch.equal(torch.randn(3), drawn)
    snapshot.save(6, {})
    assert [path.name for path in (tmp_path / "state").glob("step.*")] == ["step.6"]


@pytest.fixture(scope="module", params=["normalized", "balanced"])
def begun(request, tmp_path_factory) -> Path:
    """A run folder with an untrained teacher, and a recipe with every option on, with either loss that remembers."""
    root = tmp_path_factory.mktemp("qat")
    file = write_recipe(root)
    text = file.read_text().replace("[ternary]\ncalibrate = 8\npixels = 0.9\nsteps = 6\nbatch = 4", "\n".join((
        "[ternary]", "steps = 14", "batch = 8", "pixels = 0.9", f'loss = "{request.param}"', "contrast = 0.25",
        "critic = 0.5", "freeze = 0.3", "residual = 0.5", "anneal = 0.3", "accumulate = 2", "save_every = 3",
        "sheet_every = 6")))
    assert "contrast" in text
    file.write_text(text.replace("[path]", "[path]\njitter = 0.5"))
    recipe, run = Recipe.from_file(file), root / "run"
    torch.manual_seed(0)
    painter = Painter(recipe)
    nn.init.normal_(painter.transformer.proj_out.weight, std=0.1)
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        nn.init.normal_(painter.transformer.get_submodule(name).linear.weight, std=0.1)
    make_tokenizer(recipe, run / "tokenizer")
    painter.save(run / "teacher")
    (run / "vae").mkdir()
    from linocut.models.autoencoder import Autoencoder
    save_weights(run / "vae", Autoencoder(replace(recipe.autoencoder, preview=True)).state_dict(), "F32")
    load_vae(recipe, run, CPU)
    return root


def start(begun: Path, out: Path) -> None:
    import shutil
    shutil.copytree(begun / "run", out)


def weights(folder: Path) -> dict[str, np.ndarray]:
    with Checkpoint.open(folder) as checkpoint:
        return {name: checkpoint.array(name).copy() for name in checkpoint.names}


def test_a_run_that_was_cut_ends_with_the_very_same_weights(begun, tmp_path, monkeypatch):
    recipe = Recipe.from_file(begun / "recipe.toml")
    start(begun, tmp_path / "a")
    start(begun, tmp_path / "b")
    run_stage("ternary", recipe, tmp_path / "a", tmp_path, "cpu")
    update, calls = Average.update, []

    def cut(average: Average) -> None:
        calls.append(1)
        if len(calls) in (6, 12):
            raise KeyboardInterrupt
        update(average)

    monkeypatch.setattr(Average, "update", cut)
    for _ in range(2):  # once before the endgame, once in it
        with pytest.raises(KeyboardInterrupt):
            run_stage("ternary", recipe, tmp_path / "b", tmp_path, "cpu")
    monkeypatch.undo()
    run_stage("ternary", recipe, tmp_path / "b", tmp_path, "cpu")
    straight, again = weights(tmp_path / "a" / "ternary"), weights(tmp_path / "b" / "ternary")
    assert straight.keys() == again.keys()
    assert all(np.array_equal(straight[name], again[name]) for name in straight)
    lines = read_lines(tmp_path / "a" / "ternary.jsonl")
    assert [line["step"] for line in lines] == [0, 5, 10, 13]
    assert [line["frozen"] for line in lines] == [False, False, True, True]
    assert lines[-1]["flips"] == 0.0 < lines[1]["flips"]
    assert lines[0]["sensitivity"] > 0
    assert 0.0 not in [line["margin"] for line in lines]
    assert {line["step"] for line in read_lines(tmp_path / "b" / "ternary.jsonl")} == {0, 5, 10, 13}
    assert (tmp_path / "a" / "ternary.6.png").is_file()
    assert (tmp_path / "a" / "ternary.svg").is_file()
    assert any(not np.array_equal(value, weights(begun / "run" / "teacher")[name]) for name, value in straight.items()
               if name.endswith("norm_q.weight"))  # norms learn too


@pytest.mark.slow
def test_kills_change_nothing_in_the_end(begun, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    for out in ("a", "b"):
        start(begun, tmp_path / out)

    def command(out: str) -> list[str]:
        return [sys.executable, "-m", "linocut", "train", str(begun / "recipe.toml"), "--out", str(tmp_path / out),
                "--stage", "ternary", "--device", "cpu"]

    subprocess.run(command("a"), check=True, env=environment, stdout=subprocess.DEVNULL)
    kills, state = 0, tmp_path / "b" / "ternary" / "state" / "current.json"
    for wanted in (3, 9, None):
        process = subprocess.Popen(command("b"), env=environment, stdout=subprocess.DEVNULL)
        while wanted is not None and process.poll() is None:
            if state.exists() and json.loads(state.read_text())["step"] > wanted:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.wait(timeout=300)
    assert kills == 2
    straight, again = weights(tmp_path / "a" / "ternary"), weights(tmp_path / "b" / "ternary")
    assert all(np.array_equal(straight[name], again[name]) for name in straight)


@pytest.mark.parametrize("wrong", [{"loss": "huber"}, {"freeze": 1.0}, {"accumulate": 0}, {"contrast": -1.0},
                                   {"critic": 1.5}, {"tasks": {"portraits": 1.0}}, {"tasks": 1.0},
                                   {"tasks": {"counting": 0.0}}, {"tasks": {"counting": -0.5, "position": 1.0}},
                                   {"tasks": {"counting": "1"}}, {"tasks": {"counting": True}},
                                   {"tasks": {"counting": math.inf}}, {"tasks": {"counting": math.nan}}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        QatSettings(**wrong)
