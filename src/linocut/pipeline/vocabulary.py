"""What a model with a small vocabulary can draw, and which words of a prompt it never met. Needs no torch.

Such a model carries `vocabulary.json`; one that was trained on free text has none, and nothing here speaks of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from linocut.errors import FormatError
from linocut.formats.folder import VOCABULARY_FILE, ModelFolder

MOST_NAMED = 6  # unknown words that a note names
_WORD, _PIECES = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*"), re.compile("['-]")


@dataclass(frozen=True)
class Thing:
    """Something that can be drawn: its name, its plural, and what else it may be called."""

    name: str
    plural: str
    synonyms: tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """`things` to draw, `most` of them in one picture, `lists` of what else to ask for (colours, places, ...).

    `words` are all that captions had, lower case, and the pieces of those with a hyphen.
    """

    things: tuple[Thing, ...]
    most: int
    lists: dict[str, tuple[str, ...]]
    words: frozenset[str]

    @classmethod
    def of(cls, folder: ModelFolder) -> Vocabulary | None:
        """The vocabulary of a model, or None if it has no list of it. Raises FormatError for a malformed file."""
        table = folder.vocabulary()
        if table is None:
            return None
        path = folder.root / VOCABULARY_FILE
        try:
            things = tuple(Thing(_text(entry["name"]), _text(entry["plural"]), _texts(entry["synonyms"]))
                           for entry in table["things"])
            lists = {_text(name): _texts(values) for name, values in table["lists"].items()}
            most, other = int(table["most"]), _texts(table["other_words"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError("not a vocabulary", path=path, expected="things, most, lists and other_words",
                              found=f"{type(error).__name__}: {error}", advice="fetch the model again") from None
        said = [name for thing in things for name in (thing.name, thing.plural, *thing.synonyms)]
        said += [text for values in lists.values() for text in values] + list(other)
        words = {word for text in said for word in words_of(text)}
        return cls(things, most, lists, frozenset(words | {piece for word in words for piece in _PIECES.split(word)}))

    def unknown(self, prompt: str) -> list[str]:
        """Words of the prompt that the model never met, as they are written there, each once."""
        return list(dict.fromkeys(word for word in _WORD.findall(prompt) if not self._knows(word)))

    def near(self, word: str, count: int = 3) -> list[str]:
        """Known words that are spelled alike, the nearest first."""
        from difflib import get_close_matches

        return get_close_matches(word.lower(), sorted(self.words), count, cutoff=0.72)

    def note(self, prompt: str) -> str | None:
        """One line that names the prompt's unknown words, each with near ones, or None if all are known."""
        unknown = self.unknown(prompt)
        if not unknown:
            return None
        named = []
        for word in unknown[:MOST_NAMED]:
            near = self.near(word)
            named.append(f"{word!r} (near: {', '.join(near)})" if near else repr(word))
        more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
        return (f"this model never met {', '.join(named)}{more}; what it can draw: linocut inspect --vocabulary")

    def _knows(self, word: str) -> bool:
        parts = list(words_of(word))
        return all(part in self.words or all(piece in self.words for piece in _PIECES.split(part)) for part in parts)


def words_of(text: str) -> Iterator[str]:
    """The words of a text, lower case, with plain apostrophes."""
    return (word.lower().replace("\u2019", "'") for word in _WORD.findall(text))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list")
    return tuple(_text(value) for value in values)
