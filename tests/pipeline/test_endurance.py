"""Many pictures in one process, and processes that may not have the memory or the disk they want, or are killed.

Memory stays flat; what cannot be done ends in one clear line; no file is ever left half written.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
_QUIET = os.environ | {"LINOCUT_PROMPT_CACHE": "0", "LINOCUT_THREADS": "1"}

# Holes between what is in use come and go by 20 MB from picture to picture. With every larger block mapped by itself
# there are none, and what grows is what is held.
_NO_HOLES = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

_SOAK = """
import os, sys
import torch
from linocut.pipeline import memory
from linocut.pipeline.generate import Pipeline

torch.set_num_threads(1)
model, keep, pictures, side = sys.argv[1], sys.argv[2] == "keep", int(sys.argv[3]), int(sys.argv[4])
pipe, held = Pipeline.from_pretrained(model, keep_loaded=keep, prompt_cache=False), []
if sys.argv[2] == "stream":
    pipe.max_memory = 10**12  # follows plans; this one streams
    from dataclasses import replace
    usual = pipe._planner.default_ways
    pipe._planner.default_ways = lambda *size: replace(usual(*size), keep_loaded=False, stream=True, tile=16)
for i in range(pictures):
    pipe(f"{i} red apples", seed=i, width=side * (1 + i % 3), height=side, num_inference_steps=1 + i % 2)
    if i in (pictures // 5, pictures - 1):
        files, maps = len(os.listdir("/proc/self/fd")), len(open("/proc/self/maps").readlines())
        held.append((memory.resident_bytes(), files, maps))
print(*(after - before for before, after in zip(*held)))
"""


def _soak(model: Path | str, way: str, pictures: int, side: int) -> tuple[int, int, int]:
    """What memory, open files and maps grow by, from a fifth of the pictures on to the last."""
    done = subprocess.run([sys.executable, "-c", _SOAK, str(model), way, str(pictures), str(side)],
                          env=_QUIET | _NO_HOLES, capture_output=True, text=True, check=True)
    grown, files, maps = map(int, done.stdout.split())
    return grown, files, maps


@pytest.mark.parametrize("way", ["keep", "drop", "stream"])
def test_memory_files_and_maps_stay_as_they_were(tiny_model: Path, way: str) -> None:
    grown, files, maps = _soak(tiny_model, way, 15, 32)
    assert grown < 3_000_000
    assert files <= 0
    assert maps < 10


@pytest.mark.slow
@pytest.mark.parametrize("way", ["keep", "drop", "stream"])
def test_fifty_pictures_of_the_embedded_model_take_no_more_than_ten(way: str) -> None:
    grown, files, maps = _soak("embedded", way, 50, 128)
    assert grown < 3_000_000
    assert files <= 0
    assert maps < 10


# ---- limits of a process and of a container ------------------------------------------------------------------------

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
                          capture_output=True, text=True, env=_QUIET, check=False)
    _check(done, picture, drawn=spare > 500_000_000)


@pytest.fixture
def container() -> Iterator[Path]:
    """A control group inside the one that this test runs in; skips where none can be made."""
    group = None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers == "memory":
            group = Path("/sys/fs/cgroup/memory") / place.lstrip("/") / f"linocut-test-{os.getpid()}"
    try:
        assert group is not None, "no memory controller of version 1, whose groups take processes at any level"
        group.mkdir()
    except (OSError, AssertionError) as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    for _ in range(50):  # it is busy until its last process is gone
        try:
            group.rmdir()
            break
        except OSError:
            time.sleep(0.1)


_CONTAINED = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
from linocut.cli import main
main(["generate", "a red apple", "-m", sys.argv[2], "-s", "1", "--steps", "1", "-o", sys.argv[3]])
"""


@pytest.mark.parametrize("limit", [200_000_000, 1_000_000_000])
def test_a_containers_limit_ends_in_one_line_and_no_file(container: Path, tiny_model: Path, tmp_path: Path,
                                                         limit: int) -> None:
    (container / "memory.limit_in_bytes").write_text(str(limit))
    picture = tmp_path / "a.png"
    done = subprocess.run([sys.executable, "-c", _CONTAINED, str(container), str(tiny_model), str(picture)],
                          timeout=120, capture_output=True, text=True, env=_QUIET, check=False)
    _check(done, picture, drawn=limit > 500_000_000)


def _check(done: "subprocess.CompletedProcess[str]", picture: Path, drawn: bool) -> None:
    if drawn:
        assert done.returncode == 0, done.stderr
        assert list(picture.parent.iterdir()) == [picture]
        return
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "are free" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(picture.parent.iterdir()) == []


# ---- a full disk, a kill -------------------------------------------------------------------------------------------

_NO_ROOM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)  # a longer file fails as on a full disk
from linocut.cli import main
main(sys.argv[2:])
"""


def _without_room(room: int, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", _NO_ROOM, str(room), *map(str, arguments)], timeout=120, env=_QUIET,
                          capture_output=True, text=True, check=False)


def test_a_disk_without_room_for_the_picture(tiny_model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    given = ("generate", "a red apple", "-m", tiny_model, "-s", 1, "--steps", 1, "-o", picture)
    done = _without_room(2000, *given)
    assert done.returncode == 2, done.stderr
    assert str(picture) in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert _without_room(1_000_000, *given).returncode == 0
    before = picture.read_bytes()
    assert _without_room(2000, *given, "--force").returncode == 2
    assert picture.read_bytes() == before  # the old one is whole


def test_a_disk_without_room_for_the_model(dense_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = _without_room(20_000, "quantize", dense_model, out, "--encoding", "ternary")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(out.rglob("*.safetensors"))
    done = _without_room(10**9, "quantize", dense_model, out, "--encoding", "ternary")
    assert done.returncode == 0, done.stderr
    assert _without_room(10**9, "inspect", out, "--verify").returncode == 0


def test_a_full_disk(tiny_model: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)], capture_output=True,
                             check=False) if os.geteuid() == 0 else None
    if mounted is None or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        done = _without_room(10**9, "generate", "a red apple", "-m", tiny_model, "-s", 1, "--steps", 1, "-o",
                             disk / "a.png")
        assert done.returncode == 2, done.stderr
        assert "No space left" in done.stderr
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=False)


@pytest.mark.parametrize("after", [1, 4])
def test_a_kill_leaves_whole_pictures_only(tiny_model: Path, tmp_path: Path, after: int) -> None:
    given = ["generate", "a red apple", "-m", str(tiny_model), "-s", "1", "-n", "500", "-o",
             str(tmp_path / "{index}.png")]
    child = subprocess.Popen([sys.executable, "-m", "linocut", *given], env=_QUIET, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.png"))) < after and time.monotonic() < deadline:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    pictures = list(tmp_path.glob("[0-9]*.png"))
    assert after <= len(pictures) < 500
    for picture in pictures:
        with Image.open(picture) as image:
            image.load()
            assert "linocut" in image.info
