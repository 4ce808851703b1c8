"""The detector that comes with the package: what it knows, what was measured of it, and that it sees."""

import torch

from linocut.eval.rules import GENEVAL_TASKS, judge
from linocut.eval.world_detector import SHIPPED, WEIGHTS, WorldDetector, _coded, _decoded
from linocut.pipeline.generate import Pipeline
from linocut.train.palette import COLOURS
from linocut.train.vocabulary import objects

PROMPT = "please draw exactly three strawberries for my daughter"


def test_it_knows_the_world_and_was_measured():
    detector = WorldDetector(SHIPPED)
    assert detector.names == tuple(thing.name for thing in objects())
    assert detector.colour_names == tuple(COLOURS)
    assert set(detector.accuracy) == {"256x256 plain", "256x256 redrawn", "320x192 plain", "320x192 redrawn"}
    for table in detector.accuracy.values():
        assert list(table) == list(GENEVAL_TASKS)
        assert all(row["accuracy"] >= 0.98 and row["n"] == 500 for row in table.values())
    assert (SHIPPED / WEIGHTS).stat().st_size < 4_500_000


def test_it_counts_what_the_embedded_model_draws():
    detector = WorldDetector(SHIPPED)
    (sight,) = detector.look([Pipeline.from_pretrained("embedded", prompt_cache=False)(PROMPT, seed=8).images[0]])

    def verdict(count):
        wish = {"tag": "counting", "include": [{"class": "strawberry", "count": count}],
                "exclude": [{"class": "strawberry", "count": count + 1}], "prompt": PROMPT}
        return judge(wish, sight.found, sight.colours, detector.thresholds)

    assert [verdict(count).correct for count in (2, 3, 4)] == [False, True, False]


def test_weights_in_int8_are_off_by_half_a_step_at_most():
    state = {"conv.weight": torch.randn(5, 3, 3, 3), "conv.bias": torch.randn(5), "empty.weight": torch.zeros(2, 4)}
    coded = _coded(state)
    assert coded["conv.weight"].dtype == torch.int8
    again = _decoded(coded)
    assert set(again) == set(state)
    assert torch.equal(again["conv.bias"], state["conv.bias"])
    assert torch.equal(again["empty.weight"], state["empty.weight"])
    step = state["conv.weight"].flatten(1).abs().amax(1) / 127
    assert ((again["conv.weight"] - state["conv.weight"]).flatten(1).abs() <= 0.501 * step[:, None]).all()
