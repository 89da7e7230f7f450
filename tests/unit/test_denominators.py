"""What every loss is divided by, against sums taken label by label, however labels, documents and rows fall."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextn.alignment import IGNORED, PADDING_DOCUMENT, DepthAlignment
from nextn.config import MTPConfig
from nextn.mtp import MTPModel
from nextn.objective import BatchTotals, StepObjective, batch_totals
from nextn.objective import summed_cross_entropy as right_cross_entropy

from .test_mtp_laws import TINY, tokens

DEPTH_WEIGHTS = (0.5, 0.25)


@dataclass(frozen=True)
class Case:
    """A global batch and how it is trained on."""

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor
    label_weights: Tensor | None
    denominator: str
    micro_batch_size: int
    chunk_size: int | None


def random_case(
    seed: int,
    num_rows: int,
    length: int,
    denominator: str,
    weighted: bool,
    micro_batch_size: int,
    chunk_size: int | None,
) -> Case:
    """Uneven masks: rows with nearly all labels and rows with hardly any, documents of any length, padding, zeros."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokens(num_rows, length, seed=seed)
    kept = torch.rand(num_rows, length, generator=generator) < torch.rand(num_rows, 1, generator=generator)
    starts = torch.rand(num_rows, length, generator=generator) < 0.2
    documents = starts.long().cumsum(1)
    num_tokens = torch.randint(1, length + 1, (num_rows, 1), generator=generator)
    documents[torch.arange(length)[None] >= num_tokens.clamp(min=length // 2)] = PADDING_DOCUMENT
    weights = 3 * torch.rand(num_rows, length, generator=generator)
    weights[torch.rand(num_rows, length, generator=generator) < 0.2] = 0
    return Case(
        ids,
        ids.masked_fill(~kept, IGNORED),
        documents,
        weights if weighted else None,
        denominator,
        micro_batch_size,
        chunk_size,
    )


@cache
def model() -> MTPModel:
    return MTPModel(TINY, MTPConfig("independent", num_depths=2)).initialize(seed=1).double()


def losses_by_hand(case: Case) -> tuple[float, list[float]]:
    """Total and L_0..L_2 in float64, label by label."""
    with torch.no_grad():
        logits = model().eval()(case.input_ids, document_ids=case.document_ids).logits_per_depth
    sums, counts = [0.0] * 3, [0.0] * 3
    num_rows, length = case.input_ids.shape
    for k, log_probs in enumerate(depth_logits.log_softmax(-1) for depth_logits in logits):
        for row in range(num_rows):
            for i in range(length - k - 1):
                label = int(case.labels[row, i + k + 1])
                documents = set(case.document_ids[row, i : i + k + 2].tolist())
                if label == IGNORED or len(documents) > 1 or documents == {PADDING_DOCUMENT}:
                    continue
                weight = 1.0 if case.label_weights is None or k == 0 else float(case.label_weights[row, i + k + 1])
                sums[k] -= weight * float(log_probs[row, i, label])
                counts[k] += weight
    if case.denominator == "sequence":
        counts = [counts[0]] * 3
    losses = [total / (count or 1.0) for total, count in zip(sums, counts, strict=True)]
    return losses[0] + sum(w * loss for w, loss in zip(DEPTH_WEIGHTS, losses[1:], strict=True)), losses


def losses_of(case: Case, totals_of=batch_totals) -> tuple[float, list[float]]:
    """The same from the model, summed over micro-batches."""
    objective = StepObjective(DEPTH_WEIGHTS, case.denominator, chunk_size=case.chunk_size)
    totals: BatchTotals = totals_of(
        case.denominator, 2, case.input_ids, case.labels, case.document_ids, case.label_weights
    )
    total, losses = 0.0, torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(case.input_ids), case.micro_batch_size):
        rows = slice(first, first + case.micro_batch_size)
        out = model().train()(
            case.input_ids[rows],
            case.labels[rows],
            case.document_ids[rows],
            label_weights=None if case.label_weights is None else case.label_weights[rows],
            objective=objective,
            totals=totals,
        )
        total += out.loss.item()
        losses += out.loss_per_depth
    return total, losses.tolist()


def check_by_hand(case: Case, totals_of=batch_totals) -> None:
    expected_total, expected = losses_by_hand(case)
    total, losses = losses_of(case, totals_of)
    assert losses == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert total == pytest.approx(expected_total, rel=1e-5, abs=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.integers(2, 12),
    st.sampled_from(["depth", "sequence"]),
    st.booleans(),
    st.integers(1, 4),
    st.sampled_from([None, 1, 5, 100]),
)
def test_losses_are_the_sums_by_hand_over_what_they_are_divided_by(
    seed, num_rows, length, denominator, weighted, micro_batch_size, chunk_size
):
    check_by_hand(random_case(seed, num_rows, length, denominator, weighted, micro_batch_size, chunk_size))


CHUNKS = pytest.mark.parametrize("chunk_size", [None, 5])
KINDS = pytest.mark.parametrize("denominator", ["depth", "sequence"])


@CHUNKS
@KINDS
def test_weights_of_other_tokens_than_the_labels_are_caught(monkeypatch, denominator, chunk_size):
    case = random_case(3, 4, 12, denominator, True, 2, chunk_size)
    check_by_hand(case)
    right = DepthAlignment.at_labels
    monkeypatch.setattr(DepthAlignment, "at_labels", lambda self, values: right(self, values.roll(1, dims=1)))
    with pytest.raises(AssertionError):
        check_by_hand(case)


@KINDS
def test_importance_applied_to_the_main_loss_is_caught(monkeypatch: pytest.MonkeyPatch, denominator: str):
    case = random_case(3, 4, 12, denominator, True, 4, None)
    next_weights = case.label_weights.roll(-1, dims=1)

    def weighing_the_main_loss_too(logits, labels, label_weights=None) -> Tensor:
        return right_cross_entropy(
            logits, labels, next_weights[:, : labels.shape[1]] if label_weights is None else label_weights
        )

    monkeypatch.setattr("nextn.mtp.model.summed_cross_entropy", weighing_the_main_loss_too)
    with pytest.raises(AssertionError):
        check_by_hand(case)


@CHUNKS
@KINDS
def test_denominators_of_a_micro_batch_or_of_plain_counts_are_caught(denominator: str, chunk_size: int | None):
    case = random_case(3, 4, 12, denominator, True, 2, chunk_size)

    def of_the_first_micro_batch(kind, num_depths, *tensors) -> BatchTotals:
        return batch_totals(kind, num_depths, *(tensor[:2] for tensor in tensors))

    def unweighted(kind, num_depths, input_ids, labels, document_ids, label_weights) -> BatchTotals:
        return batch_totals(kind, num_depths, input_ids, labels, document_ids)

    def of_the_other_kind(kind, *arguments) -> BatchTotals:
        return batch_totals("sequence" if kind == "depth" else "depth", *arguments)

    broken = [of_the_first_micro_batch, of_the_other_kind, *([unweighted] if denominator == "depth" else [])]
    for totals_of in broken:
        with pytest.raises(AssertionError):
            check_by_hand(case, totals_of)


def test_equal_weights_of_any_size_change_no_loss_divided_by_its_own_weights():
    case = random_case(5, 3, 12, "depth", True, 3, 5)
    equal = replace(case, label_weights=torch.full_like(case.label_weights, 0.7))
    assert losses_of(equal)[1] == pytest.approx(losses_of(replace(case, label_weights=None))[1], rel=1e-6)
    assert losses_of(case)[1][1:] != pytest.approx(losses_of(equal)[1][1:], rel=1e-3)
