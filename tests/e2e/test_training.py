from __future__ import annotations

import io
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from nextn.config import Recipe
from nextn.data import PackedTokens
from nextn.errors import CheckpointError, ConfigError, DataError, DeviceError, DivergenceError
from nextn.files import list_checkpoints, read_json, read_tensors, write_json, write_tensors
from nextn.model.device import resolve_device
from nextn.mtp import MTPModel, load_model
from nextn.tables import from_table
from nextn.training import read_metrics, resolve_precision, trainer
from nextn.training.checkpoint import remove_old_checkpoints
from nextn.training.metrics import TIMING_FIELDS, MetricsWriter, keep_lines
from tests.e2e import tiny_run
from tests.e2e.tiny_run import RECIPE, recipe_with


def without_times(path: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in read_metrics(path)]


def first_step_gradients(run_folder: Path, micro_batch_size: int | None) -> dict[str, torch.Tensor]:
    """Gradients of the first optimizer step, before they are clipped, in float64."""
    recipe = recipe_with(model={"n_routed_experts": 0}, training={"micro_batch_size": micro_batch_size})
    model = MTPModel(recipe.model, recipe.mtp).initialize(0).double()
    run = tiny_run.trainer(run_folder, recipe, model=model)
    run.state.optimizer.step = lambda step, grad_norm: 0.0  # keep the gradients, take no step
    run.step()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_gradients_do_not_depend_on_the_micro_batch_size(tmp_path, micro_batch_size):
    whole = first_step_gradients(tmp_path, None)
    split = first_step_gradients(tmp_path, micro_batch_size)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_averaging_over_each_micro_batch_alone_is_caught(tmp_path, monkeypatch):
    whole = first_step_gradients(tmp_path, None)
    # The classic mistake: each micro-batch divides by its own labels, then micro-batches are averaged (6 rows, 2 each).
    monkeypatch.setattr(trainer, "BatchTotals", SimpleNamespace(of_counts=lambda *arguments: None))
    split = first_step_gradients(tmp_path, 2)
    errors = [(split[name] / 3 - gradient).abs().max() / gradient.abs().max() for name, gradient in whole.items()]
    assert max(errors) > 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_lowers_the_loss_of_every_depth(tmp_path, optimizer):
    recipe = recipe_with(
        optimizer={"name": optimizer}, training={"num_steps": 60, "evaluate_every": 30, "log_every": 7}
    )
    result = tiny_run.trainer(tmp_path, recipe).train()
    records = read_metrics(result.metrics)
    train = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train] == [1, 7, 14, 21, 28, 35, 42, 49, 56, 60]
    assert [record["step"] for record in records if record["kind"] == "evaluation"] == [30, 60]
    for first, last in zip(train[0]["loss_per_depth"], train[-1]["loss_per_depth"], strict=True):
        assert last < first - 0.5
    assert train[0]["loss"] == pytest.approx(
        train[0]["loss_per_depth"][0] + 0.15 * sum(train[0]["loss_per_depth"][1:]) + 1e-4 * train[0]["balance_loss"],
        rel=1e-5,
    )
    assert (result.num_steps, result.num_tokens) == (60, 60 * 6 * 24)
    assert set(train[-1]["expert_load_max_over_mean"]) == set(result.evaluation["expert_load"])
    assert min(train[-1]["expert_load_max_over_mean"].values()) >= 1
    assert all(sum(shares) == pytest.approx(1) for shares in result.evaluation["expert_load"].values())
    assert result.evaluation == records[-1]
    assert result.evaluation["loss_per_depth"][0] < math.log(tiny_run.VOCAB_SIZE)


def test_the_run_folder_holds_settings_provenance_metrics_and_the_last_checkpoints(tmp_path):
    run = tiny_run.trainer(tmp_path / "run", evaluate=lambda model: {"training": model.training})
    result = run.train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "provenance.json",
        "recipe.json",
    ]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000008", "step-00000012"]
    assert result.checkpoint == list_checkpoints(tmp_path / "run")[-1]
    for folder in (tmp_path / "run", result.checkpoint):
        assert from_table(Recipe, json.loads((folder / "recipe.json").read_text())) == RECIPE
        assert json.loads((folder / "provenance.json").read_text()) == {"made_by": "a test"}
    assert read_metrics(result.metrics)[-1]["decoding"] == {"training": False}
    assert not run.model.training
    loaded = load_model(result.checkpoint)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_a_depth_of_weight_zero_is_skipped_and_training_is_then_plain_next_token_training(tmp_path):
    def losses(name: str, num_depths: int, value: float) -> list[float]:
        table = {"mtp_lambda": from_table(type(RECIPE.objective.mtp_lambda), {"values": [value]})}
        recipe = recipe_with(mtp={"num_depths": num_depths}, objective=table)
        result = tiny_run.trainer(tmp_path / name, recipe).train()
        return [(r["loss"], r["loss_per_depth"][1:]) for r in read_metrics(result.metrics) if r["kind"] == "train"]

    plain, silenced = losses("plain", 0, 0.3), losses("silenced", 2, 0.0)
    assert [loss for loss, _ in plain] == [loss for loss, _ in silenced]
    assert {tuple(deeper) for _, deeper in silenced} == {(None, None)}
    assert [loss for loss, _ in losses("counted", 2, 0.3)] != [loss for loss, _ in plain]


def test_routing_biases_move_against_the_load_by_the_speed_asked_for(tmp_path):
    run = tiny_run.trainer(tmp_path)
    run.step()
    biases = [b for name, b in run.model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3  # one trunk layer, two MTP blocks
    for bias in biases:
        assert bias.abs().max().item() == pytest.approx(0.01)
        assert bias.sum().abs() <= 0.02 + 1e-6  # overloaded experts go down, underloaded ones up


@pytest.mark.parametrize("poisoned", ["loss", "gradient"])
def test_divergence_stops_with_a_message_and_leaves_weights_and_the_last_checkpoint(tmp_path, poisoned):
    run = tiny_run.trainer(tmp_path)
    take_step, weights = run.step, {}

    def step():
        if run.state.clock.step == 6:
            parameter = run.model.scheme.layers[0].eh_proj.weight
            if poisoned == "loss":
                parameter.data[0, 0] = float("nan")
            else:
                parameter.register_hook(lambda gradient: gradient * float("inf"))
            weights.update({name: p.detach().clone() for name, p in run.model.named_parameters()})
        return take_step()

    run.step = step
    with pytest.raises(DivergenceError) as caught:
        run.train()
    message = str(caught.value)
    assert "diverged at step 7" in message
    assert str(tmp_path / "checkpoints" / "step-00000004") in message
    assert ("the loss of depth 1 is nan" if poisoned == "loss" else "eh_proj.weight") in message
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), weights[name].nan_to_num()), name
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004"]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 6
    load_model(list_checkpoints(tmp_path)[0])


def test_a_resumed_run_must_have_the_same_settings_and_data(tmp_path):
    tiny_run.trainer(tmp_path).train()
    longer = recipe_with(training={"num_steps": 13, "seed": 1})
    with pytest.raises(
        ConfigError, match=r"num_steps: the run has 12, the recipe now has 13\n  training.seed"
    ) as caught:
        tiny_run.trainer(tmp_path, longer).train(resume=True)
    assert "learning-rate schedule depends on it" in str(caught.value)
    with pytest.raises(DataError, match="training tokens differ"):
        tiny_run.trainer(tmp_path, train_tokens=tiny_run.tokens(seed=9)).train(resume=True)


def test_a_folder_with_a_run_is_not_overwritten_and_an_empty_one_cannot_be_resumed(tmp_path):
    tiny_run.trainer(tmp_path).train()
    with pytest.raises(ConfigError, match="already holds a run; resume it"):
        tiny_run.trainer(tmp_path).train()
    with pytest.raises(CheckpointError, match="nothing to resume"):
        tiny_run.trainer(tmp_path / "other").train(resume=True)


def test_resuming_a_finished_run_does_nothing(tmp_path):
    finished = tiny_run.trainer(tmp_path).train()
    before = finished.metrics.read_text()
    again = tiny_run.trainer(tmp_path).train(resume=True)
    assert (again.checkpoint, again.evaluation) == (finished.checkpoint, finished.evaluation)
    assert finished.metrics.read_text() == before


@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign"])
def test_resuming_from_a_damaged_checkpoint_says_which_file(tmp_path, damage):
    newest = tiny_run.trainer(tmp_path).train().checkpoint
    file = newest / "training_state/tensors.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "missing":
        file.unlink()
    else:
        file.write_text("not tensors")
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors"):
        tiny_run.trainer(tmp_path).train(resume=True)


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(tmp_path):
    reference = tiny_run.trainer(tmp_path / "whole").train()
    shutil.copytree(tmp_path / "whole", tmp_path / "killed", ignore=shutil.ignore_patterns("checkpoints"))
    resumed = tiny_run.trainer(tmp_path / "killed").train(resume=True)
    assert without_times(resumed.metrics) == without_times(reference.metrics)


def test_metrics_are_cut_at_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    keep_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_leftovers_of_killed_writes_are_removed_with_the_old_checkpoints(tmp_path):
    for name in ("step-00000001", "step-00000002", "step-00000003", ".step-00000004.x1", ".removed-step-00000000"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert len(list_checkpoints(tmp_path)) == 3
    remove_old_checkpoints(tmp_path, keep=2)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000002", "step-00000003"]


def test_a_corpus_shorter_than_a_row_is_refused(tmp_path):
    whole = tiny_run.tokens()
    short = PackedTokens(whole.token_ids[:20], whole.document_ids[:20], 40)
    with pytest.raises(DataError, match="20 tokens"):
        tiny_run.trainer(tmp_path, train_tokens=short)


def test_unknown_and_absent_devices_are_named_with_what_is_here():
    with pytest.raises(DeviceError, match=r"unknown device 'tpu'.*this machine has: cpu"):
        resolve_device("tpu")
    with pytest.raises(DeviceError, match="device 'cuda:99' is not here: this machine has: cpu"):
        resolve_device("cuda:99")
    assert resolve_device("cpu") == torch.device("cpu")


def test_precision_says_why_it_was_chosen(monkeypatch):
    monkeypatch.setattr("nextn.training.hardware._multiplies_bfloat16", lambda device: False)
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu).name == "float32"
    assert "emulated" in resolve_precision("bfloat16", cpu).reason
    monkeypatch.setattr("nextn.training.hardware._multiplies_bfloat16", lambda device: True)
    assert resolve_precision("auto", cpu).name == "bfloat16"
    assert resolve_precision("float32", cpu).name == "float32"


def test_bfloat16_training_keeps_float32_weights_and_learns(tmp_path):
    recipe = recipe_with(training={"precision": "bfloat16", "num_steps": 30})
    run = tiny_run.trainer(tmp_path, recipe)
    records = read_metrics(run.train().metrics)
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert records[-2]["loss"] < records[0]["loss"] - 0.5


def test_compiling_without_a_compiler_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DeviceError, match=r"needs a C\+\+ compiler"):
        tiny_run.trainer(tmp_path, recipe_with(training={"compile": True}))


def test_tensorboard_without_its_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install tensorboard"):
        tiny_run.trainer(tmp_path, recipe_with(training={"tensorboard": True})).train()
    assert not (tmp_path / "recipe.json").exists(), "a run that cannot start leaves its folder free"


def test_tensorboard_receives_every_number_of_a_line_by_name(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    writer = MetricsWriter(tmp_path, 4, tensorboard=True)
    writer.write({"kind": "train", "step": 5, "loss": 2.5, "loss_per_depth": [1.0, None], "decoding": {}})
    writer.close()
    expected = [("train/loss", 2.5, 5), ("train/loss_per_depth/0", 1.0, 5)]
    assert written == [(str(tmp_path / "tensorboard"), 5), *expected, "closed"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_ends_with_the_last_step(tmp_path, is_terminal):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100)
    tiny_run.trainer(tmp_path, console=console).train()
    text = console.file.getvalue()
    assert "float32 (asked for)" in text
    assert "12/12" in text
    assert "tokens/s" in text
    assert ("step 12/12  loss" in text) is not is_terminal


@pytest.mark.parametrize("damage", ["no clock", "no moments", "recipe is a list", "broken metrics", "no metrics"])
def test_a_damaged_run_is_refused_and_named(tmp_path, damage):
    run = tiny_run.trainer(tmp_path)
    run.train()
    checkpoint = list_checkpoints(tmp_path)[-1]
    if damage == "no clock":
        table = read_json(checkpoint / "training_state/state.json")
        del table["clock"]
        write_json(checkpoint / "training_state/state.json", table)
    elif damage == "no moments":
        state = read_tensors(checkpoint / "training_state/tensors.safetensors")
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("optimizer/")}
        write_tensors(checkpoint / "training_state/tensors.safetensors", kept)
    elif damage == "recipe is a list":
        write_json(tmp_path / "recipe.json", [])
    elif damage == "broken metrics":
        (tmp_path / "metrics.jsonl").write_text("{\n")
    else:
        (tmp_path / "metrics.jsonl").unlink()
    named = {"no clock": "clock", "no moments": "training_state", "recipe is a list": "recipe"}
    with pytest.raises(CheckpointError, match=named.get(damage, "metrics")):
        tiny_run.trainer(tmp_path).train(resume=True)


def test_weights_that_became_infinite_are_never_saved(tmp_path):
    run = tiny_run.trainer(tmp_path)
    take_step = run.step

    def step():
        report = take_step()
        if run.state.clock.step == 8:
            run.model.trunk.lm_head.weight.data[0, 0] = float("inf")
        return report

    run.step = step
    with pytest.raises(DivergenceError, match="step-00000004"):
        run.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004"]
