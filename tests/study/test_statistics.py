"""Intervals cover what they say, and pairing narrows them."""

import numpy as np
import pytest

from fdp.study.statistics import interval

pytestmark = pytest.mark.fast
RUNS = 3000


def means(rng, n):
    return rng.normal(0.0, 1.0, n), None, 0.0


def scattered(rng, n):
    return rng.lognormal(0.0, 0.3, n), None, np.exp(0.045)


def ratios(rng, n):
    return rng.lognormal(0.0, 0.1, n), rng.lognormal(0.0, 0.1, n), 1.0


def paired(rng, n):
    base = rng.lognormal(0.0, 0.2, n)
    return base * rng.normal(0.9, 0.05, n), base, 0.9


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
@pytest.mark.parametrize("draw", [means, scattered, ratios, paired])
def test_the_95_percent_interval_of_few_seeds_covers_95_percent(draw, seeds):
    rng, hits = np.random.default_rng(seeds), 0
    for _ in range(RUNS):
        values, baseline, truth = draw(rng, seeds)
        low, high = interval(values, baseline)
        hits += low <= truth <= high
    assert 0.93 <= hits / RUNS <= 0.97


def test_ten_seeds_are_bootstrapped():
    x = np.random.default_rng(0).normal(5.0, 1.0, 10)
    low, high = interval(x)
    assert x.min() < low < x.mean() < high < x.max()
    assert interval(x) == (low, high)
    assert high - low < np.subtract(*interval(x[:9])[::-1])


@pytest.mark.parametrize("seeds", [3, 12])
def test_pairing_narrows_a_ratio_and_equal_values_have_no_width(seeds):
    base = np.random.default_rng(1).uniform(1, 9, seeds)
    assert interval(0.5 * base, base) == pytest.approx((0.5, 0.5))
    assert interval([2.0] * seeds) == (2.0, 2.0)
    low, high = interval(base[::-1] * 0.5, base)
    assert low < 0.5 < high


def test_what_has_no_interval():
    assert interval([1.0]) is None
    assert interval([1.0], [2.0]) is None
    with pytest.raises(ValueError, match="2 values, 3 baselines"):
        interval([1, 2], [1, 2, 3])
    low, high = interval([1.0, -1.0], [2.0, 3.0])
    assert low < 0 < high
