"""`linocut bench memory` on next to nothing: the whole process is sampled, phases are told apart, all of it is kept."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from linocut.cli import main
from linocut.cli.bench import report
from linocut.cli.bench.memory import PHASES, plot
from linocut.cli.bench.watch import Series, Watch

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="counts memory as Linux lists it")

_CHILD = """
import mmap, sys
def wait():
    print(flush=True)
    sys.stdin.readline()
wait()
block = bytearray(200_000_000)
block[::4096] = b"1" * len(block[::4096])
wait()
del block
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sum(mapped[::4096])
wait()
"""


def test_a_process_is_watched_with_its_mapped_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(100_000_000))
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    seen = []
    with Watch(child.pid) as watch:
        for _ in range(3):
            child.stdout.readline()
            start, samples, shares = time.monotonic(), len(watch.rss.values), len(watch.pss.values)
            deadline = start + 60
            while (len(watch.rss.values) < samples + 3 or len(watch.pss.values) < shares + 2) \
                    and time.monotonic() < deadline:
                time.sleep(0.01)
            seen.append(watch.rss.between(start, time.monotonic()))
            child.stdin.write("\n")
            child.stdin.flush()
        child.wait()
    plain, block, mapped = (each.peak for each in seen)
    assert plain < 50e6
    assert 190e6 < block - plain < 230e6
    assert 95e6 < mapped - plain < 130e6
    assert watch.pss.peak > 190e6
    assert min(watch.rss.values) < watch.rss.mean < watch.rss.peak
    later = time.monotonic()
    assert watch.rss.between(later, later + 1).values == []


def test_means_are_over_time_and_thinning_keeps_peaks() -> None:
    series = Series([0.0, 1.0, 1.1, 1.2, 2.0], [100, 900, 100, 100, 100])
    assert series.mean == round((100 * 1.0 + 900 * 0.1 + 100 * 0.1 + 100 * 0.8) / 2.0)
    assert series.thinned(2) == [(0.0, 100), (1.0, 900)]
    assert max(value for _, value in series.thinned(100)) == 900
    assert Series().thinned(10) == []
    assert series.at(1.05).values == [900]
    assert series.at(-1.0).values == [100]


@pytest.fixture
def bench(capsys, monkeypatch):
    monkeypatch.setenv("LINOCUT_THREADS", "1")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["bench", "memory", *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.mark.slow
def test_drawing_is_watched_ours_and_torchs(bench, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    common = (tiny_model, "--size", "64x64", "--steps", 1, "-o", file)
    code, out, err = bench(*common, "--work", tmp_path / "work", "--max-memory", "2GB")
    assert code == 0, err
    results = report.read(file, "memory")["results"]
    assert list(results) == ["linocut", "torch bf16"]
    for arm, found in results.items():
        assert 100e6 < found["phases"]["denoise"]["mean"] <= found["phases"]["denoise"]["peak"] <= found["peak"] < 2e9
        assert found["mean"] <= found["peak"]
        assert 0 < found["pss_mean"] <= found["pss_peak"] <= found["peak"]
        assert list(found["phases"]) == list(PHASES)
        assert sum(phase["seconds"] for phase in found["phases"].values()) == pytest.approx(found["seconds"], abs=0.1)
        assert f"{arm}: mean" in out
    assert results["linocut"]["planned_peak"] >= results["linocut"]["peak"]
    assert results["torch bf16"]["planned_peak"] is None
    assert "|start" in out
    before = file.read_bytes()
    code, out, _ = bench(*common, "--work", tmp_path / "work", "--max-memory", "2GB", "--json")
    assert code == 0
    assert file.read_bytes() == before  # nothing is run again
    assert json.loads(out)["results"] == results
    assert "other settings" in bench(*common)[2]


def test_what_it_needs_is_said(bench, tiny_model: Path) -> None:
    code, _, err = bench(tiny_model, "--arm", "torch bf16")
    assert code == 2
    assert "--work DIR" in err
    code, _, err = bench(tiny_model, "--max-memory", "100MB")
    assert code == 2
    assert "no size would fit" in err


def test_the_plot_shows_heights_and_phases() -> None:
    drawn = plot([[0.0, 100], [5.0, 1000], [9.0, 100]], {"start": {"seconds": 5.0}, "encode": {"seconds": 5.0}})
    rows = drawn.splitlines()
    assert rows[0].count("█") > 10
    assert rows[0].index("█") > 40  # the second half
    assert rows[-2].split() == ["|start", "|encode"]
    assert rows[-1].split() == ["0", "s", "10", "s"]
