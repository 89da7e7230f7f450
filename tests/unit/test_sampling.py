"""transform and choose: the filters keep what they say, sampling follows the probabilities, rows are independent."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.exc import Unsupported
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nextn.decoding.sampling import (
    SamplingConfig,
    choose,
    draw_uniforms,
    penalise,
    row_generators,
    seen_after,
    transform,
)
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
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.5},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": math.inf},
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value(settings: dict[str, float]):
    ((name, value),) = settings.items()
    with pytest.raises(GenerationError, match=f"{name} must .*{value}"):
        SamplingConfig(**settings)


SEEN_IDS = torch.randint(0, 40, (6, 9), generator=torch.Generator().manual_seed(1))
SEEN = torch.zeros(6, 40, dtype=torch.bool).scatter(1, SEEN_IDS, True)


def dividing_always(logits: torch.Tensor, seen: torch.Tensor, config: SamplingConfig) -> torch.Tensor:
    """Broken: divides whatever the sign, as the paper writes it."""
    return torch.where(seen, logits / config.repetition_penalty, logits)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_penalty_equals_that_of_transformers(penalty: float):
    config = SamplingConfig(repetition_penalty=penalty)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(SEEN_IDS, LOGITS.clone())
    torch.testing.assert_close(penalise(LOGITS, SEEN, config), theirs)
    assert not torch.allclose(dividing_always(LOGITS, SEEN, config), theirs)


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12),
    penalty=st.floats(0.125, 8, width=32),
    bits=st.integers(0, 4095),
)
def test_a_penalty_above_one_never_favours_a_seen_token_and_leaves_the_others(logits, penalty, bits):
    row = torch.tensor(logits)
    seen = torch.tensor([bool(bits >> place & 1) for place in range(len(logits))])
    penalised = penalise(row, seen, SamplingConfig(repetition_penalty=penalty))
    assert torch.equal(penalised[~seen], row[~seen])
    change = (penalised - row)[seen] * (1 if penalty <= 1 else -1)
    assert (change >= 0).all()


def test_the_penalty_falls_before_temperature_and_filters():
    config = SamplingConfig(temperature=0.7, top_k=5, repetition_penalty=1.5)
    theirs = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.5), TemperatureLogitsWarper(0.7), TopKLogitsWarper(5)]
    )(SEEN_IDS, LOGITS.clone())
    torch.testing.assert_close(transform(LOGITS, config, SEEN), theirs.softmax(-1), rtol=1e-5, atol=1e-7)
    filtered_first = penalise(
        LOGITS.masked_fill(transform(LOGITS, SamplingConfig(0.7, 5)) == 0, -math.inf), SEEN, config
    )
    assert not torch.allclose((filtered_first / 0.7).softmax(-1), theirs.softmax(-1), atol=1e-3)


def test_greedy_takes_the_most_likely_token_after_the_penalty():
    logits, seen = torch.tensor([2.0, 1.5, -1.0]), torch.tensor([True, False, False])
    assert transform(logits, SamplingConfig(repetition_penalty=2.0), seen).tolist() == [0.0, 1.0, 0.0]
    assert transform(logits, SamplingConfig(), seen).tolist() == [1.0, 0.0, 0.0]


def test_without_a_penalty_logits_stay_what_they_are_and_seen_may_be_missing():
    logits = LOGITS.bfloat16()
    assert penalise(logits, SEEN, SamplingConfig()) is logits
    config = SamplingConfig(temperature=0.8, top_p=0.9)
    assert torch.equal(transform(LOGITS, config), transform(LOGITS, config, SEEN))
    with pytest.raises(ValueError, match=r"repetition_penalty = 1\.2 needs seen"):
        transform(LOGITS, SamplingConfig(repetition_penalty=1.2))


def seen_one_place_early(seen: torch.Tensor, draft_ids: torch.Tensor) -> torch.Tensor:
    """Broken: draft j counts at its own place already."""
    return seen_after(seen, torch.cat((draft_ids, draft_ids[:, -1:]), dim=1))[:, 1:]


@given(seed=st.integers(0, 10_000), draft_length=st.integers(0, 4))
def test_what_is_seen_at_a_place_is_the_text_and_the_drafts_before_it(seed: int, draft_length: int):
    generator = torch.Generator().manual_seed(seed)
    seen = torch.rand(3, 9, generator=generator) < 0.2
    draft_ids = torch.randint(0, 9, (3, draft_length), generator=generator)
    result = seen_after(seen, draft_ids)
    assert (result.shape, result.dtype) == ((3, draft_length + 1, 9), torch.bool)
    for row in range(3):
        known = set(seen[row].nonzero().flatten().tolist())
        for place in range(draft_length + 1):
            expected = known | set(draft_ids[row, :place].tolist())
            assert set(result[row, place].nonzero().flatten().tolist()) == expected


def test_a_draft_that_counts_at_its_own_place_is_noticed():
    seen, draft_ids = torch.zeros(1, 4, dtype=torch.bool), torch.tensor([[0, 2]])
    assert not torch.equal(seen_one_place_early(seen, draft_ids), seen_after(seen, draft_ids))


def test_the_penalty_of_a_verified_draft_is_that_of_decoding_one_token_at_a_time():
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(3))
    config, draft_ids = SamplingConfig(temperature=1.0, repetition_penalty=1.4), torch.tensor([[1, 5, 1], [0, 8, 2]])
    seen = torch.zeros(2, 9, dtype=torch.bool).scatter(1, torch.tensor([[3, 4], [3, 0]]), True)
    together = transform(logits, config, seen_after(seen, draft_ids))
    for place in range(4):
        torch.testing.assert_close(together[:, place], transform(logits[:, place], config, seen))
        if place < 3:
            seen = seen.scatter(1, draft_ids[:, place : place + 1], True)


@pytest.mark.parametrize(
    "config",
    [SamplingConfig(), SamplingConfig(0.9, 12, 0.9, 0.05), SamplingConfig(0.9, repetition_penalty=1.2)],
    ids=["greedy", "filters", "penalty"],
)
def test_transform_compiles_into_one_graph(config: SamplingConfig):
    def last_place(logits: torch.Tensor, seen: torch.Tensor, draft_ids: torch.Tensor) -> torch.Tensor:
        return choose(transform(logits, config, seen_after(seen, draft_ids)[:, -1]), None)

    arguments = (LOGITS, SEEN, SEEN_IDS[:, :2])
    compiled = torch.compile(last_place, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), last_place(*arguments))


def test_a_branch_on_the_data_does_not_compile_into_one_graph():
    def broken(logits: torch.Tensor) -> torch.Tensor:
        return logits if logits.max() > 0 else -logits

    with pytest.raises(Unsupported):
        torch.compile(broken, backend="eager", fullgraph=True)(LOGITS)


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
