"""Prepare the text of a run from its settings: corpus, tokenizer, packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nextn.config import DataConfig
from nextn.data.corpora import Corpus, hold_out_all, load_corpus
from nextn.data.packing import PackedTokens, pack, require_row
from nextn.data.tokenizers import Tokenizer, build_tokenizer


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True)
class PreparedData:
    """A corpus read, split, tokenized and packed; `train` is empty where it was prepared for evaluation alone."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: PackedTokens
    validation: PackedTokens

    def summary(self) -> str:
        """One line for people."""
        tokens = f"{len(self.train):,} tokens to train on, {len(self.validation):,} held out"
        return f"{self.corpus.name}: {tokens}{self._left_out()}"

    def held_out_summary(self) -> str:
        """One line for people: the text an evaluation reads."""
        num_files = sum(file.split == "validation" for file in self.corpus.files)
        size = f"{num_files:,} {'file' if num_files == 1 else 'files'}, {len(self.validation):,} tokens"
        which = "the part held out of training" if self.corpus.train else "all of it, since it was not trained on"
        return f"{self.corpus.name}: {size}: {which}{self._left_out()}"

    def _left_out(self) -> str:
        num_files = len(self.corpus.dropped)
        return f"; left out: {num_files:,} {'file' if num_files == 1 else 'files'}" if num_files else ""

    def provenance(self) -> dict[str, Any]:
        """Facts of the text: names, sizes and hashes of all files, and the files that were left out."""
        return {
            "name": self.corpus.name,
            "sha256": self.corpus.sha256,
            **({"num_train_tokens": len(self.train)} if len(self.train) else {}),
            "num_validation_tokens": len(self.validation),
            "files": [vars(file) for file in self.corpus.files],
            "dropped": [vars(file) for file in self.corpus.dropped],
        }


def prepare_data(
    config: DataConfig, say: Callable[[str], None] = _silent, tokenizer: Tokenizer | None = None
) -> PreparedData:
    """Read the corpus, build the tokenizer that the settings name, and pack both parts.

    Args:
        config: names corpus and tokenizer.
        say: called with a progress message before each slow step.
        tokenizer: of a model that is loaded; None: the one that the settings name.

    Raises DataError when the corpus cannot be read, is empty, or is shorter than a row.
    """
    say(f"reading {config.corpus}")
    corpus = load_corpus(config)
    if tokenizer is None:
        if config.tokenizer.startswith("bpe:"):
            say(f"training the tokenizer {config.tokenizer}")
        tokenizer = build_tokenizer(config.tokenizer, corpus)
    say("turning text into tokens")
    data = PreparedData(corpus, tokenizer, pack(corpus.train, tokenizer), pack(corpus.validation, tokenizer))
    require_row(data.train, config.sequence_length, "training")
    require_row(data.validation, config.sequence_length, "validation")
    return data


def prepare_held_out(
    config: DataConfig,
    tokenizer: Tokenizer,
    trained: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = _silent,
) -> PreparedData:
    """Read the text to evaluate a trained model on; nothing is packed to train on.

    Args:
        config: names the corpus.
        tokenizer: the model's.
        trained: what the model was trained on, as `PreparedData.provenance` gave it. If it is this corpus, by its hash,
            the part held out is read; of any other corpus all is, but for files trained on. None: it is this corpus.
        say: called with a progress message before each slow step.

    Raises:
        DataError: the corpus cannot be read, is empty, or what is left to evaluate on is shorter than a row.
    """
    say(f"reading {config.corpus}")
    corpus = load_corpus(config)
    if trained is not None and trained.get("sha256") != corpus.sha256:
        corpus = hold_out_all(corpus, {file["sha256"] for file in trained.get("files", ()) if file["split"] == "train"})
    say("turning text into tokens")
    data = PreparedData(corpus, tokenizer, pack((), tokenizer), pack(corpus.validation, tokenizer))
    require_row(data.validation, config.sequence_length, "validation")
    return data
