"""A model as its settings describe it, with fresh weights."""

from __future__ import annotations

from dataclasses import replace

from nextn.config import Recipe
from nextn.data.tokenizers import Tokenizer
from nextn.errors import ConfigError
from nextn.mtp.model import MTPModel
from nextn.mtp.registry import check_scheme


def check_recipe(recipe: Recipe) -> None:
    """Raise ConfigError for settings that the scheme ignores, or drafts that it cannot make; no data is needed."""
    draft_length = recipe.evaluation.draft_length if recipe.evaluation.num_prompts else 0
    check_scheme(recipe.mtp, recipe.objective.detach, draft_length)


def fit_vocabulary(recipe: Recipe, tokenizer: Tokenizer) -> Recipe:
    """The recipe with `model.vocab_size` = 0 replaced by the tokenizer's.

    Raises ConfigError when the recipe asks for fewer tokens than the tokenizer has.
    """
    wanted = recipe.model.vocab_size
    if wanted == 0:
        return replace(recipe, model=replace(recipe.model, vocab_size=tokenizer.vocab_size))
    if wanted < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {wanted}, but the tokenizer ({recipe.data.tokenizer}) has {tokenizer.vocab_size} "
            "tokens; leave vocab_size out to take the tokenizer's"
        )
    return recipe


def new_model(recipe: Recipe, tokenizer: Tokenizer) -> MTPModel:
    """A model with fresh weights from the recipe's seed, the tokenizer attached."""
    model = MTPModel(recipe.model, recipe.mtp).initialize(recipe.training.seed)
    model.tokenizer = tokenizer
    return model
