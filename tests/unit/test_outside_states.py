"""Losses from hidden states that somebody else computed, and counts of labels that add up over parts of a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nextn.alignment import align_depths
from nextn.config import MTPConfig
from nextn.mtp import MTPModel, TrunkStates
from nextn.objective import BatchTotals, StepObjective, batch_totals, denominators, label_counts

from .test_mtp_laws import TINY, tokens
from .test_schemes import VARIANTS

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [-1] * 3])


def states_of(model: MTPModel, ids: Tensor) -> TrunkStates:
    """Computed as another trainer would, cut off from the trunk."""
    hidden = model.trunk.hidden_states(ids, model.trunk.context(ids.shape[1], DOCUMENTS)).detach().requires_grad_()
    return TrunkStates(hidden, model.trunk.final_norm(hidden))


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_of_outside_states_are_those_of_the_trunks_own_forward_bit_for_bit(variant: str, chunk_size: int | None):
    model = MTPModel(TINY, VARIANTS[variant]).initialize(seed=1).eval()
    ids, objective = tokens(2, 12), StepObjective((0.3,) * model.num_depths, chunk_size=chunk_size)
    own = model(ids, document_ids=DOCUMENTS, objective=objective)
    outside = model(ids, document_ids=DOCUMENTS, objective=objective, states=states_of(model, ids))
    assert torch.equal(outside.loss_per_depth, own.loss_per_depth)
    assert torch.equal(outside.loss.detach(), own.loss.detach())


def test_gradients_reach_the_states_that_were_given():
    model = MTPModel(TINY, MTPConfig(num_depths=2)).initialize(seed=1).train()
    ids = tokens(2, 12)
    hidden = model.trunk.hidden_states(ids, model.trunk.context(ids.shape[1], DOCUMENTS))
    outside = hidden.detach().requires_grad_()
    model(ids, document_ids=DOCUMENTS, states=TrunkStates(outside, model.trunk.final_norm(outside))).loss.backward()
    hidden.retain_grad()
    model(ids, document_ids=DOCUMENTS, states=TrunkStates(hidden, model.trunk.final_norm(hidden))).loss.backward()
    torch.testing.assert_close(outside.grad, hidden.grad)
    assert outside.grad.abs().sum() > 0


def test_states_of_other_tokens_would_be_noticed():
    model = MTPModel(TINY, MTPConfig(num_depths=2)).initialize(seed=1).eval()
    ids = tokens(2, 12)
    wrong = model(ids, document_ids=DOCUMENTS, states=states_of(model, ids.roll(1, dims=1)))
    assert not torch.equal(wrong.loss_per_depth, model(ids, document_ids=DOCUMENTS).loss_per_depth)


# ------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("kind", ["depth", "sequence"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 6])
def test_counts_of_parts_add_up_to_the_totals_of_the_whole(kind: str, weighted: bool, num_parts: int):
    ids = tokens(6, 12)
    documents = torch.arange(12).div(torch.tensor([[3], [4], [5], [6], [7], [12]]), rounding_mode="floor")
    weights = torch.rand(6, 12, generator=torch.Generator().manual_seed(0)) if weighted else None
    whole = batch_totals(kind, 3, ids, None, documents, weights)
    counts = torch.zeros(4, dtype=torch.float64)
    for rows in torch.arange(6).chunk(num_parts):
        part = None if weights is None else weights[rows]
        counts += label_counts(align_depths(ids[rows], 3, document_ids=documents[rows]), part)
    assert torch.equal(BatchTotals.of_counts(kind, counts, 6).denominators, whole.denominators)


def test_the_mean_of_denominators_is_another_number():
    ids, documents = tokens(2, 12), torch.tensor([[0] * 12, [0, 1, 2] * 4])
    parts = [
        denominators("depth", label_counts(align_depths(ids[i : i + 1], 2, document_ids=documents[i : i + 1])))
        for i in range(2)
    ]
    whole = batch_totals("depth", 2, ids, None, documents).denominators
    assert not torch.allclose(sum(parts) / 2, whole)
    assert not torch.allclose(sum(parts), whole), "a depth without labels in one part must not count as 1"


@pytest.mark.parametrize("depth", [0, 1, 2, 11, 12, 15])
def test_a_depth_knows_which_it_is_even_where_no_position_is_left(depth: int):
    aligned = align_depths(tokens(2, 12), 15)[depth]
    assert aligned.depth == depth
    assert aligned.num_positions == max(12 - depth, 0)
    assert aligned.at_labels(torch.ones(2, 12)).sum() == 2 * max(11 - depth, 0)
    assert aligned.documents(torch.zeros(2, 12, dtype=torch.int64)).shape == aligned.labels.shape


def test_alignment_that_is_handed_on_gives_the_same_losses_and_another_one_does_not():
    model = MTPModel(TINY, MTPConfig(num_depths=2)).initialize(seed=1).eval()
    ids = tokens(2, 12)
    aligned = align_depths(ids, 2, document_ids=DOCUMENTS)
    own = model(ids, document_ids=DOCUMENTS).loss_per_depth
    assert torch.equal(model(ids, document_ids=DOCUMENTS, alignment=aligned).loss_per_depth, own)
    shifted = [replace(one, labels=one.labels.roll(1, dims=1)) for one in aligned]
    assert not torch.equal(model(ids, document_ids=DOCUMENTS, alignment=shifted).loss_per_depth, own)
