"""Prompt files: what is accepted, what is refused, and how sure so many prompts can make one."""

import json

import numpy as np
import pytest

from linocut.errors import UsageError
from linocut.eval.coco_detector import COCO
from linocut.eval.prompts import (
    expected_difference_error,
    expected_error,
    fingerprint,
    read_prompts,
    refuse_unknown,
    seed_of,
    write_prompts,
)
from linocut.eval.rules import GENEVAL_COLOURS, GENEVAL_TASKS
from linocut.train.palette import COLOURS
from linocut.train.prompts import sample_prompts
from linocut.train.scenes import pair_split
from linocut.train.vocabulary import objects

OFFICIAL = [
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}],
     "prompt": "a photo of two clocks"},
    {"tag": "color_attr", "include": [{"class": "tv", "count": 1, "color": "purple"},
                                      {"class": "computer mouse", "count": 1, "color": "white"}],
     "prompt": "a photo of a purple tv and a white computer mouse"},
    {"tag": "position", "include": [{"class": "dog", "count": 1},
                                    {"class": "hair drier", "count": 1, "position": ["right of", 0]}],
     "prompt": "a photo of a hair drier right of a dog"},
]


def test_the_official_form_is_read_as_it_is(tmp_path):
    write_prompts(tmp_path / "new" / "prompts.jsonl", OFFICIAL)
    assert read_prompts(tmp_path / "new" / "prompts.jsonl") == OFFICIAL
    refuse_unknown(OFFICIAL, COCO, GENEVAL_COLOURS)


def without(index, **changes):
    return json.dumps(OFFICIAL[index] | changes)


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 2: not a line of GenEval's metadata"),
    ("[]", "line 2: not a line"),
    (without(0, tag="size"), "tag must be one of"),
    (without(0, prompt=" "), "the prompt is empty"),
    (without(0, include=[]), "nothing to include"),
    (without(0, include=[{"class": "clock", "count": 0}]), "a count of 1 or more"),
    (without(0, include=[{"class": "clock"}]), "KeyError"),
    (without(2, include=OFFICIAL[2]["include"][::-1]), "index of an entry before"),
    (without(2, include=[OFFICIAL[2]["include"][0], {"class": "cat", "count": 1, "position": ["near", 0]}]),
     "must be a relation"),
    (json.dumps(OFFICIAL[1]), "lines 1 and 2 hold the same prompt"),
])
def test_mistakes_are_named_with_their_line(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text(json.dumps(OFFICIAL[1]) + "\n" + line + "\n")
    with pytest.raises(UsageError, match=message):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize(("entry", "message"), [({"class": "unicorn"}, "no class 'unicorn', only 80 others"),
                                                ({"class": "tv", "color": "mauve"}, "no color 'mauve', only 10")])
def test_what_a_detector_does_not_know_is_refused(entry, message):
    with pytest.raises(UsageError, match=message):
        refuse_unknown([*OFFICIAL, OFFICIAL[0] | {"include": [entry | {"count": 1}]}], COCO, GENEVAL_COLOURS)


def test_files_without_prompts(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match="no prompts in it"):
        read_prompts(tmp_path / "p.jsonl")
    with pytest.raises(UsageError, match="not a readable file"):
        read_prompts(tmp_path / "none.jsonl")


@pytest.mark.parametrize("split", ["dev", "test"])
def test_prompts_of_the_embedded_world_fit_its_detector(tmp_path, split):
    prompts = sample_prompts(split, 60)
    write_prompts(tmp_path / "p.jsonl", prompts)
    assert read_prompts(tmp_path / "p.jsonl") == prompts
    refuse_unknown(prompts, {thing.name for thing in objects()}, COLOURS)
    assert [each["tag"] for each in prompts] == list(GENEVAL_TASKS) * 10 or \
        sorted(each["tag"] for each in prompts) == sorted(GENEVAL_TASKS * 10)
    number = {thing.name: index for index, thing in enumerate(objects())}
    pairs = [[number[entry["class"]] for entry in each["include"]] for each in prompts if len(each["include"]) == 2]
    assert len(pairs) == 30
    assert {pair_split(*pair) for pair in pairs} == {split}


def test_seeds_and_fingerprints():
    seeds = {seed_of(prompt, image) for prompt in ("a", "b", "a photo of a cat") for image in range(4)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert seed_of("a photo of a cat", 0) == 4119427094985405085  # results of earlier runs rely on it
    assert fingerprint(OFFICIAL) != fingerprint(OFFICIAL[:2])
    assert fingerprint(OFFICIAL) == fingerprint(json.loads(json.dumps(OFFICIAL)))


def test_the_expected_error_is_that_of_simulated_benchmarks():
    """Prompts whose own rates vary so that pictures of a prompt correlate as supposed."""
    rng, prompts, images, rate, alike = np.random.default_rng(0), 120, 4, 0.9, 0.3
    a = rate * (1 / alike - 1)  # of the beta distribution with that mean and correlation
    own = rng.beta(a, (1 - rate) * (1 / alike - 1), (4000, 6, prompts // 6))
    right = rng.binomial(images, own) / images
    spread = right.mean(2).mean(1).std()
    assert expected_error(prompts, images, rate, alike) == pytest.approx(spread, rel=0.05)
    assert expected_error(10_000, 1) == pytest.approx(0.003)
    assert expected_difference_error(2500, 4) < 0.0031
