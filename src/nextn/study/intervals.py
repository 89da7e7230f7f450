"""Computes means over seeds and their 95% intervals by Student's t, which holds for a handful of seeds."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

from nextn.study.results import Estimate

CONFIDENCE = 0.95


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent values and its two-sided 95% interval, in the values' unit; n = 1 has no interval.

    >>> estimate([1.0, 2.0, 3.0])
    Estimate(mean=2.0, low=-0.484..., high=4.484..., n=3)
    >>> estimate([1.5])
    Estimate(mean=1.5, low=None, high=None, n=1)
    """
    n, mean = len(values), float(statistics.mean(values))  # exact: equal values have no spread
    if n < 2:
        return Estimate(mean, None, None, n)
    half_width = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half_width, mean + half_width, n)


def excludes(found: Estimate, value: float) -> bool:
    """Whether the interval lies wholly to one side of a value; False where there is no interval.

    >>> excludes(estimate([1.0, 1.1, 1.2]), 0), excludes(estimate([-1.0, 1.1, 1.2]), 0), excludes(estimate([1.0]), 0)
    (True, False, False)
    """
    return found.low is not None and found.high is not None and not found.low <= value <= found.high


@functools.cache
def t_quantile(num_degrees_of_freedom: int) -> float:
    """The t with P(|T| < t) = 95%, T of Student's distribution.

    >>> [round(t_quantile(n), 3) for n in (1, 2, 3, 1000)]
    [12.706, 4.303, 3.182, 1.962]
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # bisection of the angle, to the last bit
        middle = (low + high) / 2
        if _central_probability(middle, num_degrees_of_freedom) < CONFIDENCE:
            low = middle
        else:
            high = middle
    return math.sqrt(num_degrees_of_freedom) * math.tan(high)


def _central_probability(angle: float, num_degrees_of_freedom: int) -> float:
    """P(|T| < sqrt(n) tan(angle)) as a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    odd = num_degrees_of_freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(2 + odd, num_degrees_of_freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power - 1) / power
    return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total
