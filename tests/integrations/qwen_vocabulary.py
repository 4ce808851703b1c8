"""Qwen's own vocabulary as a `tokenizer.json`, from the list of ranks that Alibaba's package dashscope carries."""

from __future__ import annotations

import base64
import importlib.util
import json
from itertools import pairwise
from pathlib import Path

from linocut.models.synthetic import _byte_characters, synthetic_tokenizer

PACKAGE = "dashscope"


def ranks_file() -> Path | None:
    """`qwen.tiktoken` of the installed package, without importing it."""
    found = importlib.util.find_spec(PACKAGE)
    places = [] if found is None else [Path(place) / "resources" / "qwen.tiktoken"
                                       for place in found.submodule_search_locations or ()]
    return next((place for place in places if place.is_file()), None)


def qwen_tokenizer(ranks_path: Path) -> bytes:
    """A `tokenizer.json` with the 151,643 ordinary and the added tokens of Qwen3.

    A token's rank is its id. The pair it was merged from is what merging its bytes by lower ranks ends with.
    """
    lines = (line.split() for line in ranks_path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    characters = _byte_characters()
    names = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            order = [min(ranks.get(left + right, rank), rank) for left, right in pairwise(parts)]
            first = order.index(min(order))
            parts[first:first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append([names[part] for part in parts])
    document = json.loads(synthetic_tokenizer(256))
    for number, token in enumerate(document["added_tokens"]):
        token["id"] = len(ranks) + number
    document["model"] |= {"vocab": {names[token]: rank for token, rank in ranks.items()}, "merges": merges}
    return json.dumps(document, ensure_ascii=False).encode("utf-8")
