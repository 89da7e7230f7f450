"""Prepare the start of a run: a fresh model by `[model]`, or the model of a folder by `[trunk]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from nextn.config import DataConfig, MTPConfig, Recipe
from nextn.data.prepare import PreparedData, prepare_data
from nextn.errors import CheckpointError, ConfigError
from nextn.files import list_checkpoints
from nextn.interop.load import load_unmerged
from nextn.interop.lora import add_factors
from nextn.mtp.fresh import check_recipe, fit_vocabulary, new_model
from nextn.mtp.model import MTPModel

_STRUCTURE_ALONE = ("num_depths", "share_weights")
"""Settings of a chain that modules with the same weights may have otherwise: how often they are used."""


class Start(NamedTuple):
    """A run about to begin or to go on.

    Attributes:
        recipe: with everything resolved that corpus, tokenizer or loaded folder decide.
        model: what of it is trained requires gradients.
        data: to train and to evaluate on.
    """

    recipe: Recipe
    model: MTPModel
    data: PreparedData


def start(recipe: Recipe, run_folder: Path, say: Callable[[str], None] = lambda _: None) -> Start:
    """Prepare everything that a run of this recipe needs.

    Args:
        recipe: as it was read.
        run_folder: of a run that goes on; its newest checkpoint is read instead of `trunk.from`.
        say: called with a progress message before each slow step.

    Raises:
        ConfigError: settings that contradict the loaded model.
        CheckpointError: the folder to load from cannot be read.
        DataError: the corpus cannot be read, is empty or too short.
    """
    if recipe.trunk.from_ is None:
        data = prepare_data(recipe.data, say)
        recipe = fit_vocabulary(recipe, data.tokenizer)
        return Start(recipe, new_model(recipe, data.tokenizer), data)
    recipe, model = load_start(recipe, run_folder, say)
    data = prepare_data(recipe.data, say, model.tokenizer)
    if model.tokenizer is None:
        if data.tokenizer.vocab_size > model.trunk.vocab_size:
            raise ConfigError(
                f"data.tokenizer = {recipe.data.tokenizer!r} has {data.tokenizer.vocab_size} tokens, and the trunk of "
                f"{recipe.trunk.from_} knows {model.trunk.vocab_size}"
            )
        model.tokenizer = data.tokenizer
    return Start(recipe, model, data)


def load_start(
    recipe: Recipe, run_folder: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> tuple[Recipe, MTPModel]:
    """The recipe, its `[mtp]` resolved, and the model that `[trunk]` starts from; arguments and errors: see `start`."""
    folder = _folder_to_load(recipe, run_folder)
    say(f"loading {folder}")
    loaded = load_unmerged(folder)
    recipe = _resolved(recipe, loaded, recipe.trunk.from_ or "")
    model = _with_modules(recipe, loaded)
    if recipe.trunk.train == "none":
        model.trunk.requires_grad_(False)  # type: ignore[attr-defined]
    elif recipe.trunk.train == "lora":
        add_factors(model, recipe.trunk.lora, recipe.training.seed)
    return recipe, model.train()


def _folder_to_load(recipe: Recipe, run_folder: Path | None) -> Path:
    """The newest checkpoint of a run that has one, else `trunk.from`."""
    if run_folder is not None and (checkpoints := list_checkpoints(run_folder)):
        return checkpoints[-1]
    assert recipe.trunk.from_ is not None, "there is a folder to load"
    folder = Path(recipe.trunk.from_).expanduser()
    if not folder.exists():
        raise CheckpointError(f"trunk.from = {recipe.trunk.from_!r} does not exist; name a model's folder or a run's")
    return folder


def _resolved(recipe: Recipe, loaded: MTPModel, name: str) -> Recipe:
    """The recipe with the `[mtp]` that will be trained, checked against the loaded model. Raises ConfigError."""
    recipe.check_context(loaded.trunk.max_position_embeddings, f"the context of {name}")
    if loaded.tokenizer is not None and recipe.data.tokenizer != DataConfig().tokenizer:
        raise ConfigError(
            f"data.tokenizer = {recipe.data.tokenizer!r}, and {name} has a tokenizer of its own, which its weights "
            "were trained with; leave data.tokenizer out"
        )
    has_modules, wanted, modules = loaded.scheme is not None, recipe.mtp, recipe.trunk.modules
    if modules == "keep" and not has_modules:
        raise ConfigError(f"trunk.modules = 'keep', and {name} has no MTP modules; set trunk.modules = 'fresh'")
    if modules == "fresh" or not has_modules or wanted.num_depths == 0:
        check_recipe(recipe)
        return recipe
    if wanted == MTPConfig():
        wanted = loaded.mtp_config
    elif not _have_the_same_weights(wanted, loaded.mtp_config):
        raise ConfigError(
            f"{name} has MTP modules of another kind than [mtp] asks for: {_difference(wanted, loaded.mtp_config)}; "
            "leave [mtp] out to keep them, or set trunk.modules = 'fresh' to train new ones in their place"
        )
    recipe = replace(recipe, mtp=wanted)
    check_recipe(recipe)
    return recipe


def _have_the_same_weights(first: MTPConfig, second: MTPConfig) -> bool:
    """Modules of the one serve as modules of the other."""
    kinds = [{key: value for key, value in vars(one).items() if key not in _STRUCTURE_ALONE} for one in (first, second)]
    numbers = [1 if one.share_weights and one.num_depths else one.num_depths for one in (first, second)]
    return kinds[0] == kinds[1] and numbers[0] == numbers[1]


def _difference(wanted: MTPConfig, found: MTPConfig) -> str:
    return ", ".join(
        f"{key} = {value!r} (the folder: {getattr(found, key)!r})"
        for key, value in vars(wanted).items()
        if value != getattr(found, key)
    )


def _with_modules(recipe: Recipe, loaded: MTPModel) -> MTPModel:
    """The loaded trunk with the modules to train: the loaded ones, or fresh ones from the recipe's seed."""
    keeps = loaded.scheme is not None and recipe.trunk.modules != "fresh" and recipe.mtp.num_depths > 0
    if keeps and recipe.mtp == loaded.mtp_config:
        return loaded
    model = loaded.with_modules(recipe.mtp)
    if keeps and loaded.scheme is not None and model.scheme is not None:
        model.scheme.load_state_dict(loaded.scheme.state_dict())
    else:
        model.initialize_modules(recipe.training.seed)
    return model
