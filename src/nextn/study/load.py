"""Reads a study's file into variants and recipes. Every mistake is named with its correction."""

from __future__ import annotations

import difflib
import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nextn.config import Recipe
from nextn.errors import ConfigError
from nextn.study.definition import LoadedStudy, Study, Variant
from nextn.study.metrics import METRICS, metric_of
from nextn.tables import flattened, from_table, overlaid, override
from nextn.training import check_recipe


def load_study(path: str | Path, scale: str = "cpu", overrides: Sequence[str] = ()) -> LoadedStudy:
    """Read a study and build every variant's recipe.

    Args:
        path: the TOML file.
        scale: fills `{scale}` in the name of the base recipe.
        overrides: `table.key=value` for the base recipe, as in `nextn train --set`.

    Raises:
        ConfigError: a file is missing or is not TOML, an unknown key, variants of one name, a name that no variant has,
            or a recipe that contradicts itself (the message names the variant).
    """
    path = Path(path)
    table = _read_toml(path, "study")
    _refuse_old_names(table, path)
    table = overlaid(table, table.pop("scales", {}).get(scale, {}))
    variants = [*_listed_variants(table.pop("variants", [])), *_grid_variants(table.pop("grid", {}))]
    study = from_table(Study, table)
    if not variants:
        raise ConfigError(f"{path} has no variants to compare: add [[variants]] with a name, or a [grid]")
    names = [given.name for given in variants]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path}: two variants are called {repeated[0]!r}; every variant needs a name of its own")
    baseline = study.baseline or names[0]
    _check_names(study, variants, baseline, path)
    if len(set(study.seeds)) < len(study.seeds) or not study.seeds:
        raise ConfigError(f"{path}: seeds must be different numbers, at least one, got {list(study.seeds)}")
    if any(not multiple > 0 for multiple in study.ladder):
        raise ConfigError(f"{path}: ladder holds multiples of the baseline's steps, above 0, got {list(study.ladder)}")
    drafting = {given.draft_model for given in variants}
    if chained := [given.name for given in variants if given.draft_model and given.name in drafting]:
        raise ConfigError(f"{path}: {chained[0]!r} drafts for another variant, so it can have no draft_model itself")
    base = _base_table(path, study.base, scale, overrides)
    variants.sort(key=lambda given: given.name != baseline)
    recipes = {given.name: _recipe(base, given, study.seeds[0], path) for given in variants}
    return LoadedStudy(path.stem, replace(study, baseline=baseline), scale, tuple(variants), recipes)


VARIANT_KEYS = ("name", "set", "against", "draft_model")


def _read_toml(path: Path, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{what} not found: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{what} {path} cannot be read as TOML: {error}") from None


_OLD_NAMES = {"settings": "[[variants]]", "measure": "[evaluation]"}
_OLD_TEST_NAMES = {"setting": "variant", "measure": "metric"}


def _refuse_old_names(table: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError for a key that earlier versions read, with its name of today."""
    for place in (table, *table.get("scales", {}).values()):
        for old, new in _OLD_NAMES.items():
            if old in place:
                raise ConfigError(f"{path}: {old!r} is now called {new}; rename it in the study's file")
    for claim in table.get("claims", []):
        for test in claim.get("tests", []):
            for old, new in _OLD_TEST_NAMES.items():
                if old in test:
                    raise ConfigError(
                        f"{path}: {old!r} in a claim's test is now called {new!r}; write {new} = {test[old]!r}"
                    )


def _listed_variants(tables: Any) -> list[Variant]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError("variants are written as [[variants]], each with a name and what it sets")
    variants = []
    for table in tables:
        if unknown := sorted(table.keys() - set(VARIANT_KEYS)):
            raise ConfigError(
                f"unknown key {unknown[0]!r} in [[variants]]; it knows: {', '.join(VARIANT_KEYS)}. "
                f"Settings of the recipe are written as set.{unknown[0]} = ..."
            )
        name = table.get("name")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"every [[variants]] needs a name, got {name!r}")
        variants.append(Variant(name, table.get("set", {}), table.get("against", ""), table.get("draft_model", "")))
    return variants


def _grid_variants(table: Mapping[str, Any]) -> list[Variant]:
    """Every combination of a [grid]'s values, the last axis fastest.

    >>> [given.name for given in _grid_variants({"mtp": {"num_depths": [1, 3]}, "training": {"batch_size": [8]}})]
    ['num_depths = 1, batch_size = 8', 'num_depths = 3, batch_size = 8']
    """
    axes = [(name, values) for name, values in flattened(table)]
    for name, values in axes:
        if not isinstance(values, list) or not values:
            raise ConfigError(f"[grid] {name} must be a list of values to try, got {values!r}")
    variants = []
    for combination in itertools.product(*(values for _, values in axes)) if axes else ():
        name = ", ".join(f"{axis.split('.')[-1]} = {value}" for (axis, _), value in zip(axes, combination, strict=True))
        changes: dict[str, Any] = {}
        for (axis, _), value in zip(axes, combination, strict=True):
            *parents, key = axis.split(".")
            inner = changes
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[key] = value
        variants.append(Variant(name, changes))
    return variants


def _check_names(study: Study, variants: Sequence[Variant], baseline: str, path: Path) -> None:
    """Raise ConfigError for a name of a variant that does not exist, with the nearest one."""
    known = [given.name for given in variants]
    tests = [test for claim in study.claims for test in claim.tests]
    named = [("baseline", baseline)]
    named += [(f"the variant {given.name!r}", given.against) for given in variants if given.against]
    named += [(f"the draft model of {given.name!r}", given.draft_model) for given in variants if given.draft_model]
    named += [("a claim", name) for test in tests for name in (test.variant, test.best, *test.among) if name]
    for what, name in named:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(f"{path}: {what} names the variant {name!r}{hint} The study has: {', '.join(known)}")
    for claim in study.claims:
        if not claim.tests:
            raise ConfigError(f"{path}: the claim {claim.text!r} has no tests; add tests = [{{ metric = ..., ... }}]")
    for test in tests:
        metric = metric_of(test.metric)
        if metric is not None and metric.better is None and (test.best or test.against_baseline):
            raise ConfigError(f"{path}: {test.metric!r} is shown, not compared, so no claim can compare variants in it")
        if test.against_baseline and test.variant == baseline:
            raise ConfigError(f"{path}: a claim about {test.metric!r} sets the baseline {baseline!r} against itself")
        if metric is None:
            nearest = difflib.get_close_matches(test.metric, METRICS, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(f"{path}: a claim tests the unknown metric {test.metric!r}{hint}")


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


def _recipe(base: Mapping[str, Any], given: Variant, seed: int, path: Path) -> Recipe:
    try:
        recipe = from_table(Recipe, overlaid(base, overlaid(given.changes, {"training": {"seed": seed}})))
        check_recipe(recipe)
    except ConfigError as error:
        raise ConfigError(f"{path}, variant {given.name!r}: {error}") from None
    return recipe
