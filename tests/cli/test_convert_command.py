"""`linocut convert`, the command: what it prints, and one line for what it refuses."""

import json

import pytest
from click.testing import CliRunner

from linocut.cli.convert import command
from linocut.errors import UsageError


def run(*arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments], standalone_mode=False)


def test_it_says_what_it_did(tiny_model, tmp_path):
    done = run(tiny_model, tmp_path / "x", "--to", "gguf")
    assert done.exception is None
    assert "linocut -> gguf: 34 packed weights" in done.output
    assert "read back 64 weights: all equal to the source, bit for bit" in done.output
    assert "note: four-bit weights become Q4_1" in done.output
    back = run(tmp_path / "x", tmp_path / "y", "--to", "linocut", "--json")
    report = json.loads(back.output)
    assert (report["source_form"], report["form"], report["verified"], report["losses"]) == ("gguf", "linocut", 68, [])


def test_losses_are_named(tiny_model, tmp_path):
    done = run(tiny_model, tmp_path / "x", "--to", "gguf", "--dense-type", "Q8_0", "--lossy")
    assert "lost: dense tensors are rounded from F32 to Q8_0" in done.output
    assert "all as they were rounded" in done.output


def test_an_existing_destination_is_safe(tiny_model, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("mine")
    for extra in ((), ("--force",)):
        assert isinstance(run(tiny_model, tmp_path / "x", "--to", "gguf", *extra).exception, UsageError)
    assert (tmp_path / "x" / "mine").read_text() == "mine"
    run(tiny_model, tmp_path / "z", "--to", "gguf")
    assert run(tiny_model, tmp_path / "z", "--to", "mlx", "--force").exception is None
    assert not (tmp_path / "z" / "transformer.gguf").exists()


@pytest.mark.parametrize("arguments", [["nothing-here", "x", "--to", "gguf"], [".", "x", "--to", "mlx"]])
def test_no_model_is_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = run(*arguments).exception
    assert error is not None
    assert "\n" not in str(error)
