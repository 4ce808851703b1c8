"""Writing: all or nothing, whatever happens; and resuming."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from malicious import good_packed

from linocut.errors import FormatError, LinocutError
from linocut.formats import writer as writer_module
from linocut.formats.checkpoint import Checkpoint, CheckpointWriter, WriteError, atomic_write_bytes, write_checkpoint

ENV = os.environ | {"PYTHONPATH": str(Path(writer_module.__file__).resolve().parents[2])}
OLD = {"w": np.arange(4, dtype=np.float32)}
NEW = {"w": np.arange(4, dtype=np.float32) + 1, "big": np.zeros(100_000, np.float32)}


@pytest.fixture
def old(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, OLD)
    return path


def unharmed(path: Path) -> bool:
    with Checkpoint.open(path) as checkpoint:
        checkpoint.verify()
        return checkpoint.array("w").tolist() == [0, 1, 2, 3] and [p.name for p in path.parent.iterdir()] == [path.name]


def test_replacing_a_file(old):
    write_checkpoint(old, NEW)
    with Checkpoint.open(old) as checkpoint:
        assert checkpoint.verify() == 2
    assert [p.name for p in old.parent.iterdir()] == [old.name]


def test_a_mapped_file_may_be_replaced(old):
    with Checkpoint.open(old) as checkpoint:
        view = checkpoint.array("w")
        write_checkpoint(old, NEW)
        assert view.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "replace"])
def test_full_disk(old, monkeypatch, call):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer_module.os, call, full)
    with pytest.raises(WriteError, match=r"cannot write .*model.safetensors: No space left on device; free some space"):
        write_checkpoint(old, NEW)
    monkeypatch.undo()
    assert unharmed(old)


def test_full_disk_after_some_tensors(old, monkeypatch):
    calls = []
    real = os.pwrite

    def soon_full(fd, data, offset):
        calls.append(offset)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:100_000], offset)  # short writes happen, too

    monkeypatch.setattr(writer_module.os, "pwrite", soon_full)
    with pytest.raises(LinocutError, match="No space left"):
        write_checkpoint(old, NEW)
    monkeypatch.undo()
    assert unharmed(old)


def test_short_writes_are_continued(old, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(writer_module.os, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
    write_checkpoint(old, NEW)
    assert Checkpoint.open(old).verify() == 2


def test_a_size_limit_of_the_system(old):
    """A real limit, in a child process: the file may not pass 64 kB."""
    code = ("import sys, numpy as np\nfrom linocut.formats.checkpoint import write_checkpoint\n"
            "from linocut.errors import LinocutError\n"
            "try: write_checkpoint(sys.argv[1], {'big': np.zeros(100000, np.float32)})\n"
            "except LinocutError as error: print(error); sys.exit(2)")
    done = subprocess.run([sys.executable, "-c", code, str(old)], capture_output=True, text=True, check=False, env=ENV,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)))
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stdout
    assert unharmed(old)


def test_killed_while_writing(old):
    """SIGKILL in the middle leaves the old file, and the next run finishes the job."""
    code = ("import sys, time, numpy as np\nfrom linocut.formats.checkpoint import CheckpointWriter\n"
            "w = CheckpointWriter(sys.argv[1], [('w', 'F32', (4,)), ('big', 'F32', (100000,))], resume=True)\n"
            "w.write('big', np.ones(100000, np.float32))\nprint('half', flush=True)\ntime.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", code, str(old)], stdout=subprocess.PIPE, text=True, env=ENV)
    assert child.stdout is not None
    assert child.stdout.readline() == "half\n"
    with pytest.raises(WriteError, match="another process is writing"):
        CheckpointWriter(old, [("w", "F32", (4,))])
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert Checkpoint.open(old).array("w").tolist() == [0, 1, 2, 3]
    with CheckpointWriter(old, [("w", "F32", (4,)), ("big", "F32", (100000,))], resume=True) as writer:
        assert writer.done("big")
        assert writer.missing == ["w"]
        writer.write("w", np.zeros(4, np.float32))
    assert Checkpoint.open(old).verify() == 2
    assert [p.name for p in old.parent.iterdir()] == [old.name]


PLAN = [("a", "F32", (10,)), ("b", "F32", (10,))]


def half_written(path: Path) -> None:
    def run() -> None:
        with CheckpointWriter(path, PLAN, resume=True) as writer:
            writer.write("a", np.ones(10, np.float32))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()


def test_resume_checks_what_it_finds(tmp_path):
    path = tmp_path / "m.safetensors"
    half_written(path)
    assert not path.exists()
    partial = path.with_name("m.safetensors.partial")
    damaged = bytearray(partial.read_bytes())
    damaged[-60] ^= 1  # inside a or b
    damaged[-44] ^= 1
    partial.write_bytes(damaged)
    with CheckpointWriter(path, PLAN, resume=True) as writer:
        assert not writer.done("a")
        writer.write("a", np.ones(10, np.float32))
        writer.write("b", np.ones(10, np.float32))
    assert Checkpoint.open(path).verify() == 2


@pytest.mark.parametrize("plan", [[("a", "F32", (10,))], [("a", "F32", (10,)), ("b", "I32", (10,))]])
def test_resume_begins_anew_for_another_plan(tmp_path, plan):
    path = tmp_path / "m.safetensors"
    half_written(path)
    with CheckpointWriter(path, plan, resume=True) as writer:
        assert not writer.done("a")
        for name, dtype, shape in plan:
            writer.write(name, np.ones(shape, np.float32 if dtype == "F32" else np.int32))
    assert Checkpoint.open(path).verify() == len(plan)


def test_resume_survives_a_broken_journal(tmp_path):
    path = tmp_path / "m.safetensors"
    for junk in ("", "not json", "[1]\n", '{"plan": "other"}\n', None):
        half_written(path)
        journal = path.with_name("m.safetensors.partial.journal")
        text = journal.read_text()
        journal.write_text(text + '{"name": "b", "sha' if junk is None else junk)
        with CheckpointWriter(path, PLAN, resume=True) as writer:
            assert writer.done("a") == (junk is None)
            assert not writer.done("b")
            for name in writer.missing:
                writer.write(name, np.ones(10, np.float32))
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        assert Checkpoint.open(path).verify() == 2
        path.unlink()


def test_resume_survives_two_interruptions(tmp_path):
    path = tmp_path / "m.safetensors"
    half_written(path)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(path, PLAN, resume=True) as writer:
        raise KeyboardInterrupt
    with CheckpointWriter(path, PLAN, resume=True) as writer:
        assert writer.done("a")
        writer.write("b", np.ones(10, np.float32))
    assert Checkpoint.open(path).verify() == 2


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "m.safetensors", PLAN):
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())


def test_unfinished_close_is_refused(old):
    with pytest.raises(FormatError, match="1 tensors were declared but not written"), \
            CheckpointWriter(old, PLAN) as writer:
        writer.write("a", np.ones(10, np.float32))
    assert unharmed(old)


def test_writes_are_checked_against_the_plan(tmp_path):
    packed = good_packed()
    with CheckpointWriter(tmp_path / "m.safetensors", PLAN, {}, {"layer": ("ternary", (3, 256))}) as writer:
        for name, array, words in [
            ("a", np.ones(9, np.float32), r"shape \[10\]"), ("a", np.ones(10), "float32.*float64"),
            ("ghost", np.ones(10), "not declared"), ("a", packed, "declared"),
            ("layer", good_packed("affine4"), "affine4"), ("layer.codes", packed.codes[:2], "shape"),
        ]:
            with pytest.raises(FormatError, match=words):
                writer.write(name, array)
        with pytest.raises(FormatError, match="40 bytes"):
            writer.write_chunks("a", [np.ones(4, np.float32)])
        with pytest.raises(FormatError, match="more"):
            writer.write_chunks("a", [np.ones(8, np.float32)] * 2)
        writer.write_chunks("a", (np.full(2, i, np.float32) for i in range(5)))
        writer.write("b", np.ones((10, 2), np.float32)[:, 0])  # not contiguous
        assert not writer.done("layer")
        writer.write("layer", packed)
        assert writer.done("layer")
    with Checkpoint.open(tmp_path / "m.safetensors") as checkpoint:
        assert checkpoint.array("a").tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert checkpoint.verify() == 4


def test_plans_are_checked(tmp_path):
    path = tmp_path / "m.safetensors"
    for tensors, packed, words in [
        ([("a", "F32", (1,)), ("a", "F32", (1,))], {}, "declared twice"),
        ([("a", "F3", (1,))], {}, "dtype"), ([("a", "F32", (-1,))], {}, "-1"),
        ([("m.weight", "F32", (1,))], {"m": ("binary", (1, 128))}, "contradicts"),
        ([("m.codes", "U8", (1, 17))], {"m": ("binary", (1, 128))}, r"U8 \[1, 16\]"),
        ([], {"m": ("binary", (1, 100))}, "128"), ([], {"m": ("octal", (1, 128))}, "octal"),
    ]:
        with pytest.raises(FormatError, match=words):
            CheckpointWriter(path, tensors, {}, packed)
    with pytest.raises(FormatError, match="metadata"):
        CheckpointWriter(path, [], {"a": 1})  # type: ignore[dict-item]
    with pytest.raises(FormatError, match="dtype"):
        write_checkpoint(path, {"a": np.zeros(1, "datetime64[s]")})
    with pytest.raises(WriteError, match="No such file or directory"):
        write_checkpoint(tmp_path / "no" / "m.safetensors", OLD)
    assert not list(tmp_path.iterdir())


def test_atomic_write_bytes(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    atomic_write_bytes(path, b"one")
    atomic_write_bytes(path, b"two")
    assert path.read_bytes() == b"two"

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module.os, "fsync", full)
    with pytest.raises(WriteError):
        atomic_write_bytes(path, b"three")
    monkeypatch.undo()
    assert path.read_bytes() == b"two"
    assert len(list(tmp_path.iterdir())) == 1


def test_writing_does_not_hold_memory(tmp_path):
    """Chunks stream through: 200 MB pass with little growth of this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with CheckpointWriter(tmp_path / "m.safetensors", [("a", "U8", (200, 1 << 20))]) as writer:
        block = np.zeros((1, 1 << 20), np.uint8)
        writer.write_chunks("a", (block for _ in range(200)))
    assert time.perf_counter() - started < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000
