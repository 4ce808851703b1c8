"""Every `linocut` command and every Python block of docs/interop.md is executed, in the order of the text.

The block that needs stable-diffusion.cpp is run where that program is, by test_sdcpp.py.
"""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_model import SMALL

from linocut.cli import cli
from linocut.models.synthetic import write_synthetic

TEXT = (Path(__file__).parents[2] / "docs" / "interop.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^    linocut ([^\n]+)$|^```python\n(.+?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_synthetic(tmp_path / "klein", SMALL, "bf16")
    assert sum(bool(command) for command, _ in RECIPES) >= 7
    assert sum(bool(program) for _, program in RECIPES) >= 3
    for command, program in RECIPES:
        if "stable_diffusion_cpp" in program:
            continue
        if program:
            exec(compile(program, "docs/interop.md", "exec"), {})
            continue
        done = CliRunner().invoke(cli, shlex.split(command), standalone_mode=False)
        assert done.exception is None, f"{command}: {done.exception}"
        assert "all equal to the source" in done.output or command.startswith("quantize")
    for folder in ("for-sd", "packed", "saved", "for-diffusers", "for-mlx", "for-gemlite", "for-bfl", "from-mlx"):
        assert (tmp_path / folder / "model_index.json").is_file()
    for file in ("apple.png", "ternary-transformer/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / file).is_file()
