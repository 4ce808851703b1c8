"""The planner against what is measured, and its refusals."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_dense import TINY

from linocut.formats.folder import ModelFolder
from linocut.models.flux2 import Flux2Config
from linocut.models.synthetic import write_synthetic
from linocut.pipeline import components, memory
from linocut.pipeline.generate import Pipeline

_PEAK = """
import torch
from linocut.pipeline import memory
from linocut.pipeline.measure import Meter

meter = Meter(torch.device("cpu"))
start = memory.resident_bytes()
with meter.phase("quiet"):
    pass
with meter.phase("loud"):
    block = bytearray(200_000_000)
    del block
print(meter.phases["quiet"].peak_rss - start, meter.phases["loud"].peak_rss - start)
"""


def test_the_meter_sees_a_peak_that_is_gone_by_the_end() -> None:
    # In a process of its own: in this one, what other tests left can leave memory at the same moment.
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    quiet, loud = map(int, done.stdout.split())
    assert loud > 190_000_000
    assert quiet < 50_000_000


_MEASURE = """
import json, sys
import torch
from linocut.pipeline import memory
from linocut.pipeline.generate import Pipeline

torch.set_num_threads(1)
size = int(sys.argv[2])
pipe = Pipeline.from_pretrained(sys.argv[1], keep_loaded=False)
pipe("warm up", seed=1)  # so that library initialisation counts as the process's own memory
base = memory.resident_bytes()
plan = pipe.plan(size, size, base=base)
timings = pipe("a red apple", seed=1, width=size, height=size).timings
print(json.dumps({p.name: [p.peak - base, timings[p.name]["peak_rss"] - base] for p in plan.phases}))
"""


@pytest.mark.parametrize("size", [64, 512])
def test_the_plan_covers_what_is_measured(tiny_model: Path, size: int) -> None:
    # In a process of its own too: what other tests left in this one's heap would be counted, or reused, by chance.
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(tiny_model), str(size)],
                          capture_output=True, text=True, check=True)
    for name, (planned, measured) in json.loads(done.stdout).items():
        assert planned >= measured, name
        # Allowances of constant size are all there is in small pictures.
        assert planned <= 2 * max(measured, 0) + 70e6, name


_RESIDENT = """
import sys
import torch
from linocut.pipeline.generate import Pipeline

def mapped(file):
    "Resident bytes of every map of a file."
    total, ours = 0, False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            ours = line.rstrip().endswith(file)
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total

file = sys.argv[2]
for keep in (True, False):
    pipe, seen = Pipeline.from_pretrained(sys.argv[1], keep_loaded=keep), []
    for prompt in ("a red apple", "a blue cup"):
        pipe(prompt, seed=1, width=32, height=32,
             on_progress=lambda p: seen.append(mapped(file)) if p.phase == sys.argv[3] else None)
    pipe.close()
    print(max(seen), seen[-1])
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts resident pages as Linux lists them")
def test_what_sees_the_noise_level_alone_is_gone_while_denoising(tmp_path: Path) -> None:
    width = 512
    transformer = Flux2Config(in_channels=64, num_layers=1, num_single_layers=1, num_attention_heads=width // 128,
                              joint_attention_dim=384)
    write_synthetic(tmp_path / "model", replace(TINY, transformer=transformer), "binary")
    weights = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    resident = _resident_while(tmp_path / "model", "transformer/diffusion_pytorch_model.safetensors", "denoise")
    size, timestep = weights.stat().st_size, 2 * width * (256 + width + 17 * width)
    assert timestep > 0.6 * size
    for most in resident:  # networks kept in memory, and dropped
        # The rest is in memory; pages come in clusters, so some bytes beside it are too.
        assert 0.9 * (size - timestep) < most < size - 0.9 * timestep


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts resident pages as Linux lists them")
@pytest.mark.parametrize("kernel", ["auto", "native"])
def test_what_embeds_the_prompt_is_gone_while_denoising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        kernel: str) -> None:
    monkeypatch.setenv("LINOCUT_KERNEL", kernel)
    text = replace(TINY.text_encoder, hidden_size=1024)
    transformer = Flux2Config(in_channels=64, num_layers=1, num_single_layers=10, num_attention_heads=4,
                              joint_attention_dim=3 * 1024)
    write_synthetic(tmp_path / "model", replace(TINY, text_encoder=text, transformer=transformer), "binary")
    kept, dropped = _resident_while(tmp_path / "model", "transformer/diffusion_pytorch_model.safetensors", "denoise",
                                    at_the_end=True)
    embedder = 3 * 1024 * 4 * 128 * 2
    assert kept > embedder
    assert dropped < kept - 0.9 * embedder
    folder = ModelFolder.open(tmp_path / "model")
    plans = [memory.plan(folder, 32, 32, keep_loaded=False, pictures=2, prompts=prompts).phases[1].weights
             for prompts in (2, 1)]
    assert plans[0] - plans[1] == (embedder if kernel == "auto" else 0)
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": False}))
    guided = memory.plan(ModelFolder.open(tmp_path / "model"), 32, 32, keep_loaded=False).phases[1].weights
    assert guided == plans[0]  # the empty prompt is embedded after the first block of the other


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts resident pages as Linux lists them")
def test_layers_of_the_text_encoder_leave_memory_one_by_one(tmp_path: Path) -> None:
    text = replace(TINY.text_encoder, hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    transformer = replace(TINY.transformer, joint_attention_dim=3 * 512)
    write_synthetic(tmp_path / "model", replace(TINY, text_encoder=text, transformer=transformer, text_taps=(4, 8, 12)))
    size = (tmp_path / "model" / "text_encoder" / "model.safetensors").stat().st_size
    kept, dropped = _resident_while(tmp_path / "model", "text_encoder/model.safetensors", "encode")
    assert kept > 0.9 * size
    assert dropped < 0.25 * size
    folder = ModelFolder.open(tmp_path / "model")
    plans = [memory.plan(folder, 32, 32, keep_loaded=keep).phases[0].weights for keep in (True, False)]
    assert plans[1] < 0.35 * plans[0]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts resident pages as Linux lists them")
def test_the_stored_decoder_leaves_memory_when_it_is_converted(tmp_path: Path) -> None:
    vae = replace(TINY.vae, block_out_channels=(64, 128, 128, 128))
    write_synthetic(tmp_path / "model", replace(TINY, vae=vae))
    file = "vae/diffusion_pytorch_model.safetensors"
    size = (tmp_path / "model" / file).stat().st_size
    for most in _resident_while(tmp_path / "model", file, "decode"):
        assert most < 0.3 * size


def _resident_while(model: Path, file: str, phase: str, at_the_end: bool = False) -> list[int]:
    """Most resident bytes of a model's file in a phase of two pictures, or those at the end of the second one, with
    networks kept in memory and dropped."""
    done = subprocess.run([sys.executable, "-c", _RESIDENT, str(model), file, phase], capture_output=True, text=True,
                          check=True)
    return [int(line.split()[at_the_end]) for line in done.stdout.splitlines()]


def test_networks_are_gone_without_a_search_for_cycles(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The search takes 50 ms, and every phase ends with it if something still holds its network.
    searches: list[None] = []
    monkeypatch.setattr(components.gc, "collect", lambda: searches.append(None))
    for kernel in ("auto", "native"):
        monkeypatch.setenv("LINOCUT_KERNEL", kernel)
        pipe = Pipeline.from_pretrained(tiny_model, keep_loaded=False)
        pipe(["a red apple", "a blue cup"], seed=1, width=32, height=32, num_inference_steps=2,
             callback_on_step_end=lambda *given: given[3]["preview"])
    assert not searches


def test_a_network_in_a_cycle_is_found() -> None:
    network = torch.nn.Linear(2, 2)
    network.itself = [network]
    seen = weakref.ref(network)
    del network
    components.give_memory_back(seen)
    assert seen() is None


_ADVISED = """
import os, sys
import torch
from linocut.pipeline.generate import Pipeline

Pipeline.from_pretrained(sys.argv[1])
assert "THP_MEM_ALLOC_ENABLE" not in os.environ
x = torch.ones(8_000_000)
address, ours = x.data_ptr() + x.nbytes // 2, False
for line in open("/proc/self/smaps"):
    first = line.split()[0]
    if "-" in first:
        start, end = (int(side, 16) for side in first.split("-"))
        ours = start <= address < end
    elif ours and line.startswith("VmFlags:"):
        print("hg" in line.split())
"""


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages")
def test_large_tensors_ask_for_huge_pages(tiny_model: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _ADVISED, str(tiny_model)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]


def test_plans_grow_with_the_picture(tiny_model: Path) -> None:
    folder = ModelFolder.open(tiny_model)
    small, large = (memory.plan(folder, side, side) for side in (256, 1024))
    assert large.peak > small.peak
    assert large.disk == small.disk
    assert sum(small.disk.values()) == sum(
        file.stat().st_size for part in ("transformer", "text_encoder", "vae", "tokenizer")
        for file in (tiny_model / part).iterdir() if file.name != "config.json")


def test_kept_networks_count_in_later_phases(tiny_model: Path) -> None:
    folder = ModelFolder.open(tiny_model)
    kept, dropped = (memory.plan(folder, 64, 64, keep_loaded=keep) for keep in (True, False))
    assert kept.phases[2].held == kept.phases[0].weights + kept.phases[1].weights
    assert dropped.phases[2].held == 0
