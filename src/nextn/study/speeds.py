"""Times a training step of each variant, interleaved with the baseline's.

A run's own clock also measures whatever else the machine was doing. So a comparison uses the baseline's median step
times the number of steps, times a ratio: the variant's step over the baseline's in the same moments. The ratio of a
timing run is the median over its turns, which one disturbed turn does not move. The ratio of a variant is the mean
over its timing runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nextn.config import Recipe
from nextn.errors import NextnError, StudyError
from nextn.files import read_json, write_json
from nextn.model.device import resolve_device
from nextn.mtp.cost import phases
from nextn.provenance import machine
from nextn.study.plan import run_id
from nextn.training import PreparedData, time_steps
from nextn.training.timing import with_depths_on

NUM_TIMING_RUNS, TURNS_PER_TIMING_RUN = 4, 8
"""A turn is one timed step of each. It scatters by a tenth on a machine that does nothing else. A timing run has new
models and several turns. It scatters by a few hundredths, however many turns it has: by where the weights lie in
memory, and by what the machine's neighbours do. So every variant has several, and all others are timed in between."""

Depths = tuple[int, ...]
"""1-based depths that are trained at a step."""


@dataclass(frozen=True)
class StepTimes:
    """Of one variant with the same depths trained, and of the baseline in the same turns; seconds per step."""

    variant_s: tuple[float, ...]
    baseline_s: tuple[float, ...]

    def __add__(self, later: StepTimes) -> StepTimes:
        """With the turns of another timing run."""
        return StepTimes(self.variant_s + later.variant_s, self.baseline_s + later.baseline_s)

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times the baseline's step, one per timing run: the median over its turns.

        >>> StepTimes((3.0,) * 7 + (9.0,) + (4.0,) * 8, (2.0,) * 16).ratios
        (1.5, 2.0)
        """
        turns = [a / b for a, b in zip(self.variant_s, self.baseline_s, strict=True)]
        firsts = range(0, len(turns), TURNS_PER_TIMING_RUN)
        return tuple(statistics.median(turns[first : first + TURNS_PER_TIMING_RUN]) for first in firsts)


@dataclass(frozen=True)
class Speeds:
    """Step times of all variants of a study on one machine.

    Attributes:
        times: by variant's name and trained depths; None for what trains just as the baseline does.
        baseline_s: median seconds of the baseline's step over all turns.
    """

    times: dict[tuple[str, Depths], StepTimes | None]
    baseline_s: float

    def ratios(self, variant: str, depths: Depths) -> tuple[float, ...]:
        """How many times the baseline's step one of the variant takes, one per timing run."""
        times = self.times[variant, depths]
        return (1.0,) * NUM_TIMING_RUNS if times is None else times.ratios

    def step_s(self, variant: str, depths: Depths) -> float:
        """Seconds of a step: the baseline's, times the mean ratio."""
        return self.baseline_s * statistics.fmean(self.ratios(variant, depths))

    def mean_step_s(self, variant: str, recipe: Recipe) -> float:
        """The same, averaged over the phases of a run."""
        seconds = sum(self.step_s(variant, depths) * num_steps for depths, num_steps in phases(recipe))
        return seconds / recipe.training.num_steps

    def overheads(self, variant: str, recipe: Recipe) -> tuple[float, ...]:
        """Extra time relative to the baseline, one figure per timing run, averaged over the phases of a run."""
        sums = [0.0] * NUM_TIMING_RUNS
        for depths, num_steps in phases(recipe):
            ratios = self.ratios(variant, depths)
            sums = [total + ratio * num_steps for total, ratio in zip(sums, ratios, strict=True)]
        return tuple(total / recipe.training.num_steps - 1 for total in sums)


@dataclass
class SpeedFile:
    """Step times that were measured on this machine, kept from study to study.

    Attributes:
        path: speeds.json.
        pairs: by run ids of baseline and variant.
    """

    path: Path
    pairs: dict[str, StepTimes] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, device: torch.device) -> SpeedFile:
        """What the file holds, unless it is of another machine; pairs with a part of a timing run are left out."""
        table: dict[str, Any] = read_json(path) if path.exists() else {}
        if table.get("machine") != machine(device):
            return cls(path)
        pairs = {key: StepTimes(*(tuple(times) for times in pair)) for key, pair in table["pairs"].items()}
        return cls(path, {key: pair for key, pair in pairs.items() if len(pair.variant_s) % TURNS_PER_TIMING_RUN == 0})

    def write(self, device: torch.device) -> None:
        """All pairs, and what they were measured on."""
        pairs = {key: [pair.variant_s, pair.baseline_s] for key, pair in self.pairs.items()}
        write_json(self.path, {"machine": machine(device), "pairs": pairs})


def measure_speeds(
    baseline: str,
    recipes: Mapping[str, Recipe],
    data_of: Callable[[Recipe], PreparedData],
    device: str,
    path: Path,
    say: Callable[[str], None],
) -> Speeds:
    """Step times of all variants; what `path` knows is not measured again.

    Args:
        baseline: name of the variant that others are timed beside.
        recipes: by variant.
        data_of: a recipe's text.
        device: where; `auto` is where the recipe's `training.device` says.
        path: where measured times are kept.
        say: told what is being timed.

    Raises:
        StudyError: a variant cannot be trained, not even for a few steps.
    """
    if device != "auto":
        recipes = {n: replace(one, training=replace(one.training, device=device)) for n, one in recipes.items()}
    place = resolve_device(recipes[baseline].training.device)
    file = SpeedFile.read(path, place)
    baseline_id = run_id(recipes[baseline], "")
    to_time = {
        (name, depths): with_depths_on(recipe, depths) if recipe.mtp.num_depths else recipe
        for name, recipe in recipes.items()
        for depths, _ in phases(recipe)
    }
    different = {which: variant for which, variant in to_time.items() if run_id(variant, "") != baseline_id}
    keys = {which: f"{baseline_id}/{run_id(variant, '')}" for which, variant in (different or to_time).items()}
    which_of: dict[str, tuple[str, Depths]] = {}
    for which, key in keys.items():
        which_of.setdefault(key, which)
    for timing_run in range(NUM_TIMING_RUNS):
        for key, (name, depths) in which_of.items():
            known = file.pairs.get(key, StepTimes((), ()))
            if len(known.ratios) > timing_run:
                continue
            what = f", depths {', '.join(map(str, depths)) or 'none'}" if recipes[name].mtp.num_depths else ""
            say(f"timing training steps, run {timing_run + 1} of {NUM_TIMING_RUNS}: {name}{what}, beside {baseline}")
            try:
                file.pairs[key] = known + _timed_pair(recipes[baseline], to_time[name, depths], data_of)
            except NextnError as error:
                raise StudyError(f"timing the steps of {name!r} failed: {error}") from None
            file.write(place)
    if place.type == "cuda":
        torch.cuda.empty_cache()  # for the workers
    times = dict.fromkeys(to_time) | {which: file.pairs[key] for which, key in keys.items()}
    baseline_s = [seconds for key in which_of for seconds in file.pairs[key].baseline_s]
    return Speeds(times, statistics.median(baseline_s))


def _timed_pair(baseline: Recipe, variant: Recipe, data_of: Callable[[Recipe], PreparedData]) -> StepTimes:
    recipes = {"baseline": baseline, "variant": variant}
    seconds = time_steps(recipes, {name: data_of(recipe) for name, recipe in recipes.items()}, TURNS_PER_TIMING_RUN)
    return StepTimes(tuple(seconds["variant"]), tuple(seconds["baseline"]))
