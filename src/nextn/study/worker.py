"""Does one job in a process of its own: trains a run, or resumes its training, then evaluates it.

`python -m nextn.study.worker JOB.json` does the job of a `JobSpec`. It ends as soon as the process that
started it is gone: standard input is a pipe whose other end that process holds. So a killed study leaves nothing behind
that would write into its folders, and each run's peak memory is its own.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from nextn.config import Recipe
from nextn.errors import DivergenceError, NextnError
from nextn.files import list_checkpoints, read_json, write_json
from nextn.model.device import resolve_device
from nextn.mtp import load_model
from nextn.provenance import collect
from nextn.study.definition import ModelEvaluationConfig
from nextn.study.evaluate import evaluate_model
from nextn.study.plan import recipe_as_begun
from nextn.tables import from_table, to_table
from nextn.training import PreparedData, Trainer, fit_vocabulary, new_model, prepare_data

TRAINED, DIVERGED = "trained.json", "diverged.json"
"""In a run's folder once its training is over: what only the process that trained it could know, or how it failed."""


@dataclass(frozen=True)
class JobSpec:
    """What a worker is to do.

    Attributes:
        recipe: of the run.
        folder: of the run; a half-trained run in it is gone on with.
        metrics: file that the metrics go to.
        evaluation: what to evaluate.
        draft_model: folder of a trained run that drafts; None: MTP depths draft.
        num_threads: of torch on the CPU; None: torch's own choice.
    """

    recipe: Recipe
    folder: str
    metrics: str
    evaluation: ModelEvaluationConfig
    draft_model: str | None = None
    num_threads: int | None = None


def is_trained(folder: Path) -> bool:
    """True iff the run in a folder is complete."""
    return (folder / TRAINED).exists() and bool(list_checkpoints(folder))


def work(spec: JobSpec) -> None:
    """Train what is not trained yet, then evaluate what is not evaluated yet."""
    if spec.num_threads is not None:
        torch.set_num_threads(spec.num_threads)
    data = prepare_data(spec.recipe.data)
    folder = Path(spec.folder)
    recipe = recipe_as_begun(fit_vocabulary(spec.recipe, data.tokenizer), folder)
    if not is_trained(folder):
        try:
            _train(recipe, data, folder)
        except DivergenceError as error:
            write_json(folder / DIVERGED, {"message": str(error)})
            return
    if not Path(spec.metrics).exists():
        device = resolve_device(recipe.training.device)
        model = load_model(list_checkpoints(folder)[-1], device=str(device))
        draft_model = None
        if spec.draft_model is not None:
            draft_model = load_model(list_checkpoints(Path(spec.draft_model))[-1], device=str(device))
        measured = evaluate_model(model, data, recipe, spec.evaluation, draft_model=draft_model, say=_log)
        write_json(Path(spec.metrics), to_table(measured))


def _train(recipe: Recipe, data: PreparedData, folder: Path) -> None:
    device = resolve_device(recipe.training.device)
    trainer = Trainer(
        recipe,
        new_model(recipe, data.tokenizer),
        data.train,
        data.validation,
        folder,
        evaluate=None,
        provenance=collect(seed=recipe.training.seed, device=device, corpus=data.provenance()),
        console=Console(stderr=True, soft_wrap=True, highlight=False, markup=False),
    )
    trainer.train(resume=(folder / "recipe.json").exists())
    write_json(folder / TRAINED, {"peak_memory_bytes": _peak_memory_bytes(device)})
    shutil.rmtree(list_checkpoints(folder)[-1] / "training_state")  # only a resumed training needs it


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _peak_memory_bytes(device: torch.device) -> int:
    """Of this process so far: of the GPU it trained on, or of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux: the other figure begins at that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _end_with_parent() -> None:
    """End this process when standard input closes, which is when the process that started it is gone."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock would be held when the interpreter ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def read_spec(path: Path) -> JobSpec:
    """A job as `write_spec` wrote it."""
    return from_table(JobSpec, read_json(path))


def write_spec(spec: JobSpec, path: Path) -> None:
    """As JSON."""
    write_json(path, to_table(spec))


if __name__ == "__main__":
    _end_with_parent()
    try:
        work(read_spec(Path(sys.argv[1])))
    except NextnError as error:
        sys.exit(f"error: {error}")
