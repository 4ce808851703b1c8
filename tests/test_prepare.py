"""What `make` does before there is a virtual environment, on machines that lack one thing or another."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_debian.sh"
COMPILER = ("c++", "exit 0")
# Answers for the questions that the script asks of a Python; MISSING lists what is not there.
PYTHON = """case "$*" in
*version_info\\ \\<*) exit 0;;
*ensurepip*) test -e "$(dirname "$0")/venv";;
*Python.h*) test -e "$(dirname "$0")/headers";;
*) echo python3.11;;
esac"""


@pytest.fixture
def machine(tmp_path):
    """A PATH of its own: a shell, what the script itself uses, and the programs and features that a test adds."""
    def make(*features, programs=(), user=1000, arguments=()):
        for tool in ("dirname", "env"):
            (tmp_path / tool).symlink_to(shutil.which(tool))
        for name, body in [("make", "exit 0"), ("id", f"echo {user}"), *programs]:
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        for feature in features:
            (tmp_path / feature).touch()
        environment = {key: value for key, value in os.environ.items() if key != "CXX"} | {"PATH": str(tmp_path)}
        return subprocess.run(["/bin/sh", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True,
                              timeout=60)

    return make


def test_a_complete_machine_is_left_alone(machine):
    result = machine("venv", "headers", programs=[("python3.11", PYTHON), COMPILER])
    assert (result.returncode, result.stdout, result.stderr) == (0, "python3.11\n", "")


def test_without_headers_and_compiler_it_goes_on_and_says_so(machine):
    result = machine("venv", programs=[("python3.11", PYTHON)])
    assert (result.returncode, result.stdout) == (0, "python3.11\n")
    assert result.stderr.count("\n") == 1
    assert "reference kernels; to have it: apt-get install python3.11-dev g++" in result.stderr


def test_without_venv_it_stops_with_the_package_to_install(machine):
    result = machine("headers", programs=[("python3", PYTHON), COMPILER, ("apt-get", "exit 1")])
    assert result.returncode == 1
    assert result.stdout == ""
    assert "apt-get install python3.11-venv (" in result.stderr


def test_a_python_that_is_too_old_or_absent_is_refused(tmp_path):
    (tmp_path / "old").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "old").chmod(0o755)
    for python in (tmp_path / "old", tmp_path / "none"):
        result = subprocess.run([SCRIPT, python], capture_output=True, text=True, timeout=60)
        assert result.returncode == 1
        assert f"{python} is not Python 3.11 or newer" in result.stderr


def test_without_python_it_names_python(machine):
    result = machine(programs=[COMPILER])
    assert result.returncode == 1
    assert "apt-get install python3 python3-venv (" in result.stderr


@pytest.mark.parametrize(("user", "sudo"), [(0, None), (1000, '[ "$1" = -n ] && shift && exec "$@"')])
def test_it_installs_what_is_missing_if_it_may(machine, tmp_path, user, sudo):
    here = tmp_path / "asked"
    apt = f'echo "$@" >>{here}\n: >{tmp_path}/venv; : >{tmp_path}/headers'
    programs = [("python3", PYTHON), COMPILER, ("apt-get", apt)] + ([("sudo", sudo)] if sudo else [])
    if sudo:
        programs.append(("true", "exit 0"))
    result = machine(programs=programs, user=user)
    assert (result.returncode, result.stdout) == (0, "python3\n")
    assert here.read_text().splitlines() == [
        "update -qq", "install -y -qq --no-install-recommends python3.11-venv python3.11-dev"]


def test_without_the_right_to_install_it_does_not_try(machine, tmp_path):
    here = tmp_path / "asked"
    programs = [("python3", PYTHON), COMPILER, ("apt-get", f"echo asked >{here}"), ("sudo", "exit 1")]
    assert machine("venv", programs=programs).returncode == 0
    assert not here.exists()


def test_what_only_tests_need_is_asked_for_only_by_them(machine, tmp_path):
    here = tmp_path / "asked"
    programs = [("python3.11", PYTHON), COMPILER, ("apt-get", f'echo "$@" >>{here}')]
    result = machine("venv", "headers", programs=programs, user=0, arguments=["--tests"])
    assert (result.returncode, result.stdout) == (0, "python3.11\n")
    assert here.read_text().splitlines()[1].endswith(" qemu-user g++-aarch64-linux-gnu chromium")
    assert "tests of the C++ kernels on other CPUs, or of the studio, will fail" in result.stderr
