"""Losses against float64 brute force; weights and schedules at their boundaries."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextn.alignment import IGNORED
from nextn.config import ObjectiveConfig, ScheduleConfig
from nextn.errors import ConfigError
from nextn.objective import denominators, depth_weights, summed_cross_entropy, total_loss, value_at


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
    assert denominators(ObjectiveConfig(denominator="depth"), counts).tolist() == [10, 7, 1]
    assert denominators(ObjectiveConfig(denominator="sequence"), counts).tolist() == [10, 10, 10]


@given(st.integers(1, 8), st.floats(0.01, 2))
def test_identical_depths_do_not_scale_an_averaged_loss(num_depths: int, value: float):
    config = ObjectiveConfig(mtp_lambda=ScheduleConfig(values=(value,)))
    losses = [torch.tensor(2.0, dtype=torch.float64)] * num_depths
    total = total_loss(torch.tensor(1.0, dtype=torch.float64), losses, depth_weights(config, num_depths))
    assert total.item() == pytest.approx(1.0 + 2.0 * value)
    summed = ObjectiveConfig(mtp_lambda=ScheduleConfig(values=(value,)), average_over_depths=False)
    total = total_loss(torch.tensor(1.0, dtype=torch.float64), losses, depth_weights(summed, num_depths))
    assert total.item() == pytest.approx(1.0 + 2.0 * value * num_depths)


def test_decay_over_depths_is_geometric():
    config = ObjectiveConfig(mtp_lambda=ScheduleConfig(values=(1.0,)), average_over_depths=False, depth_decay=0.5)
    assert depth_weights(config, 3) == (1.0, 0.5, 0.25)


@pytest.mark.parametrize(("unit", "step", "tokens"), [("steps", 1, 0), ("tokens", 0, 1)])
def test_piecewise_changes_exactly_at_its_boundary(unit: str, step: int, tokens: int):
    schedule = ScheduleConfig("piecewise", values=(0.3, 0.2, 0.1), boundaries=(100, 200), unit=unit)
    seen = [value_at(schedule, at * step, at * tokens) for at in (0, 99, 100, 199, 200, 10**9)]
    assert seen == [0.3, 0.3, 0.2, 0.2, 0.1, 0.1]


@pytest.mark.parametrize(
    "settings_",
    [
        {"kind": "piecewise", "values": (0.3,), "boundaries": (5,)},
        {"kind": "constant", "values": (0.3, 0.1)},
        {"kind": "piecewise", "values": (0.3, 0.2, 0.1), "boundaries": (5, 5)},
    ],
)
def test_contradicting_schedules_are_refused(settings_):
    with pytest.raises(ConfigError, match="schedule"):
        ScheduleConfig(**settings_)


def test_weight_zero_leaves_the_main_loss_bit_for_bit():
    main = torch.tensor(1.2345678)
    assert total_loss(main, [None, torch.tensor(float("nan"))], [0.0, 0.0]) is main
