"""How long an optimizer step takes, measured beside a run: to plan its length, and to see what a setting costs."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nextn.config import CurriculumConfig, Recipe, ScheduleConfig
from nextn.data.prepare import PreparedData
from nextn.mtp.fresh import new_model
from nextn.training.trainer import Trainer

STEPS_PER_TURN = 3
"""Steps that one recipe takes before the next one's turn; the first is not timed, since the others have just filled the
caches, that of the CPU's matrix library above all."""


def time_steps(
    recipes: Mapping[str, Recipe], data: PreparedData | Mapping[str, PreparedData], num_turns: int = 4
) -> dict[str, list[float]]:
    """Train throwaway models side by side for a few steps, in turns, all of them in memory at once.

    Schedules and curricula are at their beginning: see `with_depths_on` for another part of a run.

    Args:
        recipes: by name, their vocabulary resolved (`fit_vocabulary`).
        data: what to train on; for all, or by the recipes' names.
        num_turns: turns of each, after one to warm up.

    Returns:
        By name, the median seconds of a step in each turn; entry i of all lists is of the same turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: _trainer(recipe, data if isinstance(data, PreparedData) else data[name], num_turns, Path(folder))
            for name, recipe in recipes.items()
        }
        for turn in range(num_turns + 1):
            for name in [*trainers][:: -1 if turn % 2 else 1]:  # none always comes first
                of_turn = [_timed_step(trainers[name]) for _ in range(STEPS_PER_TURN)]
                if turn:
                    seconds[name].append(statistics.median(of_turn[1:]))
    return seconds


def with_depths_on(recipe: Recipe, depths: Sequence[int]) -> Recipe:
    """The recipe with exactly these depths trained from the first step to the last, lambda at its usual 0.3.

    >>> with_depths_on(Recipe(), (1,)).objective.curriculum.stages
    ((1,),)
    """
    curriculum = CurriculumConfig("stages", stages=(tuple(depths),))
    return replace(recipe, objective=replace(recipe.objective, mtp_lambda=ScheduleConfig(), curriculum=curriculum))


def _trainer(recipe: Recipe, data: PreparedData, num_turns: int, folder: Path) -> Trainer:
    """A trainer whose run is long enough for all turns."""
    num_steps = max(recipe.training.num_steps, STEPS_PER_TURN * (num_turns + 1))
    recipe = replace(recipe, training=replace(recipe.training, num_steps=num_steps))
    model = new_model(recipe, data.tokenizer).train()
    return Trainer(recipe, model, data.train, data.validation, folder, evaluate=None, provenance={})


def _timed_step(trainer: Trainer) -> float:
    started = time.perf_counter()
    trainer.step()
    return time.perf_counter() - started
