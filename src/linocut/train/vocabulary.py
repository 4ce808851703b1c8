"""The things that the embedded model can draw: sprites with their names, synonyms and plurals (`objects/*.txt`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from linocut.train.palette import RGB

FILES = ("geneval", "animals", "plants", "food", "travel", "things", "people")
COMMON_WEIGHT = 3.0  # how much more often a common thing is drawn than a rare one
_SAID_WITH_A = ("one", "uni", "use", "ufo", "euro", "ukulele", "ewe")  # although they begin with a vowel
_SAID_WITH_AN = ("hour", "suv", "x ", "x-")  # although they begin with a consonant
_SINGULAR = ("ss", "us", "ceros", "ananas", "christmas", "holmes", "biceps")  # ends of what is no plural


@dataclass(frozen=True)
class ObjectName:
    """One drawable thing: the code point of its sprite, its name, synonyms and the plural of its name.

    `masses` are those of its names that are no countable nouns ("bread"; written "bread~" in the files). `common`
    things are drawn more often; `natural` ones keep their own colours. `outline` is the mean RGB along the sprite's
    edge, `width` and `height` which shares of its square the sprite takes, known here so that scenes can care for
    contrast and for what stands on what without opening sprites.
    """

    code: str
    name: str
    synonyms: tuple[str, ...]
    plural: str
    masses: frozenset[str] = frozenset()
    common: bool = False
    natural: bool = False
    outline: RGB = (0.5, 0.5, 0.5)
    width: float = 1.0
    height: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """Every word for one of it."""
        return self.name, *self.synonyms


def pluralize(noun: str) -> str:
    """The regular English plural of a noun phrase (its last word, or the one before "of")."""
    if noun.endswith("nut and bolt"):
        return f"{pluralize(noun.removesuffix(' and bolt'))} and bolts"
    head, rest = _parted(noun)
    if rest:
        return pluralize(head) + rest
    if is_plural(noun):
        return noun
    if noun.endswith("person"):
        return noun.removesuffix("person") + "people"
    if noun.endswith("man") and not noun.endswith("human"):
        return noun[:-3] + "men"
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith(("knife", "loaf", "eaf", "wolf")):
        return noun.removesuffix("e")[:-1] + "ves"
    return noun + ("es" if noun.endswith(("tomato", "potato", "hero")) else "s")


def is_plural(noun: str) -> bool:
    """Whether a noun is a plural already ("scissors", but not "pair of scissors")."""
    head, _ = _parted(noun)
    return head.endswith("s") and not head.endswith(_SINGULAR)


def _parted(noun: str) -> tuple[str, str]:
    """The part of a noun phrase that takes the plural, and what comes after it."""
    for link in (" full of ", " of ", " with ", " and "):
        head, found, tail = noun.partition(link)
        if found:
            return head, found + tail
    return noun, ""


def plural_of(thing: ObjectName, noun: str) -> str:
    """The plural of one of a thing's names."""
    return thing.plural if noun == thing.name or noun in thing.masses else pluralize(noun)


def every_name(thing: ObjectName) -> list[str]:
    """All words for one of a thing and for several."""
    return [word for noun in thing.names for word in (noun, plural_of(thing, noun))]


def article(words: str) -> str:
    """"a" or "an", by the sound that the words begin with."""
    vowel = words[0] in "aeiou" and not words.startswith(_SAID_WITH_A)
    return "an" if vowel or words.startswith(_SAID_WITH_AN) else "a"


@cache
def objects() -> tuple[ObjectName, ...]:
    """The vocabulary, in the order of FILES; GenEval's classes come first."""
    folder, table = files("linocut.train").joinpath("objects"), []
    measured = {code: [int(value) for value in values] for code, *values in
                (line.split() for line in _lines(folder.joinpath("outlines.txt").read_text("utf-8")))}
    for file in FILES:
        for line in _lines(folder.joinpath(f"{file}.txt").read_text("utf-8")):
            code, name, *rest = (field.strip() for field in line.split("|"))
            masses = frozenset(field[:-1] for field in (name, *rest) if field.endswith("~"))
            name, rest = name.rstrip("~"), [field.rstrip("~") for field in rest]
            flags = {field for field in rest if field.startswith("+")}
            plurals = [field.removeprefix("plural=") for field in rest if field.startswith("plural=")]
            synonyms = tuple(field for field in rest if not field.startswith(("+", "plural=")))
            red, green, blue, width, height = measured.get(code, (127.5, 127.5, 127.5, 100, 100))
            table.append(ObjectName(code, name, synonyms, plurals[0] if plurals else pluralize(name), masses,
                                    file == "geneval" or "+common" in flags, "+natural" in flags,
                                    (red / 255, green / 255, blue / 255), width / 100, height / 100))
    return tuple(table)


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
