"""Seconds of a training step of each setting, measured beside the baseline's in turn.

A run's own clock tells what else the machine was doing. So the time that a comparison uses is the baseline's median
step, times how many times longer the setting's step took in the same moments (in each sitting the median over its
turns, which a disturbed turn does not move; then the mean over sittings), times the number of steps.
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

NUM_SITTINGS, TURNS_PER_SITTING = 4, 8
"""One turn scatters by a tenth on a machine that does nothing else. So does one sitting by a few hundredths, however
many turns it has (where weights lie in memory, what the machine's neighbours do), so every setting has several, with
new models, and all others are timed in between."""

Depths = tuple[int, ...]
"""1-based depths that are trained at a step."""


@dataclass(frozen=True)
class StepTimes:
    """Of one setting with the same depths trained, and of the baseline in the same turns; seconds per step."""

    setting_s: tuple[float, ...]
    baseline_s: tuple[float, ...]

    def __add__(self, later: StepTimes) -> StepTimes:
        """With the turns of another sitting."""
        return StepTimes(self.setting_s + later.setting_s, self.baseline_s + later.baseline_s)

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times the baseline's step, sitting by sitting: the median over its turns.

        >>> StepTimes((3.0,) * 7 + (9.0,) + (4.0,) * 8, (2.0,) * 16).ratios
        (1.5, 2.0)
        """
        turns = [a / b for a, b in zip(self.setting_s, self.baseline_s, strict=True)]
        firsts = range(0, len(turns), TURNS_PER_SITTING)
        return tuple(statistics.median(turns[first : first + TURNS_PER_SITTING]) for first in firsts)


@dataclass(frozen=True)
class Speeds:
    """Step times of all settings of a study on one machine.

    Attributes:
        times: by setting's name and trained depths; None for what trains just as the baseline does.
        baseline_s: median seconds of the baseline's step over all turns.
    """

    times: dict[tuple[str, Depths], StepTimes | None]
    baseline_s: float

    def ratios(self, setting: str, depths: Depths) -> tuple[float, ...]:
        """How many times the baseline's step one of the setting takes, sitting by sitting."""
        times = self.times[setting, depths]
        return (1.0,) * NUM_SITTINGS if times is None else times.ratios

    def step_s(self, setting: str, depths: Depths) -> float:
        """Seconds of a step: the baseline's, times the mean ratio."""
        return self.baseline_s * statistics.fmean(self.ratios(setting, depths))

    def mean_step_s(self, setting: str, recipe: Recipe) -> float:
        """The same, averaged over the phases of a run."""
        seconds = sum(self.step_s(setting, depths) * num_steps for depths, num_steps in phases(recipe))
        return seconds / recipe.training.num_steps

    def overheads(self, setting: str, recipe: Recipe) -> tuple[float, ...]:
        """Extra time relative to the baseline, one figure per sitting, averaged over the phases of a run."""
        sums = [0.0] * NUM_SITTINGS
        for depths, num_steps in phases(recipe):
            ratios = self.ratios(setting, depths)
            sums = [total + ratio * num_steps for total, ratio in zip(sums, ratios, strict=True)]
        return tuple(total / recipe.training.num_steps - 1 for total in sums)


@dataclass
class SpeedFile:
    """Step times that were measured on this machine, kept from study to study.

    Attributes:
        path: speeds.json.
        pairs: by run ids of baseline and setting.
    """

    path: Path
    pairs: dict[str, StepTimes] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, device: torch.device) -> SpeedFile:
        """What the file holds, unless it is of another machine; pairs with a part of a sitting are left out."""
        table: dict[str, Any] = read_json(path) if path.exists() else {}
        if table.get("machine") != machine(device):
            return cls(path)
        pairs = {key: StepTimes(*(tuple(times) for times in pair)) for key, pair in table["pairs"].items()}
        return cls(path, {key: pair for key, pair in pairs.items() if len(pair.setting_s) % TURNS_PER_SITTING == 0})

    def write(self, device: torch.device) -> None:
        """All pairs, and what they were measured on."""
        pairs = {key: [pair.setting_s, pair.baseline_s] for key, pair in self.pairs.items()}
        write_json(self.path, {"machine": machine(device), "pairs": pairs})


def measure_speeds(
    baseline: str,
    recipes: Mapping[str, Recipe],
    data_of: Callable[[Recipe], PreparedData],
    device: str,
    path: Path,
    say: Callable[[str], None],
) -> Speeds:
    """Step times of all settings; what `path` knows is not measured again.

    Args:
        baseline: name of the setting that others are timed beside.
        recipes: by setting.
        data_of: a recipe's text.
        device: where; `auto` is where the recipe's `training.device` says.
        path: where measured times are kept.
        say: told what is being timed.

    Raises:
        StudyError: a setting cannot be trained, not even for a few steps.
    """
    if device != "auto":
        recipes = {n: replace(one, training=replace(one.training, device=device)) for n, one in recipes.items()}
    place = resolve_device(recipes[baseline].training.device)
    file = SpeedFile.read(path, place)
    baseline_id = run_id(recipes[baseline], "")
    variants = {
        (name, depths): with_depths_on(recipe, depths) if recipe.mtp.num_depths else recipe
        for name, recipe in recipes.items()
        for depths, _ in phases(recipe)
    }
    different = {which: variant for which, variant in variants.items() if run_id(variant, "") != baseline_id}
    keys = {which: f"{baseline_id}/{run_id(variant, '')}" for which, variant in (different or variants).items()}
    which_of: dict[str, tuple[str, Depths]] = {}
    for which, key in keys.items():
        which_of.setdefault(key, which)
    for sitting in range(NUM_SITTINGS):
        for key, (name, depths) in which_of.items():
            known = file.pairs.get(key, StepTimes((), ()))
            if len(known.ratios) > sitting:
                continue
            what = f", depths {', '.join(map(str, depths)) or 'none'}" if recipes[name].mtp.num_depths else ""
            say(f"timing training steps, sitting {sitting + 1} of {NUM_SITTINGS}: {name}{what}, beside {baseline}")
            try:
                file.pairs[key] = known + _timed_pair(recipes[baseline], variants[name, depths], data_of)
            except NextnError as error:
                raise StudyError(f"timing the steps of {name!r} failed: {error}") from None
            file.write(place)
    if place.type == "cuda":
        torch.cuda.empty_cache()  # for the workers
    times = dict.fromkeys(variants) | {which: file.pairs[key] for which, key in keys.items()}
    baseline_s = [seconds for key in which_of for seconds in file.pairs[key].baseline_s]
    return Speeds(times, statistics.median(baseline_s))


def _timed_pair(baseline: Recipe, variant: Recipe, data_of: Callable[[Recipe], PreparedData]) -> StepTimes:
    recipes = {"baseline": baseline, "setting": variant}
    seconds = time_steps(recipes, {name: data_of(recipe) for name, recipe in recipes.items()}, TURNS_PER_SITTING)
    return StepTimes(tuple(seconds["setting"]), tuple(seconds["baseline"]))
