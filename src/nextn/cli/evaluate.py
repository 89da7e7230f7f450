"""`nextn evaluate`: losses, bits per byte and the three acceptance kinds of a checkpoint; or its scores in tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import nextn
from nextn.cli.console import messages, status
from nextn.cli.output import print_evaluation, print_task_scores
from nextn.errors import ConfigError
from nextn.evaluation.held_out import evaluate_held_out
from nextn.files import write_json
from nextn.mtp import find_checkpoint
from nextn.provenance import collect
from nextn.tables import to_table
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
        int | None, typer.Option(min=1, help="--tasks: only the first questions of each task, for a trial.")
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
        options = {
            "num_fewshot": num_fewshot,
            "limit": limit,
            "batch_size": USUAL_BATCH_SIZE if batch_size is None else batch_size,
        }
        _evaluate_tasks(path, tasks, include_path, json, device, dtype, draft_length=draft_length, **options)
        return
    _refuse("is about --tasks, which is not given", include_path=include_path, num_fewshot=num_fewshot, limit=limit,
            batch_size=batch_size)  # fmt: skip
    folder = find_checkpoint(path)
    model = nextn.load(folder, device=device, dtype=dtype)
    console = messages()
    with status(console) as say:
        found = evaluate_held_out(
            folder,
            model,
            corpus,
            say=say,
            note=console.print,
            draft_length=draft_length,
            num_rows=num_rows,
            num_prompts=num_prompts,
        )
    print_evaluation(Console(), found.figures)
    if json is not None:
        provenance = collect(seed=0, device=device, corpus=found.corpus)
        write_json(json, {"evaluation": found.figures, "settings": to_table(found.settings), "provenance": provenance})


def _evaluate_tasks(
    path: Path,
    names: str,
    include_path: Path | None,
    json: Path | None,
    device: str,
    dtype: str,
    *,
    draft_length: int | None,
    **options: Any,
) -> None:
    """Run tasks of lm-evaluation-harness, which is imported only here; `options` are the harness's."""
    from nextn.evaluation.tasks import TaskSelection, evaluate_tasks

    console = messages()
    selection = TaskSelection.find([name.strip() for name in names.split(",") if name.strip()], include_path)
    folder = find_checkpoint(path)
    model = nextn.load(folder, device=device, dtype=dtype)
    results = evaluate_tasks(model, folder, selection, draft_length=draft_length, **options)
    print_task_scores(Console(), results.scores)
    for kind, num_truncated in results.num_truncated.items():
        if num_truncated:
            console.print(
                f"{plural(num_truncated, kind + ' request')} did not fit into the model's context of "
                f"{model.trunk.max_position_embeddings} tokens and lost the left end"
            )
    if options["limit"] is not None:
        console.print(f"--limit {options['limit']}: these scores are for trying out, not for reporting")
    if json is not None:
        provenance = collect(seed=0, device=device)
        provenance["libraries"] |= results.libraries
        settings = {"tasks": list(selection.names), **options, "device": device, "dtype": dtype}
        write_json(json, {"tasks": results.to_table(), "settings": settings, "provenance": provenance})


def _refuse(reason: str, **options: object) -> None:
    """An option that would have no effect is an error."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {reason}; leave it out, or measure twice")
