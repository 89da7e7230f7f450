"""transform and choose: the filters keep what they say, sampling follows the probabilities, rows are independent."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nextn.decoding.sampling import SamplingConfig, choose, draw_uniforms, row_generators, transform
from nextn.errors import GenerationError

LOGITS = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 3
FILTERS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("settings", FILTERS)
def test_transform_equals_the_logits_warpers_of_transformers(settings: dict[str, float]):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(settings["temperature"])])
    if "top_k" in settings:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        warpers.append(MinPLogitsWarper(settings["min_p"]))
    theirs = warpers(None, LOGITS.clone()).softmax(-1)
    torch.testing.assert_close(transform(LOGITS, SamplingConfig(**settings)), theirs, rtol=1e-5, atol=1e-7)


@given(
    logits=st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    temperature=st.floats(1e-30, 10),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(1e-6, 1),
    min_p=st.none() | st.floats(0, 1),
)
def test_transform_is_always_a_distribution_that_keeps_the_most_likely_token(logits, temperature, top_k, top_p, min_p):
    row = torch.tensor(logits)
    probs = transform(row, SamplingConfig(temperature, top_k, top_p, min_p))
    assert probs.dtype == torch.float32
    assert torch.isfinite(probs).all()
    assert (probs >= 0).all()
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)
    assert probs[row.argmax()] == probs.max()


def test_top_p_keeps_the_token_that_crosses_the_threshold_and_no_further_one():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    kept = [
        transform(logits, SamplingConfig(1.0, top_p=p)).count_nonzero().item() for p in (0.49, 0.51, 0.74, 0.76, 1.0)
    ]
    assert kept == [1, 2, 2, 3, 4]


def test_transform_works_on_any_leading_shape_and_in_bfloat16():
    config = SamplingConfig(temperature=0.8, top_k=7)
    together = transform(LOGITS.bfloat16().view(2, 3, 40), config).view(6, 40)
    assert torch.equal(together, torch.stack([transform(row, config) for row in LOGITS.bfloat16()]))


def test_temperature_zero_is_one_hot_and_the_limit_of_small_temperatures():
    greedy = transform(LOGITS, SamplingConfig())
    assert torch.equal(greedy, torch.nn.functional.one_hot(LOGITS.argmax(-1), 40).float())
    assert torch.equal(greedy, transform(LOGITS, SamplingConfig(temperature=1e-30)))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"seed": -1},
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value(settings: dict[str, float]):
    ((name, value),) = settings.items()
    with pytest.raises(GenerationError, match=f"{name} must .*{value}"):
        SamplingConfig(**settings)


def share_of_uniforms(probs: torch.Tensor, cells: int) -> list[float]:
    """Share of the unit interval that chooses each token, from the midpoints of equal cells."""
    midpoints = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    chosen = choose(probs.expand(cells, -1), midpoints)
    return (torch.bincount(chosen, minlength=probs.shape[-1]) / cells).tolist()


@given(weights=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
@settings(max_examples=50)
def test_choose_gives_each_token_exactly_its_share_of_the_unit_interval(weights: list[int]):
    total = sum(weights)
    shares = share_of_uniforms(torch.tensor(weights, dtype=torch.float32), total * 4)
    assert shares == pytest.approx([weight / total for weight in weights])


def test_choose_never_takes_a_token_of_probability_zero_at_either_end():
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    ends = (0.0, math.nextafter(1.0, 0.0))
    assert [choose(probs, torch.tensor([u], dtype=torch.float64)).item() for u in ends] == [1, 3]


def test_without_uniforms_choose_takes_the_most_likely_token():
    assert choose(torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]), None).tolist() == [1, 0]


def test_the_numbers_of_a_row_do_not_depend_on_its_batch():
    together = row_generators(5, [0, 1, 2])
    alone = [row_generators(5, [row])[0] for row in range(3)]
    for count in (1, 4, 2):
        expected = torch.cat([draw_uniforms([generator], count) for generator in alone])
        assert torch.equal(draw_uniforms(together, count), expected)


def test_seeds_and_rows_give_different_numbers():
    first = [draw_uniforms(row_generators(seed, [row]), 3) for seed in range(3) for row in range(3)]
    assert len({tuple(numbers.flatten().tolist()) for numbers in first}) == 9
