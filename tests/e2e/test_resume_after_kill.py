"""A run killed with SIGKILL, at random moments and more than once, ends with the metrics of an uninterrupted one.

As a program (`python -m tests.e2e.test_resume_after_kill RUN_FOLDER`) this file trains the run, or goes on with it.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nextn.data import RowSampler
from nextn.files import list_checkpoints
from nextn.mtp import load_model
from nextn.training import Trainer, TrainingResult, read_metrics
from nextn.training.metrics import TIMING_FIELDS
from tests.e2e import tiny_run
from tests.e2e.tiny_run import recipe_with

RECIPE = recipe_with(training={"num_steps": 160, "evaluate_every": 7, "checkpoint_every": 5, "log_every": 2})
REPOSITORY = Path(__file__).parents[2]
NUM_KILLS = 2


def decode_with_randomness(model: object) -> dict[str, list[float]]:
    """Stands in for decoding, and moves torch's and Python's global random generators as careless callers would."""
    return {"drawn": [torch.rand(()).item(), random.random()]}


def run(run_folder: Path) -> Trainer:
    return tiny_run.trainer(run_folder, RECIPE, evaluate=decode_with_randomness)


def without_times(path: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in read_metrics(path)]


def train_until_killed(run_folder: Path, after_s: float) -> None:
    """Start or resume the run in a process of its own; SIGKILL it `after_s` after its first new checkpoint."""
    before = list_checkpoints(run_folder)
    command = [sys.executable, "-m", "tests.e2e.test_resume_after_kill", str(run_folder)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while list_checkpoints(run_folder) == before and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint within a minute"
        time.sleep(0.002)
    time.sleep(after_s)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -9, f"ended with {process.returncode} before it was killed: {errors.decode()}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> TrainingResult:
    return run(tmp_path_factory.mktemp("uninterrupted")).train()


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The folder of a run that was killed, resumed, and killed again."""
    run_folder = tmp_path_factory.mktemp("killed") / "run"
    for _ in range(NUM_KILLS):
        train_until_killed(run_folder, after_s=random.uniform(0, 0.4))
    return run_folder


def test_a_run_killed_at_random_moments_equals_an_uninterrupted_one_bit_for_bit(uninterrupted, killed, tmp_path):
    run_folder = shutil.copytree(killed, tmp_path / "run")
    assert 0 < read_metrics(run_folder / "metrics.jsonl")[-1]["step"] < RECIPE.training.num_steps
    resumed = run(run_folder).train(resume=True)
    assert without_times(resumed.metrics) == without_times(uninterrupted.metrics)
    assert [p.name for p in list_checkpoints(run_folder)] == ["step-00000155", "step-00000160"]
    assert sorted(p.name for p in (run_folder / "checkpoints").iterdir()) == ["step-00000155", "step-00000160"]
    expected = load_model(uninterrupted.checkpoint).state_dict()
    for name, tensor in load_model(resumed.checkpoint).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_every_checkpoint_seen_after_a_kill_is_complete(killed):
    for checkpoint in list_checkpoints(killed):
        load_model(checkpoint)
        assert (checkpoint / "training_state/state.json").exists()


@pytest.mark.parametrize("forgotten", ["place in the data", "random generators", "optimizer moments"])
def test_a_resume_that_forgets_part_of_the_state_is_caught(uninterrupted, killed, tmp_path, monkeypatch, forgotten):
    if forgotten == "place in the data":
        monkeypatch.setattr(RowSampler, "load_state_dict", lambda sampler, state: None)
    elif forgotten == "random generators":
        monkeypatch.setattr("nextn.training.checkpoint.RandomGenerators.load_state_dict", lambda self, state: None)
    else:
        monkeypatch.setattr("nextn.training.optimizer.TrainingOptimizer.load_state_dict", lambda self, state: None)
    resumed = run(shutil.copytree(killed, tmp_path / "run")).train(resume=True)
    assert without_times(resumed.metrics) != without_times(uninterrupted.metrics)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run(folder).train(resume=(folder / "recipe.json").exists())
