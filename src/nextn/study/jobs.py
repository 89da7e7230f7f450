"""Runs a study's jobs: one process each, one after another, or side by side on listed devices."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from nextn.errors import ConfigError, StudyError
from nextn.files import make_folder, read_json
from nextn.study.plan import PlannedRun
from nextn.study.worker import DIVERGED, JobSpec, is_trained, write_spec
from nextn.training import read_metrics

POLL_S = 0.5
LOG, SPEC = "worker.log", "job.json"


@dataclass(frozen=True)
class Job:
    """One run to train and to evaluate, as far as that is not done.

    Attributes:
        run: what to train.
        spec: what the worker is told; its number of threads is filled in when it starts.
        predicted_s: seconds that training takes on a quiet machine, all its cores used.
    """

    run: PlannedRun
    spec: JobSpec
    predicted_s: float

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.spec.folder)

    def is_done(self) -> bool:
        """True iff nothing is left to do."""
        is_whole = is_trained(self.folder) and Path(self.spec.metrics).exists()
        return is_whole or self.divergence() is not None

    def divergence(self) -> str | None:
        """How its training failed, or that of its draft model; None: it did not."""
        for folder in (self.folder, Path(self.spec.draft_model or self.folder)):
            if (folder / DIVERGED).exists():
                return str(read_json(folder / DIVERGED)["message"])
        return None

    def share_done(self) -> float:
        """How much of the training is done, 0..1."""
        if is_trained(self.folder):
            return 1.0
        steps = [record["step"] for record in read_metrics(self.folder / "metrics.jsonl")[-1:]]
        return max(steps, default=0) / self.run.recipe.training.num_steps

    def is_ready(self) -> bool:
        """False while the model that is to draft for it is not trained."""
        return self.spec.draft_model is None or is_trained(Path(self.spec.draft_model))


class JobMonitor(Protocol):
    """Told how far the study is."""

    def update(self, running: Sequence[Job]) -> None:
        """Called every half second with the jobs that run now."""

    def finished(self, job: Job) -> None:
        """A job is done."""


class Worker:
    """A process that does one job, on one device."""

    def __init__(self, job: Job, device: str, num_threads: int | None) -> None:
        self.job, self.device = job, device
        make_folder(job.folder)
        write_spec(replace(job.spec, num_threads=num_threads), job.folder / SPEC)
        with (job.folder / LOG).open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nextn.study.worker", str(job.folder / SPEC)],
                stdin=subprocess.PIPE, stdout=log, stderr=log,
                env=os.environ | _environment(device, num_threads),
            )  # fmt: skip

    def stop(self) -> None:
        """End the process; what it has saved stays."""
        self.process.kill()
        self.process.wait()


def checked_devices(text: str) -> list[str]:
    """The devices of a comma-separated list.

    Raises:
        ConfigError: one of them is not auto, cpu, cuda or cuda:N, or they are of two kinds.

    >>> checked_devices("cuda:0, cuda:1")
    ['cuda:0', 'cuda:1']
    """
    devices = [device.strip() for device in text.split(",")]
    if wrong := [device for device in devices if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device)]:
        raise ConfigError(f"--devices takes auto, cpu, cuda or cuda:N, separated by commas, got {wrong[0]!r}")
    if len({device.partition(":")[0] for device in devices}) > 1:
        raise ConfigError(
            f"--devices {text}: runs that are compared must be trained on one kind of device; name CPUs or GPUs alone"
        )
    return devices


def run_jobs(jobs: Sequence[Job], devices: Sequence[str], monitor: JobMonitor) -> None:
    """Do all jobs that are not done; jobs of one run never at the same time.

    Args:
        jobs: in the order wanted.
        devices: where, one job at a time each; a device listed twice takes two, CPUs share their cores.
        monitor: told what happens.

    Raises:
        StudyError: a worker failed; the others are stopped, and what they have saved is gone on with next time.
    """
    waiting = [job for job in jobs if not job.is_done()]
    num_threads = _threads(devices)
    free, running = list(devices), list[Worker]()
    try:
        while waiting or running:
            while free and (job := _next_job(waiting, running)) is not None:
                waiting.remove(job)
                device = free.pop(0)
                running.append(Worker(job, device, num_threads if device == "cpu" else None))
            for worker in [worker for worker in running if worker.process.poll() is not None]:
                running.remove(worker)
                free.append(worker.device)
                if worker.process.returncode or not worker.job.is_done():
                    raise _failure(worker)
                monitor.finished(worker.job)
            monitor.update([worker.job for worker in running])
            if waiting and not running and _next_job(waiting, running) is None:
                raise StudyError(f"the run of {waiting[0].run.variant!r} waits for a draft model that no job trains")
            time.sleep(POLL_S)
    finally:
        for worker in running:
            worker.stop()


def _environment(device: str, num_threads: int | None) -> dict[str, str]:
    """What makes `training.device = "auto"` choose this device, so that a run's recipe does not depend on it.

    >>> _environment("cuda:1", None), _environment("cpu", 2)
    ({'CUDA_VISIBLE_DEVICES': '1'}, {'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '2'})
    """
    visible: dict[str, str] = {}
    if device == "cpu":
        visible = {"CUDA_VISIBLE_DEVICES": ""}
    elif device.startswith("cuda:"):
        index = int(device.removeprefix("cuda:"))
        allowed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        visible = {"CUDA_VISIBLE_DEVICES": allowed[index] if index < len(allowed) and allowed[index] else str(index)}
    return visible | ({} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)})


def _next_job(waiting: Sequence[Job], running: Sequence[Worker]) -> Job | None:
    busy = {worker.job.run.id for worker in running}
    return next((job for job in waiting if job.run.id not in busy and job.is_ready()), None)


def _threads(devices: Sequence[str]) -> int | None:
    """Threads of each of several CPU workers; None: one worker, which takes what torch takes."""
    num_workers = devices.count("cpu")
    if num_workers < 2:
        return None
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // num_workers)


def _failure(worker: Worker) -> StudyError:
    log = worker.job.folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    run = worker.job.run
    code = worker.process.returncode
    said = lines[-1].removeprefix("error: ") if lines and code > 0 else f"its process ended with code {code}"
    if code < 0:
        said = f"its process was ended by {signal.Signals(-code).name}; if that was for lack of memory, lower the batch"
    return StudyError(
        f"the run of {run.variant!r} with seed {run.seed} failed: {said} (all of it: {log}). Finished runs are kept: "
        "once the cause is mended, the same command goes on"
    )
