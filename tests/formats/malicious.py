"""Broken and hostile weight files, made on the fly: each is refused at open (structure) or under verify (values).

A case names the stage that must refuse it and the words that the error must hold (tensor, expected, found).
"""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from linocut.formats.packed import PackedTensor, pack


@dataclass(frozen=True)
class Case:
    """One file: its bytes, who refuses it, and what the error says."""

    name: str
    data: bytes
    stage: str  # "open" or "verify"
    words: tuple[str, ...]


def raw_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Any bytes as header and data, with a true or a false length."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def file_of(tensors: dict[str, Any], data: bytes, metadata: dict[str, Any] | None = None) -> bytes:
    """A file from header entries as they are, right or wrong."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    text = json.dumps(header | tensors).encode()
    return raw_file(text.ljust(-(-(8 + len(text)) // 64) * 64 - 8), data)


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def good_packed(encoding: str = "ternary") -> PackedTensor:
    rng = np.random.default_rng(5)
    shape = (3, 256)
    if encoding == "affine4":
        return pack(rng.integers(0, 16, shape), np.full((3, 4), 0.5), encoding, rng.integers(0, 16, (3, 4)))
    if encoding == "int8":
        return pack(rng.integers(-127, 128, shape), np.full((3, 2), 0.5), encoding)
    return pack(rng.integers(-1, 2, shape), np.full((3, 2), 0.5), encoding)


def packed_file(edit: Callable[[dict[str, Any]], None] | None = None, encoding: str = "ternary") -> bytes:
    """A sound file with the packed weight `net.layer`, after `edit` has had its way with the pieces.

    Pieces: arrays (name -> numpy array), claims (the metadata "linocut"), dtypes (name -> dtype in the header), hashes.
    """
    packed = good_packed(encoding)
    arrays = {f"net.layer.{suffix}": array.copy() for suffix, array in packed.parts().items()}
    pieces: dict[str, Any] = {
        "arrays": arrays, "dtypes": {}, "order": ["net.layer.scales", "net.layer.codes", "net.layer.zeros"],
        "claims": {"version": 1, "packed": {"net.layer": {"encoding": encoding, "shape": list(packed.shape)}}},
        "hashes": "true",
    }
    if edit is not None:
        edit(pieces)
    import hashlib
    names = {"float16": "F16", "uint8": "U8", "float32": "F32", "uint16": "BF16", "int64": "I64"}
    header, data, hashes = {}, b"", {}
    order = pieces["order"] + [name for name in arrays if name not in pieces["order"]]
    for name in order:
        if name not in arrays:
            continue
        chunk = arrays[name].tobytes()
        dtype = pieces["dtypes"].get(name, names[str(arrays[name].dtype)])
        header[name] = entry(dtype, list(arrays[name].shape), len(data), len(data) + len(chunk))
        data += chunk
        hashes[name] = hashlib.sha256(chunk).hexdigest()
    metadata = {"linocut": json.dumps(pieces["claims"])}
    if pieces["hashes"] == "true":
        metadata["sha256"] = json.dumps(hashes)
    elif pieces["hashes"] is not None:
        metadata["sha256"] = json.dumps(pieces["hashes"])
    return file_of(header, data, metadata)


def _set(name: str, index: tuple[int, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(pieces: dict[str, Any]) -> None:
        pieces["arrays"][name][index] = value
    return edit


def _add(name: str, array: np.ndarray) -> Callable[[dict[str, Any]], None]:
    def edit(pieces: dict[str, Any]) -> None:
        pieces["arrays"][name] = array
    return edit


def _claim(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def edit(pieces: dict[str, Any]) -> None:
        pieces["claims"]["packed"]["net.layer"] |= changes
    return edit


def _top(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(pieces: dict[str, Any]) -> None:
        pieces[key] = value
    return edit


def _cast(name: str, dtype: str) -> Callable[[dict[str, Any]], None]:
    def edit(pieces: dict[str, Any]) -> None:
        pieces["arrays"][name] = pieces["arrays"][name].astype(dtype)
    return edit


def _unsorted(pieces: dict[str, Any]) -> None:
    pieces["order"].reverse()  # codes (615 bytes and the like) before scales: scales at an odd address
    pieces["arrays"]["a"] = np.zeros(1, dtype=np.uint8)
    pieces["order"].insert(0, "a")


class _Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this pickle ran code",))


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Boom()))
    return buffer.getvalue()


def structure_cases() -> list[Case]:
    """Files that must not open."""
    four = b"\0" * 16
    good = file_of({"w": entry("F32", [4], 0, 16)}, four)
    one = {"w": entry("F32", [4], 0, 16)}
    deep = b"[" * 100_000
    names: list[tuple[str, bytes, tuple[str, ...]]] = [
        ("empty", b"", ("at least 8", "0 bytes")),
        ("seven-bytes", b"\x02\0\0\0\0\0\0", ("at least 8", "7 bytes")),
        ("only-length", struct.pack("<Q", 100), ("100 bytes", "0 bytes")),
        ("header-truncated", good[:30], ("cut off",)),
        ("data-truncated", good[:-1], ("w", "cut off", f"{len(good)} bytes", f"{len(good) - 1} bytes")),
        ("data-appended", good + b"x", ("belong to no tensor", f"{len(good)} bytes", f"{len(good) + 1} bytes")),
        ("length-2^63", raw_file(b"{}", length=2**63), ("100000000", str(2**63))),
        ("length-2^64-1", raw_file(b"{}", length=2**64 - 1), ("100000000",)),
        ("length-101MB", raw_file(b"{}", length=101_000_000), ("100000000",)),
        ("length-zero", raw_file(b""), ("header",)),
        ("not-json", raw_file(b"{nonsense}"), ("JSON",)),
        ("json-array", raw_file(b"[]"), ("object",)),
        ("json-string", raw_file(b'"{}"'), ("object",)),
        ("leading-space", raw_file(b" {}"), ("object",)),
        ("not-utf8", raw_file(b'{"\xff":1}'), ("UTF-8", "0xff")),
        ("trailing-junk", raw_file(b"{} {}"), ("JSON",)),
        ("deep-nesting", raw_file(b'{"a":' + deep), ("JSON",)),
        ("many-lists", raw_file(b'{"a":[' + b"[]," * 1_500_000 + b"[]]}"), ("too many parts", "at most 3000000")),
        ("many-tensors", raw_file(b"{" + b",".join(b'"%x":{}' % i for i in range(250_001)) + b"}"),
         ("too many tensors", "250001")),
        ("endless-number", raw_file(b'{"a":' + b"9" * 10_000 + b"}"), ("JSON",)),
        ("nan-token", raw_file(b'{"w":NaN}'), ("JSON", "NaN")),
        ("duplicate-names", raw_file(b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                                     b'"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), ("twice", "w")),
        ("duplicate-keys", raw_file(b'{"w":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"),
         ("twice", "dtype")),
        ("overlap", file_of(one | {"v": entry("F32", [4], 8, 24)}, b"\0" * 24), ("v", "overlap", "16", "8")),
        ("same-bytes-twice", file_of(one | {"v": entry("F32", [4], 0, 16)}, four), ("v", "overlap")),
        ("gap", file_of(one | {"v": entry("F32", [4], 20, 36)}, b"\0" * 36), ("v", "gap", "16", "20")),
        ("gap-at-start", file_of({"w": entry("F32", [4], 4, 20)}, b"\0" * 20), ("w", "gap")),
        ("beyond-the-end", file_of({"w": entry("F32", [8], 0, 32)}, four), ("w", "cut off")),
        ("lying-shape", file_of({"w": entry("F32", [5], 0, 16)}, four), ("w", "20 bytes", "16 bytes")),
        ("lying-dtype", file_of({"w": entry("F64", [4], 0, 16)}, four), ("w", "32 bytes", "16 bytes")),
        ("overflow-shape", file_of({"w": entry("U8", [2**32, 2**32], 0, 0)}, b""), ("w", "impossible")),
        ("overflow-dimension", file_of({"w": entry("U8", [2**64], 0, 0)}, b""), ("w", "shape")),
        ("huge-zero-shape", file_of({"w": entry("U8", [2**62, 4, 0, 2**70], 0, 0)}, b""), ("w", "shape")),
        ("huge-empty", file_of({"w": entry("F32", [2**62, 4, 0], 0, 0)}, b""), ("w", "impossible")),
        ("negative-dimension", file_of({"w": entry("F32", [-4], 0, 16)}, four), ("w", "-4")),
        ("two-negative-dimensions", file_of({"w": entry("F32", [-2, -2], 0, 16)}, four), ("w", "-2")),
        ("float-dimension", file_of({"w": entry("F32", [4.0], 0, 16)}, four), ("w", "4.0")),
        ("bool-dimension", file_of({"w": entry("U8", [True], 0, 1)}, b"\0"), ("w", "True")),
        ("string-shape", file_of({"w": entry("F32", "4", 0, 16)}, four), ("w", "shape")),  # type: ignore[arg-type]
        ("many-dimensions", file_of({"w": entry("U8", [1] * 1000, 0, 1)}, b"\0"), ("w", "32")),
        ("negative-offset", file_of({"w": entry("F32", [4], -16, 0)}, four), ("w", "-16")),
        ("reversed-offsets", file_of({"w": entry("F32", [4], 16, 0)}, four), ("w", "begin <= end")),
        ("float-offsets", file_of({"w": entry("F32", [4], 0.0, 16.0)}, four), ("w", "data_offsets")),
        ("three-offsets", file_of({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, four),
         ("w", "data_offsets")),
        ("unknown-dtype", file_of({"w": entry("Q1_0", [4], 0, 16)}, four), ("w", "F32", "Q1_0")),
        ("dtype-no-string", file_of({"w": entry(["F32"], [4], 0, 16)}, four), ("w", "dtype")),  # type: ignore[arg-type]
        ("half-a-byte", file_of({"w": entry("F4", [3], 0, 1)}, b"\0"), ("w", "whole bytes")),
        ("missing-key", file_of({"w": {"dtype": "F32", "shape": [4]}}, four), ("w", "data_offsets")),
        ("extra-key", file_of({"w": entry("F32", [4], 0, 16) | {"extra": 1}}, four), ("w", "extra")),
        ("entry-no-object", file_of({"w": 5}, b""), ("w", "int")),
        ("name-empty", file_of({"": entry("F32", [4], 0, 16)}, four), ("name",)),
        ("name-no-text", raw_file(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), ("UTF-8",)),
        ("metadata-list", file_of(one, four, []), ("__metadata__", "list")),  # type: ignore[arg-type]
        ("metadata-number", file_of(one, four, {"a": 1}), ("__metadata__",)),
        ("pickle", pickle.dumps({"w": _Boom()}), ("pickle",)),
        ("zip", _zip(), ("zip",)),
        ("gguf", b"GGUF\x03\0\0\0" + b"\0" * 64, ("GGUF",)),
        ("text", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ("header is too long",)),
    ]
    wrong = "net.layer"
    edits: list[tuple[str, Callable[[dict[str, Any]], None], tuple[str, ...]]] = [
        ("claims-no-object", _top("claims", []), ("linocut",)),
        ("claims-newer", _top("claims", {"version": 2, "packed": {}}), ("version", "expected 1", "found 2", "update")),
        ("claims-version-text", _top("claims", {"version": "1", "packed": {}}), ("linocut",)),
        ("encoding-unknown", _claim(encoding="septary"), (wrong, "binary", "septary")),
        ("encoding-missing", _claim(encoding=None), (wrong, "None")),
        ("shape-odd-width", _claim(shape=[3, 250]), (wrong, "128", "250")),
        ("shape-zero", _claim(shape=[0, 256]), (wrong, "[0, 256]")),
        ("shape-negative", _claim(shape=[3, -256]), (wrong, "-256")),
        ("shape-huge", _claim(shape=[3, 2**62]), (wrong, "net.layer.codes", "found U8 [3, 52]")),
        ("shape-too-wide", _claim(shape=[3, 384]), ("net.layer.codes", "U8 [3, 77]", "U8 [3, 52]")),
        ("shape-too-tall", _claim(shape=[4, 256]), ("net.layer.codes", "U8 [4, 52]", "U8 [3, 52]")),
        ("shape-three", _claim(shape=[3, 2, 128]), (wrong, "[O, N]")),
        ("other-encoding", _claim(encoding="binary"), ("net.layer.codes", "U8 [3, 32]", "U8 [3, 52]")),
        ("no-such-layer",
         _top("claims", {"version": 1, "packed": {"ghost": {"encoding": "binary", "shape": [1, 128]}}}),
         ("ghost.codes", "no such tensor")),
        ("codes-signed", lambda p: p["dtypes"].update({"net.layer.codes": "I8"}), ("net.layer.codes", "U8", "I8")),
        ("scales-float32", _cast("net.layer.scales", "float32"), ("net.layer.scales", "F16 [3, 2]", "F32 [3, 2]")),
        ("scales-bfloat16", lambda p: p["dtypes"].update({"net.layer.scales": "BF16"}),
         ("net.layer.scales", "F16", "BF16")),
        ("dense-twin", _add("net.layer.weight", np.zeros((3, 256), np.float32)), ("net.layer.weight", "contradicts")),
        ("zeros-for-ternary", _add("net.layer.zeros", np.zeros((3, 2), np.uint8)), ("net.layer.zeros", "contradicts")),
        ("unsorted", _unsorted, ("aligned", "multiple of 2")),
        ("hashes-no-object", _top("hashes", [1]), ("sha256",)),
        ("hash-no-hex", _top("hashes", {"net.layer.codes": "xyz"}), ("sha256", "64 hex")),
        ("hash-of-nothing", _top("hashes", {"ghost": "0" * 64}), ("ghost", "sha256")),
    ]
    cases = [Case(name, data, "open", words) for name, data, words in names]
    cases += [Case(name, packed_file(edit), "open", words) for name, edit, words in edits]
    without = packed_file(lambda pieces: pieces["arrays"].pop("net.layer.zeros"), "affine4")
    cases.append(Case("affine-without-zeros", without, "open", ("net.layer.zeros", "U8 [3, 2]", "no such tensor")))
    eight: list[tuple[str, Callable[[dict[str, Any]], None], tuple[str, ...]]] = [
        ("int8-too-narrow", _claim(shape=[3, 384]), ("net.layer.codes", "U8 [3, 384]", "U8 [3, 256]")),
        ("int8-as-affine4", _claim(encoding="affine4"), ("net.layer.codes", "U8 [3, 128]", "U8 [3, 256]")),
        ("int8-signed", lambda p: p["dtypes"].update({"net.layer.codes": "I8"}), ("net.layer.codes", "U8", "I8")),
        ("int8-dense-twin", _add("net.layer.weight", np.zeros((3, 256), np.float32)),
         ("net.layer.weight", "contradicts")),
        ("int8-zeros", _add("net.layer.zeros", np.zeros((3, 1), np.uint8)), ("net.layer.zeros", "contradicts")),
    ]
    return cases + [Case(name, packed_file(edit, "int8"), "open", words) for name, edit, words in eight]


def value_cases() -> list[Case]:
    """Files whose structure is sound and whose values are not."""
    scales, codes = "net.layer.scales", "net.layer.codes"
    valid = {-(-256 * v // 243) for v in range(243)}
    edits: list[tuple[str, Callable[[dict[str, Any]], None], tuple[str, ...]]] = [
        ("scale-nan", _set(scales, (1, 1), np.nan), (scales, "row 1, group 1", "above 0", "nan")),
        ("scale-inf", _set(scales, (0, 0), np.inf), (scales, "inf")),
        ("scale-minus-inf", _set(scales, (0, 0), -np.inf), (scales, "-inf")),
        ("scale-zero", _set(scales, (2, 1), 0.0), (scales, "row 2, group 1", "found 0.0")),
        ("scale-minus-zero", _set(scales, (2, 1), -0.0), (scales, "found -0.0")),
        ("scale-negative", _set(scales, (2, 0), -0.5), (scales, "found -0.5")),
        # the row of 256 has one block of 52 bytes: the last 4 positions of its fifth plane lie past the row
        ("padding-used", _set(codes, (1, 51), 0), (codes, "padding", "code 1", "code 0")),
        ("hash-wrong", _top("hashes", {scales: "0" * 64, codes: "1" * 64}), ("SHA-256", "expected 0000")),
        ("hash-missing", _top("hashes", {scales: "0" * 64}), ("SHA-256",)),
        ("no-hashes", _top("hashes", None), ("SHA-256", "nothing")),
        ("dense-nan", _add("bias", np.array([0, np.nan], np.float32)), ("bias", "[1]", "nan")),
        ("dense-inf-bf16", _add("bias", np.array([[0, 0x7F80]], np.uint16)), ("bias", "[0, 1]", "0x7f80")),
    ]
    edits += [(f"trit-{byte:02x}", _set(codes, (2, 7), byte), (codes, "row 2, byte 7", f"0x{byte:02x}"))
              for byte in range(256) if byte not in valid]
    cases = [Case(name, packed_file(edit), "verify", words) for name, edit, words in edits]
    eight = [("int8-lowest", _set(codes, (1, 200), 0x80), (codes, "row 1, byte 200", "-127..127", "0x80")),
             ("int8-scale-nan", _set(scales, (1, 1), np.nan), (scales, "row 1, group 1", "nan"))]
    return cases + [Case(name, packed_file(edit, "int8"), "verify", words) for name, edit, words in eight]
