"""`nextn evaluate`: losses, bits per byte and the three acceptance kinds of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import nextn
from nextn.checkpoint import write_json
from nextn.cli.output import print_evaluation
from nextn.data import validation_rows
from nextn.errors import DataError
from nextn.mtp import find_checkpoint
from nextn.report.measurement import acceptance_probe
from nextn.report.provenance import collect
from nextn.tables import to_table
from nextn.training import evaluate_teacher_forced, prepare_data, read_recipe


def evaluate(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder (its last checkpoint is taken).")],
    corpus: Annotated[
        str | None, typer.Option(help="Corpus to hold text out from. Default: the one it was trained on.")
    ] = None,
    draft_length: Annotated[int | None, typer.Option(help="N, tokens drafted per cycle. Default: as trained.")] = None,
    num_rows: Annotated[int | None, typer.Option(help="Held-out rows read. Default: as trained.")] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Held-out prompts decoded. Default: as trained.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    json: Annotated[Path | None, typer.Option(help="Also write the figures and their provenance to this file.")] = None,
) -> None:
    """Measure a checkpoint on held-out text.

    Examples:

        nextn evaluate runs/python-stdlib

        nextn evaluate runs/python-stdlib --corpus my-project/ --draft-length 2 --json evaluation.json
    """
    folder = find_checkpoint(path)
    model = nextn.load(folder, device=device, dtype=dtype)
    if model.tokenizer is None:
        raise DataError(f"{folder} has no tokenizer, so text cannot be read with it")
    recipe = read_recipe(folder / "recipe.json")
    changes = {"draft_length": draft_length, "num_rows": num_rows, "num_prompts": num_prompts}
    settings = replace(recipe.evaluation, **{key: value for key, value in changes.items() if value is not None})
    data_config = recipe.data if corpus is None else replace(recipe.data, corpus=corpus)
    data = prepare_data(data_config, model.tokenizer)
    rows = validation_rows(data.validation, data_config.sequence_length, settings.num_rows)
    forced = evaluate_teacher_forced(
        model,
        rows,
        data.validation.bytes_per_token,
        rows_per_forward=recipe.training.batch_size,
        isolate_documents=data_config.isolate_documents,
    )
    table = forced.to_table()
    probe = acceptance_probe(data.validation, settings)
    if probe is not None:
        table["decoding"] = probe(model)
    print_evaluation(Console(), table)
    if json is not None:
        provenance = collect(seed=0, device=device, corpus=data.provenance())
        write_json(json, {"evaluation": table, "settings": to_table(settings), "provenance": provenance})
