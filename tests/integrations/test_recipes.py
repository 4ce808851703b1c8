"""Every `linocut` command of docs/interop.md is executed, in the order of the text."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from linocut.cli import cli

TEXT = (Path(__file__).parents[2] / "docs" / "interop.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    linocut (.+)$", TEXT, re.MULTILINE)


@pytest.mark.slow
def test_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(COMMANDS) >= 6
    for command in COMMANDS:
        done = CliRunner().invoke(cli, shlex.split(command), standalone_mode=False)
        assert done.exception is None, f"{command}: {done.exception}"
        assert "all equal to the source" in done.output
    for folder in ("for-sd", "for-diffusers", "for-mlx", "for-gemlite", "for-bfl", "from-mlx"):
        assert (tmp_path / folder / "model_index.json").is_file()
