"""Finished pictures: PNG files that are the truth, and an SQLite database that finds them.

    images/ID.png   a picture with its recipe and its marks      trash/ID.png   one that was deleted, for a while
    thumbs/ID.webp  made when it is first asked for              gallery.sqlite WAL, with full-text search

A file appears under its name whole or not at all, and before its row; what a crash leaves out of step is put right when
the gallery is opened: rows are made from files and dropped with them. An ID is the moment of drawing (UTC) and four
random digits, so names sort by time.
"""

import contextlib
import io
import json
import logging
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from linocut.errors import FormatError, LinocutError, UsageError
from linocut.pipeline.png import Recipe, read_recipe, recipe_dict
from linocut.server.marks import Marks, read_marks, with_marks

TRASH_SECONDS = 30 * 86400
THUMBNAIL_SIDE = 256
_ID = re.compile(r"\d{8}-\d{6}-\d{6}-[0-9a-f]{4}")
_SCHEMA_VERSION = 1
_SCHEMA = f"""
    CREATE TABLE images (
        number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, created REAL NOT NULL, model TEXT NOT NULL,
        model_hash TEXT NOT NULL, prompt TEXT NOT NULL, seed INTEGER, width INTEGER NOT NULL, height INTEGER NOT NULL,
        steps INTEGER NOT NULL, guidance REAL NOT NULL, favourite INTEGER NOT NULL, tags TEXT NOT NULL,
        bytes INTEGER NOT NULL, trashed REAL);
    CREATE VIRTUAL TABLE words USING fts5(prompt, tags, model, tokenize = 'unicode61 remove_diacritics 2');
    PRAGMA user_version = {_SCHEMA_VERSION};
"""
_COLUMNS = ("id", "created", "model", "model_hash", "prompt", "seed", "width", "height", "steps", "guidance",
            "favourite", "tags", "bytes", "trashed")
log = logging.getLogger("linocut.server")
Entry = dict[str, Any]


class NoSuchImage(LinocutError):
    """The gallery has no picture of this ID."""


class NotInTrash(LinocutError):
    """Only what was deleted can be destroyed."""


class Gallery:
    """Pictures in the folder `root`, which is made if it is not there. Safe for use from any thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.RLock()
        for name in ("images", "trash", "thumbs"):
            folder = root / name
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for partial in folder.glob(".linocut-*.partial"):  # a process was killed while it wrote them
                partial.unlink(missing_ok=True)
        self._base = self._open_database()
        self._match_files()

    # ---- pictures in ---------------------------------------------------------------------------------------------

    def add(self, png: bytes, recipe: Recipe) -> Entry:
        """Keep a picture: its file, then its row. Returns the entry; an OSError means that nothing was kept."""
        image_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{secrets.token_hex(2)}"
        _write(self._file(image_id), png)
        with self._lock, self._base:
            self._insert(image_id, recipe, Marks(), len(png), None)
        return self.entry(image_id)

    def mark(self, image_id: str, favourite: bool | None = None, tags: Sequence[str] | None = None) -> Entry:
        """Change what the user says of a picture; None leaves a mark as it is. Raises NoSuchImage."""
        with self._lock:
            entry = self.entry(image_id)
            marks = Marks(entry["favourite"] if favourite is None else favourite,
                          tuple(entry["tags"] if tags is None else dict.fromkeys(tags)))
            path = self.file(image_id)
            png = with_marks(path.read_bytes(), marks)
            _write(path, png)
            if entry["trashed"] is not None:
                os.utime(path, (entry["trashed"], entry["trashed"]))  # still the time of its deletion
            with self._base:
                self._base.execute("UPDATE images SET favourite = ?, tags = ?, bytes = ? WHERE id = ?",
                                   (marks.favourite, json.dumps(marks.tags), len(png), image_id))
                self._base.execute("UPDATE words SET tags = ? WHERE rowid = (SELECT number FROM images WHERE id = ?)",
                                   (" ".join(marks.tags), image_id))
            return self.entry(image_id)

    def trash(self, ids: Sequence[str]) -> list[Entry]:
        """Delete pictures so that `restore` can bring them back. Raises NoSuchImage before anything is changed."""
        return self._move(ids, time.time())

    def restore(self, ids: Sequence[str]) -> list[Entry]:
        """Bring deleted pictures back. Raises NoSuchImage before anything is changed."""
        return self._move(ids, None)

    def purge(self, ids: Sequence[str]) -> list[Entry]:
        """Destroy pictures that lie in the trash, and return what they were.

        Raises NoSuchImage or NotInTrash before anything is changed.
        """
        with self._lock:
            entries = [self.entry(image_id) for image_id in dict.fromkeys(ids)]
            for entry in entries:
                if entry["trashed"] is None:
                    raise NotInTrash(f"the picture {entry['id']} is not deleted; delete it first, then destroy it")
            for entry in entries:
                self._destroy(entry["id"])
            with self._base:
                for entry in entries:
                    self._forget(entry["id"])
        return entries

    def _move(self, ids: Sequence[str], trashed: float | None) -> list[Entry]:
        with self._lock:
            entries = [self.entry(image_id) for image_id in dict.fromkeys(ids)]
            for entry in entries:
                if (entry["trashed"] is None) != (trashed is None):
                    target = self._file(entry["id"], trashed)
                    os.replace(self._file(entry["id"], entry["trashed"]), target)
                    if trashed is not None:
                        os.utime(target, (trashed, trashed))  # a rebuilt database reads the time of deletion here
            with self._base:
                # What lies in the trash keeps the time at which it came there.
                self._base.executemany("UPDATE images SET trashed = iif(?1 IS NULL, NULL, coalesce(trashed, ?1)) "
                                       "WHERE id = ?2", [(trashed, entry["id"]) for entry in entries])
            return [self.entry(entry["id"]) for entry in entries]

    # ---- pictures out --------------------------------------------------------------------------------------------

    def entry(self, image_id: str) -> Entry:
        """What is known of one picture. Raises NoSuchImage."""
        with self._lock:
            row = self._base.execute(f"SELECT {', '.join(_COLUMNS)} FROM images WHERE id = ?", (image_id,)).fetchone()
        if row is None:
            raise NoSuchImage(f"there is no picture {image_id[:40]!r} in the gallery")
        return _entry(row)

    def file(self, image_id: str) -> Path:
        """The PNG of a picture, in the trash or not. Raises NoSuchImage."""
        return self._file(image_id, self.entry(image_id)["trashed"])

    def read(self, image_id: str) -> bytes:
        """The bytes of the PNG. A path would not do: the file moves when it is deleted, restored or destroyed."""
        with self._lock:
            try:
                return self.file(image_id).read_bytes()
            except FileNotFoundError:
                raise NoSuchImage(f"the file of picture {image_id} is gone from the gallery's folder") from None

    def recipe(self, image_id: str) -> dict[str, Any]:
        """The recipe in the picture's file as JSON-ready values."""
        return recipe_dict(read_recipe(io.BytesIO(self.read(image_id))))

    def thumbnail(self, image_id: str) -> bytes:
        """A WebP of the picture, at most 256 pixels on its longer side; made now unless it is there."""
        path = self.root / "thumbs" / f"{image_id}.webp"
        with self._lock:
            self.entry(image_id)
            if path.exists():
                return path.read_bytes()
        from PIL import Image

        with Image.open(io.BytesIO(self.read(image_id)), formats=["PNG"]) as image:
            image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "WEBP", quality=85)
        with self._lock:
            self.entry(image_id)  # it may have been destroyed meanwhile
            _write(path, buffer.getvalue())
        return buffer.getvalue()

    def search(self, query: str = "", *, model: str | None = None, tag: str | None = None,
               favourite: bool | None = None, trashed: bool = False, since: float | None = None,
               until: float | None = None, after: str | None = None,
               limit: int = 60) -> tuple[list[Entry], str | None, int]:
        """Pictures from the newest on, the cursor of the next page or None, and the number of all that match.

        Each word of `query` must begin a word of the prompt, a tag or the model's name; `after` is a cursor.
        """
        where = ["trashed IS NOT NULL" if trashed else "trashed IS NULL"]
        values: list[str | float | bool] = []
        words = re.findall(r"[^\W_]+", query)
        if words:
            where.append("number IN (SELECT rowid FROM words WHERE words MATCH ?)")
            values.append(" ".join(f'"{word}"*' for word in words))
        for condition, value in (("model = ?", model), ("favourite = ?", favourite), ("created >= ?", since),
                                 ("created < ?", until),
                                 ("EXISTS (SELECT 1 FROM json_each(images.tags) WHERE value = ?)", tag)):
            if value is not None:
                where.append(condition)
                values.append(value)
        matching = " AND ".join(where)
        with self._lock:
            total = self._base.execute(f"SELECT count(*) FROM images WHERE {matching}", values).fetchone()[0]
            if after is not None:
                matching, values = f"{matching} AND id < ?", [*values, after]
            rows = self._base.execute(f"SELECT {', '.join(_COLUMNS)} FROM images WHERE {matching} ORDER BY id DESC "
                                      "LIMIT ?", [*values, limit + 1]).fetchall()
        entries = [_entry(row) for row in rows[:limit]]
        return entries, entries[-1]["id"] if len(rows) > limit else None, total

    def tags(self) -> list[dict[str, Any]]:
        """Every tag with the number of its pictures, the most used first."""
        with self._lock:
            rows = self._base.execute("SELECT value, count(*) AS n FROM images, json_each(images.tags) "
                                      "WHERE trashed IS NULL GROUP BY value ORDER BY n DESC, value").fetchall()
        return [{"tag": tag, "count": count} for tag, count in rows]

    def size(self) -> tuple[int, int]:
        """Number of pictures outside the trash, and bytes of all files."""
        with self._lock:
            return self._base.execute("SELECT count(*) FILTER (WHERE trashed IS NULL), "
                                      "coalesce(sum(bytes), 0) FROM images").fetchone()

    def close(self) -> None:
        with self._lock:
            self._base.close()

    # ---- database and files --------------------------------------------------------------------------------------

    def _file(self, image_id: str, trashed: float | None = None) -> Path:
        return self.root / ("images" if trashed is None else "trash") / f"{image_id}.png"

    def _insert(self, image_id: str, recipe: Recipe, marks: Marks, size: int, trashed: float | None) -> None:
        row = (image_id, _created(image_id), recipe.model, recipe.model_hash, recipe.prompt, recipe.seed, recipe.width,
               recipe.height, recipe.steps, recipe.guidance, marks.favourite, json.dumps(marks.tags), size, trashed)
        places = ", ".join("?" * len(row))
        number = self._base.execute(f"INSERT INTO images ({', '.join(_COLUMNS)}) VALUES ({places})", row).lastrowid
        self._base.execute("INSERT INTO words (rowid, prompt, tags, model) VALUES (?, ?, ?, ?)",
                           (number, recipe.prompt, " ".join(marks.tags), recipe.model))

    def _forget(self, image_id: str) -> None:
        self._base.execute("DELETE FROM words WHERE rowid = (SELECT number FROM images WHERE id = ?)", (image_id,))
        self._base.execute("DELETE FROM images WHERE id = ?", (image_id,))

    def _destroy(self, image_id: str) -> None:
        """Remove what lies in the trash, the picture last: a thumbnail that stayed would show it still."""
        (self.root / "thumbs" / f"{image_id}.webp").unlink(missing_ok=True)
        (self.root / "trash" / f"{image_id}.png").unlink(missing_ok=True)

    def _open_database(self) -> sqlite3.Connection:
        path = self.root / "gallery.sqlite"
        try:
            return _connect(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise UsageError(f"{path} is in use by another program; stop it, or choose another --home") from None
            log.warning("%s is damaged or of another version (%s); making it again from the pictures", path, error)
            for suffix in ("", "-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            return _connect(path)

    def _match_files(self) -> None:
        """Make rows for files that have none, drop rows whose files are gone, and empty the trash of what is old."""
        files: dict[str, float | None] = {}
        for folder in ("images", "trash"):
            for item in os.scandir(self.root / folder):
                name, suffix = os.path.splitext(item.name)
                if suffix != ".png" or not _ID.fullmatch(name):
                    continue
                trashed = item.stat().st_mtime if folder == "trash" else None
                if trashed is not None and trashed < time.time() - TRASH_SECONDS:
                    self._destroy(name)
                    continue
                files[name] = trashed
        with self._lock, self._base:
            known = dict(self._base.execute("SELECT id, trashed FROM images").fetchall())
            wrong = [name for name, trashed in known.items()
                     if name not in files or (files[name] is None) != (trashed is None)]
            for name in wrong:
                self._forget(name)
            for name in sorted(files.keys() - (known.keys() - set(wrong))):
                path = self._file(name, files[name])
                try:
                    png = path.read_bytes()
                    self._insert(name, read_recipe(path), read_marks(png), len(png), files[name])
                except (UsageError, FormatError, OSError, OverflowError) as error:
                    log.warning("not in the gallery: %s", error)


def _connect(path: Path) -> sqlite3.Connection:
    """Open the database, making it if it is not there. Raises sqlite3.DatabaseError if it is damaged."""
    base = sqlite3.connect(path, check_same_thread=False, timeout=10)
    try:
        base.execute("PRAGMA journal_mode = WAL")
        base.execute("PRAGMA synchronous = NORMAL")  # with WAL enough to survive a killed process
        version = base.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            base.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        elif version != _SCHEMA_VERSION or base.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError(f"version {version}, expected {_SCHEMA_VERSION}")
    except BaseException:
        base.close()
        raise
    return base


def _entry(row: Iterable[Any]) -> Entry:
    entry = dict(zip(_COLUMNS, row, strict=True))
    entry["favourite"], entry["tags"] = bool(entry["favourite"]), json.loads(entry["tags"])
    entry["url"] = f"/api/images/{entry['id']}/file"
    entry["thumbnail_url"] = f"/api/images/{entry['id']}/thumbnail"
    return entry


def _created(image_id: str) -> float:
    try:
        return datetime.strptime(image_id[:22], "%Y%m%d-%H%M%S-%f").replace(tzinfo=UTC).timestamp()
    except ValueError:  # digits that are no date
        return 0.0


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, in the place of one that is there."""
    partial = path.with_name(f".linocut-{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
