"""Many runs of `linocut eval geneval`, several at a time, each a process of its own with a folder and a log; and what
came out of them."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from linocut.eval.prompts import read_prompts
from linocut.eval.report import gather
from linocut.eval.rules import GENEVAL_TASKS
from linocut.eval.run import PROMPTS, results


@dataclass(frozen=True)
class Judging:
    """One run: the command's arguments after `--out FOLDER`, what it finds in its environment, and which shard of the
    prompts is its part."""

    folder: Path
    arguments: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    shard: str = "0/1"

    @property
    def log(self) -> Path:
        """Where the run tells what it does."""
        return self.folder.with_name(f"{self.folder.name}.{self.shard.partition('/')[0]}.log")


def judge(runs: Sequence[Judging], at_once: int) -> None:
    """All of them, those on "cuda" spread over the GPUs; one that was cut goes on.

    Raises SystemExit with the end of what a process said that failed.
    """
    waiting, places = list(runs), gpus()
    running: list[tuple[Judging, subprocess.Popen[bytes], str | None]] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                run = waiting.pop(0)
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, "-m", "linocut", "eval", "geneval", "--out", str(run.folder),
                           "--shard", run.shard, *run.arguments]
                place = min(places, key=[taken for *_, taken in running].count) if "cuda" in run.arguments else None
                with run.log.open("wb") as log:
                    here = {} if place is None else {"CUDA_VISIBLE_DEVICES": place}
                    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                               env=os.environ | here | run.environment)
                running.append((run, process, place))
            for each in list(running):
                run, process, _ = each
                if process.poll() is not None:
                    running.remove(each)
                    print(f"{run.folder.name}, shard {run.shard}: exit code {process.returncode}", flush=True)
                    if process.returncode:
                        raise SystemExit(run.log.read_text(errors="replace")[-2000:])
            time.sleep(0.2)
    finally:
        for _, process, _ in running:
            process.terminate()


def gpus() -> list[str]:
    """The GPUs of this process by the names that CUDA_VISIBLE_DEVICES has for them; one empty name for none."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())] or [""]


def outcomes(folder: Path, label: str, images: int, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Of a run, or its first `count` prompts: which pictures are right, bool [prompts, images], and each prompt's task
    as its number in `GENEVAL_TASKS`, int [prompts]. Raises UsageError where any is not judged yet."""
    prompts = read_prompts(folder / PROMPTS)[:count]
    tasks = np.array([GENEVAL_TASKS.index(prompt["tag"]) for prompt in prompts])
    return gather(results(folder, label), prompts, images, label).correct, tasks
