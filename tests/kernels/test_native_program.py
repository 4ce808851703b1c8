"""The C++ kernels outside Python: under sanitizers, on emulated CPUs, and on another architecture.

`csrc/tests` compares every variant that was compiled and can run with scalar oracles, in memory that ends at forbidden
pages. Here it is built in several ways, each time by CMakeLists.txt with the flags of the real module, and run.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from linocut.kernels import native

ROOT = Path(__file__).parents[2]
X86 = platform.machine() in ("x86_64", "AMD64")
CHECKED = "-DCMAKE_CXX_FLAGS=-O1 -g1 -Werror -fno-sanitize-recover=all -fsanitize="
OTHER_CPU = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=unknown"]
BUILDS = {
    "release": ["-DCMAKE_BUILD_TYPE=Release"],
    "address": ["-DCMAKE_BUILD_TYPE=None", f"{CHECKED}address,undefined"],
    # Threads know nothing of instruction sets; this is also the build for a CPU that the project has never heard of.
    "thread": ["-DCMAKE_BUILD_TYPE=None", f"{CHECKED}thread", *OTHER_CPU],
    "arm": ["-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++"],
}
PACKAGES = {"qemu-x86_64": "qemu-user", "qemu-aarch64": "qemu-user", "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu"}
LAST = "all kernels agree with their oracles"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the emulators are Linux programs")]


def tool(name: str) -> str:
    """The program `name`, from PATH or beside this Python; fails the test with what to install."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    assert found is not None, (
        f"{name} is missing; `make test` installs it where it may, else on Debian: apt-get install {PACKAGES[name]}"
        if name in PACKAGES else f"{name} is missing; `make test` installs it, or: pip install {name}")
    return found


@cache
def build(kind: str) -> Path:
    """csrc/tests built as `kind` says. The folder stays, so that the next time only what changed is compiled; it is of
    these options alone, because CMake keeps what it was first told.
    """
    if kind == "arm":
        tool("aarch64-linux-gnu-g++")
    options = hashlib.sha256(" ".join(BUILDS[kind]).encode()).hexdigest()[:8]
    folder = ROOT / "build" / "kernels_test" / f"{kind}-{options}"
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    for command in ([tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", "-DLINOCUT_TESTS=ON", *BUILDS[kind]],
                    [tool("cmake"), "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "kernels_test"


def run(*command: str | Path) -> list[str]:
    """The lines that a test program printed; the test fails with what it said if it did not get to its end."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
    lines = done.stdout.splitlines()
    assert lines[-1] == LAST
    return lines


def ran(lines: list[str], kind: str) -> set[str]:
    """Names of the variants of `kind` that the program compared with their oracle in at least ten cases."""
    return {line.split()[1].rstrip(":") for line in lines
            if line.startswith(kind + " ") and line.endswith(" cases agree") and int(line.split()[2]) >= 10}


def test_address_and_undefined_behaviour_sanitizers():
    lines = run(build("address"), "--random", "40")
    here = {name for name, _, why_not in native.module().gemm_variants() if not why_not}
    assert ran(lines, "product") == here
    assert ran(lines, "decoder") == ran(lines, "quantizer") == ran(lines, "rows") == {
        name for name, why_not in native.module().variants() if not why_not}
    assert ran(lines, "attention") == {name for name, _, why_not in native.module().attention_variants() if not why_not}


def test_thread_sanitizer_and_an_unknown_cpu():
    assert ran(run(build("thread"), "--no-fork"), "product") == {"generic"}


@pytest.mark.skipif(not X86, reason="this CPU is no x86")
def test_avx_vnni_with_its_instruction_emulated():
    if not any(name == "avx2" and not why_not for name, why_not in native.module().variants()):
        pytest.skip("only a CPU with AVX2 can run the rest of it")
    assert "avxvnni" in ran(run(build("release"), "--no-fork", "--emulate-avxvnni"), "product")


@pytest.mark.skipif(not X86, reason="this CPU is no x86")
@pytest.mark.parametrize(("cpu", "others", "products"), [
    ("Nehalem", {"baseline"}, {"generic"}),                    # SSE4.2
    ("IvyBridge", {"baseline"}, {"generic"}),                  # AVX
    ("Haswell", {"avx2", "baseline"}, {"avx2", "generic"}),
])
def test_no_illegal_instruction_on_older_cpus(cpu, others, products):
    emulator = [tool("qemu-x86_64"), "-cpu", cpu]
    lines = run(*emulator, build("release"), "--no-fork")
    for kind in ("decoder", "quantizer", "rows", "attention"):
        assert ran(lines, kind) == others
    assert ran(lines, "product") == products
    # The module itself, as Python loads it, with what it chooses there; results are those of this CPU to the bit.
    module = native.module().__file__
    script = Path(__file__).parent / "without_torch.py"
    outputs = [json.loads(subprocess.run([*before, sys.executable, "-I", "-S", script, module], capture_output=True,
                                         text=True, check=True, timeout=300).stdout) for before in ([], emulator)]
    assert outputs[0]["digest"] == outputs[1]["digest"]
    chosen = ", ".join(f"{kind} {outputs[1][kind]}" for kind in ("decoder", "attention", "product"))
    assert lines[0] == f"chosen: {chosen}"


def test_files_of_an_instruction_set_define_one_function():
    """Nothing that the linker could take for other files, and nothing that runs before a CPU was asked what it can."""
    folder = build("release").parent / "CMakeFiles" / "kernels.dir" / "csrc"
    objects = [path for path in folder.iterdir() if any(name in path.name for name in ("avx", "amx", "neon"))]
    assert objects or not X86
    for path in objects:
        listing = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        symbols = [line.split()[-2:] for line in listing.splitlines()]
        assert len([name for kind, name in symbols if kind.isupper() or kind in "uvw"]) == 1, (path.name, listing)
        assert not [name for _, name in symbols if "_GLOBAL__sub_I" in name], path.name


@pytest.mark.parametrize(("cpu", "best", "products"), [
    ("cortex-a53", "generic", {"generic"}),
    ("neoverse-n1", "neon-dot", {"neon-dot", "generic"}),
    ("max", "neon-i8mm", {"neon-i8mm", "neon-dot", "generic"}),
])
def test_arm(cpu, best, products):
    emulator = [tool("qemu-aarch64"), "-L", "/usr/aarch64-linux-gnu", "-cpu", cpu]
    lines = run(*emulator, build("arm"), "--no-fork", "--random", "10")
    assert ran(lines, "product") == products
    assert lines[0].endswith(f"product {best}")
    for kind in ("decoder", "quantizer", "rows", "attention"):
        assert ran(lines, kind) == {"baseline"}
