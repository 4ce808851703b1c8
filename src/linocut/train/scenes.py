"""Captioned scenes of the embedded world: what is in the picture, where it stands, and how a person may say it.

A scene is a list of groups (object, count, colour), an optional relation between the first two groups and an optional
background. The same description gives the placements (drawn by `render`) and any number of captions, so that a picture
can be shown to the model under several wordings. Everything is decided by one `random.Random`, hence repeatable.

The tasks are GenEval's six (Ghosh et al. 2023: one object, two objects, counting, colours, position, colour
attribution) plus mixtures such as "two red apples and a blue cup".
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
BACKGROUNDS = ("white", "gray", "pink", "blue", "green", "yellow", "purple", "orange", "black")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = {"single_object": 0.12, "two_object": 0.16, "counting": 0.20, "colors": 0.13, "position": 0.17,
         "color_attr": 0.13, "mixed": 0.09}
MAX_OBJECTS = 6
_NUMBERS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class ObjectName:
    """One drawable thing: the code point of its sprite, its name, synonyms and the plural of its name."""

    code: str
    name: str
    synonyms: tuple[str, ...]
    plural: str


@dataclass(frozen=True)
class Group:
    """`count` equal things. `thing` indexes `objects()`; `colour` indexes COLOURS, None keeps the natural colours."""

    thing: int
    count: int = 1
    colour: int | None = None


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn. `relation` says how group 0 stands to group 1."""

    task: str
    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Placement:
    """One sprite on the canvas: centre and side in units of the canvas, y downwards."""

    thing: int
    colour: int | None
    x: float
    y: float
    size: float


def pluralize(noun: str) -> str:
    """The regular English plural of a noun phrase (its last word)."""
    if " of " in noun:
        head, _, tail = noun.partition(" of ")
        return f"{pluralize(head)} of {tail}"
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith("knife"):
        return noun[:-2] + "ves"
    return noun + ("es" if noun == "tomato" else "s")


@cache
def objects() -> tuple[ObjectName, ...]:
    """The vocabulary, in the order of `objects.txt`; GenEval's classes come first."""
    table = []
    for line in files("linocut.train").joinpath("objects.txt").read_text("utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        code, name, *rest = (field.strip() for field in line.split("|"))
        irregular = [field.removeprefix("plural=") for field in rest if field.startswith("plural=")]
        synonyms = tuple(field for field in rest if not field.startswith("plural="))
        table.append(ObjectName(code, name, synonyms, irregular[0] if irregular else pluralize(name)))
    return tuple(table)


# Scenes ---------------------------------------------------------------------------------------------------------------

def sample_scene(rng: random.Random, task: str | None = None) -> Scene:
    """A random scene of `task`, or of a task drawn by the shares in TASKS."""
    task = task or rng.choices(list(TASKS), list(TASKS.values()))[0]
    first, second, third = rng.sample(range(len(objects())), 3)
    background = rng.choice(BACKGROUNDS) if rng.random() < 0.12 else None

    def colour(chance: float) -> int | None:
        return rng.randrange(len(COLOURS)) if rng.random() < chance else None

    if task == "single_object":
        return Scene(task, (Group(first),), None, background)
    if task == "colors":
        return Scene(task, (Group(first, 1, colour(1)),), None, background)
    if task == "counting":
        return Scene(task, (Group(first, rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 4)), colour(0.25)),), None, background)
    if task == "two_object":
        return Scene(task, (Group(first), Group(second)), None, background)
    if task == "position":
        tint = 0.25 if rng.random() < 0.4 else 0.0
        groups = Group(first, 1, colour(tint)), Group(second, 1, colour(tint))
        return Scene(task, groups, rng.choice(RELATIONS), background)
    if task == "color_attr":
        return Scene(task, (Group(first, 1, colour(1)), Group(second, 1, colour(1))), None, background)
    if task != "mixed":
        raise ValueError(f"unknown task {task!r}, expected one of {', '.join(TASKS)}")
    if rng.random() < 0.25:
        return Scene(task, tuple(Group(thing, 1, colour(0.4)) for thing in (first, second, third)), None, background)
    counts = rng.choice(((1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3), (3, 2), (1, 4), (4, 1), (3, 3)))
    relation = rng.choice(RELATIONS) if rng.random() < 0.3 and max(counts) <= 3 else None
    groups = Group(first, counts[0], colour(0.6)), Group(second, counts[1], colour(0.6))
    return Scene(task, groups, relation, background)


# Placements -----------------------------------------------------------------------------------------------------------

# Slots (x, y) and the range of the side, by the number of things; several arrangements each.
_ARRANGEMENTS: dict[int, tuple[tuple[tuple[tuple[float, float], ...], float, float], ...]] = {
    1: ((((0.5, 0.5),), 0.55, 0.72),),
    2: ((((0.27, 0.5), (0.73, 0.5)), 0.36, 0.44), (((0.5, 0.27), (0.5, 0.73)), 0.36, 0.44),
        (((0.29, 0.3), (0.71, 0.7)), 0.36, 0.42), (((0.29, 0.7), (0.71, 0.3)), 0.36, 0.42)),
    3: ((((0.18, 0.5), (0.5, 0.5), (0.82, 0.5)), 0.27, 0.31), (((0.5, 0.28), (0.26, 0.72), (0.74, 0.72)), 0.34, 0.4),
        (((0.26, 0.28), (0.74, 0.28), (0.5, 0.72)), 0.34, 0.4)),
    4: ((((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)), 0.34, 0.41),),
    5: ((((0.2, 0.2), (0.8, 0.2), (0.5, 0.5), (0.2, 0.8), (0.8, 0.8)), 0.27, 0.31),
        (((0.18, 0.3), (0.5, 0.3), (0.82, 0.3), (0.32, 0.7), (0.68, 0.7)), 0.27, 0.3)),
    6: ((((0.18, 0.3), (0.5, 0.3), (0.82, 0.3), (0.18, 0.7), (0.5, 0.7), (0.82, 0.7)), 0.27, 0.3),),
}


def place(scene: Scene, rng: random.Random) -> list[Placement]:
    """Where each thing stands: non-overlapping slots with a little jitter, obeying the scene's relation."""
    things = [group for group in scene.groups for _ in range(group.count)]
    if not 1 <= len(things) <= MAX_OBJECTS:
        raise ValueError(f"a scene holds 1 to {MAX_OBJECTS} things, found {len(things)}")
    slots: Sequence[tuple[float, float]]
    if scene.relation is not None:
        slots, size = _related_slots(scene, rng)
    else:
        slots, low, high = rng.choice(_ARRANGEMENTS[len(things)])
        size = rng.uniform(low, high)
        if len(scene.groups) > 1:
            slots = rng.sample(slots, len(slots))
    jitter = 0.06 if len(things) == 1 else 0.025
    return [Placement(group.thing, group.colour, x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter),
                      size * rng.uniform(0.94, 1.0)) for group, (x, y) in zip(things, slots, strict=True)]


def _related_slots(scene: Scene, rng: random.Random) -> tuple[list[tuple[float, float]], float]:
    """One line of slots per group, the two lines on opposite sides of the canvas."""
    counts = [group.count for group in scene.groups]
    size = (0.42, 0.38, 0.29)[max(counts) - 1] * rng.uniform(0.9, 1.0)
    near = rng.uniform(0.25, 0.29)
    slots = []
    for index, count in enumerate(counts):
        across = near if (index == 0) == (scene.relation in ("left of", "above")) else 1 - near
        along = {1: (0.5,), 2: (0.28, 0.72), 3: (0.18, 0.5, 0.82)}[count]
        slots += [(across, a) if scene.relation in ("left of", "right of") else (a, across) for a in along]
    return slots, size


# Captions -------------------------------------------------------------------------------------------------------------

_PREFIXES = ("a photo of ", "a picture of ", "an image of ", "a drawing of ", "an illustration of ", "a 3d render of ",
             "draw ", "show me ", "please draw ", "a scene with ", "emoji of ", "a cute picture of ")
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_PHRASES = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "on top of", "higher than"),
    "below": ("below", "under", "beneath", "underneath"),
}
_ENDS = {"left of": ("on the left", "on the right"), "right of": ("on the right", "on the left"),
         "above": ("at the top", "at the bottom"), "below": ("at the bottom", "at the top")}


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" and not words.startswith(("unic", "one")) else "a"


def noun_phrase(group: Group, rng: random.Random) -> str:
    """The group in words: "a red apple", "2 dogs", "three purple sofas"."""
    thing = objects()[group.thing]
    use_synonym = thing.synonyms and rng.random() < 0.35
    noun = rng.choice(thing.synonyms) if use_synonym else thing.name
    colour = "" if group.colour is None else COLOURS[group.colour]
    if colour == "purple" and rng.random() < 0.15:
        colour = "violet"
    described = f"{colour} {noun}" if colour else noun
    if colour and rng.random() < 0.04:
        described = f"{colour} colored {noun}"
    if group.count == 1:
        style = rng.random()
        if noun.endswith("s") and noun == thing.plural:  # "scissors", "grapes": no article, no number
            return described
        if style < 0.72:
            return f"{_article(described)} {described}"
        return f"one {described}" if style < 0.82 else f"the {described}" if style < 0.86 else described
    plural = pluralize(noun) if use_synonym else thing.plural
    many = f"{colour} {plural}" if colour else plural
    style = rng.random()
    if style < 0.68:
        return f"{_NUMBERS[group.count]} {many}"
    if style < 0.92 or group.count != 2:
        return f"{group.count} {many}"
    return f"a pair of {many}" if "pair of" not in many else f"two {many}"


def _join(parts: list[str], rng: random.Random) -> str:
    if len(parts) == 1:
        return parts[0]
    if rng.random() < 0.5:
        parts = rng.sample(parts, len(parts))
    if len(parts) == 2:
        word = rng.choices((" and ", " with ", ", ", " next to ", " & ", " together with ", " beside "),
                           (70, 8, 6, 6, 3, 3, 3))[0]
        return parts[0] + word + parts[1]
    return ", ".join(parts[:-1]) + rng.choice((" and ", ", and ", ", ")) + parts[-1]


def _relate(first: str, second: str, relation: str, rng: random.Random) -> str:
    style = rng.random()
    if style < 0.5:
        return f"{first} {rng.choice(_PHRASES[relation])} {second}"
    if style < 0.7:
        return f"{second} {rng.choice(_PHRASES[_OPPOSITE[relation]])} {first}"
    if style < 0.8:
        here, there = _ENDS[relation]
        return f"{first} {here} and {second} {there}" if rng.random() < 0.5 else f"{here} {first}, {there} {second}"
    if style < 0.9:
        return f"{rng.choice(_PHRASES[relation])} {second} is {first}"
    return f"{second} with {first} {rng.choice(_PHRASES[relation][1:])} it"


def caption(scene: Scene, rng: random.Random) -> str:
    """One wording of the scene."""
    parts = [noun_phrase(group, rng) for group in scene.groups]
    text = _relate(parts[0], parts[1], scene.relation, rng) if scene.relation else _join(parts, rng)
    if rng.random() < 0.45:
        text = rng.choice(_PREFIXES) + text
    elif rng.random() < 0.06:
        many = len(parts) > 1 or scene.groups[0].count > 1
        text = f"there {'are' if many else 'is'} {text}"
    if scene.background is not None:
        where = rng.choice((f"on a {scene.background} background", f"with a {scene.background} background",
                            f"{scene.background} background", f"in front of a {scene.background} wall"))
        text = text + rng.choice((" ", ", ")) + where
    if rng.random() < 0.12:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text


def normalize(text: str) -> str:
    """The words of a caption alone, for telling whether two captions are the same word for word."""
    return " ".join(re.findall(r"[a-z0-9-]+", text.lower()))


def sample_captions(scene: Scene, rng: random.Random, count: int, held_out: Iterable[str] = ()) -> list[str]:
    """`count` wordings of a scene, none of which equals a held-out prompt word for word."""
    forbidden = held_out if isinstance(held_out, (set, frozenset)) else {normalize(text) for text in held_out}
    found: list[str] = []
    while len(found) < count:
        text = caption(scene, rng)
        if normalize(text) not in forbidden:
            found.append(text)
    return found
