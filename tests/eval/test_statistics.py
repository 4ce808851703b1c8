"""Statistics against closed forms and simulation."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from linocut.eval.statistics import bootstrap, compare, gap_closed, mcnemar, score, scores

RNG = np.random.default_rng(0)
TASKS = np.repeat(np.arange(6), (50, 40, 40, 30, 60, 50))


def table(rate: float, images: int = 4) -> np.ndarray:
    own = RNG.beta(3 * rate, 3 * (1 - rate), len(TASKS))
    return RNG.random((len(TASKS), images)) < own[:, None]


def test_score_is_the_mean_of_task_means_not_of_prompts():
    outcomes = np.where(TASKS == 0, 1.0, 0.0)[:, None]
    assert score(outcomes, TASKS)[0] == pytest.approx(1 / 6)


def test_bootstrap_error_equals_the_closed_form():
    """Of a mean within strata: sum over tasks of variance / n, over 36."""
    outcomes = table(0.7).mean(1, keepdims=True)
    expected = math.sqrt(sum(outcomes[t == TASKS].var() / (t == TASKS).sum() for t in range(6))) / 6
    estimate = scores(outcomes, TASKS)[0]
    assert estimate.value == pytest.approx(score(outcomes, TASKS)[0])
    assert estimate.error == pytest.approx(expected, rel=0.03)
    assert estimate.low == pytest.approx(estimate.value - 1.96 * expected, abs=0.15 * expected)
    assert estimate.high == pytest.approx(estimate.value + 1.96 * expected, abs=0.15 * expected)


def test_bootstrap_draws_the_same_prompts_for_all_arms():
    outcomes = table(0.7).mean(1, keepdims=True)
    drawn = bootstrap(np.hstack([outcomes, outcomes / 2]), TASKS, 50)
    assert set(drawn) == set(range(6))
    for means in drawn.values():
        np.testing.assert_allclose(means[:, 0], 2 * means[:, 1])


def test_pairing_makes_the_difference_surer():
    first = table(0.8)
    second = first.copy()
    second[::10, 0] = False
    paired, unpaired = compare(first, second, TASKS), compare(first, RNG.permuted(second, axis=0), TASKS)
    assert paired.difference.error < 0.5 * unpaired.difference.error
    assert paired.difference.high <= 0
    assert paired.ratio.value == pytest.approx(1 + paired.difference.value / score(first.mean(1)[:, None], TASKS)[0])
    assert (paired.lost, paired.won) == (int((first & ~second).sum()), 0)
    assert sum(each.value for each in paired.tasks.values()) / 6 == pytest.approx(paired.difference.value)


def test_the_share_of_a_gap_that_an_arm_closes():
    rng = np.random.default_rng(5)
    top = np.ones((600, 4), bool)
    baseline = rng.random((600, 4)) < 0.5
    halfway = baseline | (rng.random((600, 4)) < 0.5)
    tasks = np.arange(600) % 6
    found = gap_closed(top, baseline, halfway, tasks)
    assert found.low < 0.5 < found.high
    assert 0.005 < found.error < 0.03
    assert gap_closed(top, baseline, top, tasks).value == 1
    assert gap_closed(top, baseline, baseline, tasks).value == 0
    assert gap_closed(top, halfway, baseline, tasks).high < 0
    assert math.isnan(gap_closed(top, top, baseline, tasks).error)  # no gap


def test_an_arm_against_itself():
    first = table(0.8)
    found = compare(first, first, TASKS)
    assert (found.difference.value, found.difference.error, found.ratio.value, found.ratio.error) == (0, 0, 1, 0)
    assert (found.lost, found.won, found.p) == (0, 0, 1.0)


def test_nothing_right_anywhere_gives_no_ratio_and_no_warning():
    nothing = np.zeros((len(TASKS), 2), bool)
    assert math.isnan(compare(nothing, nothing, TASKS).ratio.value)


def test_intervals_cover_what_they_should():
    """In simulated comparisons without a difference, 95 % intervals hold zero about 95 times in a hundred."""
    tasks, inside = np.repeat(np.arange(6), 30), 0
    for _ in range(200):
        own = RNG.beta(4, 1, 180)[:, None]
        found = compare(RNG.random((180, 4)) < own, RNG.random((180, 4)) < own, tasks, 400)
        inside += found.difference.low <= 0 <= found.difference.high
    assert 178 <= inside <= 199


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 5), (9, 1), (3, 12), (40, 21)])
def test_mcnemar_is_the_exact_binomial_test(lost, won):
    n, k = lost + won, min(lost, won)
    expected = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    assert mcnemar(lost, won) == pytest.approx(expected)
    assert n == 0 or expected == pytest.approx(binomtest(k, n).pvalue)
    assert mcnemar(won, lost) == mcnemar(lost, won)


def test_mcnemar_of_many_pairs_is_near_its_normal_limit():
    chi = (abs(5200 - 4800) - 1) ** 2 / 10_000
    assert mcnemar(5200, 4800) == pytest.approx(math.erfc(math.sqrt(chi / 2)), rel=0.01)
    assert 0 < mcnemar(1500, 100) < 1e-200
