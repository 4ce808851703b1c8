"""`linocut quantize` and `linocut bench` as a user meets them: reports, signals, one-line refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_dense import TINY

from linocut.cli import main
from linocut.formats.checkpoint import write_checkpoint
from linocut.formats.folder import ModelFolder
from linocut.formats.timestep_table import TABLE_FILE
from linocut.models import synthetic
from linocut.models.flux2 import Flux2Config


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_report_as_table_and_as_json(capsys, dense_model, tmp_path):
    code, out, _ = run(capsys, "quantize", dense_model, tmp_path / "a", "--encoding", "ternary")
    assert code == 0
    assert "transformer: 30 packed and" in out
    assert "text_encoder: 22 packed and" in out
    assert "single_transformer_blocks.2.attn.to_out" in out
    code, out, _ = run(capsys, "quantize", dense_model, tmp_path / "b", "--encoding", "binary", "--json",
                       "--text-encoder", "keep")
    report = json.loads(out)
    assert code == 0
    assert list(report["totals"]) == ["transformer"]
    assert sum(tensor["encoding"] == "binary" for tensor in report["tensors"]) == 30
    assert ModelFolder.open(tmp_path / "b").has("text_encoder")


def test_a_timestep_table_is_made_and_told(capsys, dense_model, tmp_path):
    code, out, err = run(capsys, "quantize", dense_model, tmp_path / "a", "--encoding", "binary", "--timestep-table")
    assert code == 0, err
    nbytes = (tmp_path / "a/transformer" / TABLE_FILE).stat().st_size
    assert f"timestep table: {nbytes:,} bytes" in out
    assert "timestep_weights: 0 packed and 6 dense tensors" in out
    code, out, _ = run(capsys, "quantize", dense_model, tmp_path / "b", "--encoding", "binary", "--timestep-table",
                       "--json")
    assert json.loads(out)["timestep_table_bytes"] == nbytes
    policy = tmp_path / "p.toml"
    policy.write_text("[[rules]]\npattern = '.*'\nencoding = 'binary'\n")
    other = tmp_path / "other.safetensors"
    write_checkpoint(other, {"layer.weight": np.ones((4, 128), np.float32)})
    code, _, err = run(capsys, "quantize", other, tmp_path / "c", "--policy", policy, "--timestep-table")
    assert code == 2
    assert "none of the layers that a timestep table stands for" in err


def test_policy_file(capsys, dense_model, tmp_path):
    policy = tmp_path / "p.toml"
    policy.write_text("[[rules]]\npattern = 'single_transformer_blocks\\..*'\n"
                      "[[rules]]\npattern = 'transformer_blocks\\..*'\nencoding = 'affine4'\n")
    code, out, _ = run(capsys, "quantize", dense_model, tmp_path / "out", "--policy", policy, "--encoding", "binary",
                       "--json")
    assert code == 0
    encodings = [tensor["encoding"] for tensor in json.loads(out)["tensors"] if tensor["component"] == "transformer"]
    assert (encodings.count("binary"), encodings.count("affine4")) == (6, 24)


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "--encoding"), (("--policy", "absent.toml"), "cannot read the policy file"),
    (("--encoding", "ternery"), "'ternery'"), (("--encoding", "binary", "--text-encoder", "int8"), "'int8'"),
])
def test_mistakes_are_one_line(capsys, dense_model, tmp_path, arguments, message):
    code, out, err = run(capsys, "quantize", dense_model, tmp_path / "out", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_nothing_and_the_next_run_resumes(tmp_path, kind):
    wide = replace(TINY, transformer=Flux2Config(in_channels=64, num_layers=0, num_single_layers=8,
                                                 num_attention_heads=4, joint_attention_dim=384))
    synthetic.write_synthetic(tmp_path / "in", wide, "bf16")
    command = [sys.executable, "-c", "from linocut.cli import main; main()", "quantize", str(tmp_path / "in"),
               str(tmp_path / "out"), "--encoding", "ternary", "--threads", "1", "--json"]
    environment = os.environ | {"PYTHONPATH": str(Path(synthetic.__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    log = tmp_path / ".out.partial" / "transformer.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(kind)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert "goes on where it stopped" in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "in"]
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(again.stdout)["resumed_tensors"] >= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    with ModelFolder.open(tmp_path / "out").checkpoint("transformer") as checkpoint:
        checkpoint.verify()


def test_a_temporary_benchmark_model_does_not_outlive_sigterm(tmp_path):
    script = ("import sys, time\nfrom linocut.cli import main\nfrom linocut.models import synthetic\n"
              "def never_ending(folder, *rest):\n    (folder / 'begun').touch()\n    time.sleep(60)\n"
              "synthetic.write_synthetic = never_ending\nmain(['bench', 'synthetic', 'klein-4b'])")
    environment = os.environ | {"PYTHONPATH": str(Path(synthetic.__file__).parents[2]), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("linocut-bench-*/begun")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert not list(tmp_path.glob("linocut-bench-*"))


def test_bench_makes_draws_and_measures(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(synthetic.KNOWN, "klein-4b", TINY)
    code, out, err = run(capsys, "bench", "synthetic", "klein-4b", "--out", tmp_path / "m", "--encoding", "both",
                         "--size", "64x64", "--steps", "2", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert [entry["encoding"] for entry in facts] == ["ternary", "binary"]
    for entry in facts:
        assert list(entry["stages"]) == ["encode", "denoise", "decode"]
        assert all(stage["peak_rss"] > 0 for stage in entry["stages"].values())
    vaes = [tmp_path / "m" / name / "vae/diffusion_pytorch_model.safetensors" for name in ("ternary", "binary")]
    assert os.path.samefile(*vaes)
    code, _, err = run(capsys, "bench", "synthetic", "klein-4b", "--out", tmp_path / "m/binary", "--make-only")
    assert code == 2
    assert "holds a binary model already" in err
    code, _, err = run(capsys, "bench", "synthetic", "klein-4b", "--out", tmp_path / "m/binary", "--make-only",
                       "--encoding", "binary", "--timestep-table")
    assert code == 2
    assert "without a timestep table already" in err
    code, out, _ = run(capsys, "bench", "synthetic", "klein-4b", "--out", tmp_path / "s", "--source", "bf16")
    assert code == 0
    assert "klein-4b bf16" in out


@pytest.mark.parametrize("edges", ["int8", "affine4"])
def test_edges_of_fewer_bits_are_packed_and_draw(capsys, dense_model, tmp_path, edges):
    out = tmp_path / "a"
    code, said, err = run(capsys, "quantize", dense_model, out, "--encoding", "ternary", "--edges", edges, "--json")
    assert code == 0, err
    encodings = {tensor["name"].removesuffix(".weight"): tensor["encoding"] for tensor in json.loads(said)["tensors"]
                 if tensor["component"] == "transformer"}
    found = [encodings[name] for name in ("context_embedder", "x_embedder", "proj_out")]
    assert found == [edges, "dense", edges]  # the second one has 64 inputs
    code, _, err = run(capsys, "generate", "a fox", "-m", out, "--size", 32, "-o", tmp_path / "a.png", "--json")
    assert code == 0, err
    policy = tmp_path / "p.toml"
    policy.write_text("[[rules]]\npattern = '.*'\nencoding = 'binary'\n")
    code, _, err = run(capsys, "quantize", dense_model, tmp_path / "b", "--policy", policy, "--edges", edges)
    assert code == 2
    assert "write a rule of your own" in err
