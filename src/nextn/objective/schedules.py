"""Quantities that change over training, as pure functions of steps and tokens."""

from __future__ import annotations

from bisect import bisect_right

from nextn.config import ScheduleConfig


def value_at(schedule: ScheduleConfig, step: int, num_tokens: int) -> float:
    """The scheduled value for optimizer step `step` (0-based), before which `num_tokens` tokens were trained.

    Piecewise: `values[i]` from `boundaries[i-1]` (included) up to `boundaries[i]` (excluded), so DeepSeek-V3's
    lambda is values (0.3, 0.1) with boundary 10e12 tokens.

    >>> lambda_schedule = ScheduleConfig("piecewise", values=(0.3, 0.1), boundaries=(100,), unit="steps")
    >>> [value_at(lambda_schedule, step, 0) for step in (0, 99, 100)]
    [0.3, 0.3, 0.1]
    """
    if schedule.kind == "constant":
        return schedule.values[0]
    progress = step if schedule.unit == "steps" else num_tokens
    return schedule.values[bisect_right(schedule.boundaries, progress)]
