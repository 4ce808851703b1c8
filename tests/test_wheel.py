"""The wheel and the sdist, each installed into a clean environment outside the repository, draw a picture.

What is real here: the build, the archives, pip's installation of linocut, the installed command, a working directory
elsewhere. What is borrowed, to save minutes and gigabytes: torch and the other dependencies. They come from the
environment that runs the tests, by a .pth file that is added after pip has installed linocut. Such a path is only
searched, its own .pth files are not run, so that the tests' editable linocut cannot stand in for the installed one;
each test asserts that.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "src" / "linocut" / "data" / "embedded" / "model_index.json"
OLDEST_GLIBC = (2, 28)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> dict[str, Path]:
    """{"sdist": path, "wheel": path}, built as `make wheel` builds them."""
    spec = spec_from_file_location("build_wheel", ROOT / "scripts" / "build_wheel.py")
    assert spec is not None
    assert spec.loader is not None
    builder = module_from_spec(spec)
    spec.loader.exec_module(builder)
    sdist, wheel = builder.build(tmp_path_factory.mktemp("dist"))
    return {"sdist": sdist, "wheel": wheel}


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def installed(request, archives, tmp_path_factory) -> Path:
    """The bin folder of a clean environment that holds linocut from one of the archives."""
    home = tmp_path_factory.mktemp(f"venv-{request.param}")
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    python = home / "bin" / "python"
    # The sdist's build tools come through pip's own build isolation, as they would for a user.
    subprocess.run([python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps",
                    archives[request.param]], check=True)
    target = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                            check=True, capture_output=True, text=True).stdout.strip()
    Path(target, "borrowed_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return home / "bin"


def run(installed: Path, cwd: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run an installed program elsewhere, with nothing of this repository on its paths."""
    ours = ("PYTHON", "LINOCUT", "PYTEST")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    environment["HF_HUB_OFFLINE"] = "1"
    return subprocess.run([installed / command[0], *command[1:]], cwd=cwd, env=environment, capture_output=True,
                          text=True, check=False)


def test_the_installed_package_is_the_archive(installed, tmp_path):
    done = run(installed, tmp_path, "python", "-c",
               "import linocut, linocut._native as n; print(linocut.__file__); print(n.__file__)")
    assert done.returncode == 0, done.stderr
    for line in done.stdout.split():
        assert line.startswith(str(installed.parent)), f"{line} is not the installed package"


def test_help_and_version(installed, tmp_path):
    assert "generate" in run(installed, tmp_path, "linocut", "--help").stdout
    assert "linocut" in run(installed, tmp_path, "linocut", "--version").stdout


def test_doctor_finds_everything(installed, tmp_path):
    done = run(installed, tmp_path, "linocut", "doctor", "--json")
    report = json.loads(done.stdout)
    assert report["native"]["available"] is True
    assert all(each["ok"] for each in report["checks"])
    assert done.returncode == 0, report["problems"]


@pytest.mark.parametrize("model", ["embedded", "embedded-binary"])
def test_it_draws(installed, tmp_path, model):
    done = run(installed, tmp_path, "linocut", "generate", "a red apple", "--model", model, "--seed", "1",
               "-o", "apple.png")
    assert done.returncode == 0, done.stderr
    from PIL import Image

    with Image.open(tmp_path / "apple.png") as picture:
        assert picture.size == (256, 256)
        low, high = picture.convert("L").getextrema()
        assert high - low > 100, "the picture is flat"


def test_wheel_runs_on_older_systems(archives):
    """libstdc++ is inside and newer glibc functions are avoided; see CMakeLists.txt."""
    found = re.search(r"manylinux_(\d+)_(\d+)_", archives["wheel"].name)
    assert found is not None, f"{archives['wheel'].name} is no manylinux wheel"
    assert tuple(map(int, found.groups())) <= OLDEST_GLIBC


def test_archives_hold_what_they_should(archives):
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        names = wheel.namelist()
    assert any(re.fullmatch(r"linocut/_native\..*so", name) for name in names)
    assert "linocut/py.typed" in names
    assert "linocut/train/objects/geneval.txt" in names
    assert {name.split("/")[-1] for name in names if "licenses/" in name} >= {"LICENSE", "NOTICE"}
    assert not [name for name in names if name.startswith(("tests", "csrc", "recipes", "build"))]
    shipped = {path.relative_to(ROOT / "src").as_posix() for path in EMBEDDED.parent.rglob("*") if path.is_file()}
    assert shipped, "the embedded model is missing from the source tree"
    assert shipped <= set(names)
