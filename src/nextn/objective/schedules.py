"""Quantities that change over training, as pure functions of how far the run is."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nextn.config import CurriculumConfig, ScheduleConfig


@dataclass(frozen=True)
class Progress:
    """How far a run is at one optimizer step.

    Attributes:
        step: the step about to be taken, 0-based.
        num_tokens: tokens trained before it.
        num_steps: steps of the whole run.
    """

    step: int = 0
    num_tokens: int = 0
    num_steps: int = 1

    def measured_in(self, unit: Literal["steps", "tokens", "share"]) -> float:
        """Where the step stands among boundaries of that unit; `share` is step / num_steps, in [0, 1).

        >>> Progress(step=5, num_tokens=5120, num_steps=20).measured_in("share")
        0.25
        """
        if unit == "share":
            return self.step / self.num_steps
        return self.step if unit == "steps" else self.num_tokens


START = Progress()
"""Before the first step."""


def value_at(schedule: ScheduleConfig, progress: Progress) -> float:
    """The scheduled value for the step about to be taken.

    `piecewise`: `values[i]` from `boundaries[i-1]` (included) up to `boundaries[i]` (excluded), so DeepSeek-V3's lambda
    is values (0.3, 0.1) with boundary 10e12 tokens. `linear`: through the points (boundaries[i], values[i]), constant
    outside them. `polynomial`: end + (start - end) * (1 - t) ** power, with t running from 0 to 1 between the two
    boundaries; from 0 to the whole run with end 0 it is lambda0 * (1 - t / T) ** alpha. `product`: of its factors.

    >>> falling = ScheduleConfig("piecewise", values=(0.3, 0.1), boundaries=(100,), unit="steps")
    >>> [value_at(falling, Progress(step)) for step in (0, 99, 100)]
    [0.3, 0.3, 0.1]
    >>> warm_up = ScheduleConfig("linear", values=(0, 1), boundaries=(0, 10))
    >>> both = ScheduleConfig("product", factors=(warm_up, falling))
    >>> [value_at(both, Progress(step)) for step in (0, 5, 10, 100)]
    [0.0, 0.15, 0.3, 0.1]
    """
    if schedule.kind == "constant":
        return schedule.values[0]
    if schedule.kind == "product":
        return math.prod(value_at(factor, progress) for factor in schedule.factors)
    position = progress.measured_in(schedule.unit)
    if schedule.kind == "piecewise":
        return schedule.values[bisect_right(schedule.boundaries, position)]
    if schedule.kind == "linear":
        return float(np.interp(position, schedule.boundaries, schedule.values))
    start, end = schedule.values
    remaining = float(np.interp(position, schedule.boundaries, (1.0, 0.0))) ** schedule.power
    return start * remaining + end * (1 - remaining)


def stage_at(curriculum: CurriculumConfig, num_depths: int, progress: Progress) -> int:
    """Index (0-based) of the curriculum's stage at the step about to be taken; a boundary belongs to the next stage.

    Without boundaries the stages are equal parts of the run, in steps.

    >>> forward = CurriculumConfig("forward")  # nothing, depth 1, depths 1 and 2
    >>> [stage_at(forward, 2, Progress(step, num_steps=6)) for step in range(6)]
    [0, 0, 1, 1, 2, 2]
    """
    if curriculum.boundaries:
        return bisect_right(curriculum.boundaries, progress.measured_in(curriculum.unit))
    num_stages = len(curriculum.stages_for(num_depths))
    return min(progress.step * num_stages // progress.num_steps, num_stages - 1)


def depth_is_on(curriculum: CurriculumConfig, num_depths: int, progress: Progress) -> tuple[bool, ...]:
    """For each depth 1..K: whether the curriculum trains it at the step about to be taken (arXiv 2505.22757).

    Raises:
        ConfigError: the curriculum does not fit `num_depths`, see `CurriculumConfig.stages_for`.

    >>> [depth_is_on(CurriculumConfig("forward"), 2, Progress(step, num_steps=3)) for step in range(3)]
    [(False, False), (True, False), (True, True)]
    """
    stages = curriculum.stages_for(num_depths)
    stage = stages[stage_at(curriculum, num_depths, progress)]
    return tuple(depth in stage for depth in range(1, num_depths + 1))
