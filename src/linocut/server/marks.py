"""What a user says of a picture, kept in its PNG: an iTXt chunk beside the recipe, replaced without touching pixels.

So the file alone is the whole truth, and the gallery's database can be made again from the files.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from linocut.errors import FormatError

KEY = b"linocut-marks"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_TAGS, LONGEST_TAG = 32, 64


@dataclass(frozen=True)
class Marks:
    """Whether the user likes a picture, and the words it was given, each once and in order."""

    favourite: bool = False
    tags: tuple[str, ...] = ()


def read_marks(png: bytes) -> Marks:
    """Return the marks in a PNG; none if it has no such chunk, or one that is broken. Raises FormatError for no PNG."""
    for kind, start, end in _chunks(png):
        if kind == b"iTXt" and png.startswith(KEY + b"\0", start):
            try:
                found = json.loads(png[start + len(KEY) + 5:end])
                tags = [tag for tag in found["tags"] if isinstance(tag, str)]
                return Marks(found["favourite"] is True, tuple(tags[:MOST_TAGS]))
            except (ValueError, KeyError, TypeError, RecursionError):
                return Marks()
    return Marks()


def with_marks(png: bytes, marks: Marks) -> bytes:
    """Return the PNG with these marks instead of those that it has. Raises FormatError for no PNG."""
    parts = [SIGNATURE]
    for kind, start, end in _chunks(png):
        if kind == b"iTXt" and png.startswith(KEY + b"\0", start):
            continue
        parts.append(png[start - 8:end + 4])
        if kind == b"IHDR" and marks != Marks():
            text = json.dumps({"favourite": marks.favourite, "tags": list(marks.tags)}, ensure_ascii=False)
            # keyword, no compression, no language, no translated keyword, text (PNG specification 11.3.3.4)
            parts.append(_chunk(b"iTXt", KEY + b"\0\0\0\0\0" + text.encode()))
    return b"".join(parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind of each chunk and where its data begin and end."""
    if not png.startswith(SIGNATURE):
        raise FormatError("not a PNG")
    start = len(SIGNATURE)
    while start + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, start)
        if start + 12 + length > len(png):
            raise FormatError("the PNG ends within a chunk")
        yield kind, start + 8, start + 8 + length
        start += 12 + length
