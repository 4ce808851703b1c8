"""The gallery: search, marks in the file, deletion that can be undone, a database that the files can replace."""

import io
import json
import os
import struct
import threading
import time
import zipfile
import zlib

import pytest
from PIL import Image

from linocut.errors import FormatError
from linocut.pipeline.png import Recipe, encode_png, read_recipe
from linocut.server.gallery import TRASH_SECONDS, Gallery, NoSuchImage, NotInTrash
from linocut.server.marks import Marks, read_marks, with_marks


def recipe(prompt="two red apples", seed=1, model="embedded"):
    return Recipe(model, "0123456789ab", prompt, seed, 32, 32, 4)


def png(made, colour="red"):
    return encode_png(Image.new("RGB", (32, 32), colour), made)


def fill(gallery, *prompts):
    return [gallery.add(png(recipe(prompt, i)), recipe(prompt, i))["id"] for i, prompt in enumerate(prompts)]


def found(gallery, query="", **filters):
    return [entry["prompt"] for entry in gallery.search(query, **filters)[0]]


@pytest.fixture
def gallery(tmp_path):
    opened = Gallery(tmp_path / "gallery")
    yield opened
    opened.close()


def test_search_finds_beginnings_of_words_newest_first(gallery):
    fill(gallery, "two red apples", "a blue cup", "Äpfel und red cups")
    assert found(gallery) == ["Äpfel und red cups", "a blue cup", "two red apples"]
    assert found(gallery, "cup") == ["Äpfel und red cups", "a blue cup"]
    assert found(gallery, "apfel RED") == ["Äpfel und red cups"]
    assert found(gallery, "embedded appl") == ["two red apples"]
    assert found(gallery, "zebra") == []
    for odd in ('"', "red OR *", "NEAR(", "-red", "a:b", "\0", "'; DROP TABLE images; --", "^", "\u0301", "()"):
        found(gallery, odd)
    assert len(found(gallery)) == 3


def test_pages_follow_each_other(gallery):
    ids = fill(gallery, *(f"number {i}" for i in range(5)))
    first, cursor, total = gallery.search(limit=2)
    second, cursor, _ = gallery.search(limit=2, after=cursor)
    third, end, _ = gallery.search(limit=2, after=cursor)
    assert [entry["id"] for entry in first + second + third] == ids[::-1]
    assert end is None
    assert total == 5


def test_filters(gallery):
    one, two = fill(gallery, "one", "two")
    gallery.mark(one, favourite=True, tags=["fruit", "red", "fruit"])
    assert gallery.entry(one)["tags"] == ["fruit", "red"]
    assert found(gallery, favourite=True) == ["one"]
    assert found(gallery, tag="fruit") == ["one"]
    assert found(gallery, "frui") == ["one"], "tags are searched too"
    assert found(gallery, model="other") == []
    middle = gallery.entry(two)["created"]
    assert found(gallery, since=middle) == ["two"]
    assert found(gallery, until=middle) == ["one"]
    assert gallery.tags() == [{"tag": "fruit", "count": 1}, {"tag": "red", "count": 1}]
    gallery.mark(one, favourite=False)
    assert gallery.entry(one)["tags"] == ["fruit", "red"], "the other mark stays"


def test_marks_live_in_the_file_beside_the_recipe():
    plain = png(recipe())
    marked = with_marks(plain, Marks(True, ("größe", "b")))
    assert read_marks(marked) == Marks(True, ("größe", "b"))
    assert read_recipe(io.BytesIO(marked)) == recipe()
    assert Image.open(io.BytesIO(marked)).tobytes() == Image.open(io.BytesIO(plain)).tobytes()
    assert with_marks(marked, Marks()) == plain
    assert read_marks(plain) == Marks()


@pytest.mark.parametrize("broken", [b"", b"GIF89a", png(recipe())[:60]])
def test_what_is_no_png_cannot_be_marked(broken):
    with pytest.raises(FormatError):
        with_marks(broken, Marks(True))


def test_deletion_can_be_undone(gallery):
    one, two = fill(gallery, "one", "two")
    with pytest.raises(NoSuchImage):
        gallery.trash([one, "20200101-000000-000000-0000"])
    assert found(gallery) == ["two", "one"], "all or none"
    gallery.trash([one, one])
    when = gallery.entry(one)["trashed"]
    assert when == pytest.approx(time.time(), abs=60)
    assert gallery.trash([one])[0]["trashed"] == when, "deleted once"
    assert found(gallery) == ["two"]
    assert found(gallery, trashed=True) == ["one"]
    assert gallery.file(one).is_file(), "still there to look at"
    gallery.mark(one, favourite=True)
    assert gallery.file(one).stat().st_mtime == pytest.approx(when, abs=0.001), "marks do not make it younger"
    assert gallery.restore([one, two])[0]["trashed"] is None
    assert found(gallery) == ["two", "one"]
    assert gallery.file(one).parent.name == "images"


def test_pictures_that_move_are_read_all_the_same(gallery):
    """A browser asks for a picture at the moment in which it is deleted, restored or destroyed."""
    (one,) = fill(gallery, "one")
    data, over = gallery.read(one), threading.Event()

    def move():
        while not over.is_set():
            gallery.trash([one])
            gallery.restore([one])

    moving = threading.Thread(target=move)
    moving.start()
    try:
        assert {gallery.read(one) for _ in range(300)} == {data}
        assert gallery.recipe(one)["prompt"] == "one"
    finally:
        over.set()
        moving.join()
    gallery.trash([one])
    gallery.purge([one])
    (two,) = fill(gallery, "two")
    gallery.file(two).unlink()  # by hand, while the server runs
    with pytest.raises(NoSuchImage, match="gone"):
        gallery.read(two)
    for look in (gallery.read, gallery.thumbnail, gallery.recipe):
        with pytest.raises(NoSuchImage):
            look(one)


def test_what_is_deleted_can_be_destroyed_and_nothing_else(gallery):
    one, two, three = fill(gallery, "one", "two", "three")
    gallery.trash([one, two])
    gallery.thumbnail(one)
    for ids, error in (([one, three], NotInTrash), ([one, "20200101-000000-000000-0000"], NoSuchImage)):
        with pytest.raises(error):
            gallery.purge(ids)
    assert found(gallery, trashed=True) == ["two", "one"], "all or none"
    assert [entry["id"] for entry in gallery.purge([one, one])] == [one]
    assert found(gallery, trashed=True) == ["two"]
    assert found(gallery, "one", trashed=True) == []
    assert not [path for path in gallery.root.rglob("*") if path.stem == one]
    with pytest.raises(NoSuchImage):
        gallery.entry(one)
    assert gallery.size()[0] == 1


def test_the_trash_is_emptied_of_what_is_old(gallery):
    old, fresh, _ = fill(gallery, "old", "fresh", "kept")
    gallery.trash([old, fresh])
    past = time.time() - TRASH_SECONDS - 60
    os.utime(gallery.file(old), (past, past))
    again = Gallery(gallery.root)
    assert found(again, trashed=True) == ["fresh"]
    assert found(again) == ["kept"]
    assert not (gallery.root / "trash" / f"{old}.png").exists()


@pytest.mark.parametrize("damage", ["missing", "garbage", "truncated"])
def test_the_database_is_made_again_from_the_pictures(gallery, damage):
    one, two, _ = fill(gallery, "one", "two", "three")
    gallery.mark(one, favourite=True, tags=["a"])
    gallery.trash([two])
    before = gallery.search(limit=10)[0] + gallery.search(limit=10, trashed=True)[0]
    gallery.close()
    base = gallery.root / "gallery.sqlite"
    for log in gallery.root.glob("gallery.sqlite-*"):
        log.unlink()
    if damage == "missing":
        base.unlink()
    else:
        base.write_bytes(b"not a database " * 500 if damage == "garbage" else base.read_bytes()[:5000])
    again = Gallery(gallery.root)
    after = again.search(limit=10)[0] + again.search(limit=10, trashed=True)[0]
    for old, new in zip(before, after, strict=True):
        assert new.pop("trashed") == pytest.approx(old.pop("trashed"), abs=0.01)
        assert new == old
    assert found(again, "thre") == ["three"]


def test_what_a_crash_left_out_of_step_is_put_right(gallery):
    one, two = fill(gallery, "one", "two")
    gallery.file(two).unlink()  # a row without a file
    made = recipe("three")
    (gallery.root / "images" / "20300101-000000-000000-abcd.png").write_bytes(png(made))  # a file without a row
    (gallery.root / "images" / ".linocut-0011.partial").write_bytes(b"half")
    (gallery.root / "images" / "20300101-000000-000000-0000.png").write_bytes(b"no picture")
    (gallery.root / "images" / "holiday.png").write_bytes(png(made))
    again = Gallery(gallery.root)
    assert found(again) == ["three", "one"]
    assert again.entry("20300101-000000-000000-abcd")["created"] == 1893456000
    assert not list(gallery.root.rglob("*.partial"))
    assert again.file(one).is_file()


def test_pictures_are_marked_deleted_and_exported_over_http(server):
    job = server.finished(server.job("a green frog", num_images=2))
    one, two = (image["id"] for image in job["images"])
    marked = server.ask("PATCH", f"/api/images/{one}", {"favourite": True, "tags": ["frog"]})
    assert (marked.json["favourite"], marked.json["tags"]) == (True, ["frog"])
    assert [image["id"] for image in server.images("&query=green+fro&favourite=true")] == [one]
    assert server.ask("GET", "/api/tags").json["tags"] == [{"tag": "frog", "count": 1}]
    whole = server.ask("GET", f"/api/images/{one}").json
    assert whole["recipe"]["prompt"] == "a green frog"

    archive = zipfile.ZipFile(io.BytesIO(server.ask("POST", "/api/images/export", {"ids": [one, two]}).body))
    assert archive.testzip() is None
    assert set(archive.namelist()) == {f"{one}.png", f"{two}.png", "recipes.json"}
    assert json.loads(archive.read("recipes.json"))[0]["tags"] == ["frog"]
    assert read_recipe(io.BytesIO(archive.read(f"{two}.png"))).prompt == "a green frog"

    assert server.ask("POST", "/api/images/trash", {"ids": [one]}).json["images"][0]["trashed"]
    assert one not in [image["id"] for image in server.images()]
    assert [image["id"] for image in server.images("&trashed=true")] == [one]
    server.ask("POST", "/api/images/restore", {"ids": [one]})
    assert one in [image["id"] for image in server.images()]
    assert server.ask("POST", "/api/images/trash", {"ids": ["nothing"]}).status == 404
    refused = server.ask("POST", "/api/images/purge", {"ids": [two]})
    assert (refused.status, "not deleted" in refused.sentence) == (409, True)
    server.ask("POST", "/api/images/trash", {"ids": [two]})
    assert server.ask("POST", "/api/images/purge", {"ids": [two]}).json["images"][0]["id"] == two
    assert server.ask("GET", f"/api/images/{two}").status == 404

    thumbnail = server.ask("GET", f"/api/images/{one}/thumbnail")
    assert thumbnail.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(thumbnail.body)).size == (64, 64)
    download = server.ask("GET", f"/api/images/{one}/file?download=true")
    assert download.headers["content-disposition"] == f'attachment; filename="{one}.png"'


def test_a_recipe_is_read_from_an_upload(server):
    image = server.finished(server.job("a red car", seed=3))["images"][0]
    data = server.ask("GET", image["url"]).body
    answer = server.ask("POST", "/api/recipe", data, content_type="image/png")
    assert answer.json["recipe"]["seed"] == 3
    assert (answer.json["model_known"], answer.json["same_weights"]) == (True, True)
    other = server.ask("POST", "/api/recipe", png(recipe(model="elsewhere")), content_type="image/png").json
    assert (other["model_known"], other["same_weights"]) == (False, None)
    plain = encode_png(Image.new("RGB", (8, 8)), None)
    for body, words in ((plain, "no linocut recipe"), (b"GIF89a", "not a PNG"), (data[:40], "not a PNG"),
                        (data[:120], "cannot be read"), (b"", "not a PNG")):
        refused = server.ask("POST", "/api/recipe", body, content_type="image/png")
        assert refused.status == 400
        assert words in refused.sentence
        assert "the uploaded file" in refused.sentence
    assert server.ask("POST", "/api/recipe", data, content_type="text/html").status == 415
    bomb = server.ask("POST", "/api/recipe", encode_png(Image.new("1", (9000, 9000)), None), content_type="image/png")
    assert (bomb.status, "9000 x 9000" in bomb.sentence) == (400, True)
    large = encode_png(Image.new("1", (9000, 9000)), None)
    chunk = b"tEXt" + b"a\0" + struct.pack(">II", 1, 1)
    hidden = large[:8] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + large[8:]
    bomb = server.ask("POST", "/api/recipe", hidden, content_type="image/png")
    assert (bomb.status, "size at its beginning" in bomb.sentence) == (400, True)
