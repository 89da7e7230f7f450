"""Counters of acceptance: identities between the ratios, unequal drafts, merging."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextn.decoding.statistics import AcceptanceStatistics

DRAFT_LENGTH = 4

full_cycles = st.lists(st.integers(0, DRAFT_LENGTH).map(lambda accepted: (DRAFT_LENGTH, accepted)), min_size=1)
cycles = st.lists(
    st.integers(1, DRAFT_LENGTH).flatmap(lambda drafted: st.tuples(st.just(drafted), st.integers(0, drafted))),
    min_size=1,
)


def identities_hold(al: float, unconditional: tuple[float, ...], conditional: tuple[float, ...]) -> bool:
    product, products = 1.0, []
    for ratio in conditional:
        product = 0.0 if product == 0 else product * ratio  # after a depth never accepted, conditionals have no case
        products.append(product)
    return al == pytest.approx(1 + sum(unconditional)) and products == pytest.approx(list(unconditional))


@given(full_cycles)
def test_with_full_drafts_al_is_one_plus_the_sum_of_unconditional_which_is_the_product_of_conditional(pairs):
    stats = AcceptanceStatistics.of_cycles(DRAFT_LENGTH, pairs)
    al, unconditional = stats.mean_acceptance_length, stats.acceptance_unconditional
    assert identities_hold(al, unconditional, stats.acceptance_conditional)


def test_the_identity_fails_for_the_classic_definitions_without_bonus_or_with_the_wrong_denominator():
    stats = AcceptanceStatistics.of_cycles(2, [(2, 2), (2, 1), (2, 0)])
    al, unconditional = stats.mean_acceptance_length, stats.acceptance_unconditional
    assert identities_hold(al, unconditional, stats.acceptance_conditional)
    assert not identities_hold(al - 1, unconditional, stats.acceptance_conditional)
    assert not identities_hold(al, unconditional, conditional=unconditional)


@given(cycles)
def test_with_unequal_drafts_each_depth_counts_only_the_cycles_that_drafted_that_far(pairs):
    stats = AcceptanceStatistics.of_cycles(DRAFT_LENGTH, pairs)
    total = 1.0
    for k in range(1, DRAFT_LENGTH + 1):
        reached = [accepted for drafted, accepted in pairs if drafted >= k]
        came_so_far = [accepted for accepted in reached if accepted >= k - 1]
        accepted_k = sum(accepted >= k for accepted in reached)
        for ratio, cases in (
            (stats.acceptance_unconditional[k - 1], reached),
            (stats.acceptance_conditional[k - 1], came_so_far),
        ):
            assert ratio == accepted_k / len(cases) if cases else math.isnan(ratio)
        total += accepted_k / len(reached) * len(reached) / len(pairs) if reached else 0
    assert stats.mean_acceptance_length == pytest.approx(total)


@given(cycles)
def test_counts_are_those_of_the_cycles(pairs):
    stats = AcceptanceStatistics.of_cycles(DRAFT_LENGTH, pairs)
    assert stats.num_drafts == len(pairs) == sum(stats.histogram)
    assert stats.num_draft_tokens == sum(drafted for drafted, _ in pairs)
    assert stats.num_accepted_tokens == sum(accepted for _, accepted in pairs)
    assert stats.acceptance_rate == stats.num_accepted_tokens / stats.num_draft_tokens


@given(cycles, cycles)
def test_adding_statistics_equals_counting_all_cycles_together(first, second):
    of = AcceptanceStatistics.of_cycles
    assert of(DRAFT_LENGTH, first) + of(DRAFT_LENGTH, second) == of(DRAFT_LENGTH, first + second)
    assert of(DRAFT_LENGTH, first) + AcceptanceStatistics(DRAFT_LENGTH) == of(DRAFT_LENGTH, first)


def test_statistics_at_different_draft_lengths_do_not_add_up():
    with pytest.raises(ValueError, match="cannot add 2 and 3"):
        AcceptanceStatistics(2) + AcceptanceStatistics(3)


def test_plain_decoding_has_no_cycles_and_an_acceptance_length_of_one():
    stats = AcceptanceStatistics.of_cycles(0, [(0, 0), (0, 0)])
    assert (stats.num_drafts, stats.mean_acceptance_length, stats.histogram) == (0, 1.0, (0,))
    assert math.isnan(stats.acceptance_rate)


def test_a_cycle_cannot_accept_more_than_it_drafted_nor_draft_more_than_n():
    for pair in [(1, 2), (4, 0)]:
        with pytest.raises(ValueError):
            AcceptanceStatistics.of_cycles(3, [pair])
    with pytest.raises(ValueError):
        AcceptanceStatistics(3, {2: (1, 1)})


def test_the_table_is_json_with_n_beside_the_rates_and_none_for_ratios_without_cases():
    table = AcceptanceStatistics.of_cycles(2, [(1, 0)]).to_table()
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert table["draft_length"] == 2
    assert table["acceptance_unconditional"] == [0.0, None]
