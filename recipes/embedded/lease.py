"""Trains the embedded model on machines that are lent for minutes: by the clock, in the background, results in parts.

    python recipes/embedded/lease.py start --budget 1600             # returns at once, training goes on
    python recipes/embedded/lease.py watch --seconds 560 --home OUT  # waits, says how it stands, fills OUT with results
    python recipes/embedded/lease.py join FOLDER --out runs/embedded # at home: parts become a run folder again

`start` copies the code away and begins the stages with one process per GPU (`--devices`): autoencoder, teacher, then
both students side by side, export, judging. The steps of each stage end at a time counted from the start, whatever
came before. Beside the first stage a rehearsal runs all of them for a few steps, so that mistakes show in the first
minutes and everything is compiled by the time it counts. A stage that breaks is run once more from its saved state;
another `start` goes on with what is not done. `watch` returns early when something fails. A machine that goes back
when it idles takes everything with it: call `watch` again at once, and take the teacher home as soon as it is packed.
It all needs nothing but Python's library, and can be tried without a GPU:

    python recipes/embedded/lease.py start --recipe recipes/tiny-cpu.toml --device cpu --budget 200 --root /tmp/try

With `--study` the teacher's students are the arms of a study, as many as there is time for; they are judged at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path("/tmp/lease")
RECIPE = "recipes/embedded/recipe.toml"
PART_BYTES, HOME_BYTES, HOME_FILES = 15 * 2**20, 62 * 10**6, 8  # of one result file, and of all that come home at once
GRACE = 45.0  # seconds after its steps in which a stage measures, draws and saves
ENDING = 270.0  # seconds that students leave at the end to be packed and judged; what is judged last may be cut
PROMPTS = 2500  # four pictures of each, so that a difference of half a point shows
STUDENTS = ("ternary", "binary")


@dataclass(frozen=True)
class Plan:
    """When the steps of the stages end, in seconds since the start, and how the stages are run."""

    recipe: str
    device: str
    devices: int
    budget: float
    vae: float
    teacher: float
    students: float
    study: str = ""
    only: str = ""

    @classmethod
    def make(cls, recipe: str, device: str, devices: int, budget: float, vae: float | None = None,
             distil: float | None = None, study: str = "", only: str = "") -> Plan:
        """Shares of a budget: the autoencoder has `vae` seconds or few, the students `distil` or a third, and the
        teacher what is left."""
        students = budget - min(ENDING, 0.17 * budget)
        vae = min(95.0, 0.2 * budget) if vae is None else vae
        return cls(recipe, device, devices, budget, vae, students - (distil or 0.334 * budget), students, study, only)


@dataclass(frozen=True)
class Task:
    """One process."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)


class Conductor:
    """Runs the stages one after another, in a process of its own that outlives whoever started it."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.logs = root, root / "run", root / "logs"
        self.plan = Plan(**json.loads((root / "plan.json").read_text()))
        self.started = float((root / "started").read_text())
        self.port = 29500 + os.getpid() % 400

    def conduct(self) -> None:
        plan = self.plan
        # With a teacher at hand the students are next, and show their mistakes as soon as a rehearsal would.
        if not (self.root / "rehearsal").exists() and not self.finished("teacher") and not plan.study:
            threading.Thread(target=self.rehearse, daemon=True).start()
        done = self.folder / "vae.done"
        if not done.exists() and self.attempt("vae", plan.vae, self.together("vae", plan.vae)):
            done.touch()
            self.pack("vae", "vae")
        if not self.finished("teacher"):
            if not self.attempt("teacher", plan.teacher, self.together("teacher", plan.teacher)):
                self.say("all done: nothing can follow without a teacher")
                return
            threading.Thread(target=self.pack_teacher).start()  # the students need not wait for it
        if plan.study:
            self.study()
            return
        todo = [name for name in STUDENTS if not self.finished(name) and plan.only in ("", name)]
        if len(todo) == 1:
            self.attempt("students", plan.students, self.together(todo[0], plan.students))
        else:
            self.attempt("students", plan.students, [self.task(name, plan.students, rank) for rank, name in
                                                     enumerate(todo)], apart=True)
        if self.attempt("export", plan.budget, [self.task("export", plan.budget)]):
            self.pack("model", "model", *self.files(*(f"{name}.*" for name in STUDENTS)))
        many = ["-n", str(PROMPTS), "--shards", "3"] if plan.device == "cuda" else []
        self.judge("students.py", plan.recipe, "--run", str(self.folder), *many)
        self.pack("judged", *self.files("judged/*-*/**/*"))
        if plan.device == "cuda" and all(map(self.finished, STUDENTS)):
            models = [str(self.folder / "judged" / "models" / name) for name in STUDENTS]
            self.judge("gpu_loss.py", "--out", str(self.folder / "loss"), "-n", "300", "--models", *models)
            self.pack("loss", *self.files("loss/table.json", "loss/*/*.json*", "loss/*/*/results*.jsonl"))
        for name in filter(self.finished, STUDENTS):
            self.pack(name, self.slim(name))
        self.say("all done")

    def study(self) -> None:
        """Arms one after another, as long as there is time, each packed as it ends; then they are judged."""
        plan = self.plan
        common = [plan.study, "--run", str(self.folder)]
        train = [sys.executable, "-m", "linocut.train.study", *common, "--device", plan.device]
        out = ["--out", str(self.folder / "study")]
        if plan.device == "cuda":  # what is compiled for the first arm is there for all others, and counts for none
            arm = next(iter(tomllib.loads((self.root / "code" / plan.study).read_text())["arms"]))
            warm = ["--out", str(self.root / "rehearsal"), "--arm", arm, "--encoding", "ternary", "--seconds", "60"]
            self.attempt("rehearsal", plan.students,
                         [Task("rehearsal", [*train, *warm], {"CUDA_VISIBLE_DEVICES": "0"})])
        over = threading.Event()
        packing = threading.Thread(target=self.pack_arms, args=(over,), daemon=True)
        packing.start()
        self.attempt("study", plan.students, [Task("study", [
            *train, *out, "--devices", str(plan.devices), "--until", str(self.started + plan.students)])])
        self.judge("quality.py", *common, *out)
        over.set()  # not before: an arm may be late
        packing.join()
        self.pack("judged", *self.files("study/*", "study/judged*/**/*"))
        self.say("all done")

    def pack_arms(self, over: threading.Event) -> None:
        """Each arm and encoding as its report is there, until all is over: no latent weights, and what models share
        (`benchmarks/quality.py` completes the others) of one of them."""
        try:
            last = False
            while not last:
                last = over.wait(1.0)
                for report in sorted(self.folder.glob("study/*/*.report.json")):
                    arm, encoding = report.parent.name, report.name.partition(".")[0]
                    name = f"arm-{arm}-{encoding}"
                    if not (self.root / "parts" / f"{name}.tar.00").exists():
                        part = "transformer" if any(self.root.glob("parts/arm-*")) else "**"
                        self.pack(name, *self.files(f"study/{arm}/{encoding}.*",
                                                    f"study/{arm}/model-{encoding}/{part}/*"))
        except OSError as error:
            self.say(f"packing FAILED: {error}")

    def judge(self, script: str, *arguments: str) -> None:
        plan = self.plan
        command = [sys.executable, f"benchmarks/{script}", *arguments]
        command += ["--at-once", str(8 * plan.devices)] if plan.device == "cuda" else ["--device", "cpu", "-n", "6"]
        gpus = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(plan.devices)))}
        self.attempt("judging", plan.budget, [Task("judging", command, gpus)])

    def files(self, *patterns: str) -> list[str]:
        """Paths in the run folder of all files that patterns find."""
        found = {path for pattern in patterns for path in self.folder.glob(pattern) if path.is_file()}
        return [str(path.relative_to(self.folder)) for path in sorted(found)]

    def pack_teacher(self) -> None:
        self.pack("teacher", "tokenizer", "teacher.png", self.slim("teacher", eight_bits=True))

    def rehearse(self) -> None:
        """Every stage for a few steps, beside the first one that counts; an autoencoder that is there is taken."""
        late = self.plan.vae + max(60.0, 0.15 * self.plan.budget)
        if self.finished("vae"):
            shutil.copytree(self.folder / "vae", self.root / "rehearsal" / "vae", dirs_exist_ok=True)
            ended = []
        else:
            ended = [self.run(self.together("vae", late, rehearse=True), late)]
        ended.append(self.run(self.together("teacher", late, rehearse=True), late))
        if not any(ended[-1]):
            ended.append(self.run([self.task(name, late, rank, rehearse=True) for rank, name in enumerate(STUDENTS)],
                                  late, apart=True))
            ended.append(self.run([self.task("export", late, rehearse=True)], late))
        self.say(f"rehearsal {'FAILED' if any(map(any, ended)) else 'done'}, exit codes {ended}")

    # ---- processes ----------------------------------------------------------------------------------------------

    def task(self, stage: str, until: float, device: int = 0, rehearse: bool = False,
             env: dict[str, str] | None = None) -> Task:
        plan = self.plan
        out = self.root / "rehearsal" if rehearse else self.folder
        command = [sys.executable, "-X", "faulthandler", "-m", "linocut.train.stages", plan.recipe, "--out", str(out),
                   "--sprites", "sprites", "--stage", stage, "--until", str(self.started + until)]
        if rehearse:
            command.append("--rehearse")
        if plan.device == "cpu":
            command += ["--device", "cpu"]
        chosen = env or {"CUDA_VISIBLE_DEVICES": str(device % plan.devices)}
        return Task(f"{'rehearsal.' if rehearse else ''}{stage}.{chosen.get('RANK', 0)}", command, chosen)

    def together(self, stage: str, until: float, rehearse: bool = False) -> list[Task]:
        """One process per device, which work on the same thing."""
        self.port += 7  # a port may stay taken for a while
        world, port = self.plan.devices, str(self.port)
        if world == 1:
            return [self.task(stage, until, 0, rehearse)]
        return [self.task(stage, until, 0, rehearse, {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "RANK": str(rank),
            "LOCAL_RANK": str(rank)}) for rank in range(world)]

    def attempt(self, name: str, until: float, tasks: list[Task], apart: bool = False) -> bool:
        """Run tasks, and those that break once more, from their saved states. Whether all came to a good end."""
        for _ in range(2):
            codes = self.run(tasks, until, apart)
            self.say(f"{name} {'FAILED' if any(codes) else 'done'}, exit codes {codes}")
            if not any(codes):
                return True
            tasks = [task for task, code in zip(tasks, codes, strict=True) if code] if apart else tasks
        return False

    def run(self, tasks: Sequence[Task], until: float, apart: bool = False) -> list[int]:
        """Exit codes of tasks side by side. Late ones are asked to end in order, then killed; unless they are `apart`,
        one that breaks ends its fellows, who would wait for it."""
        begun = []
        for task in tasks:
            env = {"PYTHONPATH": "src", "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": str(self.root / "inductor"),
                   "OMP_NUM_THREADS": "1" if self.plan.device == "cpu" else "8"}
            with (self.logs / f"{task.name}.log").open("ab") as log:
                begun.append(subprocess.Popen(task.command, cwd=self.root / "code", stdout=log,
                                              stderr=subprocess.STDOUT, env=os.environ | env | task.env))
        asked: float | None = None
        while any(process.poll() is None for process in begun):
            now = time.time() - self.started
            if (not apart and any(process.poll() for process in begun)) or (asked is not None and now > asked + 20):
                self.signal(begun, signal.SIGKILL)
            elif asked is None and now > until + GRACE:
                asked = now
                self.signal(begun, signal.SIGTERM)
            time.sleep(0.2)
        return [process.wait() for process in begun]

    def signal(self, begun: Sequence[subprocess.Popen[bytes]], number: int) -> None:
        for process in begun:
            if process.poll() is None:
                process.send_signal(number)

    # ---- results ------------------------------------------------------------------------------------------------

    def finished(self, stage: str) -> bool:
        return (self.folder / stage / "model.safetensors").is_file()

    def slim(self, stage: str, eight_bits: bool = False) -> str:
        """Write a stage's weights in half the bytes or a quarter, for the way home. Returns the folder."""
        code = ("import sys; from pathlib import Path; from linocut.train.weights import slim; "
                f"slim(Path(sys.argv[1]), Path(sys.argv[2]), {eight_bits})")
        target = f"slim/{stage}"
        self.run([Task(f"slim.{stage}", [sys.executable, "-c", code, str(self.folder / stage),
                                         str(self.folder / target)])], self.plan.budget)
        return target

    def pack(self, name: str, *paths: str) -> None:
        """Put results, and the logs so far, into numbered parts that `watch` takes home."""
        parts = self.root / "parts"
        whole = parts / f"{name}.tar"
        with tarfile.open(whole, "w") as archive:
            for path in paths:
                if (self.folder / path).exists():
                    archive.add(self.folder / path, path.removeprefix("slim/"))
            archive.add(self.logs, "logs")
        with whole.open("rb") as source:
            for number in range(-(-whole.stat().st_size // PART_BYTES)):
                (parts / f"{name}.{number:02d}.partial").write_bytes(source.read(PART_BYTES))
                (parts / f"{name}.{number:02d}.partial").rename(parts / f"{name}.tar.{number:02d}")
        whole.unlink()
        self.say(f"packed {name}")

    def say(self, text: str) -> None:
        with (self.logs / "events.log").open("a") as log:
            log.write(f"{time.time() - self.started:5.0f} s  {text}\n")


def start(options: argparse.Namespace) -> None:
    """Copy the code away, write the plan, and leave a conductor behind."""
    root: Path = options.root
    running = root / "conductor"
    if running.exists() and Path(f"/proc/{running.read_text()}").exists():
        sys.exit(f"{root}: a plan is running already; stop process {running.read_text()} first")
    for folder in ("logs", "parts", "run"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    shutil.rmtree(root / "code", ignore_errors=True)
    unneeded = shutil.ignore_patterns("studio", "__pycache__", "*.so")
    shutil.copytree("src/linocut", root / "code" / "src" / "linocut", ignore=unneeded)
    for folder in ("recipes", "benchmarks"):
        shutil.copytree(folder, root / "code" / folder, ignore=unneeded)
    shutil.copytree(options.sprites, root / "code" / "sprites")
    run = root / "run"
    if options.have:
        shutil.copytree(options.have, run, dirs_exist_ok=True)
        (run / "vae.done").touch()
    vae = 0.0 if (run / "vae.done").exists() else options.vae
    (root / "plan.json").write_text(json.dumps(asdict(Plan.make(options.recipe, options.device, options.devices,
                                                                options.budget, vae, options.distil, options.study,
                                                                options.only))))
    (root / "started").write_text(str(time.time()))
    with (root / "logs" / "conductor.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, __file__, "conduct", "--root", str(root)], stdin=subprocess.DEVNULL,
                                   stdout=log, stderr=log, start_new_session=True)
    running.write_text(str(process.pid))
    print((root / "plan.json").read_text())


def watch(options: argparse.Namespace) -> None:
    """Wait until the plan is over, something failed or the seconds have passed; tell, and take results home."""
    root: Path = options.root
    end, events = time.time() + options.seconds, root / "logs" / "events.log"
    before = events.read_text().count("FAILED") if events.exists() and options.patient else 0
    while time.time() < end:
        said = events.read_text() if events.exists() else ""
        if "all done" in said or said.count("FAILED") > before or (options.until and options.until in said):
            break
        time.sleep(0.5)
    logs = sorted(root.glob("logs/*.log"), key=lambda path: (path == events, path.stat().st_mtime))
    for log in logs[-7:]:
        lines = log.read_text(errors="replace").splitlines()
        print(f"== {log.name}", *(line[:160] for line in lines[-(30 if log == events else 8):]), sep="\n")
    if options.home:
        take_home(root, options.home)


def take_home(root: Path, target: Path) -> None:
    """Copy parts that were not taken yet, models first, as many as may come home at once."""
    target.mkdir(parents=True, exist_ok=True)
    taken = root / "taken"
    seen = set(taken.read_text().split()) if taken.exists() else set()
    order = ("model", "judged", "loss", "vae", "teacher", *STUDENTS)  # and before all of them a study's arms
    rank = dict(zip(order, range(len(order)), strict=True))
    parts = sorted((path for path in (root / "parts").glob("*.tar.*") if path.name not in seen),
                   key=lambda path: (rank.get(path.name.split(".")[0], -1), path.name))
    room, count = HOME_BYTES, HOME_FILES
    for path in parts:
        if path.stat().st_size <= room and count:
            shutil.copy(path, target / path.name)
            seen.add(path.name)
            room, count = room - path.stat().st_size, count - 1
            print(f"home: {path.name} ({path.stat().st_size / 1e6:.1f} MB)")
    taken.write_text(" ".join(sorted(seen)))
    left = sum(path.stat().st_size for path in parts if path.name not in seen)
    print(f"still to take home: {left / 1e6:.1f} MB")


def join(options: argparse.Namespace) -> None:
    """Make a run folder of all complete results in a folder of parts."""
    for name in sorted({path.name.split(".")[0] for path in options.folder.glob("*.tar.*")}):
        whole = options.folder / f"{name}.whole"
        with whole.open("wb") as target:
            for part in sorted(options.folder.glob(f"{name}.tar.*")):
                target.write(part.read_bytes())
        with tarfile.open(whole) as archive:
            archive.extractall(options.out, filter="data")
        whole.unlink()
        print(f"{name} in {options.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("start", "watch", "join", "conduct"):
        each = commands.add_parser(name)
        each.add_argument("--root", type=Path, default=ROOT)
        if name == "start":
            each.add_argument("--recipe", default=RECIPE)
            each.add_argument("--sprites", type=Path, default=Path(".cache/sprites"))
            each.add_argument("--have", type=Path, help="run folder with results to keep: vae, perhaps tokenizer and "
                                                        "teacher")
            each.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
            each.add_argument("--devices", type=int, default=2)
            each.add_argument("--budget", type=float, default=1500, help="seconds from now until all is packed")
            each.add_argument("--vae", type=float, help="seconds of them for the autoencoder")
            each.add_argument("--distil", type=float, help="seconds of them for the students")
            each.add_argument("--study", default="", help="train this study's arms instead of students")
            each.add_argument("--only", choices=STUDENTS, default="", help="a student to train alone, on all GPUs")
        elif name == "watch":
            each.add_argument("--seconds", type=float, default=560)
            each.add_argument("--home", type=Path, help="folder for results")
            each.add_argument("--until", help="return as soon as the events hold this text, such as 'packed teacher'")
            each.add_argument("--patient", action="store_true", help="do not return for failures of before")
        elif name == "join":
            each.add_argument("folder", type=Path)
            each.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "conduct":
        conductor = Conductor(options.root)
        try:
            conductor.conduct()
        except BaseException as error:
            conductor.say(f"the plan itself FAILED: {error!r}")
            raise
    else:
        {"start": start, "watch": watch, "join": join}[options.command](options)


if __name__ == "__main__":
    main()
