"""`nextn evaluate`: losses, bits per byte and the three acceptance kinds of a checkpoint; or its scores in tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import nextn
from nextn.cli.console import messages, status
from nextn.cli.output import print_evaluation, print_task_scores
from nextn.config import Recipe
from nextn.data import validation_rows
from nextn.data.sources import is_path
from nextn.errors import ConfigError, DataError
from nextn.evaluation.free_running import acceptance_probe
from nextn.files import read_json, write_json
from nextn.mtp import check_scheme, find_checkpoint
from nextn.provenance import collect
from nextn.tables import to_table
from nextn.training import evaluate_teacher_forced, prepare_held_out, read_recipe
from nextn.wording import plural

USUAL_BATCH_SIZE = 8
"""Rows of a task scored at once."""


def evaluate(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run folder (its last checkpoint is taken).")],
    corpus: Annotated[
        str | None,
        typer.Option(help="Corpus to read, all of it. Default: the part held out of the one it was trained on."),
    ] = None,
    draft_length: Annotated[int | None, typer.Option(help="N, tokens drafted per cycle. Default: as trained.")] = None,
    num_rows: Annotated[int | None, typer.Option(help="Held-out rows read. Default: as trained.")] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Held-out prompts decoded. Default: as trained.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    json: Annotated[Path | None, typer.Option(help="Also write the figures and their provenance to this file.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead of held-out text: tasks of lm-evaluation-harness, separated by commas."),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="--tasks: a folder with more tasks' YAML files.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="--tasks: examples before each question. Default: the task's.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="--tasks: only the first so many questions; for trying out.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="--tasks: rows scored at once. Default: 8.")] = None,
) -> None:
    """Measure a checkpoint on held-out text, or in tasks of lm-evaluation-harness.

    Examples:

        nextn evaluate runs/python-stdlib

        nextn evaluate runs/python-stdlib --corpus my-project/ --draft-length 2 --json evaluation.json

        nextn evaluate runs/python-stdlib --tasks hellaswag,arc_easy --limit 100
    """
    if tasks is not None:
        _refuse("is about held-out text, which --tasks does not read", corpus=corpus, num_rows=num_rows,
                num_prompts=num_prompts)  # fmt: skip
        _evaluate_tasks(
            path,
            tasks,
            device,
            dtype,
            json,
            include_path=include_path,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=USUAL_BATCH_SIZE if batch_size is None else batch_size,
            draft_length=draft_length,
        )
        return
    _refuse("is about --tasks, which is not given", include_path=include_path, num_fewshot=num_fewshot, limit=limit,
            batch_size=batch_size)  # fmt: skip
    folder = find_checkpoint(path)
    model = nextn.load(folder, device=device, dtype=dtype)
    if model.tokenizer is None:
        raise DataError(f"{folder} has no tokenizer, so text cannot be read with it")
    recipe = _recipe(folder, corpus, model.trunk.max_position_embeddings)
    changes = {"draft_length": draft_length, "num_rows": num_rows, "num_prompts": num_prompts}
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
    console = messages()
    with status(console) as say:
        data = prepare_held_out(data_config, model.tokenizer, trained, say)
        console.print(data.held_out_summary())
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
        table = forced.to_table()
        if probe is not None:
            say(f"decoding {plural(settings.num_prompts, 'held-out prompt')}, greedy and sampled")
            table["decoding"] = probe(model)
    print_evaluation(Console(), table)
    if json is not None:
        provenance = collect(seed=0, device=device, corpus=data.provenance())
        write_json(json, {"evaluation": table, "settings": to_table(settings), "provenance": provenance})


def _recipe(folder: Path, corpus: str | None, context: int) -> Recipe:
    """What the checkpoint was trained with; where it does not say, and a corpus is named, default settings.

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


def _evaluate_tasks(
    path: Path,
    names: str,
    device: str,
    dtype: str,
    json: Path | None,
    *,
    include_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    batch_size: int,
    draft_length: int | None,
) -> None:
    """Run tasks of lm-evaluation-harness, which is imported only here."""
    from nextn.evaluation.tasks import TaskSelection, evaluate_tasks

    console = messages()
    selection = TaskSelection.find([name.strip() for name in names.split(",") if name.strip()], include_path)
    folder = find_checkpoint(path)
    model = nextn.load(folder, device=device, dtype=dtype)
    results = evaluate_tasks(
        model,
        folder,
        selection,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        draft_length=draft_length,
    )
    print_task_scores(Console(), results.scores)
    for kind, num_truncated in results.num_truncated.items():
        if num_truncated:
            console.print(
                f"{plural(num_truncated, kind + ' request')} did not fit into the model's context of "
                f"{model.trunk.max_position_embeddings} tokens and lost the left end"
            )
    if limit is not None:
        console.print(f"--limit {limit}: these scores are for trying out, not for reporting")
    if json is not None:
        provenance = collect(seed=0, device=device)
        provenance["libraries"] |= results.libraries
        settings = {
            "tasks": list(selection.names),
            "num_fewshot": num_fewshot,
            "limit": limit,
            "batch_size": batch_size,
            "device": device,
            "dtype": dtype,
        }
        write_json(json, {"tasks": results.to_table(), "settings": settings, "provenance": provenance})


def _refuse(reason: str, **options: object) -> None:
    """An option that would have no effect is an error."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {reason}; leave it out, or measure twice")
