"""GenEval's rules on hand-made detections, and against an independent reading of them on thousands of random ones."""

import random
import subprocess
import sys

import numpy as np
import pytest

from linocut.eval.rules import GENEVAL_TASKS, Found, Thresholds, judge, relations

OFFICIAL = Thresholds()


def thing(name: str, score: float = 0.95, x: float = 0, y: float = 0, side: float = 10, colour: str = "red") -> Found:
    COLOUR[(name, x, y)] = colour
    return Found(name, score, (x, y, x + side, y + side))


COLOUR: dict[tuple, str] = {}


def colours(taken):
    return [COLOUR[(each.name, each.box[0], each.box[1])] for each in taken]


def verdict(metadata, *found, thresholds=OFFICIAL):
    return judge(metadata, found, colours, thresholds)


def wish(task, *include, exclude=()):
    return {"tag": task, "include": list(include), "exclude": list(exclude), "prompt": ""}


def entry(name, count=1, **more):
    return {"class": name, "count": count, **more}


def test_single_object_is_there_or_not():
    wanted = wish("single_object", entry("cat"))
    assert verdict(wanted, thing("cat")).correct
    assert verdict(wanted, thing("cat"), thing("cat", x=50), thing("dog")).correct
    refused = verdict(wanted, thing("dog"))
    assert not refused.correct
    assert refused.reasons == ("expected 1 cat, found 0",)


def test_thresholds_are_exclusive_and_stricter_for_counting():
    assert not verdict(wish("single_object", entry("cat")), thing("cat", 0.3)).correct
    assert verdict(wish("single_object", entry("cat")), thing("cat", 0.31)).correct
    counting = wish("counting", entry("cat", 2), exclude=[entry("cat", 3)])
    assert not verdict(counting, thing("cat"), thing("cat", 0.9, x=50)).correct
    assert verdict(counting, thing("cat"), thing("cat", 0.91, x=50)).correct
    assert verdict(counting, thing("cat"), thing("cat", 0.91, x=50), thing("cat", 0.9, x=90)).correct


def test_counting_is_exact():
    wanted = wish("counting", entry("cat", 3), exclude=[entry("cat", 4)])
    cats = [thing("cat", x=20 * i) for i in range(5)]
    assert [verdict(wanted, *cats[:n]).correct for n in range(6)] == [False, False, False, True, False, False]
    assert "expected fewer than 4 cat, found 5" in verdict(wanted, *cats).reasons


def test_the_surest_objects_are_the_ones_that_count():
    wanted = wish("colors", entry("cat", color="red"))
    assert verdict(wanted, thing("cat", 0.5, colour="blue"), thing("cat", 0.9, x=50, colour="red")).correct
    assert not verdict(wanted, thing("cat", 0.5, colour="red"), thing("cat", 0.9, x=50, colour="blue")).correct


def test_both_colours_have_to_be_right():
    wanted = wish("color_attr", entry("cat", color="red"), entry("dog", color="blue"))
    red, blue = thing("cat", colour="red"), thing("dog", colour="blue")
    assert verdict(wanted, red, blue).correct
    swapped = verdict(wanted, thing("cat", colour="blue"), thing("dog", colour="red"))
    assert swapped.reasons == ("expected 1 red cat, found blue", "expected 1 blue dog, found red")


def test_position_is_that_of_the_second_entry_to_the_first():
    wanted = wish("position", entry("cat"), entry("dog", position=["right of", 0]))
    assert verdict(wanted, thing("cat"), thing("dog", x=50)).correct
    assert not verdict(wanted, thing("cat", x=50), thing("dog")).correct
    assert verdict(wanted, thing("dog", x=50)).reasons == ("expected 1 cat, found 0", "nothing for dog to be right of")


def test_a_wrong_colour_takes_the_target_away():
    wanted = wish("position", entry("cat", color="red"), entry("dog", position=["right of", 0]))
    assert not verdict(wanted, thing("cat", colour="blue"), thing("dog", x=50)).correct
    assert "nothing for dog to be right of" in verdict(wanted, thing("cat", colour="blue"), thing("dog", x=50)).reasons


@pytest.mark.parametrize(("x", "y", "expected"), [
    (30, 0, {"right of"}), (-30, 0, {"left of"}), (0, 30, {"below"}), (0, -30, {"above"}),
    (30, 30, {"right of", "below"}), (-30, -30, {"left of", "above"}), (30, 12, {"right of"}),
    (2, 0, set()), (1.9, 1.9, set()), (3, 0, set()), (4.1, 0, {"right of"}), (0, 0, set()),
])
def test_relations(x, y, expected):
    """Sides of 10: centres may be 2 off along an axis, and what is left has to be half of the whole offset."""
    assert relations((x, y, x + 10, y + 10), (0, 0, 10, 10)) == expected


def oracle(metadata, detections, threshold):
    """The rules once more, in arrays: `detections` are (name, score, box, colour)."""
    kept = {}
    for name in {d[0] for d in detections}:
        mine = sorted((d for d in detections if d[0] == name and d[1] > threshold), key=lambda d: d[1])[::-1][:16]
        kept[name] = mine
    groups, good = [], True
    for want in metadata["include"]:
        mine = kept.get(want["class"], [])[:want["count"]]
        ok = len(mine) == want["count"]
        ok = ok and ("color" not in want or sum(d[3] == want["color"] for d in mine) >= want["count"])
        if ok and "position" in want:
            name, target = want["position"]
            ok = groups[target] is not None and all(
                name in oracle_relations(np.array(a[2]), np.array(b[2])) for a in mine for b in groups[target])
        groups.append(mine if ok else None)
        good &= ok
    return good and all(len(kept.get(ban["class"], [])) < ban["count"] for ban in metadata["exclude"])


def oracle_relations(a, b):
    corners = np.stack([a, b]).reshape(2, 2, 2)
    offset = corners.mean(1)[0] - corners.mean(1)[1]
    moved = np.clip(np.abs(offset) - 0.1 * np.abs(corners[:, 1] - corners[:, 0]).sum(0), 0, None) * np.sign(offset)
    if np.abs(moved).max() < 1e-3:
        return set()
    u, v = moved / np.sqrt((offset**2).sum())
    return {n for n, there in {"left of": u < -0.5, "right of": u > 0.5, "above": v < -0.5, "below": v > 0.5}.items()
            if there}


def random_case(rng):
    names, tints = ["cat", "dog", "cow"], ["red", "blue"]
    found = []
    for index in range(rng.randrange(1, 22)):
        x, y = rng.uniform(0, 60), rng.uniform(0, 60)
        found.append((rng.choice(names[:rng.randrange(1, 4)]), rng.random() ** 0.2 + index * 1e-9,
                      (x, y, x + rng.uniform(5, 30), y + rng.uniform(5, 30)), rng.choice(tints)))
    task = rng.choice(GENEVAL_TASKS)
    include = [entry(rng.choice(names), rng.choice((1, 1, 1, 2, 3))) for _ in range(rng.choice((1, 2, 2)))]
    for index, each in enumerate(include):
        if rng.random() < 0.4:
            each["color"] = rng.choice(tints)
        if index and rng.random() < 0.6:
            each["position"] = [rng.choice(("left of", "right of", "above", "below")), 0]
    exclude = [entry(include[0]["class"], include[0]["count"] + 1)] if rng.random() < 0.4 else []
    return {"tag": task, "include": include, "exclude": exclude}, found


def test_equals_an_independent_reading_on_random_detections():
    rng, seen = random.Random(5), {True: 0, False: 0}
    for _ in range(6000):
        metadata, detections = random_case(rng)
        found = [Found(name, score, box, index) for index, (name, score, box, _) in enumerate(detections)]
        rng.shuffle(found)
        told = judge(metadata, found, lambda taken, d=detections: [d[each.handle][3] for each in taken], OFFICIAL)
        expected = oracle(metadata, detections, OFFICIAL.of(metadata["tag"]))
        assert told.correct == expected, (metadata, detections, told)
        assert told.correct == (not told.reasons)
        seen[expected] += 1
    assert min(seen.values()) > 500, seen


def test_rules_load_neither_torch_nor_numpy():
    code = "import sys, linocut.eval.rules; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
