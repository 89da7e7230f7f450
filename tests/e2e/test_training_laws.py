"""Laws of a training step as the trainer takes it: weights of depths, denominators, micro-batches, documents, rates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nextn.alignment import PADDING_DOCUMENT
from nextn.config import ScheduleConfig
from nextn.data import Batch, RowSampler, validation_rows
from nextn.model.balancing import update_routing_biases
from nextn.mtp import MTPModel
from nextn.objective import Progress
from nextn.training import Trainer, TrainingOptimizer, evaluate_teacher_forced, learning_rate_factor, read_metrics
from nextn.training import trainer as trainer_module
from tests.e2e import tiny_run
from tests.e2e.tiny_run import RECIPE, recipe_with

TOKENS_PER_STEP = RECIPE.training.batch_size * RECIPE.data.sequence_length
TOP_K = RECIPE.model.num_experts_per_tok
EXPERT_LAYERS = ("trunk.model.layers.1.mlp", "scheme.layers.0.block.mlp", "scheme.layers.1.block.mlp")
"""The layers with experts, by depth 0..2."""
QUIET = {"evaluate_every": 0, "checkpoint_every": 0}


def first_batch() -> Batch:
    """The rows that a run's first step reads."""
    return RowSampler(tiny_run.tokens(), RECIPE.data.sequence_length, RECIPE.training.batch_size, 0).next_batch()


# ------------------------------------------------------------------------------------------------ weights of the depths


def weights_by_step(run_folder: Path, schedule: ScheduleConfig) -> list[list[float]]:
    """`depth_weights` of the lines of steps 1..6 in metrics.jsonl."""
    objective = {"mtp_lambda": schedule, "depth_decay": 0.5, "average_over_depths": False}
    recipe = recipe_with(objective=objective, training={"num_steps": 6, **QUIET})
    lines = read_metrics(tiny_run.trainer(run_folder, recipe).train().metrics)
    lines = [line for line in lines if line["kind"] == "train"]
    assert [line["num_tokens"] for line in lines] == [TOKENS_PER_STEP * step for step in range(1, 7)]
    for line in lines:
        weighted = [w * loss for w, loss in zip([1.0, *line["depth_weights"]], line["loss_per_depth"], strict=True)]
        total = sum(weighted) + 1e-4 * line["balance_loss"]
        assert line["loss"] == pytest.approx(total, rel=1e-6), "the weights logged are those of the total"
    return [line["depth_weights"] for line in lines]


IN_STEPS = ScheduleConfig("piecewise", values=(0.4, 0.2, 0.1), boundaries=(3, 5), unit="steps")
IN_TOKENS = ScheduleConfig(
    "piecewise", values=(0.4, 0.2, 0.1), boundaries=(2 * TOKENS_PER_STEP, 3 * TOKENS_PER_STEP + 1), unit="tokens"
)


@pytest.mark.parametrize(
    ("schedule", "lambdas"),
    [
        (IN_STEPS, [0.4, 0.4, 0.4, 0.2, 0.2, 0.1]),  # the 4th step is the first with 3 steps behind it
        (IN_TOKENS, [0.4, 0.4, 0.2, 0.2, 0.1, 0.1]),  # the 3rd step is the first with 2 x 144 tokens behind it
    ],
    ids=["steps", "tokens"],
)
def test_a_piecewise_lambda_changes_at_the_step_it_names(tmp_path, schedule, lambdas):
    assert weights_by_step(tmp_path, schedule) == [[value, value * 0.5] for value in lambdas]


@pytest.mark.parametrize("schedule", [IN_STEPS, IN_TOKENS], ids=["steps", "tokens"])
def test_a_schedule_read_after_the_step_instead_of_before_it_is_noticed(tmp_path, monkeypatch, schedule):
    right = weights_by_step(tmp_path / "right", schedule)

    def one_step_late(step, num_tokens, num_steps):
        return Progress(step + 1, num_tokens + TOKENS_PER_STEP, num_steps)

    monkeypatch.setattr(trainer_module, "Progress", one_step_late)
    assert weights_by_step(tmp_path / "wrong", schedule) != right


# --------------------------------------------------------------------------------------------------------- denominators


def total_by_hand(model: MTPModel, batch: Batch, denominator: str) -> float:
    """main + sum over k of 0.15 * L_k, label by label."""
    with torch.no_grad():
        logits_per_depth = model.eval()(batch.input_ids, document_ids=batch.document_ids).logits_per_depth
    log_probs_per_depth = [logits.double().log_softmax(-1) for logits in logits_per_depth]
    num_rows, length = batch.input_ids.shape
    sums, counts = [0.0] * 3, [0] * 3
    for k, log_probs in enumerate(log_probs_per_depth):
        for row in range(num_rows):
            for i in range(length - k - 1):
                if batch.document_ids[row, i] == batch.document_ids[row, i + k + 1]:
                    sums[k] -= log_probs[row, i, batch.input_ids[row, i + k + 1]].item()
                    counts[k] += 1
    if denominator == "sequence":
        counts = [counts[0]] * 3
    losses = [total / count for total, count in zip(sums, counts, strict=True)]
    return losses[0] + 0.15 * (losses[1] + losses[2])


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize("denominator", ["depth", "sequence"])
def test_the_total_loss_is_the_hand_sum_under_either_denominator(tmp_path, denominator, micro_batch_size):
    objective = {"denominator": denominator, "sequence_balance_alpha": 0.0}
    recipe = recipe_with(objective=objective, training={"micro_batch_size": micro_batch_size})
    run = tiny_run.trainer(tmp_path, recipe)
    fresh = copy.deepcopy(run.model)
    loss = run.step().loss
    assert loss == pytest.approx(total_by_hand(fresh, first_batch(), denominator), rel=1e-5)
    other = "depth" if denominator == "sequence" else "sequence"
    assert loss != pytest.approx(total_by_hand(fresh, first_batch(), other), rel=1e-2), "the wrong one must be noticed"


# -------------------------------------------------------------------------------------------------------- micro-batches

# A large epsilon makes AdamW's first step a smooth function of the gradient, so that rounding stays rounding.
ONE_STEP = recipe_with(optimizer={"name": "adamw", "eps": 1e-2, "max_grad_norm": 0.0}, training={"num_steps": 3})


def one_step(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What one optimizer step logged and did: losses, gradients, weights after it, expert loads, routing biases."""
    loads = {}

    def recording_update(model, step_loads, speed):
        loads.update(step_loads)
        update_routing_biases(model, step_loads, speed)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "update_routing_biases", recording_update)
        report = run.step()
    return {
        "losses": torch.tensor([report.loss, *report.loss_per_depth]),
        "imbalance": report.expert_load_max_over_mean,
        "gradients": {name: parameter.grad.clone() for name, parameter in run.model.named_parameters()},
        "weights": {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()},
        "loads": loads,
        "biases": {
            name: run.model.get_buffer(f"{name}.gate.e_score_correction_bias").clone() for name in EXPERT_LAYERS
        },
    }


def micro_batched(run_folder: Path, micro_batch_size: int | None) -> Trainer:
    return tiny_run.trainer(run_folder, recipe_with(ONE_STEP, training={"micro_batch_size": micro_batch_size}))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_a_step_with_experts_does_not_depend_on_the_micro_batch_size(tmp_path, monkeypatch, micro_batch_size):
    whole = one_step(micro_batched(tmp_path, None), monkeypatch)
    split = one_step(micro_batched(tmp_path, micro_batch_size), monkeypatch)
    torch.testing.assert_close(split["losses"], whole["losses"], rtol=1e-5, atol=0)
    for name, gradient in whole["gradients"].items():
        torch.testing.assert_close(split["gradients"][name], gradient, rtol=1e-4, atol=2e-6, msg=f"gradient of {name}")
        weights = whole["weights"][name]
        torch.testing.assert_close(split["weights"][name], weights, rtol=1e-5, atol=2e-6, msg=f"weights {name}")
    assert split["loads"].keys() == whole["loads"].keys() == set(EXPERT_LAYERS)
    assert all(torch.equal(split["loads"][name], load) for name, load in whole["loads"].items())
    assert split["imbalance"] == whole["imbalance"]
    assert all(torch.equal(split["biases"][name], bias) for name, bias in whole["biases"].items())
    assert all(bias.any() for bias in whole["biases"].values())


def test_balancing_after_every_micro_batch_instead_of_every_step_is_noticed(tmp_path, monkeypatch):
    whole = one_step(micro_batched(tmp_path, None), monkeypatch)
    run = micro_batched(tmp_path, 2)
    run.model.register_forward_hook(lambda model, _, out: update_routing_biases(model, out.expert_loads, 0.01))
    split = one_step(run, monkeypatch)
    assert not all(torch.equal(split["biases"][name], bias) for name, bias in whole["biases"].items())


# ------------------------------------------------------------------------------------------------------------ documents


@pytest.mark.parametrize("isolate", [True, False])
def test_evaluation_and_training_isolate_documents_as_the_settings_say(tmp_path, isolate):
    recipe = recipe_with(data={"isolate_documents": isolate}, training={"num_steps": 3, **QUIET})
    run = tiny_run.trainer(tmp_path, recipe)
    fresh = copy.deepcopy(run.model)
    result = run.train()

    def losses(model: MTPModel, batch: Batch, isolated: bool) -> list[float]:
        with torch.no_grad():
            documents = batch.document_ids if isolated else None
            return model.eval()(batch.input_ids, document_ids=documents).loss_per_depth.tolist()

    first_losses = read_metrics(result.metrics)[0]["loss_per_depth"]
    assert first_losses == pytest.approx(losses(fresh, first_batch(), isolate), rel=1e-5)
    assert first_losses != pytest.approx(losses(fresh, first_batch(), not isolate), rel=1e-4)

    held_out, logged = tiny_run.tokens(20, seed=1), result.evaluation
    rows = validation_rows(held_out, recipe.data.sequence_length, recipe.evaluation.num_rows)
    assert logged["loss_per_depth"] == pytest.approx(losses(run.model, rows, isolate), rel=1e-5)
    assert logged["loss_per_depth"] != pytest.approx(losses(run.model, rows, not isolate), rel=1e-4)
    direct = evaluate_teacher_forced(run.model, rows, held_out.bytes_per_token, isolate_documents=isolate)
    for name, values in direct.to_table().items():
        assert logged[name] == pytest.approx(values, rel=1e-6), name


# ---------------------------------------------------------------------------------------------------------- expert load


def loads_of(model: MTPModel, input_ids: Tensor, document_ids: Tensor | None = None) -> dict[str, Tensor]:
    """Choices that fell on each expert in one training forward, by layer."""
    with torch.no_grad():
        loads = model.train()(input_ids, document_ids=document_ids).expert_loads
    assert loads.keys() == set(EXPERT_LAYERS)
    return loads


LENGTHS = (1, 2, 3, 7, 11)
"""Documents of one row; at depth k, one of L tokens has L - k positions, or none."""


def packed_documents(padding: int = 0) -> tuple[MTPModel, list[Tensor], Tensor, Tensor]:
    """A fresh model, documents of `LENGTHS`, and one row that packs them with `padding` padded places at its end."""
    model = MTPModel(RECIPE.model, RECIPE.mtp).initialize(0)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, tiny_run.VOCAB_SIZE, (1, length), generator=generator) for length in LENGTHS]
    owners = [torch.full((1, length), number) for number, length in enumerate(LENGTHS)]
    row = torch.cat([*documents, torch.zeros(1, padding, dtype=torch.int64)], dim=1)
    return model, documents, row, torch.cat([*owners, torch.full((1, padding), PADDING_DOCUMENT)], dim=1)


@pytest.mark.parametrize("padding", [0, 5])
def test_the_expert_loads_of_packed_documents_are_the_sums_of_those_of_separate_ones(padding):
    model, documents, row, document_ids = packed_documents(padding)
    together = loads_of(model, row, document_ids)
    apart = [loads_of(model, document) for document in documents]
    for depth, layer in enumerate(EXPERT_LAYERS):
        summed = torch.stack([loads[layer] for loads in apart]).sum(0)
        assert summed.sum() == TOP_K * sum(max(length - depth, 0) for length in LENGTHS)
        assert together[layer].tolist() == summed.tolist(), layer
    ignoring_documents = loads_of(model, row)
    for depth, layer in enumerate(EXPERT_LAYERS):
        num_counted = TOP_K * (row.shape[1] - depth)
        assert ignoring_documents[layer].sum() == num_counted
        assert (together[layer].sum() < num_counted) == (padding > 0 or depth > 0), "counting them must be noticed"


def test_the_expert_loads_do_not_change_with_the_content_of_padding():
    model, _, row, document_ids = packed_documents(padding=6)
    loads = loads_of(model, row, document_ids)
    for content in range(1, tiny_run.VOCAB_SIZE):
        other = row.masked_fill(document_ids == PADDING_DOCUMENT, content)
        changed = loads_of(model, other, document_ids)
        assert all(torch.equal(changed[layer], load) for layer, load in loads.items())


def test_a_row_of_padding_alone_moves_no_routing_bias():
    model, _, row, document_ids = packed_documents()
    loads = loads_of(model, row, torch.full_like(document_ids, PADDING_DOCUMENT))
    assert not any(load.any() for load in loads.values())


def test_the_loads_that_balance_a_step_count_the_positions_inside_documents(tmp_path, monkeypatch):
    loads = one_step(micro_batched(tmp_path, 4), monkeypatch)["loads"]
    documents = first_batch().document_ids
    length = documents.shape[1]
    inside = [int((documents[:, : length - depth] == documents[:, depth:]).sum()) for depth in range(3)]
    assert inside[0] > inside[1] > inside[2]
    assert [int(loads[layer].sum()) for layer in EXPERT_LAYERS] == [TOP_K * count for count in inside]


# ------------------------------------------------------------------------------------------------------- learning rates

RATES = recipe_with(
    optimizer={"name": "muon", "learning_rate": 0.01, "muon_learning_rate": 0.03, "schedule": "wsd"},
    training={"num_steps": 6, **QUIET},
)


def rates_by_step(run_folder: Path) -> tuple[list[set[float]], list[set[float]], list[float]]:
    """Rates of all groups at each of six steps, of AdamW and of Muon, and the rates logged."""
    used: dict[str, list[set[float]]] = {"AdamW": [], "BatchedMuon": []}

    def note_rates(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        used[type(optimizer).__name__].append({group["lr"] for group in optimizer.param_groups})

    handle = register_optimizer_step_pre_hook(note_rates)
    try:
        metrics = tiny_run.trainer(run_folder, RATES).train().metrics
    finally:
        handle.remove()
    logged = [line["learning_rate"] for line in read_metrics(metrics) if line["kind"] == "train"]
    return used["AdamW"], used["BatchedMuon"], logged


def expected_rates() -> tuple[list[set[float]], list[set[float]], list[float]]:
    factors = [learning_rate_factor(RATES.optimizer, step, 6) for step in range(6)]
    assert len({round(factor, 9) for factor in factors}) > 4, "a schedule that changes at almost every step"
    return [{0.01 * f} for f in factors], [{0.03 * f} for f in factors], [0.01 * f for f in factors]


def test_every_group_steps_at_its_own_peak_times_the_factor_of_the_step(tmp_path):
    assert rates_by_step(tmp_path) == expected_rates()


def test_muon_at_the_rate_of_adamw_is_noticed(tmp_path, monkeypatch):
    add = TrainingOptimizer._add
    monkeypatch.setattr(TrainingOptimizer, "_add", lambda self, *group: add(self, *group[:-1], 0.01))
    assert rates_by_step(tmp_path) != expected_rates()


def test_the_first_step_of_adamw_is_as_long_as_its_rate_and_that_of_matrices_scales_with_muons(tmp_path):
    def moves(name: str, **rates: float) -> dict[str, Tensor]:
        recipe = recipe_with(RATES, optimizer={"max_grad_norm": 0.0, "eps": 1e-12, **rates})
        run = tiny_run.trainer(tmp_path / name, recipe)
        before = {key: p.detach().double() for key, p in copy.deepcopy(run.model).named_parameters()}
        run.step()
        return {key: parameter.detach().double() - before[key] for key, parameter in run.model.named_parameters()}

    usual, twice = moves("usual"), moves("twice", muon_learning_rate=0.06)
    for name, move in usual.items():
        assert move.any(), name
        if "norm" in name:  # not decayed: Adam's first step is its rate in every direction, here warmed up by a third
            torch.testing.assert_close(move.abs(), torch.full_like(move, 0.01 / 3), rtol=1e-3, atol=1e-7)
        by_adamw = "norm" in name or name.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"))
        torch.testing.assert_close(twice[name], move * (1 if by_adamw else 2), rtol=1e-3, atol=1e-6, msg=name)
