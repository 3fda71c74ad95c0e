"""Scores and their bootstrap intervals against a slow plain version and closed forms."""

import math
import random
from statistics import fmean

import numpy as np
import pytest

from moi_jax.evaluation.bootstrap import difference, interval, score, share_interval

NAN = math.nan
WEIGHTS = np.array([0.25, 0.75, 0.0])


def plain_score(rows: list[list[float]], weights: list[float]) -> float:
    total = 0.0
    for metric, weight in enumerate(weights):
        known = [row[metric] for row in rows if not math.isnan(row[metric])]
        if weight:
            total += weight * fmean(known) if known else NAN
    return total


def plain_interval(rows: list[list[float]], weights: list[float]) -> tuple[float, float]:
    draws = random.Random(7)
    scores = [plain_score(draws.choices(rows, k=len(rows)), weights) for _ in range(3000)]
    known = sorted(value for value in scores if not math.isnan(value))
    return known[round(0.025 * len(known))], known[round(0.975 * len(known))]


def made_up(items: int, seed: int) -> np.ndarray:
    """Three metrics: right or wrong, a rating that some items lack, one that none has."""
    draws = np.random.default_rng(seed)
    rating = np.where(draws.random(items) < 0.3, NAN, draws.normal(5, 2, items))
    return np.stack([draws.random(items) < 0.4, rating, np.full(items, NAN)], axis=1)


def test_score_is_the_weighted_sum_of_means_over_the_items_that_have_a_metric():
    values = np.array([[1.0, 0.5], [0.0, NAN], [1.0, 0.3], [1.0, NAN]])
    assert score(values, np.array([0.5, 0.5])) == pytest.approx(0.5 * 0.75 + 0.5 * 0.4)
    values = made_up(40, 1)
    assert score(values, WEIGHTS) == pytest.approx(plain_score(values.tolist(), [0.25, 0.75, 0]))


def test_score_of_a_metric_that_no_item_has_is_nan():
    assert math.isnan(score(np.array([[1.0, NAN]]), np.array([0.5, 0.5])))
    assert np.isnan(interval(np.array([[1.0, NAN]]), np.array([0.5, 0.5]))).all()
    assert math.isnan(score(np.empty((0, 1)), np.ones(1)))
    assert np.isnan(interval(np.empty((0, 1)), np.ones(1))).all()


def test_interval_is_that_of_resampled_items():
    values = made_up(30, 2)
    expected = plain_interval(values.tolist(), [0.25, 0.75, 0])
    assert interval(values, WEIGHTS, resamples=20000) == pytest.approx(expected, abs=0.05)


def test_interval_of_right_and_wrong_is_the_binomial_one():
    values = (np.arange(2000) % 4 == 0).astype(float)[:, None]
    half = 1.96 * math.sqrt(0.25 * 0.75 / 2000)
    assert interval(values, np.ones(1)) == pytest.approx((0.25 - half, 0.25 + half), abs=0.002)


def test_metrics_of_an_item_are_drawn_together():
    up = np.random.default_rng(3).normal(size=(200, 1))
    weights = np.array([0.5, 0.5])
    assert interval(np.hstack([up, -up]), weights) == pytest.approx((0, 0), abs=1e-12)
    together, alone = interval(np.hstack([up, up]), weights), interval(up, np.ones(1))
    assert together == pytest.approx(alone, abs=0.03)


def test_draws_that_miss_a_metric_are_left_out():
    values = np.array([[1.0, NAN], [NAN, 3.0], [0.0, NAN]])
    low, high = interval(values, np.ones(2))
    assert (low, high) == (3.0, 4.0)


def test_interval_repeats_and_does_not_hang_on_the_order_of_items():
    values = made_up(50, 4)
    assert interval(values, WEIGHTS) == interval(values[::-1], WEIGHTS)
    assert interval(values, WEIGHTS) != interval(values, WEIGHTS, seed=1)


def test_difference_draws_the_same_items_for_both():
    values = made_up(60, 5)
    one = np.array([0.0, 1.0, 0.0])
    found = difference(values, values + 0.5, one)
    assert found == pytest.approx((0.5, 0.5, 0.5))
    low, high = interval(values, one)
    assert high - low > 0.5


def test_difference_is_over_what_both_measured():
    a = np.array([[0.0], [1.0], [NAN], [1.0]])
    b = np.array([[1.0], [1.0], [1.0], [NAN]])
    gap, low, high = difference(a, b, np.ones(1))
    assert gap == 0.5
    assert (low, high) == (0.0, 1.0)
    assert difference(b, a, np.ones(1))[0] == -0.5


@pytest.mark.parametrize("items", [1, 7, 164])
def test_where_all_items_are_alike_the_interval_is_clopper_and_pearsons(items):
    """The bounds are where the outcome that was seen has a probability of 2.5 %."""
    weights = np.array([0.0, 100.0])
    wrong, right = (np.tile([0.5, value], (items, 1)) for value in (0.0, 1.0))
    low, high = share_interval(wrong, weights)
    assert low == 0
    assert (1 - high / 100) ** items == pytest.approx(0.025)
    low, high = share_interval(right, weights)
    assert high == 100
    assert (low / 100) ** items == pytest.approx(0.025)


def test_where_items_differ_the_interval_is_the_bootstraps():
    weights = np.array([100.0])
    for values in ([0, 0, 1, 0], [0.5, 0.5, 0.5]):
        rows = np.array(values, float)[:, None]
        assert share_interval(rows, weights) == interval(rows, weights)
    both = np.zeros((4, 2))  # the score of several metrics is no share of right items
    assert share_interval(both, np.array([50.0, 50.0])) == (0, 0)
