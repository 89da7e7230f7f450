"""How long an optimizer step takes, measured before a run: to plan its length, and to see what MTP costs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nextn.config import Recipe
from nextn.training.prepare import PreparedData, new_model
from nextn.training.trainer import Trainer


def time_steps(
    recipe: Recipe, data: PreparedData, num_depths: Sequence[int], num_timed: int = 8, num_warmup: int = 3
) -> dict[int, list[float]]:
    """Train throwaway models side by side for a few steps, which differ in their number of depths only.

    Args:
        recipe: everything else.
        data: what to train on.
        num_depths: the values of K to compare; their steps take turns.
        num_timed: steps timed of each.
        num_warmup: steps of each before that.

    Returns:
        Seconds of each timed step, by K.
    """
    num_steps = max(recipe.training.num_steps, num_warmup + num_timed)
    recipe = replace(recipe, training=replace(recipe.training, num_steps=num_steps))
    seconds: dict[int, list[float]] = {depths: [] for depths in num_depths}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {depths: _trainer(recipe, data, depths, Path(folder)) for depths in seconds}
        for index in range(num_warmup + num_timed):
            for depths, trainer in trainers.items():
                started = time.perf_counter()
                trainer.step()
                if index >= num_warmup:
                    seconds[depths].append(time.perf_counter() - started)
    return seconds


def _trainer(recipe: Recipe, data: PreparedData, num_depths: int, folder: Path) -> Trainer:
    variant = replace(recipe, mtp=replace(recipe.mtp, num_depths=num_depths))
    model = new_model(variant, data.tokenizer).train()
    return Trainer(variant, model, data.train, data.validation, folder, evaluate=None, provenance={})
