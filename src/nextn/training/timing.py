"""How long an optimizer step takes, measured before a run: to plan its length, and to see what MTP costs."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from nextn.config import Recipe
from nextn.training.prepare import PreparedData, new_model
from nextn.training.trainer import Trainer


@dataclass(frozen=True)
class StepTimes:
    """Median seconds of an optimizer step, with MTP as the recipe says and without (K = 0), steps interleaved.

    Attributes:
        mtp_step_s: with the recipe's depths.
        plain_step_s: the same trunk, batch and optimizer without MTP.
        num_timed: steps behind each median.
        num_tokens_per_step: tokens a step reads.
    """

    mtp_step_s: float
    plain_step_s: float
    num_timed: int
    num_tokens_per_step: int

    @property
    def mtp_time_share(self) -> float:
        """Extra time of MTP relative to the plain step: 0.25 is a quarter more."""
        return self.mtp_step_s / self.plain_step_s - 1


def time_steps(recipe: Recipe, data: PreparedData, num_timed: int = 8, num_warmup: int = 2) -> StepTimes:
    """Train two throwaway models side by side for a few steps, one with MTP and one without."""
    seconds: dict[int, list[float]] = {0: [], recipe.mtp.num_depths: []}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            num_depths: Trainer(
                (variant := replace(recipe, mtp=replace(recipe.mtp, num_depths=num_depths))),
                new_model(variant, data.tokenizer).train(),
                data.train,
                data.validation,
                Path(folder),
                evaluate=None,
                provenance={},
            )
            for num_depths in seconds
        }
        for index in range(num_warmup + num_timed):
            for num_depths, trainer in trainers.items():
                started = time.perf_counter()
                trainer.step()
                if index >= num_warmup:
                    seconds[num_depths].append(time.perf_counter() - started)
    return StepTimes(
        mtp_step_s=statistics.median(seconds[recipe.mtp.num_depths]),
        plain_step_s=statistics.median(seconds[0]),
        num_timed=num_timed,
        num_tokens_per_step=recipe.training.batch_size * recipe.data.sequence_length,
    )
