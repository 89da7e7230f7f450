"""Whole runs with a curriculum, importance and balancing: resumed, micro-batched, and their losses taken apart."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from nextn.config import CurriculumConfig, Recipe, ScheduleConfig
from nextn.files import list_checkpoints
from nextn.model.balancing import balance_loss
from nextn.model.moe import Router
from nextn.mtp import MTPModel, load_model
from nextn.training import Trainer, read_metrics
from nextn.training import trainer as trainer_module
from nextn.training.metrics import TIMING_FIELDS
from tests.e2e import tiny_run
from tests.e2e.tiny_run import recipe_with

ALPHA = 0.5
CURRICULUM = recipe_with(
    objective={
        "curriculum": CurriculumConfig("forward", boundaries=(3, 6)),
        "mtp_lambda": ScheduleConfig("linear", values=(0.5, 0.1), boundaries=(0, 10)),
        "importance": "inverse_frequency",
        "denominator": "sequence",
        "sequence_balance_alpha": ALPHA,
        "loss_chunk_size": 32,
    },
    training={"num_steps": 10, "checkpoint_every": 2, "evaluate_every": 5},
)


class KilledError(Exception):
    """Stands for the end of a process."""


class NumberTokenizer:
    """Tokens without text: all that importance asks for is how many there are."""

    vocab_size, eos_token_id = tiny_run.VOCAB_SIZE, 0

    def save(self, folder: Path) -> None:
        pass


def weighted_run(run_folder: Path, recipe: Recipe = CURRICULUM) -> Trainer:
    model = MTPModel(recipe.model, recipe.mtp).initialize(recipe.training.seed)
    model.tokenizer = NumberTokenizer()
    return tiny_run.trainer(run_folder, recipe, model=model)


def run_until_killed(run_folder: Path, num_steps: int, resume: bool) -> None:
    """Start or resume, and stop dead before step `num_steps`, counted from the start of the run."""
    run = weighted_run(run_folder)
    step = run.step

    def dying_step():
        if run.state.clock.step == num_steps:
            raise KilledError
        return step()

    run.step = dying_step
    with pytest.raises(KilledError):
        run.train(resume)


def lines(run_folder: Path) -> list[dict]:
    records = read_metrics(run_folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMING_FIELDS} for record in records]


def check_killed_run(tmp_path: Path, kills: tuple[int, ...]) -> None:
    """Metrics and final weights of a run that was killed and resumed are those of an uninterrupted one, bit for bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = weighted_run(whole).train().checkpoint
    for number, num_steps in enumerate(kills):
        run_until_killed(killed, num_steps, resume=number > 0)
    result = weighted_run(killed).train(resume=True).checkpoint
    assert lines(killed) == lines(whole), "the metrics differ"
    ours, theirs = load_model(result).state_dict(), load_model(expected).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items()), "the weights differ"


@pytest.mark.parametrize("kills", [(1,), (5,), (3, 7, 9)], ids=str)
def test_a_killed_run_with_a_curriculum_and_importance_equals_an_uninterrupted_one(tmp_path: Path, kills):
    check_killed_run(tmp_path, kills)
    weights = [record["depth_weights"] for record in lines(tmp_path / "whole") if record["kind"] == "train"]
    stages = [[weight > 0 for weight in step] for step in weights]
    assert stages == [[False, False]] * 3 + [[True, False]] * 3 + [[True, True]] * 4


def test_importance_changes_the_losses_of_the_depths_and_not_the_main_loss(tmp_path: Path):
    uniform = recipe_with(CURRICULUM, objective={"importance": "uniform"})
    weighted, plain = [], []
    for losses, recipe in ((weighted, CURRICULUM), (plain, uniform)):
        run = weighted_run(tmp_path, recipe)
        run.state.clock.step = 6  # from here on all depths are trained
        losses += run.step().loss_per_depth
    assert weighted[0] == plain[0]
    assert all(abs(a - b) > 1e-3 for a, b in zip(weighted[1:], plain[1:], strict=True))


def test_a_curriculum_that_starts_again_with_the_process_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    restored: list[int] = []
    restore, progress = trainer_module.restore, trainer_module.Progress

    def noting_restore(folder, state, *rest):
        restore(folder, state, *rest)
        restored.append(state.clock.step)

    def since_the_process_started(step, num_tokens, num_steps):
        return progress(step - (restored or [0])[-1], num_tokens, num_steps)

    monkeypatch.setattr(trainer_module, "restore", noting_restore)
    monkeypatch.setattr(trainer_module, "Progress", since_the_process_started)
    with pytest.raises(AssertionError, match="the metrics differ"):
        check_killed_run(tmp_path, (5,))


# ------------------------------------------------------------------------------------------------------ routing biases


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("speed", [0.01, 0.0])
def test_routing_biases_of_trunk_and_mtp_blocks_are_float32_in_the_checkpoint_and_frozen_at_speed_zero(
    tmp_path: Path, precision: str, speed: float
):
    training = {"num_steps": 3, "precision": precision, "bias_update_speed": speed}
    tiny_run.trainer(tmp_path, recipe_with(training=training)).train()
    tensors = load_file(list_checkpoints(tmp_path)[-1] / "model.safetensors")
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith("e_score_correction_bias")}
    assert sorted(biases) == [f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in (1, 2, 3)]
    for name, bias in biases.items():
        assert bias.dtype == torch.float32, name
        assert bool(bias.any()) == (speed > 0), name
        assert bias.abs().max() <= 3 * speed + 1e-7, name


# -------------------------------------------------------------------------------------------------------- balance loss


def balanced(run_folder: Path, micro_batch_size: int | None, alpha: float = ALPHA) -> Trainer:
    return tiny_run.trainer(
        run_folder,
        recipe_with(objective={"sequence_balance_alpha": alpha}, training={"micro_batch_size": micro_batch_size}),
    )


def balance_by_hand(run: Trainer) -> float:
    """Mean over rows, summed over layers with experts, of the balance loss of the first step; row by row."""
    batch = copy.deepcopy(run.state.sampler).next_batch()
    model, scores, total = copy.deepcopy(run.model).train(), [], 0.0
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _, __, out: scores.append(out.scores))
    for row in range(len(batch.input_ids)):
        scores.clear()
        documents = batch.document_ids[row : row + 1]
        with torch.no_grad():
            model(batch.input_ids[row : row + 1], document_ids=documents)
        assert len(scores) == 3
        for depth, of_depth in enumerate(scores):
            length = documents.shape[1] - depth
            inside = documents[:, :length] == documents[:, depth:]
            total += float(balance_loss(of_depth[None], 2, inside).sum())
    return total / len(batch.input_ids)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 4])
def test_the_balance_loss_is_in_the_total_with_its_factor_for_any_micro_batch_size(tmp_path, micro_batch_size):
    run = balanced(tmp_path, micro_batch_size)
    expected = balance_by_hand(run)
    report = run.step()
    assert report.balance_loss == pytest.approx(expected, rel=1e-5)
    terms = zip([1.0, *report.depth_weights], report.loss_per_depth, strict=True)
    weighted = sum(weight * loss for weight, loss in terms)
    assert report.loss == pytest.approx(weighted + ALPHA * report.balance_loss, rel=1e-6)
    assert report.loss != pytest.approx(weighted + report.balance_loss, rel=1e-3), "a lost factor must be noticed"


def test_alpha_zero_leaves_the_balance_loss_out_and_alpha_trains_the_routers(tmp_path: Path):
    without, with_balance = balanced(tmp_path, None, alpha=0.0), balanced(tmp_path, None)
    reports = [without.step(), with_balance.step()]
    assert reports[0].balance_loss == 0.0
    assert reports[0].loss_per_depth == reports[1].loss_per_depth
    for name, parameter in without.model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            assert not torch.equal(parameter.grad, with_balance.model.get_parameter(name).grad), name


def test_a_balance_loss_averaged_over_each_micro_batch_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = trainer_module.BatchTotals.of_counts

    def rows_of_a_micro_batch(denominator, counts, num_rows):
        return right(denominator, counts, num_rows=2)

    monkeypatch.setattr(trainer_module, "BatchTotals", SimpleNamespace(of_counts=rows_of_a_micro_batch))
    run = balanced(tmp_path, 2)
    expected = balance_by_hand(run)
    assert run.step().balance_loss != pytest.approx(expected, rel=1e-2)
