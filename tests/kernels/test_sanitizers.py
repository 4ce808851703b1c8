"""The C++ sources under the address and undefined-behaviour sanitizers, without Python in between."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent.parent.parent / "csrc"
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
FLAGS = {"decode_avx2.cpp": AVX2, "decode_avx512.cpp": AVX512, "quantize_avx2.cpp": AVX2, "quantize_avx512.cpp": AVX512}


@pytest.mark.slow
def test_decoders_are_clean_under_sanitizers(tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "building linocut's tests takes a C++ compiler; on Debian: apt-get install g++"
    common = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
              "-fno-sanitize-recover=all"]
    names = ["cpu_features.cpp", "generic.cpp", "decode_baseline.cpp", "quantize_baseline.cpp",
             "tests/fuzz_decoders.cpp"]
    if platform.machine() in ("x86_64", "AMD64"):
        common.append("-DLINOCUT_X86")
        names += list(FLAGS)
    objects = []
    for name in names:
        objects.append(tmp_path / (Path(name).stem + ".o"))
        subprocess.run([compiler, *common, *FLAGS.get(name, []), "-c", SOURCES / name, "-o", objects[-1]], check=True)
    program = tmp_path / "fuzz"
    subprocess.run([compiler, *common, *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cleanly" in done.stdout
