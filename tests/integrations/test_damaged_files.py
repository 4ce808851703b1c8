"""Damaged and mislabelled files of every form: each is refused with an error of ours, and none crashes the reader.

Every file here is one that linocut wrote, so it carries checksums: a change of any byte of a tensor must be found.
"""

import json
import random
import re
import struct
from pathlib import Path

import pytest

from linocut.errors import LinocutError
from linocut.formats.weight import row_blocks
from linocut.integrations.convert import convert
from linocut.integrations.recognize import open_component

FILES = {"linocut": "transformer/diffusion_pytorch_model.safetensors",
         "diffusers": "transformer/diffusion_pytorch_model.safetensors", "bfl": "transformer.safetensors",
         "gguf": "transformer.gguf", "mlx": "transformer-packed-mflux/diffusion_pytorch_model.safetensors",
         "gemlite": "transformer-gemlite-int2/diffusion_pytorch_model.safetensors"}


@pytest.fixture(scope="module")
def models(tmp_path_factory, packed_model) -> dict[str, Path]:
    """{form: folder of the ternary model}; do not change the files."""
    root = tmp_path_factory.mktemp("forms")
    for form in FILES:
        convert(packed_model, root / form, form)
    return {form: root / form for form in FILES}


def data_start(data: bytes) -> int:
    """Where the tensors of a file begin, or for GGUF a place inside them."""
    if data[:4] == b"GGUF":
        return len(data) * 3 // 4
    return 8 + struct.unpack("<Q", data[:8])[0]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) - 64)]


def longer(data: bytes, rng: random.Random) -> bytes:
    return data + bytes(rng.randrange(64, 4096))


def payload(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(data_start(data), len(data) - 64)
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def label(data: bytes, rng: random.Random) -> bytes:
    """Another shape, type, place or name of one tensor."""
    what = rng.choice(["shape", "type", "place", "name"])
    if data[:4] == b"GGUF":
        names = [found for found in re.finditer(rb"(double|single)_blocks\.\d+\.[a-z0-9_.]+\.weight(?=.\0\0\0)", data,
                                                re.DOTALL) if data[found.end()] == 2]
        found = rng.choice(names)
        at = found.start() if what == "name" else found.end() + {"shape": 4, "type": 20, "place": 24}[what]
        if what == "name":
            return data[:at] + b"q" + data[at + 1 :]
        (old,) = struct.unpack_from("<I", data, at)
        new = {"shape": old * 2, "type": rng.choice([0, 1, 34, 35, 41]), "place": old + 32}[what]
        return data[:at] + struct.pack("<I", new) + data[at + 4 :]
    start = data_start(data)
    header = json.loads(data[8:start])
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    if what == "name":
        header[name + "x"] = header.pop(name)
    elif what == "shape":
        entry["shape"] = [*entry["shape"], 2]
    elif what == "type":
        entry["dtype"] = "F64" if entry["dtype"] != "F64" else "F32"
    else:
        entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[start:]


def anywhere(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(data_start(data))
    return data[:place] + rng.randbytes(rng.randrange(1, 5)) + data[place + 4 :]


CHANGES = (cut, longer, payload, label, anywhere)


def read(path: Path) -> None:
    """Open, verify and decode all of a file."""
    component = open_component(path.parent if path.parent.name.startswith("transformer") else path)
    try:
        component.verify()
        for weight in component.weights.values():
            for rows in row_blocks(weight.shape):
                weight.rows(*rows)
    finally:
        component.close()


def attack(model: Path, form: str, change, seed: int, place: Path) -> None:
    """Write a damaged copy of a form's transformer and demand that it is refused."""
    file = place / FILES[form]
    file.parent.mkdir(parents=True, exist_ok=True)
    for config in (model / FILES[form]).parent.glob("*.json"):
        (file.parent / config.name).write_bytes(config.read_bytes())
    original = (model / FILES[form]).read_bytes()
    damaged = change(original, random.Random(seed))
    if damaged == original:
        return
    file.write_bytes(damaged)
    try:
        read(file)
    except LinocutError:
        return
    # A changed letter of a comment may do no harm; everything else must have been found.
    assert change is anywhere, f"{change.__name__} of a {form} file with seed {seed} was not noticed"


@pytest.mark.parametrize("packed_model", ["ternary"], indirect=True, scope="session")
@pytest.mark.parametrize("form", FILES)
def test_sample(models, form, tmp_path):
    read(models[form] / FILES[form])
    for change in CHANGES:
        attack(models[form], form, change, 7, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("packed_model", ["ternary"], indirect=True, scope="session")
def test_two_thousand(models, tmp_path):
    for number in range(2000):
        form = list(FILES)[number % len(FILES)]
        attack(models[form], form, CHANGES[number // len(FILES) % len(CHANGES)], number, tmp_path)
