"""`max_memory` is a promise: what is measured stays within the plan, and the plan within the limit.

At several sizes, for the embedded model and one of some 200 million weights, in the quickest and in the smallest way
that there is, with blocks fused in C++ and layer by layer. Each picture is drawn in a process of its own.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_dense import TINY

from linocut.models.flux2 import Flux2Config
from linocut.models.synthetic import write_synthetic

_DRAW = """
import json, sys
import torch
from linocut.pipeline import budget, memory
from linocut.pipeline.generate import Pipeline

torch.set_num_threads(1)
model, width, height, way = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
pipe = Pipeline.from_pretrained(model, prompt_cache=False)
pipe("warm up", seed=1, width=32, height=32, num_inference_steps=1)
pipe.close()
base = memory.BASE_BYTES = memory.resident_bytes()  # libraries have begun, so all that comes is the picture's
planner = pipe._planner
usual = planner.plan(width, height, base=base)
if way == "smallest":
    least = budget._fit(planner, width, height, usual.ways, 1, True, {"base": base})
    pipe.max_memory = least.peak + 2_000_000  # what the process may hold by then beside `base`
plan = pipe.plan(width, height)
timings = pipe("a red apple", seed=1, width=width, height=height, num_inference_steps=2).timings
print(json.dumps({"fused": planner._fused, "limit": pipe.max_memory, "usual": usual.peak, "plan": plan.peak,
                  "phases": {p.name: [timings[p.name]["peak_rss"] - base, p.peak - base] for p in plan.phases}}))
"""
SIZES = [(256, 256), (512, 512), (832, 480)]


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ternary model of 3 double and 8 single blocks, 1024 wide."""
    folder = tmp_path_factory.mktemp("promise") / "model"
    text = replace(TINY.text_encoder, hidden_size=512, intermediate_size=1536, num_hidden_layers=9)
    transformer = Flux2Config(in_channels=64, num_layers=3, num_single_layers=8, num_attention_heads=8,
                              joint_attention_dim=3 * 512)
    vae = replace(TINY.vae, block_out_channels=(64, 128, 256, 256))
    write_synthetic(folder, replace(TINY, transformer=transformer, text_encoder=text, vae=vae, text_taps=(3, 6, 9),
                                    text_length=256), "ternary")
    return folder


def _check(model: Path | str, size: tuple[int, int], way: str, kernel: str) -> None:
    done = subprocess.run([sys.executable, "-c", _DRAW, str(model), *map(str, size), way], capture_output=True,
                          text=True, env=os.environ | {"LINOCUT_KERNEL": kernel}, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fused"] == (kernel == "auto")
    for name, (measured, planned) in found["phases"].items():
        assert measured <= planned, name
    if way == "smallest":
        assert found["plan"] <= found["limit"]
        assert found["plan"] < found["usual"]


def test_the_smallest_way_of_the_embedded_model_keeps_to_its_plan() -> None:
    _check("embedded", (256, 256), "smallest", "auto")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["auto", "native"])
@pytest.mark.parametrize(("size", "way"), list(itertools.product(SIZES, ["usual", "smallest"])))
def test_every_plan_of_the_embedded_model_is_kept(size: tuple[int, int], way: str, kernel: str) -> None:
    _check("embedded", size, way, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["auto", "native"])
@pytest.mark.parametrize(("size", "way"), list(itertools.product(SIZES, ["usual", "smallest"])))
def test_every_plan_of_a_middling_model_is_kept(middling: Path, size: tuple[int, int], way: str, kernel: str) -> None:
    _check(middling, size, way, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["usual", "smallest"])
def test_a_guided_picture_keeps_to_its_plan(middling: Path, tmp_path: Path, way: str) -> None:
    """It reads two prompts, the empty one after the first block of the other, and so needs what embeds them twice."""
    shutil.copytree(middling, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": False}))
    _check(tmp_path / "model", (256, 256), way, "auto")
