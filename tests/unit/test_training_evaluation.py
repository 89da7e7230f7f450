from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nextn.data import Batch, validation_rows
from nextn.errors import DataError
from nextn.mtp import MTPModel
from nextn.objective import HeadInput
from nextn.training import evaluate_teacher_forced, evaluation, loss_by_position
from nextn.training.evaluation import count_predictions
from tests.e2e.tiny_run import RECIPE, tokens

VOCAB_SIZE = 3  # few tokens, so that chance hits are frequent


def random_case(seed: int, num_depths: int, num_tokens: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Logits with random argmaxes, tokens, and packed documents."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(VOCAB_SIZE, (2, num_tokens), generator=generator)
    document_ids = (torch.rand(2, num_tokens, generator=generator) < 0.25).cumsum(1)
    logits = [torch.randn(2, num_tokens - k, VOCAB_SIZE, generator=generator) for k in range(num_depths + 1)]
    return logits, input_ids, document_ids


def counts_by_hand(logits: list[Tensor], input_ids: Tensor, document_ids: Tensor) -> list[tuple[int, int]]:
    """Position by position, straight from the table of depths: depth k at i predicts t[i+k+1], as the trunk at i+k."""
    counts = []
    num_rows, num_tokens = input_ids.shape
    for k, depth_logits in enumerate(logits):
        num_correct = num_agreeing = 0
        for row in range(num_rows):
            for i in range(num_tokens - k - 1):
                if len(set(document_ids[row, i : i + k + 2].tolist())) > 1:
                    continue
                choice = int(depth_logits[row, i].argmax())
                num_correct += choice == int(input_ids[row, i + k + 1])
                num_agreeing += choice == int(logits[0][row, i + k].argmax())
        counts.append((num_correct, num_agreeing))
    return counts


def as_pairs(logits: list[Tensor], input_ids: Tensor, document_ids: Tensor) -> list[tuple[int, int]]:
    head_inputs = [HeadInput(depth_logits, torch.eye(VOCAB_SIZE)) for depth_logits in logits]
    counts = count_predictions(head_inputs, input_ids, document_ids)
    return [(int(count.num_correct), int(count.num_agreeing)) for count in counts]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), num_depths=st.integers(0, 3), num_tokens=st.integers(4, 12))
def test_correct_and_agreeing_predictions_are_those_counted_by_hand(seed, num_depths, num_tokens):
    case = random_case(seed, num_depths, num_tokens)
    assert as_pairs(*case) == counts_by_hand(*case)


def test_agreement_with_the_trunk_at_the_same_position_instead_of_the_same_token_is_caught(monkeypatch):
    monkeypatch.setattr(evaluation, "of_same_token", lambda trunk, depth: trunk[:, : trunk.shape[1] - depth])
    case = random_case(0, 2, 12)
    assert as_pairs(*case) != counts_by_hand(*case)


def test_labels_across_documents_are_caught():
    logits, input_ids, document_ids = random_case(0, 2, 12)
    whole_rows = torch.zeros_like(document_ids)
    assert as_pairs(logits, input_ids, whole_rows) != counts_by_hand(logits, input_ids, document_ids)


def model_and_rows(num_rows: int = 5) -> tuple[MTPModel, Batch]:
    model = MTPModel(RECIPE.model, RECIPE.mtp).initialize(3)
    return model, validation_rows(tokens(seed=5), RECIPE.data.sequence_length, num_rows)


def test_evaluation_does_not_depend_on_the_rows_per_forward():
    model, rows = model_and_rows()
    whole = evaluate_teacher_forced(model, rows, 2.0)
    split = evaluate_teacher_forced(model, rows, 2.0, rows_per_forward=2)
    assert split.loss_per_depth == pytest.approx(whole.loss_per_depth, rel=1e-6)
    assert (split.main_agreement, split.num_labels) == (whole.main_agreement, whole.num_labels)
    assert split.teacher_forced_accuracy == whole.teacher_forced_accuracy


def test_depth_zero_is_the_mean_cross_entropy_of_the_next_token_and_bits_per_byte_follow():
    model, rows = model_and_rows()
    result = evaluate_teacher_forced(model, rows, bytes_per_token=2.5, isolate_documents=False)
    logits = model.trunk.output_head(model.trunk.final_norm(model.trunk.hidden_states(rows.input_ids)))
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows.input_ids[:, 1:].flatten()).item()
    assert result.loss_per_depth[0] == pytest.approx(expected, rel=1e-5)
    assert result.bits_per_byte_per_depth[0] == pytest.approx(expected / math.log(2) / 2.5, rel=1e-5)
    assert result.num_labels == (5 * 23, 5 * 22, 5 * 21)
    assert len(result.teacher_forced_accuracy) == 3
    assert len(result.main_agreement) == 2


def test_evaluation_leaves_the_mode_alone():
    model, rows = model_and_rows()
    for mode in (True, False):
        model.train(mode)
        evaluate_teacher_forced(model, rows, 1.0)
        assert model.training is mode


def test_rows_without_a_label_for_the_deepest_depth_are_refused():
    model, rows = model_and_rows(1)
    two_token_documents = Batch(rows.input_ids, torch.arange(rows.input_ids.shape[1]).unsqueeze(0) // 2)
    with pytest.raises(DataError, match=r"labels at depths 0\.\.2: documents are too short"):
        evaluate_teacher_forced(model, two_token_documents, 1.0)


# --------------------------------------------------------------------------------------------------------- by position


def rows_of_documents(seed: int, num_tokens: int = 24) -> Batch:
    """Rows of documents of all lengths; the first and the last of a row are cut by it."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(3, num_tokens, generator=generator) < 0.15
    ids = torch.randint(RECIPE.model.vocab_size, (3, num_tokens), generator=generator)
    return Batch(ids, 7 + begins.cumsum(1))


def losses_by_hand(model: MTPModel, rows: Batch, num_buckets: int, isolate: bool) -> list[list[float]]:
    """Label by label: each predicted from its context alone, cut out of the row, and filed by the context's length."""
    found: list[list[float]] = [[] for _ in range(num_buckets)]
    for ids, documents in zip(rows.input_ids, rows.document_ids, strict=True):
        for label in range(1, len(ids)):
            context = (documents[:label] == documents[label]) if isolate else torch.ones(label, dtype=torch.bool)
            if not context.any():
                continue  # a document's first token is nobody's label
            num_before = int(context.sum())
            logits = model(ids[None, label - num_before : label]).logits[0, -1]
            bucket = min(b for b in range(num_buckets) if num_before * num_buckets < (b + 1) * len(ids))
            found[bucket].append(F.cross_entropy(logits, ids[label]).item())
    return found


@torch.no_grad()
def check_by_position(seed: int, num_buckets: int, isolate: bool) -> None:
    model, rows = MTPModel(RECIPE.model, RECIPE.mtp).initialize(3).eval(), rows_of_documents(seed)
    losses, num_labels = loss_by_position(model, rows, num_buckets, isolate_documents=isolate)
    by_hand = losses_by_hand(model, rows, num_buckets, isolate)
    assert list(num_labels) == [len(nats) for nats in by_hand]
    assert losses == pytest.approx([sum(nats) / max(len(nats), 1) for nats in by_hand], rel=1e-4)


def check_sum(rows: Batch, num_buckets: int, isolate: bool, rows_per_forward: int | None = None) -> None:
    model = MTPModel(RECIPE.model, RECIPE.mtp).initialize(3)
    losses, num_labels = loss_by_position(
        model, rows, num_buckets, rows_per_forward=rows_per_forward, isolate_documents=isolate
    )
    whole = evaluate_teacher_forced(model, rows, 1.0, isolate_documents=isolate)
    assert sum(num_labels) == whole.num_labels[0]
    mean = sum(loss * count for loss, count in zip(losses, num_labels, strict=True)) / sum(num_labels)
    assert mean == pytest.approx(whole.loss_per_depth[0], rel=1e-6)


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("num_buckets", [3, 8])
def test_a_label_is_filed_by_the_tokens_of_its_own_document_before_it(num_buckets: int, isolate: bool):
    check_by_position(0, num_buckets, isolate)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_buckets=st.integers(1, 30),
    isolate=st.booleans(),
    rows_per_forward=st.sampled_from([None, 1, 2]),
)
def test_the_losses_of_all_positions_together_are_the_loss(seed, num_buckets, isolate, rows_per_forward):
    check_sum(rows_of_documents(seed), num_buckets, isolate, rows_per_forward)


def test_the_place_in_the_row_instead_of_the_place_in_the_document_is_caught(monkeypatch):
    right = evaluation._context_lengths
    monkeypatch.setattr(evaluation, "_context_lengths", lambda ids, documents: right(ids, None))
    with pytest.raises(AssertionError):
        check_by_position(0, 8, isolate=True)


def test_a_context_counted_at_the_position_instead_of_the_label_is_caught(monkeypatch):
    right = evaluation._context_lengths
    monkeypatch.setattr(evaluation, "_context_lengths", lambda ids, documents: right(ids, documents) - 1)
    with pytest.raises(AssertionError):
        check_by_position(0, 8, isolate=True)


def test_labels_that_are_not_counted_are_caught(monkeypatch):
    class WithoutTheLastRow(evaluation.LossByPosition):
        def __new__(cls, losses, num_labels):
            return super().__new__(cls, losses, (num_labels[0] - 1, *num_labels[1:]))

    monkeypatch.setattr(evaluation, "LossByPosition", WithoutTheLastRow)
    with pytest.raises(AssertionError):
        check_sum(rows_of_documents(0), 8, isolate=True)


def test_a_bucket_that_no_label_falls_into_has_a_count_of_zero():
    model, rows = model_and_rows()
    short = Batch(rows.input_ids, torch.arange(rows.input_ids.shape[1]).unsqueeze(0).expand_as(rows.input_ids) // 3)
    losses, num_labels = loss_by_position(model, short, 8)
    assert (losses[1:], num_labels) == ((0.0,) * 7, (5 * 16, *[0] * 7))
    for mode in (True, False):
        model.train(mode)
        loss_by_position(model, rows)
        assert model.training is mode
