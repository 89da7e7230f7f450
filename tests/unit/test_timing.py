"""Step times: recipes take turns, what warms up is not counted, and a phase of a run is timed as that phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextn.config import CurriculumConfig, Recipe, ScheduleConfig
from nextn.data import ByteTokenizer, Corpus
from nextn.mtp.cost import phases
from nextn.training import PreparedData, time_steps, timing, with_depths_on
from tests.e2e.tiny_run import RECIPE, recipe_with, tokens

DATA = PreparedData(Corpus("a test", (), (), ()), ByteTokenizer(), tokens(), tokens(20, seed=1))
FIRST_STEP_S, WARM_UP_S = 1000.0, 50.0


class Machine:
    """A clock, and a trainer whose n-th step takes seconds that say which step of which turn it was."""

    def __init__(self) -> None:
        self.now, self.steps = 0.0, []

    def perf_counter(self) -> float:
        return self.now

    def trainer(self, recipe: Recipe, *_: Any, **__: Any) -> SimpleNamespace:
        num_done = 0

        def step() -> None:
            nonlocal num_done
            turn, index = divmod(num_done, timing.STEPS_PER_TURN)
            self.now += FIRST_STEP_S if index == 0 else WARM_UP_S if turn == 0 else turn + recipe.training.seed / 10
            self.steps.append(recipe.training.seed)
            num_done += 1

        return SimpleNamespace(step=step)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(timing, "time", machine)
    monkeypatch.setattr(timing, "Trainer", machine.trainer)
    return machine


RECIPES = {"a": recipe_with(training={"seed": 1}), "b": recipe_with(training={"seed": 2})}


def check_turns(machine: Machine, time_them: Callable[..., dict[str, list[float]]]) -> None:
    seconds = time_them(RECIPES, DATA, 3)
    assert seconds == {"a": pytest.approx([1.1, 2.1, 3.1]), "b": pytest.approx([1.2, 2.2, 3.2])}
    assert machine.steps == [1, 1, 1, 2, 2, 2, 2, 2, 2, 1, 1, 1] * 2, "steps of both in turn, none always first"


def test_recipes_take_turns_and_an_entry_of_every_list_is_of_the_same_turn(machine: Machine):
    check_turns(machine, time_steps)


def test_one_recipe_after_the_other_is_caught(machine: Machine):
    def one_after_the_other(recipes, data, num_turns):
        return {name: time_steps({name: recipe}, data, num_turns)[name] for name, recipe in recipes.items()}

    with pytest.raises(AssertionError, match="in turn"):
        check_turns(machine, one_after_the_other)


def test_recipes_with_data_of_their_own_and_few_steps_are_timed():
    other = replace(DATA, train=tokens(seed=5))
    recipes = {
        "plain": recipe_with(mtp={"num_depths": 0}, training={"num_steps": 4}),
        "depth 1": with_depths_on(RECIPE, (1,)),
    }
    seconds = time_steps(recipes, {"plain": DATA, "depth 1": other}, num_turns=2)
    assert list(seconds) == ["plain", "depth 1"]
    assert all(len(turns) == 2 and min(turns) > 0 for turns in seconds.values())


SCHEDULED = recipe_with(
    mtp={"num_depths": 3},
    objective={
        "mtp_lambda": ScheduleConfig("linear", (0.0, 0.3), (2, 8)),
        "curriculum": CurriculumConfig("forward"),
    },
)


@given(depths=st.sets(st.integers(1, 3)).map(lambda depths: tuple(sorted(depths))))
def test_a_recipe_of_one_phase_has_these_depths_on_at_every_step(depths: tuple[int, ...]):
    assert phases(with_depths_on(SCHEDULED, depths)) == [(depths, SCHEDULED.training.num_steps)]


def test_every_phase_of_a_run_can_be_timed_as_a_recipe():
    found = phases(SCHEDULED)
    assert [depths for depths, _ in found] == [(), (1,), (1, 2), (1, 2, 3)]
    for depths, _ in found:
        assert with_depths_on(SCHEDULED, depths).mtp == SCHEDULED.mtp


def test_a_lambda_that_still_begins_at_zero_is_caught():
    one_phase = with_depths_on(SCHEDULED, (1, 2))
    still = replace(one_phase.objective, mtp_lambda=SCHEDULED.objective.mtp_lambda)
    assert len(phases(replace(one_phase, objective=still))) > 1
