"""Fetches the sprites of the embedded world from the npm registry into .cache/sprites (about 0.7 MB kept).

    python recipes/embedded/fetch_sprites.py [--out .cache/sprites]

Source: npm package @lobehub/fluent-emoji-3d 1.1.0, Microsoft's Fluent Emoji 3D (MIT licence). `npm` must be installed.
"""

import argparse
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from linocut.train.scenes import objects

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".cache/sprites"))
    out: Path = parser.parse_args().out
    wanted = {f"{thing.code}{suffix}.webp" for thing in objects() for suffix in ("", "-fe0f")}
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=work, check=True, stdout=subprocess.DEVNULL)
        out.mkdir(parents=True, exist_ok=True)
        kept = 0
        with tarfile.open(next(Path(work).glob("*.tgz"))) as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and name in wanted:
                    source = archive.extractfile(member)
                    assert source is not None
                    with (out / name).open("wb") as target:
                        shutil.copyfileobj(source, target)
                    kept += 1
    print(f"{kept} sprites in {out}")


if __name__ == "__main__":
    main()
