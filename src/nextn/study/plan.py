"""Lists the runs of a study and names each by a hash.

The hash covers a run's settings and its text. So two studies that share a run share its folder, and a study that was
killed or extended trains only the missing runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nextn.config import Recipe
from nextn.errors import CheckpointError
from nextn.study.definition import LoadedStudy
from nextn.tables import flattened, to_table
from nextn.training import read_recipe

WITHOUT_EFFECT = ("training.device", "training.tensorboard", "training.log_every", "training.num_kept_checkpoints")
"""Settings that do not change what a run gives; `device` changes its rounding."""


@dataclass(frozen=True)
class PlannedRun:
    """One run to train.

    Attributes:
        id: `run_id` of the recipe.
        recipe: resolved but for a `vocab_size` of 0.
        variant: name of the variant it belongs to.
        seed: its training.seed.
        ladder: multiple of the baseline's length, for a baseline trained at another length; None: a variant's own run.
    """

    id: str
    recipe: Recipe
    variant: str
    seed: int
    ladder: float | None = None


def plan_runs(loaded: LoadedStudy, corpus_sha256: Mapping[str, str]) -> list[PlannedRun]:
    """All runs, seed by seed, so that pairs are whole early; the baseline first within a seed.

    Args:
        loaded: the study.
        corpus_sha256: identity of each variant's text, by variant.
    """
    runs = []
    for seed in loaded.study.seeds:
        for given in loaded.variants:
            recipe = _with_seed(loaded.recipes[given.name], seed)
            runs.append(PlannedRun(run_id(recipe, corpus_sha256[given.name]), recipe, given.name, seed))
        for multiple in loaded.study.ladder:
            name = loaded.baseline.name
            recipe = _of_length(_with_seed(loaded.recipes[name], seed), multiple)
            runs.append(PlannedRun(run_id(recipe, corpus_sha256[name]), recipe, name, seed, multiple))
    return runs


def run_id(recipe: Recipe, corpus_sha256: str) -> str:
    """16 hexadecimal digits that stand for a run's settings and text.

    Settings at their default are left out, so that a version that adds one still finds older runs; `recipe_as_begun`
    refuses a run whose full settings differ.

    >>> from nextn.config import MTPConfig, TrainingConfig
    >>> plain = run_id(Recipe(), "0" * 64)
    >>> plain == run_id(Recipe(training=TrainingConfig(device="cpu")), "0" * 64)
    True
    >>> plain == run_id(Recipe(mtp=MTPConfig(num_depths=3)), "0" * 64)
    False
    """
    usual = dict(flattened(to_table(Recipe())))
    changed = {
        name: value
        for name, value in flattened(to_table(recipe))
        if name not in WITHOUT_EFFECT and usual.get(name) != value
    }
    text = json.dumps({"settings": changed, "text": corpus_sha256}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def recipe_as_begun(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe that the run in a folder was begun with; `recipe` itself where none was.

    Args:
        recipe: what the run is to be, vocabulary size filled in.
        folder: of the run.

    Raises:
        CheckpointError: they differ in more than `WITHOUT_EFFECT`: the run is of a version with other defaults.
    """
    path = folder / "recipe.json"
    if not path.exists():
        return recipe
    begun = read_recipe(path)
    old, new = (dict(flattened(to_table(one))) for one in (begun, recipe))
    if differing := [name for name in new if old[name] != new[name] and name not in WITHOUT_EFFECT]:
        listed = ", ".join(f"{name} (there {old[name]!r}, now {new[name]!r})" for name in differing)
        raise CheckpointError(
            f"{folder} holds a run with other settings, made by another version of nextn: {listed}. Delete or rename "
            "the folder, and the same command trains the run again"
        )
    return begun


def _with_seed(recipe: Recipe, seed: int) -> Recipe:
    return replace(recipe, training=replace(recipe.training, seed=seed))


def _of_length(recipe: Recipe, multiple: float) -> Recipe:
    num_steps = max(1, round(recipe.training.num_steps * multiple))
    return replace(recipe, training=replace(recipe.training, num_steps=num_steps))
