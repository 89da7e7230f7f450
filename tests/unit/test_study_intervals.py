"""Intervals over seeds: Student's quantiles, their laws, and their coverage."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextn.study.intervals import estimate, excludes, t_quantile
from nextn.study.results import Estimate

samples = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


@pytest.mark.parametrize(
    ("degrees", "known"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_quantiles_are_those_of_the_tables(degrees, known):
    assert t_quantile(degrees) == pytest.approx(known, abs=5e-4)


def test_quantiles_fall_towards_the_normal_one():
    quantiles = [t_quantile(degrees) for degrees in range(1, 60)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert t_quantile(5000) == pytest.approx(1.95996, abs=1e-3)


@given(samples, st.floats(-50, 50), st.floats(0.1, 10))
def test_an_interval_moves_and_scales_with_its_values(values, shift, scale):
    before = estimate(values)
    after = estimate([scale * value + shift for value in values])
    for name in ("mean", "low", "high"):
        assert getattr(after, name) == pytest.approx(scale * getattr(before, name) + shift, abs=1e-6)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=8), st.randoms())
def test_the_order_of_the_values_changes_nothing(values, random):
    shuffled = random.sample(values, len(values))
    assert estimate(shuffled) == estimate(values)


def test_one_value_has_no_interval_and_equal_values_have_one_without_width():
    assert estimate([2.0]) == Estimate(2.0, None, None, 1)
    assert estimate([0.1, 0.1, 0.1]) == Estimate(0.1, 0.1, 0.1, 3)
    assert not excludes(estimate([2.0]), 0)
    assert not excludes(estimate([0.0, 0.0]), 0)
    assert excludes(estimate([0.1, 0.1]), 0)


def coverage(interval: Callable[[Sequence[float]], Estimate], n: int) -> float:
    """Share of simulated samples of n normals around 5 whose interval holds 5."""
    draws = np.random.default_rng(0).normal(5, 2, (4000, n))
    return sum(not excludes(interval(draw.tolist()), 5.0) for draw in draws) / len(draws)


def with_the_normal_quantile(values: Sequence[float]) -> Estimate:
    mean, half_width = statistics.fmean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half_width, mean + half_width, len(values))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_interval_holds_the_truth_in_95_of_100_cases(n):
    assert coverage(estimate, n) == pytest.approx(0.95, abs=0.015)


def test_with_the_normal_quantile_three_seeds_would_hold_it_too_rarely():
    assert coverage(with_the_normal_quantile, 3) < 0.85
