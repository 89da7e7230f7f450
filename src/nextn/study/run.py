"""Runs a study: plans its jobs, trains and evaluates what is missing, and compares."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nextn.config import DataConfig, Recipe
from nextn.errors import StudyError
from nextn.files import make_folder
from nextn.study.collect import collect_result
from nextn.study.definition import LoadedStudy, ModelEvaluationConfig
from nextn.study.jobs import Job, JobMonitor, run_jobs
from nextn.study.plan import PlannedRun, plan_runs
from nextn.study.results import StudyResult
from nextn.study.speeds import Speeds, measure_speeds
from nextn.study.worker import JobSpec
from nextn.tables import to_table
from nextn.training import PreparedData, fit_vocabulary, prepare_data

RUNS, SPEEDS, LOCK = "trained", "speeds.json", ".lock"
"""In a folder of studies: all runs by id, step times on this machine, and what keeps a second study out."""


@dataclass(frozen=True)
class StudyPlan:
    """All that a study will do.

    Attributes:
        loaded: the study.
        recipes: of its variants, vocabulary sizes filled in; first seed.
        jobs: one per run and way to evaluate it, in the order in which they are done.
        speeds: step times.
        corpora: facts of each variant's text, for the provenance.
    """

    loaded: LoadedStudy
    recipes: dict[str, Recipe]
    jobs: tuple[Job, ...]
    speeds: Speeds
    corpora: dict[str, Any]

    @property
    def missing(self) -> tuple[Job, ...]:
        """Jobs that are not done."""
        return tuple(job for job in self.jobs if not job.is_done())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else runs a study in this folder meanwhile. Raises StudyError if somebody does."""
    make_folder(folder)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(
                f"another study is running in {folder}; studies share runs, so wait for it, or name another folder "
                "with --out"
            ) from None
        yield


def plan_study(loaded: LoadedStudy, folder: Path, device: str, say: Callable[[str], None]) -> StudyPlan:
    """Read the texts, time the steps that have not been timed on this machine, and list the jobs.

    Args:
        loaded: the study.
        folder: of all studies, which share trained runs.
        device: where steps are timed.
        say: told what begins.

    Raises:
        DataError: a text cannot be read.
        ConfigError: a recipe does not fit its text.
    """
    prepared: dict[DataConfig, PreparedData] = {}

    def data_of(recipe: Recipe) -> PreparedData:
        if recipe.data not in prepared:
            prepared[recipe.data] = prepare_data(recipe.data, say)
        return prepared[recipe.data]

    recipes = {name: fit_vocabulary(recipe, data_of(recipe).tokenizer) for name, recipe in loaded.recipes.items()}
    speeds = measure_speeds(loaded.baseline.name, recipes, data_of, device, folder / SPEEDS, say)
    texts = {name: data_of(recipe).corpus for name, recipe in recipes.items()}
    runs = plan_runs(loaded, {name: text.sha256 for name, text in texts.items()})
    jobs = tuple(_job(run, runs, loaded, folder, speeds, recipes[run.variant]) for run in runs)
    corpora = {text.name: {"sha256": text.sha256, "num_files": len(text.files)} for text in texts.values()}
    return StudyPlan(loaded, recipes, jobs, speeds, corpora)


def run_study(plan: StudyPlan, devices: Sequence[str], monitor: JobMonitor) -> StudyResult:
    """Do what is missing and gather the result.

    Raises:
        StudyError: a run failed; what is done is kept.
    """
    run_jobs(plan.jobs, devices, monitor)
    return collect_result(plan.loaded, plan.recipes, plan.jobs, plan.speeds, plan.corpora)


def _job(
    run: PlannedRun,
    runs: Sequence[PlannedRun],
    loaded: LoadedStudy,
    folder: Path,
    speeds: Speeds,
    recipe: Recipe,
) -> Job:
    given = next(given for given in loaded.variants if given.name == run.variant)
    evaluation = _losses_only(loaded.study.evaluation) if run.ladder is not None else loaded.study.evaluation
    draft_model = None
    if given.draft_model and run.ladder is None:
        draft_id = next(other.id for other in runs if (other.variant, other.seed) == (given.draft_model, run.seed))
        draft_model = str(folder / RUNS / draft_id)
    run_folder = folder / RUNS / run.id
    metrics = run_folder / f"measures-{evaluation_id(evaluation, draft_model)}.json"
    spec = JobSpec(run.recipe, str(run_folder), str(metrics), evaluation, draft_model)
    return Job(run, spec, speeds.mean_step_s(run.variant, recipe) * run.recipe.training.num_steps)


def _losses_only(evaluation: ModelEvaluationConfig) -> ModelEvaluationConfig:
    """What is measured of a ladder's run."""
    return replace(evaluation, num_prompts=0, num_timed_prompts=0, num_completions=0, tasks=())


def evaluation_id(evaluation: ModelEvaluationConfig, draft_model: str | None) -> str:
    """8 hexadecimal digits that stand for what is measured, settings at their default left out."""
    usual = to_table(ModelEvaluationConfig())
    changed: dict[str, Any] = {key: value for key, value in to_table(evaluation).items() if value != usual[key]}
    if draft_model is not None:
        changed["draft_model"] = Path(draft_model).name
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
