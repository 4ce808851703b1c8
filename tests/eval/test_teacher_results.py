"""The teacher's verdicts in the repository: whole, of the test prompts, and what the documents say of them."""

from pathlib import Path

import numpy as np
import pytest

from linocut.eval.report import gather
from linocut.eval.rules import GENEVAL_TASKS
from linocut.eval.run import read_results
from linocut.eval.statistics import score
from linocut.train.prompts import sample_prompts

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("size", "images"), [("256x256", 4), ("320x192", 1)])
def test_retention_can_be_told_without_the_teacher(size, images):
    prompts = sample_prompts("test", 553)
    name = "teacher-4-steps" + ("" if size == "256x256" else f"-{size}")
    file = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
    correct = gather(read_results(file), prompts, images, file.stem).correct  # complains of any that is missing
    tasks = np.array([GENEVAL_TASKS.index(prompt["tag"]) for prompt in prompts])
    found = 100 * float(score(correct.mean(1, keepdims=True), tasks)[0])
    document = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    row = next(line for line in document.splitlines() if line.startswith(f"| {size} | teacher | 4 |"))
    assert f"**{found:.2f}**" in row
