"""The script for lent machines: its plan, the way home of results, and the whole of it at toy size without a GPU."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_recipe import ROOT, write_recipe, write_sprites

SCRIPT = ROOT / "recipes" / "embedded" / "lease.py"
spec = importlib.util.spec_from_file_location("lease", SCRIPT)
lease = importlib.util.module_from_spec(spec)
sys.modules["lease"] = lease
spec.loader.exec_module(lease)


@pytest.mark.parametrize("budget", [200, 1200, 1500, 1700])
def test_plans_leave_time_for_everything(budget):
    plan = lease.Plan.make("recipe.toml", "cuda", 2, budget)
    assert 0 < plan.vae < plan.teacher < plan.students < budget
    if budget >= 1200:
        assert plan.vae >= 90
        assert plan.teacher - plan.vae >= 500
        assert plan.students - plan.teacher >= 400
        assert budget - plan.students >= 70
    assert lease.Plan.make("recipe.toml", "cuda", 2, budget, vae=300).vae == 300


def conductor(root: Path) -> "lease.Conductor":
    for folder in ("logs", "parts", "run/model", "run/slim/teacher", "code"):
        (root / folder).mkdir(parents=True)
    plan = lease.Plan.make("recipe.toml", "cpu", 2, 200)
    (root / "plan.json").write_text(lease.json.dumps(lease.asdict(plan)))
    (root / "started").write_text(str(time.time()))
    return lease.Conductor(root)


@pytest.mark.parametrize("teacher", [False, True])
def test_with_a_teacher_at_hand_the_students_come_first(tmp_path, monkeypatch, teacher):
    made, ran = conductor(tmp_path), []
    monkeypatch.setattr(made, "attempt", lambda name, *_, **__: ran.append(name))
    monkeypatch.setattr(made, "rehearse", lambda: ran.append("rehearsal"))
    monkeypatch.setattr(lease.threading, "Thread", lambda target, **_: type("Now", (), {"start": lambda _: target()})())
    made.folder.joinpath("vae.done").touch()
    if teacher:
        made.folder.joinpath("teacher").mkdir()
        made.folder.joinpath("teacher", "model.safetensors").touch()
    made.conduct()
    assert ran == (["students", "export", "judging"] if teacher else ["rehearsal", "teacher"])


def test_one_student_alone_has_all_devices(tmp_path, monkeypatch):
    made, ran = conductor(tmp_path), []
    made.plan = lease.Plan.make("recipe.toml", "cuda", 2, 1600, 0.0, 950, only="binary")
    monkeypatch.setattr(made, "attempt", lambda name, until, tasks, **_: ran.append((name, tasks)))
    made.folder.joinpath("vae.done").touch()
    made.folder.joinpath("teacher").mkdir()
    made.folder.joinpath("teacher", "model.safetensors").touch()
    made.conduct()
    assert [name for name, _ in ran] == ["students", "export", "judging"]
    tasks = ran[0][1]
    assert [task.env["RANK"] for task in tasks] == ["0", "1"]
    assert all(task.command[task.command.index("--stage") + 1] == "binary" for task in tasks)


def test_what_activations_cost_is_measured_where_both_students_are_there(tmp_path, monkeypatch):
    made, ran = conductor(tmp_path), []
    made.plan = lease.Plan.make("recipe.toml", "cuda", 2, 1600, 0.0, 950)
    monkeypatch.setattr(made, "attempt", lambda name, until, tasks, **_: ran.append(tasks))
    made.folder.joinpath("vae.done").touch()
    for name in ("teacher", *lease.STUDENTS):
        made.folder.joinpath(name).mkdir()
        made.folder.joinpath(name, "model.safetensors").touch()
    made.conduct()
    judged, cost = (tasks[0].command for tasks in ran[-2:])
    assert judged[1] == "benchmarks/students.py"
    assert judged[judged.index("-n") + 1] == str(lease.PROMPTS)
    assert cost[1] == "benchmarks/gpu_loss.py"
    models = cost[cost.index("--models") + 1:][:2]
    assert models == [str(made.folder / "judged" / "models" / name) for name in lease.STUDENTS]


def test_a_study_is_trained_judged_and_packed_without_what_is_large(tmp_path, monkeypatch):
    made, ran = conductor(tmp_path), []
    made.plan = lease.Plan.make("recipe.toml", "cuda", 1, 1600, 0.0, 950, "study.toml")
    assert made.plan.teacher == 1600 - lease.ENDING - 950
    monkeypatch.setattr(made, "attempt", lambda name, *_, **__: ran.append(name) or True)
    made.folder.joinpath("vae.done").touch()
    made.root.joinpath("code", "study.toml").write_text("seconds = 1\n[arms.ours]\n[arms.usual]\n")
    for path in ("ours/binary/model.safetensors", "ours/teacher/x", "ours/model-binary/transformer/x",
                 "ours/model-binary/vae/x", "usual/model-binary/transformer/x", "usual/model-binary/vae/x",
                 "ours/binary.report.json", "usual/binary.report.json", "teacher-model/x", "usual.binary.log",
                 "judged-553/quality.json", "judged-553/ours.binary/report.json"):
        made.folder.joinpath("study", path).parent.mkdir(parents=True, exist_ok=True)
        made.folder.joinpath("study", path).write_text(path)
    made.conduct()
    assert ran == ["teacher", "rehearsal", "study", "judging"]
    lease.take_home(made.root, tmp_path / "home")
    assert {path.name for path in (tmp_path / "home").iterdir()} == {
        "arm-ours-binary.tar.00", "arm-usual-binary.tar.00", "judged.tar.00"}
    lease.join(lease.argparse.Namespace(folder=tmp_path / "home", out=tmp_path / "joined"))
    found = {path.relative_to(tmp_path / "joined" / "study").as_posix() for path in tmp_path.glob("joined/study/**/*")
             if path.is_file()}
    assert found == {"ours/model-binary/transformer/x", "ours/model-binary/vae/x", "ours/binary.report.json",
                     "usual/model-binary/transformer/x", "usual/binary.report.json", "usual.binary.log",
                     "judged-553/quality.json", "judged-553/ours.binary/report.json"}


def test_results_come_home_in_parts_and_are_joined(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lease, "PART_BYTES", 30_000)
    monkeypatch.setattr(lease, "HOME_BYTES", 130_000)
    made = conductor(tmp_path / "there")
    (made.folder / "model" / "weights").write_bytes(bytes(range(256)) * 300)
    (made.folder / "slim" / "teacher" / "model.safetensors").write_bytes(b"teacher" * 9000)
    (made.logs / "vae.0.log").write_text("learned\n")
    made.pack("teacher", "tokenizer", "slim/teacher")  # the tokenizer is not there, and is left out
    made.pack("model", "model")
    home, trips = tmp_path / "home", 0
    while trips < 5:
        lease.take_home(made.root, tmp_path / f"trip{trips}")
        taken = list((tmp_path / f"trip{trips}").iterdir())
        if not taken:
            break
        assert sum(path.stat().st_size for path in taken) <= 130_000
        assert len(taken) <= 8
        home.mkdir(exist_ok=True)
        for path in taken:
            path.rename(home / path.name)
        trips += 1
    assert trips == 2
    assert "home: model.tar.00" in capsys.readouterr().out.splitlines()[0]
    lease.join(lease.argparse.Namespace(folder=home, out=tmp_path / "run"))
    assert (tmp_path / "run" / "model" / "weights").read_bytes() == bytes(range(256)) * 300
    assert (tmp_path / "run" / "teacher" / "model.safetensors").read_bytes() == b"teacher" * 9000
    assert (tmp_path / "run" / "logs" / "vae.0.log").read_text() == "learned\n"


def python(code: str, name: str = "x") -> "lease.Task":
    return lease.Task(name, [sys.executable, "-c", code])


def test_one_that_breaks_ends_those_who_wait_for_it(tmp_path):
    made, begin = conductor(tmp_path), time.time()
    codes = made.run([python("import time; time.sleep(60)", "a"), python("raise SystemExit(3)", "b")], 100.0)
    assert codes == [-9, 3]
    assert time.time() - begin < 20
    codes = made.run([python("print('fine')", "c"), python("raise SystemExit(3)", "d")], 100.0, apart=True)
    assert codes == [0, 3]
    assert (made.logs / "c.log").read_text() == "fine\n"


def test_what_breaks_is_run_once_more(tmp_path):
    made = conductor(tmp_path)
    mark = tmp_path / "mark"
    once = f"import pathlib, sys; p = pathlib.Path({str(mark)!r}); seen = p.exists(); p.touch(); sys.exit(not seen)"
    assert made.attempt("stage", 100.0, [python(once)])
    assert not made.attempt("other", 100.0, [python("raise SystemExit(1)")])
    assert (made.logs / "events.log").read_text().count("FAILED") == 3


def test_late_ones_are_asked_to_end_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "GRACE", 1.0)
    made = conductor(tmp_path)
    code = ("import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
            "[time.sleep(0.1) for _ in range(600)]")
    assert made.run([python(code)], 1.0) == [7]


@pytest.mark.slow
def test_the_whole_plan_at_toy_size_with_two_processes(tmp_path):
    recipe, sprites, root = write_recipe(tmp_path), write_sprites(tmp_path / "sprites"), tmp_path / "lease"

    def call(*words: str) -> str:
        return subprocess.run([sys.executable, str(SCRIPT), *words, "--root", str(root)], cwd=ROOT, text=True,
                              capture_output=True, check=True, timeout=400).stdout

    call("start", "--recipe", str(recipe), "--sprites", str(sprites), "--device", "cpu", "--budget", "300")
    said = call("watch", "--seconds", "300", "--home", str(tmp_path / "home"))
    assert "all done" in said, said
    assert "rehearsal done" in said
    assert "FAILED" not in said
    call("join", str(tmp_path / "home"), "--out", str(tmp_path / "run"))
    left = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*")}
    assert {"model/model_index.json", "model/transformer/config.json", "model/transformer-binary/config.json",
            "teacher/model.safetensors", "teacher.png", "ternary.png", "binary.png", "vae/model.safetensors",
            "ternary/model.safetensors", "logs/events.log", "judged/binary-32x32-2/report.txt"} <= left
