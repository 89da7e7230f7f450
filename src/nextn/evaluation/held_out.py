"""A checkpoint on held-out text: loss, accuracy and agreement with true tokens, then acceptance by decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nextn.config import EvaluationConfig, Recipe
from nextn.data import validation_rows
from nextn.data.sources import is_path
from nextn.errors import DataError
from nextn.evaluation.free_running import acceptance_probe
from nextn.files import read_json
from nextn.mtp import MTPModel, check_scheme
from nextn.training import evaluate_teacher_forced, prepare_held_out, read_recipe
from nextn.wording import plural


@dataclass(frozen=True)
class HeldOutEvaluation:
    """What was measured, and on what.

    Attributes:
        figures: losses, bits per byte, accuracy and agreement per depth; `decoding` where prompts were decoded.
        settings: how much was read and decoded.
        corpus: facts of the text, for the provenance.
    """

    figures: dict[str, Any]
    settings: EvaluationConfig
    corpus: dict[str, Any]


def evaluate_held_out(
    folder: Path,
    model: MTPModel,
    corpus: str | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    **changes: int | None,
) -> HeldOutEvaluation:
    """Measure a loaded checkpoint on text that it was not trained on.

    Args:
        folder: the checkpoint; its recipe.json says what it was trained on.
        model: the same, loaded.
        corpus: another text, all of it; None: the part held out of the one it was trained on.
        say: called with a progress message before each slow step.
        note: called with a summary of the text.
        changes: settings of `EvaluationConfig` that differ from those trained with; None leaves one as it is.

    Raises:
        DataError: no tokenizer, or no text to read.
        ConfigError: a draft length that the scheme cannot draft.
    """
    if model.tokenizer is None:
        raise DataError(f"{folder} has no tokenizer, so text cannot be read with it")
    recipe = _recipe(folder, corpus, model.trunk.max_position_embeddings)
    settings = replace(recipe.evaluation, **{key: value for key, value in changes.items() if value is not None})
    if corpus is None and is_path(recipe.data.corpus) and not Path(recipe.data.corpus).expanduser().exists():
        raise DataError(
            f"the run was trained on {recipe.data.corpus!r}, a path seen from the folder it was started in, and there "
            f"is no such path in {Path.cwd()}; start nextn there, or name the text with --corpus"
        )
    check_scheme(model.mtp_config, draft_length=settings.draft_length if settings.num_prompts else 0)
    trained = None
    if corpus not in (None, recipe.data.corpus):
        trained = read_json(folder / "provenance.json").get("corpus", {}) if (folder / "recipe.json").exists() else {}
    data_config = recipe.data if corpus is None else replace(recipe.data, corpus=corpus)
    data = prepare_held_out(data_config, model.tokenizer, trained, say)
    note(data.held_out_summary())
    rows = validation_rows(data.validation, data_config.sequence_length, settings.num_rows)
    probe = acceptance_probe(data.validation, settings)
    say(f"reading {len(rows.input_ids)} x {data_config.sequence_length} held-out tokens")
    forced = evaluate_teacher_forced(
        model,
        rows,
        data.validation.bytes_per_token,
        rows_per_forward=recipe.training.batch_size,
        isolate_documents=data_config.isolate_documents,
    )
    figures = forced.to_table()
    if probe is not None:
        say(f"decoding {plural(settings.num_prompts, 'held-out prompt')}, greedy and sampled")
        figures["decoding"] = probe(model)
    return HeldOutEvaluation(figures, settings, data.provenance())


def _recipe(folder: Path, corpus: str | None, context: int) -> Recipe:
    """The recipe of the checkpoint; where there is none, and a corpus is named, default settings.

    Rows then have at most `context` tokens. Raises DataError where no corpus is named either.
    """
    if (folder / "recipe.json").exists():
        return read_recipe(folder / "recipe.json")
    if corpus is None:
        raise DataError(
            f"{folder} does not say what it was trained on (it has no recipe.json), so there is no held-out text; "
            "name a text with --corpus, or tasks with --tasks"
        )
    usual = Recipe()
    return replace(usual, data=replace(usual.data, sequence_length=min(usual.data.sequence_length, context)))
