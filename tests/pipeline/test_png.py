"""Pictures carry a recipe that survives, are written whole or not at all, and are read without trust."""

import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from linocut.errors import FormatError, UsageError
from linocut.pipeline import png_pixels
from linocut.pipeline.png import Recipe, encode_png, read_recipe, write_png

RECIPE = Recipe("embedded", "0123456789ab", "a fox in the snow, ☃, \"quoted\"\nsecond line", 7, 64, 96, 4,
                kernel="native", versions={"linocut": "0.1.0"})


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((64, 96), 50).convert("RGB")


def test_recipe_and_pixels_survive(tmp_path: Path, image: Image.Image) -> None:
    write_png(image, tmp_path / "a.png", RECIPE)
    assert read_recipe(tmp_path / "a.png") == RECIPE
    with Image.open(tmp_path / "a.png") as again:
        assert again.tobytes() == image.tobytes()


def test_parameters_line_is_the_one_galleries_read(image: Image.Image, tmp_path: Path) -> None:
    write_png(image, tmp_path / "a.png", RECIPE)
    with Image.open(tmp_path / "a.png") as again:
        text = again.info["parameters"]
    settings = "Steps: 4, Sampler: Euler, CFG scale: 1, Seed: 7, Size: 64x96, Model hash: 0123456789ab, Model: embedded"
    assert text.startswith(f"{RECIPE.prompt}\n{settings}")


def test_same_picture_gives_same_bytes(image: Image.Image) -> None:
    assert encode_png(image, RECIPE) == encode_png(image, RECIPE)


@pytest.mark.parametrize("size", [(1, 1), (3, 64), (5, 65), (200, 1), (96, 130)])
def test_pixels_of_any_size_survive(size: tuple[int, int]) -> None:
    """Noise, flat colour and ramps: every filter is somebody's best."""
    width, height = size
    rng = np.random.default_rng(3)
    ramp = (np.arange(height)[:, None, None] * 3 + np.arange(width)[None, :, None] * 5 + np.arange(3)) % 256
    for pixels in (rng.integers(0, 256, (height, width, 3)), np.full((height, width, 3), 77), ramp,
                   np.clip(ramp // 2 + rng.integers(0, 3, ramp.shape), 0, 255)):
        picture = Image.fromarray(pixels.astype(np.uint8))
        png = encode_png(picture, RECIPE)
        with Image.open(io.BytesIO(png)) as again:
            again.load()
            assert again.tobytes() == picture.tobytes()
            assert again.info["parameters"].startswith(RECIPE.prompt)
        data = b"".join(png[start + 8:end] for kind, start, end in chunks(png) if kind == b"IDAT")
        assert len(zlib.decompress(data)) == height * (1 + 3 * width)  # whose checksum Pillow does not look at


def chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    start = 8
    while start < len(png):
        end = start + 8 + int.from_bytes(png[start : start + 4], "big")
        assert zlib.crc32(png[start + 4 : end]) == int.from_bytes(png[end : end + 4], "big")
        yield png[start + 4 : start + 8], start, end
        start = end + 4


def test_filters_are_those_of_the_specification() -> None:
    """Undone row by row by the specification's formulas; and each of the five is chosen somewhere."""
    rng = np.random.default_rng(5)
    plane = rng.integers(0, 256, (5, 1, 3))
    rows = [np.zeros((1, 40, 3)), rng.integers(0, 4, (1, 40, 3)),  # none
            np.cumsum(np.full((1, 40, 3), 5), 1) + 9, plane[:1].repeat(40, 1)]  # from the left
    rows.append(rows[-1] + 0)
    rows.append(rng.integers(0, 256, (1, 40, 3)))
    rows.append(rows[-1] + 1)  # from above
    rough = rng.integers(0, 256, (1, 40, 3))
    between = np.zeros_like(rough)  # what is left of it by the mean of both neighbours is a few ones
    for i in range(40):
        between[0, i] = ((between[0, i - 1] if i else 0) + rough[0, i]) // 2 + rng.integers(0, 2, 3)
    rows += [rough, between, rough, np.concatenate([rough[:, :1], rough[:, :-1]], 1)]
    pixels = (np.concatenate([*rows, rng.normal(0, 9, (30, 40, 3)).cumsum(0).cumsum(1)]) % 256).astype(np.uint8)
    png = encode_png(Image.fromarray(pixels), None)
    data = zlib.decompress(b"".join(png[start + 8:end] for kind, start, end in chunks(png) if kind == b"IDAT"))
    lines = np.frombuffer(data, np.uint8).reshape(len(pixels), -1)
    above, used = [0] * 120, set()
    for line, wanted in zip(lines, pixels.reshape(len(pixels), -1), strict=True):
        found: list[int] = []
        used.add(int(line[0]))
        for i, value in enumerate(line[1:].tolist()):
            a, b, c = (found[i - 3] if i >= 3 else 0), above[i], (above[i - 3] if i >= 3 else 0)
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            found.append((value + (0, a, b, (a + b) // 2, paeth)[line[0]]) % 256)
        assert found == wanted.tolist()
        above = found
    assert used == {0, 1, 2, 3, 4}


def test_bytes_do_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Image.effect_noise((200, 300), 40).convert("RGB")
    wanted = encode_png(picture, None)
    monkeypatch.setattr(png_pixels, "MOST_THREADS", 1)
    assert encode_png(picture, None) == wanted


def test_other_pictures_are_left_to_pillow() -> None:
    for mode in ("L", "1", "RGBA"):
        with Image.open(io.BytesIO(encode_png(Image.new(mode, (9, 7)), RECIPE))) as again:
            assert (again.mode, again.size) == (mode, (9, 7))


def test_files_are_no_larger_than_the_usual_ones(tmp_path: Path) -> None:
    """A drawing of the embedded model, and a photograph's kind of noise."""
    from linocut.pipeline.generate import Pipeline

    rng = np.random.default_rng(0)
    steps = rng.normal(0, 3, (256, 256, 3)).cumsum(0).cumsum(1) / 16
    photograph = Image.fromarray((steps % 256).astype(np.uint8))
    for picture in (Pipeline.from_pretrained("embedded")("a red apple", seed=1).images[0], photograph):
        picture.save(tmp_path / "usual.png")
        assert len(encode_png(picture, None)) < 1.02 * (tmp_path / "usual.png").stat().st_size


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path, image: Image.Image) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="exists"):
        write_png(image, path, RECIPE)
    assert path.read_bytes() == b"precious"
    write_png(image, path, RECIPE, force=True)
    assert read_recipe(path) == RECIPE


def test_force_through_a_link_replaces_what_it_points_to(tmp_path: Path, image: Image.Image) -> None:
    (tmp_path / "real.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to("real.png")
    write_png(image, tmp_path / "link.png", RECIPE, force=True)
    assert (tmp_path / "link.png").is_symlink()
    assert read_recipe(tmp_path / "real.png") == RECIPE


def test_a_failed_write_leaves_nothing(tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        write_png(image, tmp_path / "a.png", RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path, image: Image.Image) -> None:
    path = tmp_path / ("字" * 83 + ".png")  # 253 of 255 bytes
    write_png(image, path, RECIPE)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_what_a_killed_run_left_is_in_nobodys_way(tmp_path: Path, image: Image.Image,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Process numbers repeat, in containers at every start: the next run must not stumble over the last one's file."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with monkeypatch.context() as killed:
        killed.setattr(os, "unlink", lambda path: None)
        killed.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "killed")))
        with pytest.raises(UsageError):
            write_png(image, tmp_path / "a.png", RECIPE)
    (left,) = tmp_path.iterdir()
    write_png(image, tmp_path / "a.png", RECIPE)
    assert {each.name for each in tmp_path.iterdir()} == {left.name, "a.png"}


def test_umask_decides_permissions(tmp_path: Path, image: Image.Image) -> None:
    old = os.umask(0o022)
    try:
        write_png(image, tmp_path / "a.png", RECIPE)
    finally:
        os.umask(old)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o644


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_devices_are_written_in_place(image: Image.Image) -> None:
    with pytest.raises(UsageError, match="/dev/full"):
        write_png(image, "/dev/full", RECIPE)
    write_png(image, "/dev/null", RECIPE)
    assert Path("/dev/null").is_char_device()


def broken(**changes: object) -> str:
    fields = {**json.loads(RECIPE.to_json()), **changes}
    return json.dumps({name: value for name, value in fields.items() if value is not ...})


@pytest.mark.parametrize(("text", "message"), [
    ("nonsense", "not JSON"), ("[" * 100_000, "not JSON"), ("[1]", "JSON object"), (broken(version=99), "version"),
    (broken(prompt=...), "lacks 'prompt'"), (broken(seed="7"), "'seed'"), (broken(seed=-1), "out of range"),
    (broken(seed=2**70), "out of range"), (broken(width=True), "'width'"), (broken(steps=None), "'steps'"),
    (broken(versions=[1]), "'versions'"), (broken(tile="x"), "'tile'"),
])
def test_broken_recipes_are_refused(tmp_path: Path, image: Image.Image, text: str, message: str) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("linocut", text)
    image.save(tmp_path / "a.png", pnginfo=texts)
    with pytest.raises(FormatError, match=message):
        read_recipe(tmp_path / "a.png")


def test_unknown_fields_of_a_recipe_are_passed_over() -> None:
    assert Recipe.from_json(broken(invented_later=1)) == RECIPE


def test_files_without_a_recipe(tmp_path: Path, image: Image.Image) -> None:
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "photo.jpg")
    (tmp_path / "cut.png").write_bytes(encode_png(image, RECIPE)[:60])
    (tmp_path / "empty.png").touch()
    for name, message in (("plain.png", "no linocut recipe"), ("photo.jpg", "not a PNG"), ("none.png", "not exist"),
                          ("empty.png", "not a PNG"), ("cut.png", "cut.png")):
        with pytest.raises(UsageError, match=message):
            read_recipe(tmp_path / name)
