"""`import linocut` and `linocut --help` load neither torch nor numpy, and help answers in a blink."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
HEAVY = ("torch", "numpy", "PIL", "rich", "tokenizers", "huggingface_hub", "transformers", "diffusers")
HELP_SECONDS = 0.4


def run(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
                          env=environment, timeout=60)


REPORT = f"import sys; print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
COMMAND_LINE = "import sys\nfrom linocut.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n    " + REPORT


def test_import_linocut_is_light():
    done = run("import linocut; linocut.__version__; dir(linocut); linocut.LinocutError\n" + REPORT)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["nonsense"], []])
def test_help_is_light(arguments):
    done = run(COMMAND_LINE, *arguments)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["generate", "doctor", "inspect", "quantize", "convert", "plan"])
def test_help_of_a_command_loads_no_torch(command):
    done = run(COMMAND_LINE, command, "--help")
    assert done.returncode == 0, done.stderr
    assert "'torch'" not in done.stdout


def test_unknown_names_are_attribute_errors():
    done = run("import linocut\ntry:\n    linocut.nonsense\nexcept AttributeError as error:\n    print(error)")
    assert "no attribute 'nonsense'" in done.stdout


def test_help_answers_in_a_blink():
    """Best of several whole processes, as a shell would start them: one quiet moment of a busy machine is enough."""
    seconds = []
    for attempt in range(12):
        time.sleep(0.2 * attempt)  # a busy moment passes
        before = time.perf_counter()
        done = run("from linocut.cli import main; main(['--help'])")
        seconds.append(time.perf_counter() - before)
        assert done.returncode == 0
        assert "generate" in done.stdout
        if min(seconds) < HELP_SECONDS:
            return
    assert min(seconds) < HELP_SECONDS, f"took {min(seconds):.2f} s at best"
