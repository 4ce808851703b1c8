"""Captions: how a person may ask for a scene. The same scene has thousands of wordings.

A wording is a template such as "draw {0} next to {1} {b}"; filling in the groups ("a lovely red apple") gives the
caption. Wordings belong to splits by their hash (`scenes.split_of`), so that prompts for judging a model can have
wordings that no training caption had.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from linocut.train import wording
from linocut.train.palette import BACKGROUNDS, COLOURS, PLACES, WALLS, colour
from linocut.train.scenes import STYLES, Group, Scene, split_of
from linocut.train.vocabulary import ObjectName, article, every_name, is_plural, objects, plural_of

NONSENSE_RATE = 0.02
_FILLER_RATE, _SYNONYM_RATE, _ENDING_RATE, _VERB_RATE, _WISH_RATE = 0.12, 0.35, 0.14, 0.10, 0.07
_COLOUR_WORDS = {*COLOURS, "gold"}  # no "blue brown bear"
_FRAME_WEIGHTS = [weight for weight, _ in wording.FRAMES]


def sample_captions(scene: Scene, rng: random.Random, count: int, held_out: Iterable[str] = (),
                    split: str = "train") -> list[str]:
    """`count` captions of a scene with wordings of `split`, none of which equals a held-out prompt word for word."""
    forbidden = held_out if isinstance(held_out, set | frozenset) else {normalize(text) for text in held_out}
    found: list[str] = []
    while len(found) < count:
        template = sample_wording(scene, rng)
        if split_of(template) != split:
            continue
        text = fill(template, scene, rng)
        if normalize(text) not in forbidden:
            found.append(text)
    return found


def normalize(text: str) -> str:
    """The words of a caption alone, for telling whether two captions are the same word for word."""
    return " ".join(re.findall(r"[a-z0-9-]+", text.lower()))


# Wordings -------------------------------------------------------------------------------------------------------------

def sample_wording(scene: Scene, rng: random.Random) -> str:
    """A random template for the scene: {0}, {1}, {2} are its groups, {b} is the phrase for its background.

    With {c} in it, it says the colour of its only group, {0}.
    """
    body = _body(scene, rng)
    sentence = "{is}" in body or "{meets}" in body
    clause = sentence or not body.startswith(("{", "both"))  # no noun phrase, so it cannot be a photo of that
    spoken = "" if scene.background not in WALLS and not BACKGROUNDS[scene.background].phrases else "{b}"
    awaiting = body.endswith(wording.PLACE_VERBS)  # then no comma before the place
    if scene.spot is not None:
        body += (" " if awaiting else rng.choice((" ", " ", " ", ", "))) + rng.choice(wording.SPOT_WORDS[scene.spot])
    if spoken:
        style = rng.random() * (0.35 if "{c}" in body else 1)  # no "make it red on the grass"
        style = 1 if awaiting and scene.spot is None else style
        clause = clause or style < 0.08
        body = f"{spoken}, {body}" if style < 0.08 else f"{body}, {spoken}" if style < 0.35 else f"{body} {spoken}"
    if scene.style in wording.STYLE_FRAMES:
        frames = [each for each in wording.STYLE_FRAMES[scene.style] if not clause or each.startswith("{x}, ")]
        return rng.choice(frames).replace("{x}", body)
    frame = "{x}" if clause else rng.choice(rng.choices([frames for _, frames in wording.FRAMES], _FRAME_WEIGHTS)[0])
    if "please" in frame and "please" in body:
        frame = "{x}"
    text = frame.replace("{x}", body)
    return text + _endings(text, rng) if rng.random() < _ENDING_RATE and not text.endswith("?") else text


def _endings(text: str, rng: random.Random) -> str:
    """One or two endings of different kinds that the text does not say already."""
    fitting = [(row, ending) for row, endings in enumerate(wording.ENDINGS) for ending in endings
               if ending.strip(" ,") not in text and not (ending in wording.POLITE and "please" in text)]
    found = dict([rng.choice(fitting)])
    if rng.random() < 0.25:
        row, ending = rng.choice(fitting)
        found.setdefault(row, ending)
    return "".join(ending for _, ending in sorted(found.items()))


def _body(scene: Scene, rng: random.Random) -> str:
    if scene.relation in wording.RELATION_WORDS:
        return _related(scene.relation, rng)
    if scene.relation == "next to":
        return _shuffled(_weighted(wording.NEXT_TO, rng), 2, rng)
    if scene.relation == "between":
        template = _weighted(wording.BETWEEN, rng)
        return _renamed(template, ("0", "2", "1")) if rng.random() < 0.5 else template
    if len(scene.groups) == 2:
        return _shuffled(_weighted(wording.JOINS, rng), 2, rng)
    if len(scene.groups) == 3:
        return _shuffled(_weighted(wording.JOINS_3, rng), 3, rng)
    if scene.groups[0].colour is not None and scene.style == STYLES[0] and not scene.spot and rng.random() < _WISH_RATE:
        return rng.choice(wording.COLOUR_WISHES).replace("{do}", rng.choice(wording.COMMANDS))
    lone, style = scene.groups[0].count == 1, rng.random()
    if style < 0.04:
        return "there {is} {0}"
    if style < 0.04 + _VERB_RATE and (scene.spot or scene.background not in WALLS):
        placed = scene.spot is not None or scene.background in PLACES
        return "{0} " + rng.choice([verb for verb in wording.VERBS if placed or verb not in wording.PLACE_VERBS])
    if style > 0.97 and scene.spot is None:
        return rng.choice(wording.LONE_STATEMENTS if lone else wording.EVERY_STATEMENT)
    return "{0}"


def _related(relation: str, rng: random.Random) -> str:
    here, there = rng.choice(wording.PLACED[relation])
    template = _weighted(wording.RELATED, rng)
    words, opposite = list(wording.RELATION_WORDS[relation]), wording.RELATION_WORDS[wording.OPPOSITE[relation]]
    if "{r} {it}" in template:  # "left of it" is not English without "to"
        words = [each for each in words if each not in ("left of", "right of")]
    if "ed {r}" in template:  # nor is "placed standing on"
        words = [each for each in words if not each.startswith(("standing", "sitting"))]
    if "{0} {r} {1}" in template and relation != "on" and rng.random() < _VERB_RATE:
        template = "{0} " + rng.choice(wording.VERBS) + " {r} {1}"
    return (template.replace("{r}", rng.choice(words)).replace("{o}", rng.choice(opposite))
            .replace("{p}", here).replace("{q}", there))


def _weighted(templates: Mapping[str, float], rng: random.Random) -> str:
    return rng.choices(list(templates), list(templates.values()))[0]


def _shuffled(template: str, count: int, rng: random.Random) -> str:
    return _renamed(template, rng.sample([str(i) for i in range(count)], count))


def _renamed(template: str, order: Sequence[str]) -> str:
    """The template with {0}, {1}, ... standing for the groups `order` names."""
    return re.sub(r"\{(\d)\}", lambda found: "{" + order[int(found[1])] + "}", template)


# Filling in -----------------------------------------------------------------------------------------------------------

def fill(template: str, scene: Scene, rng: random.Random) -> str:
    """The caption that a template makes of a scene."""
    text = template.replace("{b}", _background(scene.background, template.startswith("{b}"), rng))
    wish = "{c}" in text
    if wish:
        text = text.replace("{c}", _colour_word(scene.groups[0], rng))
    terse = not any(each in text for each in ("{is}", "{this}", "{meets}"))  # "there is cow" is not English
    phrases = [_phrase(group, rng, tell=not wish, terse=terse) for group in scene.groups]
    text = _agreeing(text, [plural for _, plural in phrases])
    for index, (words, _) in enumerate(phrases):
        text = text.replace("{" + str(index) + "}", words)
    style = rng.random()
    if style < 0.12:
        text = text[0].upper() + text[1:]
    elif style < 0.125:
        text = text.upper()
    return text + "." if rng.random() < 0.1 and text[-1] not in "?!." else text


def _agreeing(template: str, plurals: Sequence[bool]) -> str:
    """The template with {is}, {it} and the like in the number of their groups; `plurals` tells which are plurals."""
    first = int(re.findall(r"\{(\d)\}", template)[0])
    for name, forms in (wording.WITH_NEXT | wording.WITH_FIRST).items():
        before, found, after = template.partition("{" + name + "}")
        if found:
            following = re.match(r",? \{(\d)\}", after) if name in wording.WITH_NEXT else None
            plural = after.startswith(" both ") or plurals[int(following[1]) if following else first]
            template = before + forms[plural] + after
    return template


def _background(name: str, first: bool, rng: random.Random) -> str:
    """Words for a background; `first` if they begin the caption."""
    phrases = wording.WALL_PHRASES if name in WALLS else BACKGROUNDS[name].phrases
    if not phrases:
        return ""
    chosen = rng.choice([phrase for phrase in phrases if not (first and phrase.startswith("and "))])
    word = rng.choice(("gray", "grey")) if name == "gray" else name
    return chosen.replace("a {c}", f"{article(word)} {word}").replace("{c}", word)


def noun_phrase(group: Group, rng: random.Random) -> str:
    """The group in words: "a lovely red apple", "2 tiny dogs", "three sofas that are purple"."""
    return _phrase(group, rng)[0]


def _phrase(group: Group, rng: random.Random, *, tell: bool = True, terse: bool = True) -> tuple[str, bool]:
    """The group in words, and whether a verb after them is in the plural.

    `tell` its colour in them, or leave that to the words around; `terse` if a lone thing may go without an article.
    """
    thing = objects()[group.thing]
    single = _name(thing, group, rng, tell)
    always_plural = is_plural(single)  # scissors, fries
    many = plural_of(thing, single)
    plural = group.count > 1 or always_plural
    described = many if group.count > 1 else single
    if tell:
        described = _coloured(described, group, rng, plural)
    adjectives = [rng.choice(wording.SIZE_WORDS[group.size])] if group.size else []
    if rng.random() < _FILLER_RATE:
        adjectives.insert(rng.randrange(len(adjectives) + 1), rng.choice(wording.FILLERS))
    if rng.random() < NONSENSE_RATE:
        adjectives.append(nonsense(rng))
    described = " ".join([*adjectives, described])
    if group.count > 1:
        text = f"{_number(group.count, always_plural or 'pairs of' in many, rng)} {described}"
    elif always_plural or single in thing.masses:
        text = _some(described, always_plural, rng)
    else:
        text = _one(described, terse, rng)
    if rng.random() < NONSENSE_RATE / 2:
        text += f" {rng.choice(wording.NAMED)} {nonsense(rng).capitalize()}"
    return text, plural


def _name(thing: ObjectName, group: Group, rng: random.Random, tell: bool) -> str:
    """A name for one of a thing; none with a colour in it ("pink blossom") if the group has another colour."""
    synonyms = [noun for noun in thing.synonyms if group.colour is None or not _COLOUR_WORDS & set(noun.split())]
    if group.count > 1 and not is_plural(thing.name):
        synonyms = [noun for noun in synonyms if not is_plural(noun)]  # two mouths are not two lips
    clash = not tell and thing.name in _COLOUR_WORDS  # "a blue orange" is fine, "an orange, in blue" is a riddle
    return rng.choice(synonyms) if synonyms and (clash or rng.random() < _SYNONYM_RATE) else thing.name


def _colour_word(group: Group, rng: random.Random) -> str:
    assert group.colour is not None
    words = colour(group.colour).words
    return words[0] if rng.random() < 0.88 else rng.choice(words)


def _coloured(noun: str, group: Group, rng: random.Random, plural: bool) -> str:
    if group.colour is None:
        return noun
    word, style = _colour_word(group, rng), rng.random()
    if style < 0.88:
        return f"{word} {noun}"
    form = rng.choice(wording.COLOUR_AFTER if style < 0.95 else wording.COLOUR_BEFORE)
    return form.replace("{n}", noun).replace("{c}", word).replace("{is}", "are" if plural else "is")


def _number(count: int, paired: bool, rng: random.Random) -> str:
    """The number in words or digits; `paired` for scissors and the like, a pair of which is only one."""
    number = wording.NUMBERS[count] if rng.random() < 0.7 else str(count)
    style = rng.random()
    if style < 0.80:
        return number
    if style < 0.90 and count in (2, 6) and not paired:
        return rng.choice(wording.TWO if count == 2 else wording.SIX)
    return f"{rng.choice(wording.EXACT)} {number}" if style < 0.95 else f"{rng.choice(wording.COLLECTIONS)} {number}"


def _one(described: str, terse: bool, rng: random.Random) -> str:
    """One thing with its article, or if `terse` sometimes without."""
    style = rng.random()
    if style < 0.76:
        return f"{article(described)} {described}"
    return described if terse and style > 0.90 else f"{rng.choice(wording.ONE)} {described}"


def _some(described: str, plural: bool, rng: random.Random) -> str:
    """What has no article "a": words like scissors, which are `plural`, and words like bread."""
    style = rng.random()
    if style < 0.36:
        return f"some {described}"
    return described if plural or style < 0.90 else f"{rng.choice(wording.UNCOUNTED)} {described}"


def nonsense(rng: random.Random) -> str:
    """A word that means nothing, so that the model learns to pass over words it does not know."""
    pairs = [rng.choice("bdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
    return "".join(pairs) + rng.choice(("", "n", "r", "x", "l", "sh"))


@cache
def lexicon() -> frozenset[str]:
    """Every word that captions are made of, lower case, names of things included, nonsense not."""
    texts: list[str] = [*COLOURS, *wording.NUMBERS, *map(str, range(1, len(wording.NUMBERS))), "a", "an", "some", "are",
                        "is", "grey", "draw", "please", "show", "me"]
    for thing in objects():
        texts += every_name(thing)
    for index in range(len(COLOURS)):
        texts += colour(index).words
    for background in BACKGROUNDS.values():
        texts += background.phrases
    for name, value in vars(wording).items():
        if not name.startswith("__") and name != "annotations":
            texts += _strings(value)
    return frozenset(word for text in texts for word in words_of(text))


def words_of(text: str) -> list[str]:
    """The words of a text, lower case; the places for groups in a template are none."""
    return re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", re.sub(r"\{\w+\}", " ", text.lower().replace("\u2019", "'")))


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return _strings([*value, *value.values()])
    return [text for part in value for text in _strings(part)] if isinstance(value, Iterable) else []
