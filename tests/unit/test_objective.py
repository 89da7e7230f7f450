"""Losses against float64 brute force; what they are divided by."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextn.alignment import IGNORED
from nextn.objective import denominators, summed_cross_entropy, total_loss


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 6), st.integers(2, 9))
def test_summed_cross_entropy_is_the_textbook_sum(seed: int, rows: int, length: int, vocabulary: int):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(rows, length, vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.3] = IGNORED
    expected = 0.0
    for row in range(rows):
        for i in range(length):
            if labels[row, i] != IGNORED:
                scores = [math.exp(x) for x in logits[row, i].tolist()]
                expected -= math.log(scores[labels[row, i]] / sum(scores))
    assert summed_cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_depth_without_labels_is_zero_with_zero_gradients():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = summed_cross_entropy(logits, torch.full((2, 3), IGNORED))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()
    empty = summed_cross_entropy(torch.randn(2, 0, 5), torch.zeros(2, 0, dtype=torch.int64))
    assert empty.item() == 0.0


def test_depth_and_sequence_denominators():
    counts = torch.tensor([10, 7, 0])
    assert denominators("depth", counts).tolist() == [10, 7, 1]
    assert denominators("sequence", counts).tolist() == [10, 10, 10]


def test_weight_zero_leaves_the_main_loss_bit_for_bit():
    main = torch.tensor(1.2345678)
    assert total_loss(main, [None, torch.tensor(float("nan"))], [0.0, 0.0]) is main
