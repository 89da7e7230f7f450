"""How long an optimizer step takes, measured before a run: to plan its length, and to see what MTP costs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nextn.config import CurriculumConfig, Recipe, ScheduleConfig
from nextn.training.prepare import PreparedData, new_model
from nextn.training.trainer import Trainer

STEPS_PER_TURN = 3
"""Steps that one variant takes before the other's turn; the first is not timed, since the other has just filled the
caches, that of the CPU's matrix library above all."""


def time_steps(
    recipe: Recipe, data: PreparedData, num_depths: Sequence[int], num_turns: int = 4
) -> dict[int, list[float]]:
    """Train throwaway models side by side for a few steps, which differ in their number of depths only.

    Args:
        recipe: everything else.
        data: what to train on.
        num_depths: the values of K to compare; their steps take turns.
        num_turns: turns of each, after one to warm up.

    Returns:
        Seconds of each timed step, by K.
    """
    num_steps = max(recipe.training.num_steps, STEPS_PER_TURN * (num_turns + 1))
    recipe = replace(
        recipe,
        training=replace(recipe.training, num_steps=num_steps),
        # At full weight, since a schedule may have depths off in a run's first steps.
        objective=replace(recipe.objective, mtp_lambda=ScheduleConfig(), curriculum=CurriculumConfig()),
    )
    seconds: dict[int, list[float]] = {depths: [] for depths in num_depths}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {depths: _trainer(recipe, data, depths, Path(folder)) for depths in seconds}
        for turn in range(num_turns + 1):
            for depths, trainer in trainers.items():
                for index in range(STEPS_PER_TURN):
                    started = time.perf_counter()
                    trainer.step()
                    if turn and index:
                        seconds[depths].append(time.perf_counter() - started)
    return seconds


def _trainer(recipe: Recipe, data: PreparedData, num_depths: int, folder: Path) -> Trainer:
    variant = replace(recipe, mtp=replace(recipe.mtp, num_depths=num_depths))
    model = new_model(variant, data.tokenizer).train()
    return Trainer(variant, model, data.train, data.validation, folder, evaluate=None, provenance={})
