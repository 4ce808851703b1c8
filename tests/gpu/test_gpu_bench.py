"""The benchmark of the GPU, as far as a machine without one can run it: a rehearsal, the verdict, gemlite's API."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    found = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=900,
                          env=os.environ | interpret | {"PYTHONPATH": found} | environment)


@pytest.mark.slow
def test_a_rehearsal_runs_every_section(tmp_path):
    """Those that take longest in the interpreter at once, with one encoding; on a GPU the same at the same sizes."""
    done = run(str(BENCHMARKS / "gpu.py"), "--toy", "--encodings", "ternary", "-o", str(tmp_path / "toy.json"),
               "--work", str(tmp_path / "models"), LINOCUT_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "toy.json").read_text())
    assert set(found) == {"toy", "seconds", "device", "parity", "tune", "step", "together", "dense", "compiled", "text",
                          "decode", "picture", "batch", "cold", "budget", "products", "rows", "profile", "embedded",
                          "gemlite"}
    assert not [name for name, value in found.items() if isinstance(value, dict) and "failed" in value]
    assert all(check["ok"] for check in found["parity"])
    assert {each["what"] for each in found["picture"]} == {"linocut ternary exact", "dense bf16 eager",
                                                           "dense bf16 compiled"}
    assert [each["pictures"] for each in found["batch"]] == [1, 2, 1, 2]
    cold = found["cold"][0]
    assert cold["way"] == "linocut generate"
    parts = sum(value for name, value in cold["first"].items() if name != "seconds" and "peak" not in name)
    assert parts == pytest.approx(cold["first"]["seconds"], rel=0.2)  # what lies between phases is missing


def test_the_verdict_knows_what_is_enough(tmp_path):
    step = {"side": 1024, "peak_memory": 1.4e9}
    found = {"step": [{"what": "linocut binary fast", "seconds": 0.045, **step},
                      {"what": "linocut binary exact", "seconds": 0.055, **step, "peak_memory": 1.6e9},
                      {"what": "linocut binary fast", "seconds": 0.016, "side": 512, "peak_memory": 1e9}],
             "compiled": [{"what": "dense bf16 compiled", "side": 1024, "seconds": 0.059},
                          {"what": "dense bf16 compiled", "side": 512, "seconds": 0.0176}],
             "picture": [{"what": "linocut binary fast", "side": 1024, "seconds": 0.3},
                         {"what": "dense bf16 compiled", "side": 1024, "seconds": 0.36}]}
    others = {"cold": [{"what": "linocut binary exact", "first": {"seconds": 61.0}, "again": {"seconds": 12.0}}],
              "gemlite": [{"what": "gemlite A16W2 eager", "side": 1024, "seconds": 0.17},
                          {"what": "gemlite A16W2 compiled", "side": 1024, "seconds": 0.15},
                          {"what": "gemlite A16W2 product", "m": 512, "seconds": 0.001}],
              "rows": {"failed": "RuntimeError: no"}}
    for name, content in (("a", found), ("b", others)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    said = run(str(BENCHMARKS / "gpu.py"), "--table", str(tmp_path / "a.json"), str(tmp_path / "b.json")).stdout
    lines = said.splitlines()
    assert len([line for line in lines if line.startswith("yes")]) == 6
    missed = [line for line in lines if line.startswith("NO")]
    assert [line for line in missed if "1.07 (at least 1.2), linocut binary exact" in line]
    assert [line for line in missed if "2.73 (at least 2.9), linocut binary exact" in line]
    assert [line for line in missed if "1.60 (at most 1.5), linocut binary exact" in line]
    assert [line for line in missed if "61.00 (at most 60)" in line]
    assert [line for line in missed if "section rows" in line]
    assert len(missed) == 5


GEMLITE = """
import sys, types
import torch, triton
from triton.backends.compiler import GPUTarget

# gemlite asks for the GPU while it is imported, and for nothing more until a product runs.
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(name="NVIDIA H200", multi_processor_count=132)
driver = types.SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_benchmarker=lambda: None,
    utils=types.SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232448}))
triton.runtime.driver.set_active(driver)
from on_gpu import gemlite

assert gemlite.installed() == "0.6.0.post2", gemlite.installed()
for encoding, most in (("ternary", 3), ("binary", 2)):
    codes, scales = torch.randint(0, most, (256, 512)), torch.rand(256, 4) * 0.1 + 0.01
    made = gemlite.layer(codes, scales, encoding)
    bits, each = made.W_nbits, made.elements_per_sample
    unpacked = torch.stack([(made.W_q.long() >> (bits * i)) & (2**bits - 1) for i in range(each)], 1).flatten(0, 1).t()
    assert torch.equal(unpacked, codes)
    grouped = [part.float().t().repeat_interleave(128, 1) for part in (made.scales, made.zeros)]
    values = codes - 1 if encoding == "ternary" else 2 * codes - 1
    wanted = values * scales.bfloat16().float().repeat_interleave(128, 1)
    assert torch.equal(unpacked * grouped[0] + grouped[1], wanted)  # how its kernels decode in this mode
    assert made.W_group_mode == 4 and made.compute_dtype == torch.bfloat16
    with torch.device("meta"):
        x = torch.empty(5, 512, dtype=torch.bfloat16)
    assert made.to("meta")(x).shape == (5, 256)
print("right")
"""


@pytest.mark.skipif(importlib.util.find_spec("gemlite") is None, reason="gemlite is not installed")
def test_gemlite_is_given_the_same_weights(tmp_path):
    """Its own packing, decoded as its kernels decode, is the weight that was meant."""
    done = run("-c", GEMLITE, PYTHONPATH=os.pathsep.join([str(ROOT / "src"), str(BENCHMARKS),
                                                          os.environ.get("PYTHONPATH", "")]), TRITON_INTERPRET="1")
    assert done.stdout.strip().endswith("right"), done.stderr[-3000:]
