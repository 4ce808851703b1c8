"""The things that can be drawn: GenEval's among them, none ambiguous, all with sound names and plurals."""

from collections import Counter

import pytest

from linocut.train.palette import BACKGROUNDS, COLOURS, PLACES, WALLS, background_rgb, colour, distance
from linocut.train.vocabulary import article, objects, plural_of, pluralize

INDEX = {thing.name: index for index, thing in enumerate(objects())}
# GenEval's object classes that exist as sprites, under its names.
GENEVAL = """person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|stop sign|bird|cat|dog|horse
sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|skis|snowboard|sports ball|kite
skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli
carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|bed|toilet|tv|laptop|computer mouse|computer keyboard
cell phone|book|clock|vase|scissors|teddy bear|toothbrush""".replace("\n", "|").split("|")


def test_vocabulary_holds_genevals_classes():
    assert len(GENEVAL) == len(set(GENEVAL)) == 67
    assert [thing.name for thing in objects()][:67] == GENEVAL
    assert all(thing.common for thing in objects()[:67])


def test_vocabulary_is_large():
    assert len(objects()) >= 500
    assert sum(len(thing.names) for thing in objects()) >= 900


def test_vocabulary_is_unambiguous():
    words = Counter(word for thing in objects() for word in {*thing.names, *({thing.plural} - {thing.name})})
    assert [word for word, count in words.items() if count > 1] == []
    assert len({thing.code for thing in objects()}) == len(objects())
    assert not {word for thing in objects() for word in thing.names} & ({*COLOURS} - {"orange"})
    for thing in objects():
        for word in (*thing.names, thing.plural):
            assert word == word.strip() == word.lower()
            assert not set(word) & set("|+~=")


def test_every_outline_is_measured():
    assert all(thing.outline != (0.5, 0.5, 0.5) for thing in objects())
    assert len({thing.outline for thing in objects()}) > 0.9 * len(objects())
    assert all(min(thing.width, thing.height) > 0.1 and max(thing.width, thing.height) >= 0.9 for thing in objects())
    assert sum(thing.width == thing.height == 1 for thing in objects()) < 0.2 * len(objects())


@pytest.mark.parametrize(("noun", "plural"), [
    ("apple", "apples"), ("bus", "buses"), ("box", "boxes"), ("couch", "couches"), ("toothbrush", "toothbrushes"),
    ("strawberry", "strawberries"), ("key", "keys"), ("monkey", "monkeys"), ("knife", "knives"),
    ("tomato", "tomatoes"), ("slice of pizza", "slices of pizza"), ("glass of wine", "glasses of wine"),
    ("policeman", "policemen"), ("human", "humans"), ("smiley with sunglasses", "smileys with sunglasses"),
])
def test_plurals(noun, plural):
    assert pluralize(noun) == plural


@pytest.mark.parametrize(("name", "plural"), [
    ("person", "people"), ("sheep", "sheep"), ("fish", "fish"), ("scissors", "scissors"), ("snowman", "snowmen"),
    ("corn", "ears of corn"), ("wine glass", "wine glasses"), ("computer mouse", "computer mice"), ("wolf", "wolves"),
])
def test_plurals_of_the_vocabulary(name, plural):
    assert objects()[INDEX[name]].plural == plural


def test_plurals_of_synonyms():
    bread = objects()[INDEX["bread"]]
    assert plural_of(bread, "loaf of bread") == "loaves of bread"
    tea = objects()[INDEX["cup of tea"]]
    assert plural_of(tea, "green tea") == "cups of tea"  # a mass noun has no plural of its own


@pytest.mark.parametrize(("words", "expected"), [("apple", "an"), ("ufo", "a"), ("unicorn", "a"), ("old fox", "an"),
                                                 ("umbrella", "an"), ("red egg", "a")])
def test_articles(words, expected):
    assert article(words) == expected


def test_backgrounds_are_ordered_from_top_to_bottom():
    assert set(WALLS) | set(PLACES) < set(BACKGROUNDS)
    for background in BACKGROUNDS.values():
        heights = [height for height, _ in background.stops]
        assert heights[0] == 0
        assert heights[-1] == 1
        assert heights == sorted(heights)
        assert background_rgb(background, 0.0) == background.stops[0][1]
        assert all(0 <= part <= 1 for height in (0, 0.3, 0.77, 1) for part in background_rgb(background, height))


def test_colours_differ():
    middles = {name: colour(index).ramp[1] for index, name in enumerate(COLOURS)}
    assert min(distance(a, b) for x, a in middles.items() for y, b in middles.items() if x < y) > 0.1
    assert distance((0, 0, 0), (1, 1, 1)) == 1
    assert distance((0.3, 0.2, 0.1), (0.3, 0.2, 0.1)) == 0
