"""A study as its TOML file describes it: what is varied, over which seeds, what is measured, and which claims it tests.

title = "How many future tokens?"
question = "Which number of extra depths pays?"
base = "base-{scale}.toml"          # the training recipe that is varied; {scale} is what --scale says
baseline = "next token"             # the setting that all others are compared with
seeds = [0, 1, 2]

[[settings]]                        # one way to train ...
name = "next token"
set.mtp.num_depths = 0

[grid]                              # ... and/or every combination of these values
mtp.num_depths = [1, 3]

[measure]
num_prompts = 8

[[claims]]
text = "Three extra depths are best"
tests = [{ measure = "loss", best = "num_depths = 3" }]
"""

from __future__ import annotations

import difflib
import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nextn.config import Recipe
from nextn.config.fields import require, setting
from nextn.errors import ConfigError
from nextn.study.measures import MEASURES, measure_of
from nextn.tables import flattened, from_table, overlaid, override
from nextn.training import check_recipe


@dataclass(frozen=True)
class MeasureConfig:
    """`[measure]`: how much is measured of every trained model."""

    num_rows: int = setting(256, "held-out rows for the losses, by depth and by position")
    num_prompts: int = setting(32, "held-out prompts decoded for acceptance; 0 decodes none")
    prompt_length: int = setting(128, "tokens in a prompt")
    max_new_tokens: int = setting(128, "tokens decoded per prompt")
    num_timed_prompts: int = setting(2, "of these prompts, how many are decoded for tokens per second; 0 times none")
    num_repeats: int = setting(3, "timed repeats, plain and speculative decoding in turn")
    num_completions: int = setting(256, "sampled completions of Python functions that are parsed; 0 samples none")
    completion_length: int = setting(128, "tokens of such a completion")
    tasks: tuple[str, ...] = setting((), "tasks of lm-evaluation-harness (needs the lm-eval extra)")
    task_limit: int | None = setting(None, "questions per task; none asks all")

    def __post_init__(self) -> None:
        require(self, "measure", 1, "num_rows", "prompt_length", "max_new_tokens", "num_repeats", "completion_length")
        require(self, "measure", 0, "num_prompts", "num_timed_prompts", "num_completions")
        require(self, "measure", 1, "task_limit")
        if self.num_timed_prompts > self.num_prompts:
            raise ConfigError(
                f"measure.num_timed_prompts = {self.num_timed_prompts} exceeds measure.num_prompts = {self.num_prompts}"
            )


@dataclass(frozen=True)
class Setting:
    """One way to train: the base recipe with some settings changed.

    Attributes:
        name: of the setting, one per study.
        changes: nested tables as in a recipe, with the changed keys alone.
        against: name of the setting that it is compared with; empty: the study's baseline.
        draft_model: name of the setting whose model of the same seed drafts for this one; empty: MTP depths draft.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    against: str = ""
    draft_model: str = ""


@dataclass(frozen=True)
class Criterion:
    """What would make a claim true: `setting` lies within `low` and `high`, or `best` is the best of `among`."""

    measure: str = setting("", "name of a measure, see docs/studies.md")
    low: float | None = setting(None, "what is claimed of `setting`: the measure is at least this")
    high: float | None = setting(None, "and at most this")
    against_baseline: bool = setting(False, "low and high bound the difference from the baseline instead")
    best: str = setting("", "the setting claimed to be the best in the measure ...")
    among: tuple[str, ...] = setting((), "... of these settings; empty: of all")
    setting: str = setting("", "the setting of which low and high are claimed")

    def __post_init__(self) -> None:
        if bool(self.setting) == bool(self.best):
            raise ConfigError(
                f"a claim's test names either a setting (with low, high or both) or the best one, got setting = "
                f"{self.setting!r}, best = {self.best!r}"
            )
        if self.setting and self.low is None and self.high is None:
            raise ConfigError(f"the test of {self.measure!r} for {self.setting!r} needs low, high or both")


@dataclass(frozen=True)
class Claim:
    """A sentence, and the tests that must all hold for it to be true."""

    text: str = setting("", "the claim in words")
    tests: tuple[Criterion, ...] = setting((), "all must hold")


@dataclass(frozen=True)
class Study:
    """A study's file, resolved; see the module's docstring for the file itself."""

    title: str = setting("", "what the page is called")
    question: str = setting("", "what the study asks, in a sentence")
    base: str = setting("", "path of the training recipe, from the study's folder; {scale} stands for --scale")
    baseline: str = setting("", "name of the setting that others are compared with; empty: the first")
    seeds: tuple[int, ...] = setting((0, 1, 2), "training.seed of the runs; settings are paired by it")
    ladder: tuple[float, ...] = setting(
        (),
        "lengths at which the baseline is trained besides its own, as multiples of its steps: what it would do "
        "with other budgets is read between them",
    )
    target_losses: tuple[float, ...] = setting((), "losses (nats per token) whose steps, FLOPs and time are read off")
    measure: MeasureConfig = field(default_factory=MeasureConfig, metadata={"doc": "what is measured of every model"})
    claims: tuple[Claim, ...] = setting((), "what is tested")


@dataclass(frozen=True)
class LoadedStudy:
    """A study with its settings, and the recipe of each of them.

    Attributes:
        name: stem of the file.
        study: its tables.
        scale: which base recipe was taken.
        settings: baseline first.
        recipes: by setting's name, with the first seed.
    """

    name: str
    study: Study
    scale: str
    settings: tuple[Setting, ...]
    recipes: dict[str, Recipe]

    @property
    def baseline(self) -> Setting:
        """What all others are compared with."""
        return self.settings[0]


def load_study(path: str | Path, scale: str = "cpu", overrides: Sequence[str] = ()) -> LoadedStudy:
    """Read a study and build every setting's recipe.

    Args:
        path: the TOML file.
        scale: fills `{scale}` in the name of the base recipe.
        overrides: `table.key=value` for the base recipe, as in `nextn train --set`.

    Raises:
        ConfigError: a file is missing or is not TOML, an unknown key, settings of one name, a name that no setting has,
            or a recipe that contradicts itself (the message names the setting).
    """
    path = Path(path)
    table = _read_toml(path, "study")
    table = overlaid(table, table.pop("scales", {}).get(scale, {}))
    settings = [*_listed_settings(table.pop("settings", [])), *_grid_settings(table.pop("grid", {}))]
    study = from_table(Study, table)
    if not settings:
        raise ConfigError(f"{path} has no settings to compare: add [[settings]] with a name, or a [grid]")
    names = [given.name for given in settings]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path}: two settings are called {repeated[0]!r}; every setting needs a name of its own")
    baseline = study.baseline or names[0]
    _check_names(study, settings, baseline, path)
    if len(set(study.seeds)) < len(study.seeds) or not study.seeds:
        raise ConfigError(f"{path}: seeds must be different numbers, at least one, got {list(study.seeds)}")
    if any(not multiple > 0 for multiple in study.ladder):
        raise ConfigError(f"{path}: ladder holds multiples of the baseline's steps, above 0, got {list(study.ladder)}")
    drafting = {given.draft_model for given in settings}
    if chained := [given.name for given in settings if given.draft_model and given.name in drafting]:
        raise ConfigError(f"{path}: {chained[0]!r} drafts for another setting, so it can have no draft_model itself")
    base = _base_table(path, study.base, scale, overrides)
    settings.sort(key=lambda given: given.name != baseline)
    recipes = {given.name: _recipe(base, given, study.seeds[0], path) for given in settings}
    return LoadedStudy(path.stem, replace(study, baseline=baseline), scale, tuple(settings), recipes)


SETTING_KEYS = ("name", "set", "against", "draft_model")


def _read_toml(path: Path, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{what} not found: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{what} {path} cannot be read as TOML: {error}") from None


def _listed_settings(tables: Any) -> list[Setting]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError("settings are written as [[settings]], each with a name and what it sets")
    settings = []
    for table in tables:
        if unknown := sorted(table.keys() - set(SETTING_KEYS)):
            raise ConfigError(
                f"unknown key {unknown[0]!r} in [[settings]]; it knows: {', '.join(SETTING_KEYS)}. "
                f"Settings of the recipe are written as set.{unknown[0]} = ..."
            )
        name = table.get("name")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"every [[settings]] needs a name, got {name!r}")
        settings.append(Setting(name, table.get("set", {}), table.get("against", ""), table.get("draft_model", "")))
    return settings


def _grid_settings(table: Mapping[str, Any]) -> list[Setting]:
    """Every combination of a [grid]'s values, the last axis fastest.

    >>> [given.name for given in _grid_settings({"mtp": {"num_depths": [1, 3]}, "training": {"batch_size": [8]}})]
    ['num_depths = 1, batch_size = 8', 'num_depths = 3, batch_size = 8']
    """
    axes = [(name, values) for name, values in flattened(table)]
    for name, values in axes:
        if not isinstance(values, list) or not values:
            raise ConfigError(f"[grid] {name} must be a list of values to try, got {values!r}")
    settings = []
    for combination in itertools.product(*(values for _, values in axes)) if axes else ():
        name = ", ".join(f"{axis.split('.')[-1]} = {value}" for (axis, _), value in zip(axes, combination, strict=True))
        changes: dict[str, Any] = {}
        for (axis, _), value in zip(axes, combination, strict=True):
            *parents, key = axis.split(".")
            inner = changes
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[key] = value
        settings.append(Setting(name, changes))
    return settings


def _check_names(study: Study, settings: Sequence[Setting], baseline: str, path: Path) -> None:
    """Raise ConfigError for a name of a setting that does not exist, with the nearest one."""
    known = [given.name for given in settings]
    tests = [test for claim in study.claims for test in claim.tests]
    named = [("baseline", baseline)]
    named += [(f"the setting {given.name!r}", given.against) for given in settings if given.against]
    named += [(f"the draft model of {given.name!r}", given.draft_model) for given in settings if given.draft_model]
    named += [("a claim", name) for test in tests for name in (test.setting, test.best, *test.among) if name]
    for what, name in named:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(f"{path}: {what} names the setting {name!r}{hint} The study has: {', '.join(known)}")
    for claim in study.claims:
        if not claim.tests:
            raise ConfigError(f"{path}: the claim {claim.text!r} has no tests; add tests = [{{ measure = ..., ... }}]")
    for test in tests:
        measure = measure_of(test.measure)
        if measure is not None and measure.better is None and (test.best or test.against_baseline):
            raise ConfigError(
                f"{path}: {test.measure!r} is shown, not compared, so no claim can compare settings in it"
            )
        if test.against_baseline and test.setting == baseline:
            raise ConfigError(f"{path}: a claim about {test.measure!r} sets the baseline {baseline!r} against itself")
        if measure is None:
            nearest = difflib.get_close_matches(test.measure, MEASURES, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(f"{path}: a claim tests the unknown measure {test.measure!r}{hint}")


def _base_table(path: Path, base: str, scale: str, overrides: Sequence[str]) -> dict[str, Any]:
    if not base:
        raise ConfigError(f'{path} names no training recipe to vary: base = "PATH.toml"')
    recipe = path.parent / base.replace("{scale}", scale)
    if not recipe.exists() and "{scale}" in base:
        pattern = base.replace("{scale}", "*")
        first, last = base.split("{scale}")
        scales = sorted(f.name.removeprefix(Path(first).name).removesuffix(last) for f in path.parent.glob(pattern))
        raise ConfigError(f"{path} has no size {scale!r} ({recipe} is missing); it has: {', '.join(scales) or 'none'}")
    return override(_read_toml(recipe, "recipe"), overrides)


def _recipe(base: Mapping[str, Any], given: Setting, seed: int, path: Path) -> Recipe:
    try:
        recipe = from_table(Recipe, overlaid(base, overlaid(given.changes, {"training": {"seed": seed}})))
        check_recipe(recipe)
    except ConfigError as error:
        raise ConfigError(f"{path}, setting {given.name!r}: {error}") from None
    return recipe
