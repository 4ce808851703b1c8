"""Many pictures in one process, and processes that may not have the memory they want: flat, or one clear line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")

_SOAK = """
import os, sys
import torch
from linocut.pipeline import memory
from linocut.pipeline.generate import Pipeline

torch.set_num_threads(1)
for keep in (True, False):
    pipe, held = Pipeline.from_pretrained(sys.argv[1], keep_loaded=keep), []
    for i in range(50):
        pipe(f"{i} red apples", seed=i, width=32 + 32 * (i % 3), height=32, num_inference_steps=1 + i % 2)
        if i in (9, 49):
            files, maps = len(os.listdir("/proc/self/fd")), len(open("/proc/self/maps").readlines())
            held.append((memory.resident_bytes(), files, maps))
    print(*(after - before for before, after in zip(*held)))
    pipe.close()
"""


def test_fifty_pictures_leave_memory_files_and_maps_as_they_were(tiny_model: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _SOAK, str(tiny_model)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2  # networks kept in memory, and dropped
    for line in lines:
        grown, files, maps = map(int, line.split())
        assert grown < 3_000_000
        assert files <= 0
        assert maps < 10


_LIMITED = """
import resource, sys
import torch
import linocut.pipeline.generate
from linocut.cli import main

torch.set_num_threads(1)
held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData:"))
resource.setrlimit(resource.RLIMIT_DATA, (held + int(sys.argv[2]),) * 2)
main(["generate", "a red apple", "-m", sys.argv[1], "-s", "1", "--steps", "1", "-o", sys.argv[3], "--threads", "1"])
"""


@pytest.mark.parametrize("spare", [1_000_000, 100_000_000, 1_000_000_000])
def test_a_process_limit_ends_in_one_line_and_no_file(tiny_model: Path, tmp_path: Path, spare: int) -> None:
    picture = tmp_path / "a.png"
    done = subprocess.run([sys.executable, "-c", _LIMITED, str(tiny_model), str(spare), str(picture)], timeout=120,
                          capture_output=True, text=True, env=os.environ | {"LINOCUT_PROMPT_CACHE": "0"}, check=False)
    if spare < 500_000_000:
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "are free" in done.stderr
        assert done.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
    else:
        assert done.returncode == 0, done.stderr
        assert list(tmp_path.iterdir()) == [picture]
