"""Limits on memory: the quickest way within them is found and kept to; else what would fit is named."""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_dense import TINY

from linocut.cli import cli
from linocut.errors import UsageError
from linocut.formats.folder import ModelFolder
from linocut.models.flux2 import Flux2Config
from linocut.models.synthetic import write_synthetic
from linocut.pipeline import budget, memory
from linocut.pipeline.memory import Planner

MB = 10**6


@pytest.mark.parametrize(("text", "count"), [
    ("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("800mb", 800 * MB), ("12345", 12345), (7, 7), ("2g", 2 * 10**9)])
def test_amounts_of_memory(text: str | int, count: int) -> None:
    assert budget.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "-2GB", "2 GB x", "0", "0.0001kb", "1e9", "2XB", True, "9" * 400])
def test_other_words_are_no_amount_of_memory(text: str) -> None:
    with pytest.raises(UsageError, match="write it like 2GB"):
        budget.parse_bytes(text)


@pytest.fixture(scope="module")
def broad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose transformer is worth streaming: 12 blocks, 14 MB."""
    folder = tmp_path_factory.mktemp("budget") / "model"
    transformer = Flux2Config(in_channels=64, num_layers=2, num_single_layers=10, num_attention_heads=6,
                              joint_attention_dim=384)
    vae = replace(TINY.vae, block_out_channels=(8, 16, 16, 16), norm_num_groups=8)
    write_synthetic(folder, replace(TINY, transformer=transformer, vae=vae), "ternary")
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose decoder takes most."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    write_synthetic(folder, TINY, "ternary")
    return folder


def test_each_limit_is_kept_by_the_quickest_way(broad: Path) -> None:
    planner = Planner(ModelFolder.open(broad))
    free = budget.fit(planner, 1024, 1024)
    assert free.ways == planner.default_ways(1024, 1024)
    seen = []
    for limit in range(free.peak, 0, -MB):
        try:
            plan = budget.fit(planner, 1024, 1024, limit=limit)
        except UsageError:
            break
        assert plan.peak <= limit
        if plan.ways not in seen:
            seen.append(plan.ways)
    assert limit > memory.BASE_BYTES
    assert len(seen) > 3  # one step after another
    assert seen[0].keep_loaded
    assert not seen[-1].keep_loaded
    assert seen[-1].stream
    assert seen[-1].rows is not None
    for before, after in itertools.pairwise(seen):
        assert not before.stream or after.stream
        assert (after.rows or 10**6) <= (before.rows or 10**6)


def test_strips_need_a_limit_of_the_user(deep: Path) -> None:
    planner = Planner(ModelFolder.open(deep))
    dropped = replace(planner.default_ways(1024, 1024), keep_loaded=False)
    limit = planner.plan(1024, 1024, ways=dropped).peak - 20 * MB
    plan = budget.fit(planner, 1024, 1024, limit=limit)
    assert plan.ways.tile is not None
    assert plan.peak <= limit
    with pytest.raises(UsageError, match=r"are free; --max-memory \d+MB would draw it in strips; --size"):
        budget.fit(planner, 1024, 1024, free=limit)
    assert budget.fit(planner, 1024, 1024, free=limit, limit=10**12).ways.tile == plan.ways.tile


def test_a_refusal_names_what_would_fit(broad: Path) -> None:
    planner = Planner(ModelFolder.open(broad))
    with pytest.raises(UsageError, match=r"2048x1024 with model would need .* while (en|de)\w+ing, and --max-memory "
                                         r"allows 500 MB; --size (\d+)x(\d+) would fit") as caught:
        budget.fit(planner, 2048, 1024, limit=500 * MB)
    width, height = map(int, re.findall(r"--size (\d+)x(\d+)", str(caught.value))[0])
    assert width == pytest.approx(2 * height, abs=32)
    assert budget.fit(planner, width, height, limit=500 * MB).peak <= 500 * MB
    with pytest.raises(UsageError):
        budget.fit(planner, width + 64, height + 32, limit=500 * MB)
    with pytest.raises(UsageError, match="no size would fit"):
        budget.fit(planner, 512, 512, limit=100 * MB)
    with pytest.raises(UsageError, match="out of reach"):
        budget.fit(planner, 10**6 // 32 * 32, 64, limit=10**15)


def test_waiting_pictures_are_planned(broad: Path) -> None:
    planner = Planner(ModelFolder.open(broad))
    dropped = replace(planner.default_ways(512, 512), keep_loaded=False)
    one, many = (planner.plan(512, 512, pictures=count, prompts=count, ways=dropped) for count in (1, 16))
    assert many.phases[2].peak > one.phases[2].peak
    single = planner.plan(512, 512, pictures=16, prompts=16, ways=replace(dropped, at_once=1))
    assert single.peak == one.peak


_DRAW = """
import hashlib, json, sys
import torch
from linocut.pipeline import memory
from linocut.pipeline.generate import Pipeline

torch.set_num_threads(1)
pipe = Pipeline.from_pretrained(sys.argv[1], keep_loaded=False, prompt_cache=False)
pipe("warm up", seed=1, width=32, height=32)  # so that library initialisation counts as the process's own memory
base = memory.resident_bytes()
memory.BASE_BYTES = base
free = pipe.plan(512, 512, base=base).peak
if sys.argv[2] != "none":
    pipe.max_memory = base + int(sys.argv[2])
plan = pipe.plan(512, 512, base=base)
result = pipe("a red apple", seed=1, width=512, height=512, num_inference_steps=2)
print(json.dumps({"peak": max(each["peak_rss"] for each in result.timings.values()) - base, "plan": plan.peak - base,
                  "ways": [plan.ways.stream, plan.ways.rows, plan.ways.tile], "tile": result.recipe.tile,
                  "phases": {p.name: p.peak - base for p in plan.phases},
                  "pixels": hashlib.sha256(result.images[0].tobytes()).hexdigest()}))
"""


def _draw(model: Path, limit: int | None) -> dict:
    done = subprocess.run([sys.executable, "-c", _DRAW, str(model), str(limit or "none")], capture_output=True,
                          text=True, check=True)
    return json.loads(done.stdout)


def test_the_promise_is_kept(deep: Path) -> None:
    free = _draw(deep, None)
    assert free["ways"] == [False, None, None]
    strips = _draw(deep, free["phases"]["decode"] - 1)
    assert strips["tile"] is not None
    assert strips["tile"] == strips["ways"][2]
    assert strips["peak"] <= strips["plan"] < free["plan"]


def test_streaming_and_blocks_of_rows_change_no_pixel(broad: Path) -> None:
    from linocut.pipeline.generate import Pipeline
    pictures = []
    for ways in ({}, {"stream": True}, {"stream": True, "rows": 512}):
        pipe = Pipeline.from_pretrained(broad, keep_loaded=False, prompt_cache=False)
        usual = pipe._planner.default_ways
        pipe._planner.default_ways = lambda *size, ways=ways, usual=usual: replace(usual(*size), **ways)
        assert pipe.plan(384, 384).ways.stream == ways.get("stream", False)
        pictures.append(pipe("a red apple", seed=1, width=384, height=384, num_inference_steps=2).images[0].tobytes())
    assert len(set(pictures)) == 1


_STREAMED = """
import sys
from dataclasses import replace
import torch
from linocut.pipeline.generate import Pipeline

def mapped(file):
    total, ours = 0, False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            ours = line.rstrip().endswith(file)
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total

torch.set_num_threads(1)
for stream in (False, True):
    pipe, seen = Pipeline.from_pretrained(sys.argv[1], keep_loaded=False, prompt_cache=False), []
    usual = pipe._planner.default_ways
    pipe._planner.default_ways = lambda *size: replace(usual(*size), stream=stream)
    pipe("a red apple", seed=1, width=64, height=64, num_inference_steps=2, on_progress=lambda p: seen.append(
        mapped("transformer/diffusion_pytorch_model.safetensors")) if p.phase == "denoise" else None)
    print(max(seen))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts resident pages as Linux lists them")
def test_streamed_blocks_leave_memory(broad: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _STREAMED, str(broad)], capture_output=True, text=True, check=True)
    whole, streamed = map(int, done.stdout.split())
    size = (broad / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert whole > 0.45 * size  # the layers that see the noise level alone are gone in both
    assert streamed < 0.5 * whole


def test_the_command_line_keeps_and_refuses(broad: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(cli, ["plan", str(broad), "--size", "1024x1024", "--json"])
    usual = json.loads(done.output)["peak"]
    done = runner.invoke(cli, ["plan", str(broad), "--size", "1024x1024", "--max-memory", f"{usual - 10 * MB}",
                               "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["peak"] <= usual - 10 * MB
    out = tmp_path / "a.png"
    done = runner.invoke(cli, ["generate", "a fox", "-m", str(broad), "--size", "1024", "--max-memory", "400MB",
                               "-o", str(out)])
    assert done.exit_code != 0
    assert isinstance(done.exception, UsageError)
    assert "--max-memory allows 400 MB; " in str(done.exception)
    assert not out.exists()
