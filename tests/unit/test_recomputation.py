"""Layers computed again in the backward pass: the same numbers bit for bit, counted once, with less kept."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nextn.alignment import PADDING_DOCUMENT
from nextn.model.balancing import ExpertUsage, update_routing_biases
from nextn.model.blocks import DecoderLayer
from nextn.mtp import MTPModel
from nextn.objective import StepObjective
from tests.e2e import tiny_run
from tests.e2e.tiny_run import recipe_with

from .test_mtp_laws import TINY, VARIANTS, tokens


@dataclass
class Step:
    """What one training step made of a fresh model, and what it took."""

    numbers: dict[str, Tensor]
    num_layer_runs: int
    num_bytes_kept: int


def training_step(monkeypatch: pytest.MonkeyPatch, variant: str, recompute: bool, chunk_size: int | None = 16) -> Step:
    """Forward, backward and balancing over packed documents with padding, in float32."""
    model = MTPModel(TINY, VARIANTS[variant]).initialize(seed=1).train()
    if recompute:
        model.recompute_layers()
    ids, documents = tokens(3, 20), (torch.arange(20)[None] > torch.tensor([[5], [11], [99]])).long()
    documents[2, 15:] = PADDING_DOCUMENT
    num_runs, kept = 0, {}
    run = DecoderLayer._run

    def counting_run(self, *arguments) -> Tensor:
        nonlocal num_runs
        num_runs += 1
        return run(self, *arguments)

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    objective = StepObjective((0.3, 0.2, 0.1), balance_alpha=0.1, chunk_size=chunk_size)
    with monkeypatch.context() as patch, saved_tensors_hooks(note, lambda tensor: tensor):
        patch.setattr(DecoderLayer, "_run", counting_run)
        out = model(ids, document_ids=documents, objective=objective)
        num_bytes_kept = sum(kept.values())
        out.loss.backward()
    update_routing_biases(model, out.expert_loads, 0.01)
    numbers = {"loss": out.loss.detach(), "losses": out.loss_per_depth, "balance": out.balance_loss}
    numbers |= {f"load of {name}": load for name, load in out.expert_loads.items()}
    numbers |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    numbers |= {name: buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")}
    return Step(numbers, num_runs, num_bytes_kept)


def check_same_numbers(ours: Step, expected: Step) -> None:
    assert ours.numbers.keys() == expected.numbers.keys()
    for name, tensor in expected.numbers.items():
        assert torch.equal(ours.numbers[name], tensor), f"{name} differs"


@pytest.mark.parametrize("chunk_size", [None, 16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputation_changes_no_bit_of_losses_gradients_loads_and_biases(monkeypatch, variant, chunk_size):
    plain = training_step(monkeypatch, variant, False, chunk_size)
    again = training_step(monkeypatch, variant, True, chunk_size)
    assert plain.numbers["balance"] > 0
    assert any(name.startswith("load") for name in plain.numbers)
    assert any(tensor.any() for name, tensor in plain.numbers.items() if name.endswith("correction_bias"))
    check_same_numbers(again, plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_runs_twice_and_keeps_only_its_input(monkeypatch: pytest.MonkeyPatch, variant: str):
    plain, again = training_step(monkeypatch, variant, False), training_step(monkeypatch, variant, True)
    mtp = VARIANTS[variant]
    num_runs = TINY.num_hidden_layers + (mtp.num_layers if mtp.scheme == "shared_module" else mtp.num_depths)
    assert (plain.num_layer_runs, again.num_layer_runs) == (num_runs, 2 * num_runs)
    assert again.num_bytes_kept < 0.5 * plain.num_bytes_kept


@torch.no_grad()
def test_without_gradients_nothing_runs_twice(monkeypatch: pytest.MonkeyPatch):
    model = MTPModel(TINY, VARIANTS["untied"]).initialize(seed=1).eval()
    expected = model(tokens(2, 9)).loss_per_depth
    model.recompute_layers()
    monkeypatch.setattr("nextn.model.blocks.checkpoint", None)  # calling it would fail
    assert torch.equal(model(tokens(2, 9)).loss_per_depth, expected)


def test_loads_that_add_up_when_a_layer_runs_again_are_caught(monkeypatch: pytest.MonkeyPatch):
    record = ExpertUsage.record

    def accumulating(self, layer, *routing) -> None:
        """Broken: one buffer per layer, into which every run adds."""
        total = self.loads.get(layer)
        record(self, layer, *routing)
        if total is not None:
            self.loads[layer] = total.add_(self.loads[layer])

    monkeypatch.setattr(ExpertUsage, "record", accumulating)
    plain, again = (training_step(monkeypatch, "untied", recompute) for recompute in (False, True))
    with pytest.raises(AssertionError, match=r"load of .* differs"):
        check_same_numbers(again, plain)


def test_a_layer_that_draws_other_numbers_when_it_runs_again_is_caught(monkeypatch: pytest.MonkeyPatch):
    run, scale = DecoderLayer._run, iter(torch.linspace(1.0, 1.1, 99))
    plain = training_step(monkeypatch, "untied", False)
    monkeypatch.setattr(DecoderLayer, "_run", lambda self, *arguments: run(self, *arguments) * next(scale))
    with pytest.raises(AssertionError, match="differs"):
        check_same_numbers(training_step(monkeypatch, "untied", True), plain)


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_trainer_that_recomputes_takes_the_same_steps(tmp_path, micro_batch_size: int | None):
    weights = []
    for recompute in (False, True):
        training = {"recompute": recompute, "micro_batch_size": micro_batch_size}
        run = tiny_run.trainer(tmp_path, recipe_with(training=training))
        reports = [run.step() for _ in range(3)]
        weights.append((reports, run.model.state_dict()))
    (plain_reports, plain), (reports, again) = weights
    assert reports == plain_reports
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())
