"""The conventions of a checkpoint that was examined, measured on a text: what `nextn doctor --measure` adds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nextn.config import DataConfig
from nextn.data import Document, PackedTokens, Tokenizer, pack, validation_rows
from nextn.errors import CheckpointError, ConfigError, DataError
from nextn.evaluation.conventions import convention_findings, measure_conventions, most_frequent_share
from nextn.files import read_json
from nextn.interop.doctor import Diagnosis, Finding
from nextn.interop.load import load
from nextn.mtp import MTPModel
from nextn.provenance import collect
from nextn.training import prepare_held_out, read_recipe

ROW_LENGTH = 256


@dataclass(frozen=True)
class ConventionMeasurement:
    """What to measure on.

    Attributes:
        text: a UTF-8 file.
        corpus: a corpus by name or path; None with no text either: the part held out of the checkpoint's own.
        num_rows: rows of text read.
        device, dtype: where and in what the model computes.

    Raises:
        ConfigError: both a text and a corpus.
    """

    text: Path | None = None
    corpus: str | None = None
    num_rows: int = 32
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.text is not None and self.corpus is not None:
            raise ConfigError("--text and --corpus exclude each other; name one")


def measure_diagnosed(
    diagnosis: Diagnosis, wanted: ConventionMeasurement, say: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Load an examined checkpoint and measure each convention's accuracy on a text.

    Args:
        diagnosis: of a folder with MTP modules.
        wanted: the text, and how much of it is read.
        say: called with a progress message before each slow step.

    Returns:
        The accuracies as a table for JSON, and the findings that follow. A model that does not load is a finding.

    Raises:
        CheckpointError: a file alone, which cannot be loaded as a model.
        DataError: no tokenizer, or no text to read.
    """
    if diagnosis.kind != "folder":
        raise CheckpointError(f"--measure loads the model, which takes its folder; {diagnosis.path} is a file alone")
    say("loading the model")
    try:
        model = load(diagnosis.path, device=wanted.device, dtype=wanted.dtype)
    except CheckpointError as error:
        return None, [Finding("problem", "not loadable", str(error), "nextn must load a model to measure it")]
    if model.tokenizer is None:
        raise DataError(f"{diagnosis.path} has no tokenizer, so text cannot be read with it")
    if (text := wanted.text) is not None:
        packed, isolate = _read_text(text, model.tokenizer), True
        provenance = {"name": text.name, "sha256": hashlib.sha256(text.read_bytes()).hexdigest()}
    else:
        packed, provenance, isolate = _read_corpus(diagnosis.path, wanted.corpus, model, say)
    length = min(ROW_LENGTH, model.trunk.max_position_embeddings, len(packed))
    rows = validation_rows(packed, length, wanted.num_rows)
    measured = measure_conventions(model, rows, packed.bytes_per_token, isolate, say)
    guessing = most_frequent_share(rows)
    table = {
        "conventions": [one.to_table() for one in measured],
        "most_frequent_token_share": guessing,
        "num_rows": len(rows.input_ids),
        "sequence_length": length,
        "dtype": wanted.dtype,
        "provenance": collect(seed=0, device=wanted.device, corpus=provenance),
    }
    return table, convention_findings(measured, guessing)


def _read_text(file: Path, tokenizer: Tokenizer) -> PackedTokens:
    try:
        return pack([Document(file.name, file.read_text(encoding="utf-8"))], tokenizer)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}") from None


def _read_corpus(
    folder: Path, corpus: str | None, model: MTPModel, say: Callable[[str], None]
) -> tuple[PackedTokens, dict[str, Any], bool]:
    """Tokens, their provenance, and whether documents of a row do not see each other."""
    assert model.tokenizer is not None
    if (folder / "recipe.json").exists():
        config, trained = read_recipe(folder / "recipe.json").data, None
        if corpus not in (None, config.corpus):
            trained = read_json(folder / "provenance.json").get("corpus", {})
    elif corpus is not None:
        config, trained = DataConfig(), {}
    else:
        raise DataError(f"{folder} does not say what it was trained on; name a text with --text or --corpus")
    data = prepare_held_out(config if corpus is None else replace(config, corpus=corpus), model.tokenizer, trained, say)
    named = {"name": data.corpus.name, "sha256": data.corpus.sha256, "num_validation_tokens": len(data.validation)}
    return data.validation, named, config.isolate_documents
