"""Step times of a study: ratios to the baseline's step, averaged over the phases of a run."""

from __future__ import annotations

import pytest

from nextn.config import CurriculumConfig
from nextn.report.study.speeds import NUM_TURNS, Speeds, StepTimes
from tests.e2e.tiny_run import recipe_with

FORWARD = recipe_with(
    mtp={"num_depths": 1}, objective={"curriculum": CurriculumConfig("forward")}, training={"num_steps": 4}
)
SLOW_TURN = (2.0,) * (NUM_TURNS - 1) + (20.0,)
SPEEDS = Speeds(
    {
        ("plain", ()): None,
        ("forward", ()): None,
        ("forward", (1,)): StepTimes(tuple(1.5 * seconds for seconds in SLOW_TURN), SLOW_TURN),
    },
    baseline_s=2.0,
)


def test_a_step_takes_the_baselines_time_times_the_ratio_of_the_same_moments():
    assert SPEEDS.step_s("forward", (1,)) == 3.0, "a turn in which the machine was slow changes nothing"
    assert SPEEDS.step_s("forward", ()) == SPEEDS.step_s("plain", ()) == 2.0


def test_a_run_takes_the_mean_of_its_phases():
    assert SPEEDS.mean_step_s("forward", FORWARD) == 2.5
    assert SPEEDS.overheads("forward", FORWARD) == (0.25,) * NUM_TURNS


def test_what_was_not_timed_is_not_taken_for_the_baseline():
    with pytest.raises(KeyError):
        SPEEDS.step_s("forward", (2,))
    with pytest.raises(KeyError):
        SPEEDS.overheads("reverse", FORWARD)
