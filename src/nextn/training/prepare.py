"""From a recipe to everything a run needs: corpus, tokenizer, packed tokens, and a fresh model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nextn.config import DataConfig, Recipe
from nextn.data import Corpus, PackedTokens, Tokenizer, build_tokenizer, load_corpus, pack, require_row
from nextn.errors import ConfigError
from nextn.mtp import MTPModel


@dataclass(frozen=True)
class PreparedData:
    """A corpus read, split, tokenized and packed."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: PackedTokens
    validation: PackedTokens

    def summary(self) -> str:
        """One line for people."""
        return f"{self.corpus.name}: {len(self.train):,} tokens to train on, {len(self.validation):,} held out"

    def provenance(self) -> dict[str, Any]:
        """What the text was: names, sizes and hashes of all files, and what was left out."""
        return {
            "name": self.corpus.name,
            "sha256": self.corpus.sha256,
            "num_train_tokens": len(self.train),
            "num_validation_tokens": len(self.validation),
            "files": [vars(file) for file in self.corpus.files],
            "dropped": [vars(file) for file in self.corpus.dropped],
        }


def prepare_data(config: DataConfig, tokenizer: Tokenizer | None = None) -> PreparedData:
    """Read the corpus and pack it, with `tokenizer` or the one the settings name.

    Raises DataError when the corpus cannot be read, is empty, or is shorter than a row.
    """
    corpus = load_corpus(config)
    tokenizer = tokenizer or build_tokenizer(config.tokenizer, corpus)
    data = PreparedData(corpus, tokenizer, pack(corpus.train, tokenizer), pack(corpus.validation, tokenizer))
    require_row(data.train, config.sequence_length, "training")
    require_row(data.validation, config.sequence_length, "validation")
    return data


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
