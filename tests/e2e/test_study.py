"""A study killed with SIGKILL and started again ends with the table of an uninterrupted one; an extended one reuses."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nextn.study.evaluate import TIMED
from nextn.study.results import StudyResult
from nextn.study.run import locked
from nextn.study.study_file import read_json

BASE = """
[model]
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 1
num_attention_heads = 2
n_routed_experts = 0
kv_lora_rank = 8
qk_nope_head_dim = 4
qk_rope_head_dim = 4
v_head_dim = 4

[mtp]
scheme = "shared_module"
num_depths = 2

[data]
corpus = "text"
sequence_length = 128

[optimizer]
num_warmup_steps = 2

[training]
num_steps = 24
batch_size = 4
evaluate_every = 8
checkpoint_every = 3
num_kept_checkpoints = 1

[evaluation]
num_rows = 4
num_prompts = 0
"""

STUDY = """
title = "A tiny study"
question = "Does it go on?"
base = "base-{scale}.toml"
baseline = "next token"
seeds = [0, 1]
ladder = [0.5]
target_losses = [5.0]

[[variants]]
name = "next token"
set.mtp.num_depths = 0

[[variants]]
name = "three tokens"

[evaluation]
num_rows = 8
num_prompts = 2
prompt_length = 16
max_new_tokens = 16
num_timed_prompts = 1
num_repeats = 1
num_completions = 4
completion_length = 24

[[claims]]
text = "Three tokens are better."
tests = [{ metric = "loss", variant = "three tokens", high = 0.0, against_baseline = true }]
"""

MORE_VARIANTS = """
[[variants]]
name = "two tokens"
set.mtp.num_depths = 1

[[variants]]
name = "its own draft model"
set.mtp.num_depths = 0
draft_model = "next token"
"""

DEPENDS_ON_THE_MACHINE = {*TIMED, "training_tok_per_s", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study, its base recipe and its text; studies run in it."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "base-cpu.toml").write_text(BASE)
    (folder / "tiny.toml").write_text(STUDY)
    (folder / "text").mkdir()
    for path in sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py")):
        shutil.copy(path, folder / "text" / path.name)
    return folder


def start(folder: Path, out: str, study: str = "tiny.toml") -> subprocess.Popen:
    command = [sys.executable, "-m", "nextn", "study", study, "--out", out, "--devices", "cpu,cpu"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(folder: Path, out: str, study: str = "tiny.toml") -> str:
    process = start(folder, out, study)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="module")
def uninterrupted(study_folder: Path) -> StudyResult:
    finish(study_folder, "uninterrupted")
    return read_json(study_folder / "uninterrupted" / "tiny-cpu" / "study.json")


def without_times(result: StudyResult) -> dict:
    """All that must be the same on the same machine: runs and their curves, metrics, differences."""
    runs = [
        replace(
            run,
            values={name: value for name, value in run.values.items() if name not in DEPENDS_ON_THE_MACHINE},
            curve=tuple(replace(point, training_s=0.0) for point in run.curve),
        )
        for run in result.runs
    ]
    timed = {*DEPENDS_ON_THE_MACHINE, "time_overhead", "effective_speedup", "loss_at_equal_time"}
    comparisons = [one for one in result.comparisons if one.metric not in timed]
    return {"runs": runs, "comparisons": comparisons, "claims": result.claims}


def num_checkpointed(folder: Path) -> int:
    return len(list(folder.glob("*/checkpoints/step-*")))


def test_a_study_killed_in_the_middle_and_started_again_ends_with_the_same_table(
    study_folder: Path, uninterrupted: StudyResult
):
    trained = study_folder / "killed" / "trained"
    process = start(study_folder, "killed")
    deadline = time.monotonic() + 120
    while num_checkpointed(trained) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9, "it ended before it was killed"
    time.sleep(2.0)  # its workers end by themselves ...
    left = {path: path.stat().st_mtime_ns for path in trained.rglob("metrics.jsonl")}
    time.sleep(1.0)
    assert left == {path: path.stat().st_mtime_ns for path in trained.rglob("metrics.jsonl")}, "... and write no more"
    assert len(list(trained.glob("*/trained.json"))) < 6, "all runs were done before the kill"

    finish(study_folder, "killed")
    resumed = read_json(study_folder / "killed" / "tiny-cpu" / "study.json")
    assert without_times(resumed) == without_times(uninterrupted)


@pytest.fixture(scope="module")
def longer(study_folder: Path, uninterrupted: StudyResult) -> StudyResult:
    """The study with two variants more, in the same folder."""
    (study_folder / "longer.toml").write_text(STUDY + MORE_VARIANTS)
    trained = study_folder / "uninterrupted" / "trained"
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("metrics.jsonl")}
    printed = finish(study_folder, "uninterrupted", "longer.toml")
    assert "4 runs to do" in printed, "two to train, and two to measure with a draft model"
    after = {path: path.stat().st_mtime_ns for path in trained.rglob("metrics.jsonl")}
    assert len(after) == len(before) + 2
    assert {path: after[path] for path in before} == before
    return read_json(study_folder / "uninterrupted" / "longer-cpu" / "study.json")


def test_an_extended_study_trains_the_new_runs_only(longer: StudyResult, uninterrupted: StudyResult):
    names = ["next token", "three tokens", "two tokens", "its own draft model"]
    assert [given.name for given in longer.variants] == names
    assert {run.id for run in uninterrupted.runs} < {run.id for run in longer.runs}


def test_a_model_that_drafts_for_itself_is_always_accepted_and_costs_twice_the_training(longer: StudyResult):
    plain, drafted = (
        [run for run in longer.runs if (run.variant, run.ladder) == (name, None)]
        for name in ("next token", "its own draft model")
    )
    for target, both in zip(plain, drafted, strict=True):
        assert both.id == target.id
        assert both.values["acceptance_greedy_1"] == 1.0
        assert both.values["loss"] == target.values["loss"]
        for name in ("training_flops", "num_parameters"):
            assert both.values[name] == 2 * target.values[name]


def test_a_study_writes_one_row_per_run_and_a_page_that_stands_alone(study_folder: Path, uninterrupted: StudyResult):
    folder = study_folder / "uninterrupted" / "tiny-cpu"
    with (folder / "study.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(uninterrupted.runs) == 6
    assert [float(row["loss"]) for row in rows] == [run.values["loss"] for run in uninterrupted.runs]
    page = (folder / "study.html").read_text()
    assert "Three tokens are better." in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_variant_that_cannot_be_trained_is_named_before_anything_is_trained(study_folder: Path):
    study = STUDY.replace('name = "three tokens"', 'name = "three tokens"\nset.optimizer.learning_rate = 1e30')
    (study_folder / "diverging.toml").write_text(study)
    process = start(study_folder, "diverging", "diverging.toml")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    said = " ".join(printed.split())
    assert "error: timing the steps of 'three tokens' failed: training diverged" in said
    assert "Traceback" not in printed


def test_a_second_study_in_the_same_folder_is_refused_while_one_runs(study_folder: Path):
    with locked(study_folder / "busy"):
        process = start(study_folder, "busy")
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "another study is running in busy" in printed


def test_a_run_that_diverges_is_left_out_and_said_so(study_folder: Path, longer: StudyResult):
    lost = next(run for run in longer.runs if (run.variant, run.seed) == ("two tokens", 1))
    message = study_folder / "uninterrupted" / "trained" / lost.id / "diverged.json"
    message.write_text(json.dumps({"message": "training diverged at step 7"}))
    try:
        finish(study_folder, "uninterrupted", "longer.toml")
        result = read_json(study_folder / "uninterrupted" / "longer-cpu" / "study.json")
    finally:
        message.unlink()
    assert [run for run in longer.runs if run not in result.runs] == [lost]
    assert "Left out: two tokens, seed 1: training diverged at step 7" in result.notes


def test_a_failing_run_is_named_with_its_cause_and_the_same_command_goes_on(study_folder: Path):
    study = STUDY.replace("completion_length = 24", "completion_length = 500")
    (study_folder / "failing.toml").write_text(study)
    process = start(study_folder, "uninterrupted", "failing.toml")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    said = " ".join(printed.split())
    assert re.search("error: the run of '.*' with seed [01] failed: evaluation.completion_length = 500", said)
    assert "the same command goes on" in said
    assert "Traceback" not in printed


def test_a_plan_trains_nothing(study_folder: Path):
    command = [sys.executable, "-m", "nextn", "study", "tiny.toml", "--out", "planned", "--plan"]
    printed = subprocess.run(command, cwd=study_folder, capture_output=True, text=True, check=True).stdout
    assert "6 runs to do" in printed
    assert not (study_folder / "planned" / "trained").exists()
    assert json.loads((study_folder / "planned" / "speeds.json").read_text())["pairs"], "step times are kept"
