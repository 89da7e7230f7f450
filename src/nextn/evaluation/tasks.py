"""Benchmark tasks of lm-evaluation-harness: finding them by name, running them on a checkpoint, their scores.

The harness (EleutherAI, `lm_eval`) owns tasks, prompts, metrics and standard errors; `nextn.evaluation.harness` is the
model it asks. Importing this module raises ConfigError where the harness is not installed.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextn.data.text_marks import TextMarks
from nextn.errors import ConfigError, DataError
from nextn.evaluation.harness import HarnessModel
from nextn.mtp import MTPModel

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

LIBRARIES = ("lm-eval", "datasets")
"""What the scores depend on beside nextn's own libraries."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, or of a group of tasks.

    Attributes:
        task: name of the task or group.
        version: of the task, as its author counts; None for a group without one.
        num_fewshot: examples before each question; None for a group whose tasks differ.
        num_documents: questions asked; None for a group without a count.
        metric: name, as in the harness.
        filter: what was done to the model's answers before, "none" for nothing.
        value: of the metric; None where it is not a finite number.
        stderr: its standard error over documents; None where the harness gives none.
        higher_is_better: None where the task does not say.
    """

    task: str
    version: str | None
    num_fewshot: int | None
    num_documents: int | None
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskResults:
    """What came out.

    Attributes:
        scores: in the harness's order.
        num_truncated: requests of each kind that lost tokens at the left, because they exceed the model's context.
        draft_length: N that text was generated with.
        libraries: versions of `LIBRARIES`.
    """

    scores: tuple[TaskScore, ...]
    num_truncated: Mapping[str, int]
    draft_length: int
    libraries: Mapping[str, str]

    def to_table(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TaskSelection:
    """Tasks that exist: their names, and the harness's index that knows them."""

    names: tuple[str, ...]
    manager: TaskManager

    @classmethod
    def find(cls, names: Sequence[str], include_path: Path | None = None) -> TaskSelection:
        """Look names up, before anything large is loaded.

        Args:
            names: of tasks, groups or tags; patterns such as `mmlu_*`; or paths of a task's YAML file.
            include_path: a folder with more tasks' YAML files; they hide the harness's own of the same name.

        Raises:
            ConfigError: no name is given.
            DataError: nothing has that name (near names are given), or the folder does not exist.
        """
        from lm_eval.tasks import TaskManager

        if not names:
            raise ConfigError("--tasks names no task; separate names by commas: --tasks hellaswag,arc_easy")
        if include_path is not None and not include_path.is_dir():
            raise DataError(f"--include-path {include_path} is no folder; it should hold YAML files of tasks")
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        found: dict[str, None] = {}
        for name in names:
            matches = [name] if Path(name).is_file() else manager.match_tasks([name])
            if not matches:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
                hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
                raise DataError(
                    f"unknown task {name!r}; {hint}lm-eval {version('lm-eval')} knows {len(manager.all_tasks)} names "
                    "(`lm_eval ls tasks` lists them), and --include-path adds a folder of your own"
                )
            found |= dict.fromkeys(matches)
        return cls(tuple(found), manager)


def evaluate_tasks(
    model: MTPModel,
    folder: Path,
    tasks: TaskSelection,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    draft_length: int | None = None,
) -> TaskResults:
    """Run tasks on a checkpoint, its main head alone; the model is left in evaluation mode.

    Args:
        model: with a tokenizer.
        folder: the checkpoint it was read from, for its tokenizer's special tokens.
        tasks: what to run.
        num_fewshot: examples before each question; None: as each task says. A task that says 0 keeps 0, as in the
            harness.
        limit: ask only the first so many documents of each task; a score is then for testing, not for reporting.
        batch_size: rows scored at once.
        draft_length: N, tokens drafted per cycle where tasks generate text; None: what `generate` takes.

    Raises:
        DataError: a task's data cannot be read, or a continuation cannot be scored.
        ConfigError: a task runs code that the model writes, or a task appears twice.
        GenerationError: a task asks for a decoding that nextn or the model's context does not allow, or the model
            cannot draft so many tokens.
    """
    from lm_eval import simple_evaluate  # type: ignore[import-untyped]

    if model.tokenizer is None:
        raise DataError(f"{folder} has no tokenizer; tasks are texts, and need one")
    adapter = HarnessModel(model, TextMarks.read(folder, model.tokenizer.eos_token_id), batch_size, draft_length)
    results = simple_evaluate(
        model=adapter,
        tasks=_load(tasks),
        task_manager=tasks.manager,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        log_samples=False,
    )
    libraries = {name: version(name) for name in LIBRARIES}
    return TaskResults(_scores(results), adapter.num_truncated, adapter.draft_length, libraries)


def _load(tasks: TaskSelection) -> list[Any]:
    """The harness's objects for these tasks, their data read. What goes wrong here is a task's file or its data."""
    loaded: list[Any] = []
    for name in tasks.names:
        try:
            built = tasks.manager.load(name)
        except Exception as error:
            raise DataError(
                f"task {name!r} cannot be loaded ({type(error).__name__}: {error}); its data come from a hub unless "
                "its YAML file names local ones (dataset_path: json, dataset_kwargs: data_files: ...), and relative "
                "paths there are looked for in the folder nextn is started in"
            ) from error
        for task_name, task in built["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(f"task {task_name!r} runs code that the model writes, and nextn does not run that")
        groups = list(built["groups"].values())
        loaded += groups[:1] or built["tasks"].values()  # a group comes before the groups inside it
    try:
        tasks.manager.load(loaded)
    except ValueError as error:
        raise ConfigError(f"--tasks: {error}; name the group or the task, not both") from None
    return loaded


def _scores(results: Mapping[str, Any]) -> tuple[TaskScore, ...]:
    """The harness's tables as one list. A metric's key there is "metric,filter", its error "metric_stderr,filter"."""
    scores = []
    for task, metrics in results["results"].items():
        version = results["versions"].get(task)
        for key, value in metrics.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            scores.append(
                TaskScore(
                    task=task,
                    version=None if version is None else str(version),
                    num_fewshot=results["n-shot"].get(task),
                    num_documents=results["n-samples"].get(task, {}).get("effective"),
                    metric=metric,
                    filter=filter_name,
                    value=_finite(value),
                    stderr=_finite(metrics.get(f"{metric}_stderr,{filter_name}")),
                    higher_is_better=results["higher_is_better"].get(task, {}).get(metric),
                )
            )
    return tuple(scores)


def _finite(value: Any) -> float | None:
    """A number as JSON can hold it; the harness writes "N/A" for an error it cannot estimate."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
