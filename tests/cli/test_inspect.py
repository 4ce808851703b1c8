"""`linocut inspect`: sizes to the byte, damage found, no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from linocut.formats.checkpoint import write_checkpoint
from linocut.formats.packed import pack

SRC = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture
def model(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    root = tmp_path / "tiny"
    for part in ("transformer", "vae"):
        (root / part).mkdir(parents=True)
    (root / "model_index.json").write_text(json.dumps({"is_distilled": True, "linocut": {"default_size": [256, 256]}}))
    ternary = pack(rng.integers(-1, 2, (64, 3072)), np.ones((64, 24)), "ternary")
    affine = pack(rng.integers(0, 16, (8, 128)), np.ones((8, 2)), "affine4", rng.integers(0, 16, (8, 2)))
    write_checkpoint(root / "transformer" / "diffusion_pytorch_model.safetensors",
                     {"blocks.10.q": ternary, "blocks.2.q": ternary, "mod": affine, "x.weight": np.ones((4, 8), "f4")})
    write_checkpoint(root / "vae" / "model.safetensors", {"w": np.zeros(10, np.float16)})
    return root


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = ("import sys\nfrom linocut.cli import main\ntry: main(sys.argv[1:])\n"
            "finally: assert 'torch' not in sys.modules")
    return subprocess.run([sys.executable, "-c", code, "inspect", *map(str, arguments)], capture_output=True, text=True,
                          check=False, env=os.environ | {"PYTHONPATH": str(SRC)})


def test_a_model(model):
    done = run(model)
    assert done.returncode == 0, done.stderr
    for text in ("tiny", "256x256 px, 4 steps", "distilled", "transformer: diffusion_pytorch_model.safetensors",
                 "393,216", f"{2 * 64 * (615 + 48):,}", "1.7266", "4.3125", "file overhead", "total: "):
        assert text in done.stdout, done.stdout


def test_json_and_tensors(model):
    done = run(model, "--json", "--tensors", "--verify")
    report = json.loads(done.stdout)
    part = report["components"]["transformer"]
    assert part["tensor_bytes"] == 2 * 64 * (615 + 48) + 8 * (64 + 4 + 1) + 128
    assert part["file_bytes"] == part["tensor_bytes"] + part["overhead_bytes"]
    assert part["weights"] == 2 * 64 * 3072 + 8 * 128 + 32
    assert part["packed_layers"] == 3
    assert part["verified"] == {"hashes": 8, "tensors": 8}
    assert [entry["name"] for entry in part["tensors"]] == ["blocks.2.q", "blocks.10.q", "mod", "x.weight"]
    assert report["total"]["tensor_bytes"] == part["tensor_bytes"] + 20
    assert len(report["hash"]) == 12


def test_files_and_component_folders(model):
    for target in (model / "transformer", model / "transformer" / "diffusion_pytorch_model.safetensors"):
        done = run(target, "--tensors", "--verify")
        assert done.returncode == 0, done.stderr
        assert "blocks.10.q" in done.stdout
        assert "64x3072" in done.stdout
        assert "all tensors are intact" in done.stdout


def test_damage_is_found(model):
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-20] ^= 0xFF
    path.write_bytes(data)
    assert run(model).returncode == 0  # the structure is sound
    done = run(model, "--verify")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "SHA-256" in done.stderr
    path.write_bytes(data[:-1])
    done = run(model)
    assert done.returncode == 2
    assert "cut off" in done.stderr


def test_names_made_to_break_the_sorting(tmp_path):
    """Neither digits that are no decimals nor numbers too long for int() may end in a traceback."""
    path = tmp_path / "f.safetensors"
    write_checkpoint(path, {name: np.ones(4, np.float32) for name in ("a²", "a10", "a٣", "a" + "9" * 5000, "7", "a2")})
    done = run(path, "--tensors", "--json")
    assert done.returncode == 0, done.stderr
    names = [entry["name"] for entry in json.loads(done.stdout)["components"]["file"]["tensors"]]
    assert names.index("a2") < names.index("a10") < names.index("a" + "9" * 5000)


def test_foreign_and_missing(tmp_path):
    from safetensors.numpy import save_file
    save_file({"a\x1b[31m": np.ones(4, np.float32)}, tmp_path / "f.safetensors")
    done = run(tmp_path / "f.safetensors", "--verify", "--tensors")
    assert done.returncode == 0, done.stderr
    assert "no hashes" in done.stdout
    assert "\x1b" not in done.stdout
    done = run(tmp_path / "none")
    assert done.returncode == 2
    assert "embedded" in done.stderr
    assert len(done.stderr.splitlines()) == 1
