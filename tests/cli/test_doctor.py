"""`linocut doctor`: tells the choices with reasons, notices a wrong kernel, and is quick when asked to be brief."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from linocut.cli import diagnosis, doctor
from linocut.formats.packed import ENCODINGS
from linocut.kernels import dispatch, native, selfcheck
from linocut.mlx import runtime
from linocut.mlx import selfcheck as on_mlx

SMALL = (20, 384, 192)


@pytest.fixture
def quick(monkeypatch):
    """The checks at a small size, and models that are all well: other tests look at those."""
    monkeypatch.setattr(selfcheck.check_model_sized, "__defaults__", (SMALL, ENCODINGS))
    monkeypatch.setattr(on_mlx.check_model_sized, "__defaults__", (SMALL, ("binary", "ternary", "affine4")))
    monkeypatch.setattr("linocut.formats.folder.EMBEDDED", {})


def run(*arguments):
    done = CliRunner().invoke(doctor.command, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_report_names_every_choice_and_its_reason(quick):
    done = run()
    assert done.exit_code == 0, done.output
    for word in ("processor", "memory", "torch", "threads", "C++ module", "native", "reference", "generic",
                 "LINOCUT_KERNEL=generic", "M=20", "error", "chosen", "prompt cache"):
        assert word in done.output


def test_json_is_one_object(quick):
    report = json.loads(run("--json").output)
    assert report["ok"] is True
    assert report["threads"]["count"] >= 1
    assert {each["kernel"] for each in report["checks"]} >= {"native", "generic"}
    assert all(each["error"] <= each["tolerance"] for each in report["checks"])
    choice = report["kernels"][0]
    assert choice["chosen"] == next(each["name"] for each in choice["candidates"] if each["why_not"] is None)
    assert report["machine"]["memory_bytes"] > 0


def test_blocks_and_attention_are_explained(monkeypatch):
    facts = diagnosis.fused_models()
    assert {each["component"] for each in facts} == {"transformer", "text_encoder"}
    assert all(each["fused"] for each in facts)
    monkeypatch.setenv("LINOCUT_KERNEL", "reference")
    assert all("reference" in each["why_not"] for each in diagnosis.fused_models())
    attention = diagnosis.native_module()["attention"]
    assert sum(each["chosen"] for each in attention) == 1
    monkeypatch.setenv("LINOCUT_ATTENTION", "baseline")
    assert "LINOCUT_ATTENTION" in diagnosis.native_module()["attention"][-1]["reason"]


def test_the_prompt_cache_is_shown_with_place_and_size(quick, tmp_path, monkeypatch):
    assert "off: LINOCUT_PROMPT_CACHE=0" in run("--brief").output
    monkeypatch.setenv("LINOCUT_PROMPT_CACHE", "3")
    monkeypatch.setenv("LINOCUT_CACHE", str(tmp_path))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "x.safetensors").write_bytes(b"0" * 1_200_000)
    output = run("--brief").output
    assert str(tmp_path / "prompts") in output
    assert "1, 1.2 MB of at most 3 MB" in output
    monkeypatch.setenv("LINOCUT_CACHE", str(tmp_path / "prompts" / "x.safetensors"))
    assert "is not a folder" in run("--brief").output


def test_a_wrong_kernel_fails_with_its_error(quick, monkeypatch):
    right = native.Native.linear
    monkeypatch.setattr(native.Native, "linear", lambda self, x, weight: right(self, x, weight) * 1.1)
    done = run()
    assert done.exit_code == 1
    assert "FAIL" in done.output
    assert "kernel native is wrong on ternary float32" in done.output
    assert "LINOCUT_KERNEL=reference" in done.output


def test_the_device_and_mlx_are_explained_and_checked(quick, monkeypatch):
    report = json.loads(run("--json").output)
    assert report["device"]["device"] in ("cpu", "mlx")
    assert report["mlx"]["version"] == runtime.version()
    assert sorted(each["encoding"] for each in report["checks"] if each["kernel"] == "mlx") == \
        ["affine4", "binary", "ternary"]
    monkeypatch.setenv("LINOCUT_DEVICE", "mlx")
    assert "mlx: asked for by LINOCUT_DEVICE=mlx" in run().output
    right = on_mlx.Packed.matmul
    monkeypatch.setattr(on_mlx.Packed, "matmul", lambda self, x: right(self, x) * 1.1)
    done = run()
    assert done.exit_code == 1
    assert "kernel mlx is wrong on ternary" in done.output
    assert "--device cpu" in done.output


def test_mlx_that_is_missing_is_a_line_and_a_failure_only_if_asked_for(quick, monkeypatch):
    monkeypatch.setattr(runtime, "version", lambda: None)
    done = run()
    assert done.exit_code == 0, done.output
    assert "mlx is not installed" in done.output
    monkeypatch.setenv("LINOCUT_DEVICE", "mlx")
    done = run()
    assert done.exit_code == 1
    assert "FAIL device mlx was asked for" in done.output


def test_a_missing_module_is_a_line_and_no_failure(quick, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(diagnosis.importlib, "import_module", missing)
    monkeypatch.setattr(native, "status", lambda: (None, "linocut._native cannot be imported"))
    done = run()
    assert done.exit_code == 0, done.output
    assert "MISSING: cannot be imported" in done.output
    assert "reference for binary, ternary, affine4, int8" in done.output
    assert dispatch.requested() == "auto"


def test_brief_loads_no_torch():
    code = ("import sys\nfrom linocut.cli import main\ntry:\n    main(['doctor', '--brief'])\n"
            "finally:\n    print('TORCH', 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert "TORCH False" in done.stdout, done.stdout + done.stderr
    assert "processor" in done.stdout
