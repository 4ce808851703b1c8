"""Fetches the sprites of the embedded world from the npm registry into .cache/sprites (about 3 MB kept).

    python recipes/embedded/fetch_sprites.py [--out .cache/sprites] [--outlines]

Source: npm package @lobehub/fluent-emoji-3d 1.1.0, Microsoft's Fluent Emoji 3D (MIT licence). `npm` must be installed.
`--outlines` measures outlines and shapes of the sprites that are there and writes
src/linocut/train/objects/outlines.txt, which has to be done again when things are added.
"""

import argparse
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from linocut.train.sprites import edge_rgb, open_sprite, sprite_files
from linocut.train.vocabulary import objects

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
OUTLINES = Path(__file__).parents[2] / "src" / "linocut" / "train" / "objects" / "outlines.txt"
HEADER = ("# Of each sprite the mean colour of its outline (red green blue, 0..255), its width and height in percent "
          "of its square. Written by fetch_sprites.py --outlines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".cache/sprites"))
    parser.add_argument("--outlines", action="store_true", help="measure the sprites that are there; fetch none")
    options = parser.parse_args()
    if options.outlines:
        measure(options.out)
    else:
        fetch(options.out)


def fetch(out: Path) -> None:
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


def measure(folder: Path) -> None:
    lines = [HEADER]
    for thing, path in zip(objects(), sprite_files(folder, objects()), strict=True):
        sprite = open_sprite(path)
        shape = [(sprite[3] > 0.5).any(axis).float().mean() for axis in (0, 1)]
        values = [round(255 * value) for value in edge_rgb(sprite)] + [round(100 * float(share)) for share in shape]
        lines.append(f"{thing.code} " + " ".join(map(str, values)))
    OUTLINES.write_text("\n".join(lines) + "\n", "utf-8")
    print(f"outlines of {len(lines) - 1} sprites in {OUTLINES}")


if __name__ == "__main__":
    main()
