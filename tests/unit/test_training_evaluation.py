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
from nextn.training import evaluate_teacher_forced, evaluation
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
