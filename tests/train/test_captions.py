"""Captions are English, name what is there, and leave held-out prompts and wordings alone."""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_recipe import ROOT

from linocut.train import captions as module
from linocut.train.captions import fill, lexicon, normalize, noun_phrase, sample_captions, sample_wording, words_of
from linocut.train.corpus import CHUNK, chunks, make_scenes
from linocut.train.palette import BACKGROUNDS, COLOURS, WALLS, colour
from linocut.train.prompts import GENEVAL_TASKS, sample_prompts
from linocut.train.recipe import Recipe
from linocut.train.scenes import LIGHT, RELATIONS, TASKS, Group, Scene, pair_split, sample_scene, split_of
from linocut.train.vocabulary import objects, plural_of, pluralize
from linocut.train.wording import COMMANDS, NUMBERS

SEEDS = st.integers(0, 2**32)
INDEX = {thing.name: index for index, thing in enumerate(objects())}
AN = re.compile(r"(?!unicorn|ufo|one\b|ewe)[aeiou]|hourglass|suv|x ")  # what is said with "an"
PLURALS = r"scissors|skis|grapes|french fries|chips|jeans|trousers|socks|sunglasses|spectacles|lips|bricks|scales|peas"


def recipe() -> Recipe:
    return Recipe.from_file(ROOT / "recipes" / "embedded" / "recipe.toml")


def every_name(thing) -> list[str]:
    return [thing.plural, *thing.names, *(plural_of(thing, noun) for noun in thing.synonyms)]


@given(SEEDS, st.integers(0, len(objects()) - 1), st.integers(1, 6), st.none() | st.integers(0, len(COLOURS) - 1))
@settings(deadline=None, max_examples=400)
def test_noun_phrases(seed, thing, count, tint):
    phrase = noun_phrase(Group(thing, count, tint), random.Random(seed))
    assert phrase == " ".join(phrase.split())
    assert any(name in phrase for name in every_name(objects()[thing]))
    first, *rest = phrase.split()
    if first in ("a", "an") and phrase.split()[1:2] != ["single"] and " of " not in phrase:
        assert (first == "an") == (bool(AN.match(" ".join(rest)))), phrase
    if count > 1:
        said = {NUMBERS[count], str(count), *({"pair", "couple"} if count == 2 else {"dozen"} if count == 6 else ())}
        assert said & set(phrase.split()[:5]), phrase
    else:
        assert not {*NUMBERS[2:], *"23456"} & set(phrase.split()), phrase
    if tint is not None:
        assert any(word in phrase for word in colour(tint).words)
        said = [word for word in re.findall(r"[a-z]+", phrase) if word in COLOURS]
        assert len(said) <= (2 if objects()[thing].name == "orange" else 1), phrase


@given(SEEDS)
@settings(deadline=None, max_examples=500)
def test_captions_name_what_is_there(seed):
    rng = random.Random(seed)
    scene = sample_scene(rng)
    (text,) = sample_captions(scene, rng, 1)
    low = text.lower()
    assert text == " ".join(text.split())
    assert len(text) < 230
    assert not re.search(r"[{}]|\ba a\b|\bof on\b|,,|\bis are\b", low)
    for group in scene.groups:
        assert any(name in low for name in every_name(objects()[group.thing])), text
        if group.size:
            assert re.search(r"\b(big|large|huge|giant|enormous|small|tiny|little|mini)\b", low), text
    if scene.background in WALLS:
        assert scene.background.replace("gray", "") in low, text
    elif BACKGROUNDS[scene.background].phrases:
        assert any(phrase in low for phrase in BACKGROUNDS[scene.background].phrases), text
    if scene.style != "plain":
        assert re.search("black and white|gray|monochrome|pixel", low), text


@pytest.mark.parametrize("relation", RELATIONS)
def test_captions_say_the_relation_the_right_way_round(relation):
    """Read the wording back by its keywords and compare with the relation."""
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    meaning = {"left": "left of", "right": "right of", "above": "above", "over": "above", "top": "above",
               "higher": "above", "on": "above", "below": "below", "under": "below", "beneath": "below",
               "underneath": "below", "lower": "below", "bottom": "below"}
    keys = re.compile(r"\b(" + "|".join(meaning) + r")\b")
    for seed in range(600):
        rng = random.Random(seed)
        text = module._related(relation, rng).replace("{is}", "is").replace("{it}", "it")
        text = text.replace("{0}", "snail").replace("{1}", "rooster")
        snail, rooster = text.index("snail"), text.index("rooster")
        found = [(match.start(), match[1]) for match in keys.finditer(text)
                 if not re.match(r"right (above|below)", text[match.start():])]
        found = [each for each in found if each[1] != "on"] or found  # "on the left of" is left, "on top" is top
        at, word = found[0]
        if len({each[1] for each in found}) > 1 and not text.endswith(" it"):  # "A on the left, B on the right"
            of_snail = snail < rooster
        elif text.endswith(" it") or at < min(snail, rooster):  # "B with A left of it", "left of B is A"
            of_snail = rooster < snail
        else:  # "A left of B"
            of_snail = snail < rooster
        found_relation = meaning[word] if of_snail else inverse[meaning[word]]
        assert found_relation == ("above" if relation == "on" else relation), text


def test_wordings_vary():
    rng = random.Random(0)
    scene = sample_scene(rng, "two_object")
    assert len({sample_wording(scene, rng) for _ in range(1000)}) > 250


def test_filler_and_unknown_words_are_passed_over_in_training():
    rng = random.Random(0)
    found = Counter(word for _ in range(4000) for word in words_of(noun_phrase(Group(3, 1, 2), rng)))
    assert {"lovely", "happy", "new"} <= set(found)
    unknown = sum(count for word, count in found.items() if word not in lexicon() and "-" not in word)
    assert 50 < unknown < 400


def test_the_lexicon_holds_every_word_of_captions(monkeypatch):
    monkeypatch.setattr(module, "NONSENSE_RATE", 0.0)
    rng = random.Random(0)
    known, unknown = lexicon(), Counter()
    for _ in range(4000):
        for text in sample_captions(sample_scene(rng), rng, 1):
            unknown.update(part for word in words_of(text) if word not in known for part in word.split("-")
                           if part not in known)
    assert not unknown
    assert {"lovely", "please", "turtle", "turtles", "violet", "beneath", "six", "meadow", "i'd"} <= known
    assert "xylophone" not in known


def test_held_out_prompts_are_never_captions():
    scene = Scene("single_object", (Group(INDEX["snail"]),), None, LIGHT[0])
    often = Counter(normalize(text) for text in sample_captions(scene, random.Random(1), 2000)).most_common(3)
    assert often[0][1] > 5
    held_out = [f"{text.upper()}!" for text, _ in often]
    captions = {normalize(text) for text in sample_captions(scene, random.Random(0), 1000, held_out)}
    assert not captions & {text for text, _ in often}
    made = make_scenes(replace(recipe(), held_out=tuple(held_out)), 0, 200)
    assert not {normalize(text) for group in made.captions for text in group} & {text for text, _ in often}


def test_scenes_are_of_tasks_by_their_shares(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)  # two workers make what does not fit into one job
    parts = list(chunks(recipe(), 3, CHUNK + 400, {"counting": 3.0, "position": 1.0, "colors": 0.0}))
    assert [len(part.scenes) for part in parts] == [CHUNK, 400]
    for part in parts:
        tasks = Counter(scene.task for scene in part.scenes)
        assert set(tasks) == {"counting", "position"}
        assert 0.65 < tasks["counting"] / len(part.scenes) < 0.85
    assert {scene.task for scene in make_scenes(recipe(), 3, 400).scenes} == set(TASKS)


def test_a_held_out_prompt_is_passed_over():
    """The grammar can make this one; with it forbidden, the same dice make another caption."""
    scene = Scene("colors", (Group(INDEX["fire truck"], 1, list(COLOURS).index("green")),))
    prompt = normalize("a fire truck, but make it green")
    assert prompt in {normalize(text) for text in recipe().held_out}
    def caption(seed: int, held_out: tuple[str, ...] = ()) -> str:
        return normalize(sample_captions(scene, random.Random(seed), 1, held_out)[0])

    seed = next(seed for seed in range(100_000) if caption(seed) == prompt)
    assert caption(seed, recipe().held_out) != prompt


def test_the_sheets_prompts_are_no_captions():
    """Not one of the 24 can be found among many captions that are made of scenes with the same things."""
    prompts = {normalize(text) for text in recipe().held_out}
    assert len(prompts) == 24
    rng = random.Random(0)
    for prompt in prompts:
        things = [index for index, thing in enumerate(objects())
                  if any(f" {name} " in f" {prompt} " for name in every_name(thing))]
        assert things, prompt
        for _ in range(150):
            groups = tuple(Group(thing, rng.choice((1, 1, 2, 3, 5, 6)), rng.choice((None, *range(len(COLOURS)))))
                           for thing in things[:3])
            relation = rng.choice((None, *RELATIONS)) if len(groups) == 2 else None
            scene = Scene("mixed", groups, relation, rng.choice((LIGHT[0], "white", "grass", "sky", "sea", "night")))
            assert normalize(sample_captions(scene, rng, 1, prompts)[0]) not in prompts


def test_prompts_file_covers_the_six_tasks():
    lines = Path(ROOT / "recipes" / "embedded" / "prompts.txt").read_text("utf-8").splitlines()
    tasks = Counter(line.split("|")[0].strip() for line in lines if not line.startswith("#"))
    assert tasks == dict.fromkeys(GENEVAL_TASKS, 4)


def test_normalize_ignores_case_and_marks():
    assert normalize("A red Apple, and 2 T-Rexes!") == "a red apple and 2 t-rexes"


def test_fill_agrees_in_number():
    one, many = (Scene("mixed", (Group(INDEX["snail"], count), Group(INDEX["fox"])), "above") for count in (1, 3))
    for seed in range(50):
        assert re.search(r"(snail|Snail|SNAIL)[a-z ]* (is|IS) ", fill("{0} {is} above {1}", one, random.Random(seed)))
        assert re.search(r"(snails|SNAILS).* (are|ARE) ", fill("{0} {is} above {1}", many, random.Random(seed)))
    assert " are " in fill("below {1} {is} {0}", many, random.Random(0)).lower()


# English -------------------------------------------------------------------------------------------------------------

@cache
def many_captions(*tasks: str) -> tuple[str, ...]:
    """Two thousand captions of each task, lower case, without fillers; the same ones every time."""
    rng, found = random.Random(1), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NONSENSE_RATE", 0.0)
        patch.setattr(module, "_FILLER_RATE", 0.0)
        for task in tasks or TASKS:
            for _ in range(2000):
                found += sample_captions(sample_scene(rng, task), rng, 1)
    return tuple(text.lower() for text in found)


def filled(template: str, *groups: Group, count: int = 40) -> list[str]:
    return [fill(template, Scene("mixed", groups), random.Random(seed)).lower() for seed in range(count)]


def breaches(pattern: str, texts) -> list[str]:
    return [text for text in texts if re.search(pattern, text)]


SNAIL, SNAILS, FOX, FOXES, SCISSORS = (Group(INDEX[name], count) for name, count in (
    ("snail", 1), ("snail", 3), ("fox", 1), ("fox", 2), ("scissors", 1)))


@pytest.mark.parametrize(("template", "one", "many"), [
    ("{0} with {1} next to {it}", r" it\b", r" them\b"), ("{0} and {1} left of {it}", r" it\b", r" them\b"),
    ("{0} {meets} {1}", r" meets ", r" meet "), ("{0} on {its} own", r" its own", r" their own"),
    ("{0} by {itself}", r" itself", r" themselves"), ("{this} {0} and {1}", r"^this is ", r"^these are "),
    ("here {is} {0}", r"^here is ", r"^here are "), ("{0}, but make {it} red", r" it red", r" them red")])
def test_pronouns_and_verbs_agree_with_the_first_group(template, one, many):
    for other in (FOX, FOXES) if "{1}" in template else (FOX,):
        assert not [text for text in filled(template, SNAIL, other) if not re.search(one, text)]
        assert not [text for text in filled(template, SNAILS, other) if not re.search(many, text)]


def test_friends_agree_with_both_groups():
    for first, its in ((SNAIL, "its"), (SNAILS, "their")):
        for second, friend in ((FOX, "friend"), (FOXES, "friends")):
            for text in filled("{0} and {its} {friend}, {1}", first, second):
                assert f" and {its} {friend}, " in text
    assert breaches(r"\band its friend, ", many_captions("two_object"))
    assert breaches(r" meets ", many_captions("two_object"))


def test_the_pronoun_of_the_other_group_is_its_own():
    """After renaming, {it} still means the group that is named first."""
    for text in filled("{1} with {0} next to {it}", SNAIL, FOXES):
        assert re.search(r"foxes.* next to them", text)
    assert not breaches(r"^(two|three|2|3) [a-z ]* (with|and) [a-z ]+ (of|under|over|above|below|next to) it\b",
                        many_captions())


def test_nobody_is_a_photo_of_a_sentence():
    assert not breaches(r"\b(photo|picture|image|drawing|painting|with|draw) (of )?[^,]* meets? ", many_captions())


def test_articles_fit_the_sound():
    texts = many_captions()
    assert not breaches(r"\ba (?:hour|suv|x |orange|egg|owl|umbrella|onion|apple|ant)", texts)
    assert not breaches(r"\ban (?:ewe|unicorn|ufo|house|horse|hat|hippo|one )", texts)
    assert breaches(r"\ban hourglass", filled("{0}", Group(INDEX["hourglass"])))


def test_plurals_and_masses_have_no_singular_article():
    texts = [re.sub(r"\b(pair|bunch|pile|bucket)s? of [a-z]+", "pair", text) for text in many_captions()]
    assert not breaches(rf"\b(a|an|one|a single|this|some kind of) ([a-z]+ )?({PLURALS})\b", texts)
    masses = {"bread", "rice", "honey", "soap", "butter", "bacon", "toilet paper", "sushi"}
    assert not breaches(rf"\b(a|one|a single) ({'|'.join(masses)})$", texts)
    assert not [text for mass in ("bread", "corn", "soap") for text in filled("{0}", Group(INDEX[mass]), count=200)
                if re.match(rf"(a|one|a single) {mass}\b", text)]


def test_pairs_are_counted_as_pairs():
    texts = many_captions()
    assert not breaches(r"\b(two|three|four|five|six|[2-6]|dozen|some) pair of", texts)
    assert not breaches(r"\bpairs? of (?:[a-z]+ )?pairs? of|\ba couple of pair", texts)
    two = [text for name in ("scissors", "jeans") for text in filled("{0}", Group(INDEX[name], 2), count=200)]
    assert breaches(r"\btwo pairs of ", two)
    assert not breaches(r"\ba pair of ", two)  # that is one


def test_a_thing_is_not_counted_by_its_parts():
    for name, part in (("mouth", "lips"), ("pea pod", "peas")):
        assert not breaches(rf"\b{part}\b", filled("{0}", Group(INDEX[name], 2), count=200))


def test_wishes_are_verbs_only_after_verbs():
    texts = many_captions("colors", "counting")
    wishes = breaches(r" and make (it|them) ", texts)
    assert wishes
    assert not [text for text in wishes if not re.search(rf"(^|, )({'|'.join(COMMANDS)}) ", text)]
    assert not breaches(r"\bplease\b.*\bplease\b", texts)


def test_a_wish_contradicts_no_colour_in_the_name():
    red = list(COLOURS).index("red")
    for name, word in (("cherry blossom", "pink"), ("leaf", "green"), ("orange", "orange"), ("bear", "brown")):
        assert not breaches(rf"\b{word}\b", filled("{0}, but make {it} {c}", Group(INDEX[name], 1, red), count=100))


def test_endings_neither_repeat_nor_contradict():
    texts = many_captions()
    rivals = ("please|thanks|thank you|if you can", "simple|minimalistic|detailed|highly detailed|4k",
              "3d render|emoji style|clip art|cartoon style|realistic|professional photo|vector art", "cute|beautiful")
    for words in rivals:
        assert not breaches(rf", (?:{words})(?:, [^,]*)?,? (?:{words})[!.]*$", texts)
    assert not breaches(r"\bplease\b.*\bplease\b|nothing else.*nothing else|thank.*(?:for my|please)", texts)
    assert breaches(r", (?:cute|4k|glossy),? please", texts)


def test_verbs_of_place_are_followed_by_a_place():
    texts = many_captions()
    assert breaches(r" located in ", texts)
    assert not breaches(r"\b(placed|shown|seen|located)([,.!?]|$| standing| sitting)", texts)


def test_sentences_have_articles():
    bare = filled("there {is} {0}", SNAIL, count=300)
    assert not [text for text in bare if not re.match(r"there is (an?|one|the|this|some) ", text)]
    assert breaches(r"^snail", filled("{0}", SNAIL, count=300))  # elsewhere people leave them out


@pytest.mark.parametrize(("noun", "plural"), [
    ("nest full of eggs", "nests full of eggs"), ("running person", "running people"), ("trousers", "trousers"),
    ("super hero", "super heroes"), ("nut and bolt", "nuts and bolts"), ("sheaf of rice", "sheaves of rice"),
    ("rhinoceros", "rhinoceroses"), ("pair of jeans", "pairs of jeans"), ("bus", "buses"), ("dress", "dresses")])
def test_plurals_of_odd_nouns(noun, plural):
    assert pluralize(noun) == plural


# Prompts for judging --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", ["dev", "test"])
def test_prompts_to_judge_by_are_held_out(split):
    prompts = sample_prompts(split, 120)
    assert prompts == sample_prompts(split, 120)
    assert len({normalize(entry["prompt"]) for entry in prompts}) == 120
    assert Counter(entry["tag"] for entry in prompts) == dict.fromkeys(GENEVAL_TASKS, 20)
    for entry in prompts:
        things = [INDEX[each["class"]] for each in entry["include"]]
        if len(things) == 2:
            assert pair_split(*things) == split
        assert any(name in entry["prompt"].lower() for name in every_name(objects()[things[0]]))
        if entry["tag"] == "counting":
            assert entry["exclude"][0]["count"] == entry["include"][0]["count"] + 1 > 2
        if entry["tag"] in ("colors", "color_attr"):
            assert all(each["color"] in COLOURS for each in entry["include"])
        if entry["tag"] == "position":
            assert entry["include"][1]["position"][0] in RELATIONS
            assert entry["include"][1]["position"][1] == 0


def test_training_has_no_wording_of_a_held_out_split():
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng)
        state = rng.getstate()
        (text,) = sample_captions(scene, rng, 1)
        rng.setstate(state)
        template = sample_wording(scene, rng)  # the same random numbers: the first try, if it was not turned down
        if split_of(template) != "train":
            assert fill(template, scene, rng) != text


def test_the_list_that_ships_knows_all_words_of_captions(tmp_path, monkeypatch):
    from linocut.formats.folder import VOCABULARY_FILE, ModelFolder
    from linocut.pipeline.vocabulary import Vocabulary
    from linocut.train.export import vocabulary_table

    monkeypatch.setattr(module, "NONSENSE_RATE", 0.0)
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / VOCABULARY_FILE).write_text(json.dumps(vocabulary_table()))
    known, rng = Vocabulary.of(ModelFolder(tmp_path, "small")), random.Random(0)
    assert len(known.things) == len(objects())
    assert (tmp_path / VOCABULARY_FILE).stat().st_size < 80_000
    for _ in range(1000):
        (text,) = sample_captions(sample_scene(rng), rng, 1)
        assert known.note(text) is None, text
    assert "'xylophone' (near: " in known.note("a xylophone")
    assert "'7'" in known.note("7 apples")
