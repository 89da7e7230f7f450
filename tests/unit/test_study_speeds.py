"""Step times of a study: ratios to the baseline's step, averaged over the phases of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import pytest

from nextn.config import CurriculumConfig, Recipe
from nextn.data import ByteTokenizer, Corpus
from nextn.study import speeds
from nextn.study.speeds import NUM_TIMING_RUNS, TURNS_PER_TIMING_RUN, Speeds, StepTimes, measure_speeds
from nextn.training import PreparedData
from tests.e2e.tiny_run import recipe_with, tokens

FORWARD = recipe_with(
    mtp={"num_depths": 1}, objective={"curriculum": CurriculumConfig("forward")}, training={"num_steps": 4}
)
NUM_TURNS = NUM_TIMING_RUNS * TURNS_PER_TIMING_RUN
BASELINE_S = (2.0,) * NUM_TURNS
SPEEDS = Speeds(
    {
        ("plain", ()): None,
        ("forward", ()): None,
        ("forward", (1,)): StepTimes((3.0,) * (NUM_TURNS - 1) + (30.0,), BASELINE_S),
    },
    baseline_s=2.0,
)


def test_a_step_takes_the_baselines_time_times_the_ratio_of_the_same_moments():
    assert SPEEDS.step_s("forward", (1,)) == 3.0, "a turn in which something else was slow changes nothing"
    assert SPEEDS.step_s("forward", ()) == SPEEDS.step_s("plain", ()) == 2.0


def test_the_time_of_a_step_and_the_overhead_shown_are_the_same_mean_over_timing_runs():
    half = NUM_TURNS // 2
    found = Speeds({("one", (1,)): StepTimes((3.0,) * half + (4.0,) * half, BASELINE_S)}, baseline_s=2.0)
    overheads = found.overheads("one", recipe_with(mtp={"num_depths": 1}))
    assert overheads == (0.5,) * (NUM_TIMING_RUNS // 2) + (1.0,) * (NUM_TIMING_RUNS // 2)
    assert found.step_s("one", (1,)) == 2.0 * (1 + fmean(overheads)) == 3.5


def test_a_run_takes_the_mean_of_its_phases():
    assert SPEEDS.mean_step_s("forward", FORWARD) == 2.5
    assert SPEEDS.overheads("forward", FORWARD) == (0.25,) * NUM_TIMING_RUNS


def test_what_was_not_timed_is_not_taken_for_the_baseline():
    with pytest.raises(KeyError):
        SPEEDS.step_s("forward", (2,))
    with pytest.raises(KeyError):
        SPEEDS.overheads("reverse", FORWARD)


RECIPES = {
    "plain": recipe_with(mtp={"num_depths": 0}),
    "plain too": recipe_with(mtp={"num_depths": 0}),
    "one": recipe_with(mtp={"num_depths": 1}),
    "two": recipe_with(mtp={"num_depths": 2}),
}
DATA = PreparedData(Corpus("a test", (), (), ()), ByteTokenizer(), tokens(), tokens(20, seed=1))


@pytest.fixture
def timing_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Depths of what was timed, one per run; a step takes 2 s, and 1 s more per depth and per timing run so far."""
    timed: list[int] = []

    def time_steps(recipes: Mapping[str, Recipe], data: object, num_turns: int) -> dict[str, list[float]]:
        timed.append(recipes["variant"].mtp.num_depths)
        return {name: [2.0 + recipe.mtp.num_depths + len(timed)] * num_turns for name, recipe in recipes.items()}

    monkeypatch.setattr(speeds, "time_steps", time_steps)
    return timed


def measured(path: Path) -> Speeds:
    return measure_speeds("plain", RECIPES, lambda _: DATA, "auto", path, lambda _: None)


def test_every_variant_is_timed_in_several_timing_runs_with_the_others_between(tmp_path: Path, timing_runs: list[int]):
    found = measured(tmp_path / "speeds.json")
    assert timing_runs == [1, 2] * NUM_TIMING_RUNS
    times = found.times["two", (1, 2)]
    assert times is not None
    assert len(times.variant_s) == NUM_TURNS
    assert len(times.ratios) == NUM_TIMING_RUNS
    assert len(set(times.baseline_s)) == NUM_TIMING_RUNS
    assert found.times["plain", ()] is None
    assert found.ratios("plain too", ()) == (1.0,) * NUM_TIMING_RUNS


def test_what_is_timed_stays_timed_unless_a_timing_run_is_not_whole(tmp_path: Path, timing_runs: list[int]):
    path = tmp_path / "speeds.json"
    once = measured(path)
    timing_runs.clear()
    assert measured(path) == once
    assert timing_runs == []
    table = speeds.read_json(path)
    cut = {key: [times[:-1] for times in pair] for key, pair in table["pairs"].items()}
    speeds.write_json(path, table | {"pairs": cut})
    measured(path)
    assert timing_runs == [1, 2] * NUM_TIMING_RUNS


def test_timing_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, timing_runs: list[int], monkeypatch: pytest.MonkeyPatch
):
    path, whole = tmp_path / "speeds.json", speeds.time_steps

    def killed(recipes: Mapping[str, Recipe], data: object, num_turns: int) -> dict[str, list[float]]:
        if len(timing_runs) == 3:
            raise KeyboardInterrupt
        return whole(recipes, data, num_turns)

    monkeypatch.setattr(speeds, "time_steps", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(path)
    monkeypatch.setattr(speeds, "time_steps", whole)
    times = measured(path).times["two", (1, 2)]
    assert timing_runs == [1, 2] * NUM_TIMING_RUNS, "nothing twice, nothing left out"
    assert times is not None
    assert len(times.ratios) == NUM_TIMING_RUNS
