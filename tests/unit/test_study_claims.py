"""Comparisons paired by seed, and the verdicts that follow from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextn.errors import ConfigError
from nextn.study.claims import CONFIRMED, NOT_RESOLVED, REFUTED, judge
from nextn.study.compare import compare, shown
from nextn.study.definition import Claim, Criterion
from nextn.study.intervals import estimate, excludes
from nextn.study.metrics import METRICS
from nextn.study.results import Comparison, CurvePoint, RunResult

PLAIN, FOUR = "next token", "4 tokens"
SCORE = "task/arithmetic/acc"  # higher is better, where a lower loss is


def runs_of(metric: str, **values: list[float]) -> list[RunResult]:
    """Runs of variants `a`, `b`, ..., one per value, of seeds 0, 1, ...; the first variant is the baseline."""
    return [
        RunResult("", variant, seed, None, (), {metric: value}, (), ())
        for variant, given_values in values.items()
        for seed, value in enumerate(given_values)
    ]


def compared(metric: str, **values: list[float]) -> tuple[Comparison, ...]:
    return compare(runs_of(metric, **values), next(iter(values)), range(9), {})


def verdict(comparisons: tuple[Comparison, ...], **test: object) -> str:
    return judge(Claim("", (Criterion(**test),)), comparisons, comparisons[0].variant).verdict


def measured(comparisons: tuple[Comparison, ...], **test: object) -> str:
    return judge(Claim("", (Criterion(**test),)), comparisons, comparisons[0].variant).tests[0].measured


# Comparisons


@given(st.lists(st.integers(-1000, 1000), min_size=3, max_size=5))
def test_an_effect_of_the_seed_that_all_variants_share_cancels(effects):
    gains = [0.03, 0.02, 0.025, 0.03, 0.02][: len(effects)]
    a = [1.5 + effect for effect in effects]
    b = [value - gain for value, gain in zip(a, gains, strict=True)]
    found = compared("loss", a=a, b=b)[1]
    assert found.resolved
    assert found.difference.mean == pytest.approx(-sum(gains) / len(gains))


def test_without_pairing_the_same_effect_would_hide_the_gain():
    a, b = [1.4, 1.5, 1.6], [1.38, 1.475, 1.58]
    means_apart = estimate(b).mean - estimate(a).mean
    half_width = estimate(a).high - estimate(a).mean
    assert compared("loss", a=a, b=b)[1].resolved
    assert abs(means_apart) < half_width, "the broken variant: the intervals overlap widely"


@given(st.permutations(range(3)))
def test_the_order_of_runs_within_a_variant_changes_nothing(order):
    runs = runs_of("loss", a=[1.5, 1.4, 1.6], b=[1.3, 1.3, 1.4])
    shuffled = [runs[i] for i in order] + [runs[3 + i] for i in reversed(order)]
    assert compare(shuffled, "a", (0, 1, 2), {}) == compare(runs, "a", (0, 1, 2), {})


@given(st.permutations(range(3)))
def test_the_order_of_seeds_orders_the_values_and_changes_no_estimate(order):
    runs = runs_of("loss", a=[1.5, 1.4, 1.6], b=[1.3, 1.3, 1.4])
    usual, found = compare(runs, "a", (0, 1, 2), {})[1], compare(runs, "a", order, {})[1]
    assert (found.value, found.difference, found.seeds) == (usual.value, usual.difference, tuple(order))
    assert found.values == tuple(usual.values[seed] for seed in order)


def test_variants_come_baseline_first_and_measures_in_their_order_with_depths_counted_as_numbers():
    values = {SCORE: 0.5, "acceptance_greedy_10": 0.1, "acceptance_greedy_2": 0.7, "loss": 1.4}
    runs = [RunResult("", name, 0, None, (), values, (), ()) for name in ("z", FOUR, PLAIN)]
    found = compare(runs, PLAIN, (0,), {"time_overhead": {FOUR: [0.1, 0.2]}})
    assert list(dict.fromkeys(comparison.variant for comparison in found)) == [PLAIN, "z", FOUR]
    metrics = [comparison.metric for comparison in found if comparison.variant == FOUR]
    assert metrics == ["loss", "acceptance_greedy_2", "acceptance_greedy_10", "time_overhead", SCORE]


def test_only_seeds_that_both_have_make_the_difference():
    found = compared("loss", a=[1.5, 1.6], b=[1.4, 1.5, 9.0])[1]
    assert (found.value.n, found.difference.n, found.difference.mean) == (3, 2, pytest.approx(-0.1))


def test_there_is_nothing_to_compare_for_the_baseline_and_for_what_it_lacks():
    plain, four = compare(
        [
            RunResult("", PLAIN, 0, None, (), {"loss": 1.4}, (), ()),
            RunResult("", FOUR, 0, None, (), {"al_greedy": 2.0}, (), ()),
        ],
        PLAIN,
        (0,),
        {},
    )
    assert (plain.difference, plain.resolved, four.difference, four.resolved) == (None, None, None, None)


def test_overheads_are_compared_with_zero_and_belong_to_no_seed():
    runs = runs_of("loss", a=[1.5], b=[1.4])
    plain, found = (c for c in compare(runs, "a", (0,), {"time_overhead": {"b": [0.2, 0.21]}}) if c.metric != "loss")
    assert (plain.values, plain.resolved) == ((0.0, 0.0), None)
    assert (found.seeds, found.values, found.difference, found.resolved) == ((), (0.2, 0.21), None, True)


def of_length(variant: str, seed: int, steps: int, loss: float, ladder: float | None = None) -> RunResult:
    end = CurvePoint(steps, 0, 1e9 * steps, 0.5 * steps, loss)
    return RunResult("", variant, seed, ladder, (end,), {"loss": loss}, (), ())


def laddered(final_losses: list[float]) -> tuple[Comparison, ...]:
    """4 tokens beside a baseline of 200 steps and loss 2, which gains 0.3 with every doubling."""
    runs = []
    for seed, loss in enumerate(final_losses):
        runs += [of_length(PLAIN, seed, 200, 2.0), of_length(FOUR, seed, 200, loss)]
        runs += [of_length(PLAIN, seed, 100, 2.3, 0.5), of_length(PLAIN, seed, 400, 1.7, 2.0)]
    return compare(runs, PLAIN, range(len(final_losses)), {})


def test_ratios_against_the_ladder_are_resolved_away_from_one_not_from_zero():
    level = {c.metric: c for c in laddered([2.01, 1.99, 2.0]) if c.variant == FOUR}
    better = {c.metric: c for c in laddered([1.71, 1.69, 1.7]) if c.variant == FOUR}
    assert excludes(level["steps_ratio"].value, 0)
    for name in ("steps_ratio", "flops_ratio", "effective_speedup", "loss_at_equal_flops", "loss_at_equal_time"):
        assert (level[name].resolved, better[name].resolved) == (False, True)
    assert better["effective_speedup"].value.mean == pytest.approx(2, rel=0.01)
    assert better["loss_at_equal_time"].value.mean == pytest.approx(-0.3)


def test_the_baseline_equals_itself_even_where_its_ladder_is_noise_and_its_own_run_is_what_is_shown():
    runs = [of_length(PLAIN, 0, 200, 2.0), of_length(PLAIN, 0, 100, 1.9, 0.5), of_length(PLAIN, 0, 400, 2.1, 2.0)]
    found = {comparison.metric: comparison.values for comparison in compare(runs, PLAIN, (0,), {})}
    assert (found["loss"], found["steps_ratio"], found["loss_at_equal_flops"]) == ((2.0,), (1.0,), (0.0,))


# Verdicts on bounds


def test_a_bound_is_confirmed_on_its_side_refuted_on_the_other_and_open_across_it():
    found = compared("loss", a=[1.5, 1.5, 1.5], b=[1.39, 1.40, 1.41])
    assert verdict(found, metric="loss", variant="b", high=1.45) == CONFIRMED
    assert verdict(found, metric="loss", variant="b", high=1.30) == REFUTED
    assert verdict(found, metric="loss", variant="b", high=1.405) == NOT_RESOLVED
    assert verdict(found, metric="loss", variant="b", low=1.3, high=1.45) == CONFIRMED
    assert verdict(found, metric="loss", variant="b", high=-0.05, against_baseline=True) == CONFIRMED
    assert verdict(found, metric="loss", variant="b", low=0, against_baseline=True) == REFUTED


def test_a_measure_that_is_a_comparison_already_may_be_bounded_against_the_baseline():
    found = laddered([1.71, 1.69, 1.7])
    assert verdict(found, metric="steps_ratio", variant=FOUR, high=0.6, against_baseline=True) == CONFIRMED


bounds = st.one_of(st.none(), st.floats(-2, 2))


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=5), bounds, bounds)
def test_turning_values_and_bounds_round_keeps_the_verdict(values, low, high):
    if low is None and high is None:
        return
    usual = compared("loss", a=values)
    turned = compared("loss", a=[-value for value in values])
    negative_low, negative_high = (None if bound is None else -bound for bound in (high, low))
    assert verdict(usual, metric="loss", variant="a", low=low, high=high) == verdict(
        turned, metric="loss", variant="a", low=negative_low, high=negative_high
    )


def test_one_seed_resolves_nothing():
    found = compared("loss", a=[1.5], b=[0.1])
    assert verdict(found, metric="loss", variant="b", high=1.0) == NOT_RESOLVED
    assert verdict(found, metric="loss", best="b") == NOT_RESOLVED
    assert measured(found, metric="loss", variant="b", high=1.0) == "0.100, n = 1"


def test_seeds_beyond_the_ladder_leave_a_claim_open_because_the_others_are_no_fair_sample():
    found = laddered([1.71, 1.69, 0.2])
    assert verdict(found, metric="steps_ratio", variant=FOUR, high=0.9) == NOT_RESOLVED
    assert measured(found, metric="steps_ratio", variant=FOUR, high=0.9) == "0.50x, n = 2 of 3"
    assert verdict(found, metric="steps_ratio", best=PLAIN) == NOT_RESOLVED


# Verdicts on the best


losses = st.lists(st.floats(0, 4), min_size=3, max_size=3)


@given(losses, losses, losses)
def test_the_verdict_is_the_same_when_the_measure_is_turned_round(a, b, c):
    lower = compared("loss", a=a, b=b, c=c)
    higher = compared(SCORE, a=[-v for v in a], b=[-v for v in b], c=[-v for v in c])
    assert verdict(lower, metric="loss", best="b") == verdict(higher, metric=SCORE, best="b")


@given(losses, losses)
def test_of_two_variants_at_most_one_is_confirmed_best_and_then_the_other_is_refuted(a, b):
    found = compared("loss", a=a, b=b)
    opposite = {CONFIRMED: REFUTED, REFUTED: CONFIRMED, NOT_RESOLVED: NOT_RESOLVED}
    assert verdict(found, metric="loss", best="a") == opposite[verdict(found, metric="loss", best="b")]


def test_the_best_must_beat_each_of_the_others_and_is_refuted_by_any():
    a, close, worse, better = [1.40, 1.50, 1.60], [1.41, 1.48, 1.62], [1.5, 1.6, 1.7], [1.30, 1.41, 1.5]
    assert verdict(compared("loss", a=a, worse=worse), metric="loss", best="a") == CONFIRMED
    assert verdict(compared("loss", a=a, worse=worse, close=close), metric="loss", best="a") == NOT_RESOLVED
    found = compared("loss", a=a, worse=worse, close=close, better=better)
    assert verdict(found, metric="loss", best="a") == REFUTED
    assert verdict(found, metric="loss", best="a", among=("a", "worse")) == CONFIRMED


def test_a_variant_that_lacks_a_measure_is_no_rival_unless_it_is_named():
    runs = runs_of("al_greedy", four=[2.0, 2.1, 2.0], eight=[2.5, 2.7, 2.6]) + runs_of("loss", plain=[1.4, 1.4, 1.4])
    found = compare(runs, "plain", (0, 1, 2), {})
    assert verdict(found, metric="al_greedy", best="eight") == CONFIRMED
    assert verdict(found, metric="al_greedy", best="eight", among=("plain", "four")) == NOT_RESOLVED
    assert verdict(found, metric="al_greedy", variant="plain", low=1) == NOT_RESOLVED
    assert verdict(found, metric="al_greedy", variant="four", low=0, against_baseline=True) == NOT_RESOLVED


def test_rivals_are_paired_by_the_seed_and_not_by_the_place_in_the_list():
    runs = runs_of("loss", a=[9.0, 1.5, 2.5, 3.5], b=[1.4, 2.4, 3.4])
    runs = [run if run.variant == "a" else replace(run, seed=run.seed + 1) for run in runs]
    found = compare(runs, "a", range(4), {})
    assert verdict(found, metric="loss", best="b") == CONFIRMED
    assert measured(found, metric="loss", best="b").endswith("'a' is worse by 0.100 (0.100 to 0.100), n = 3")


def test_variants_without_a_seed_in_common_are_not_compared():
    runs = runs_of("loss", a=[2.0, 2.0], b=[1.0, 1.0])
    apart = [run if run.variant == "a" else replace(run, seed=run.seed + 2) for run in runs]
    assert verdict(compare(runs, "a", range(4), {}), metric="loss", best="b") == CONFIRMED
    assert verdict(compare(apart, "a", range(4), {}), metric="loss", best="b") == NOT_RESOLVED


def test_a_variant_too_good_for_the_ladder_keeps_others_from_being_called_best():
    found = laddered([0.2, 0.2, 0.2])
    assert verdict(found, metric="steps_ratio", best=PLAIN) == NOT_RESOLVED
    text = measured(found, metric="steps_ratio", best=PLAIN)
    assert text == "not measured for '4 tokens': no ladder of its baseline reaches it"


def test_the_baseline_competes_for_the_best_at_equal_time():
    assert verdict(laddered([1.71, 1.69, 1.7]), metric="loss_at_equal_time", best=FOUR) == CONFIRMED
    assert verdict(laddered([2.11, 2.09, 2.1]), metric="loss_at_equal_time", best=FOUR) == REFUTED


# Words


def test_a_test_says_what_was_claimed_and_measured():
    runs = runs_of("loss", plain=[1.40, 1.41, 1.40], four=[1.42, 1.43, 1.43])
    found = compare(runs, "plain", (0, 1, 2), {"time_overhead": {"four": [0.21, 0.22, 0.23]}})
    tests = (
        Criterion("loss", best="four"),
        Criterion("loss", variant="four", high=0.01, against_baseline=True),
        Criterion("time_overhead", variant="four", low=0.05, high=0.1),
    )
    best, bounded, overhead = judge(Claim("", tests), found, "plain").tests
    assert best.claimed == "'four' has the best loss"
    assert best.measured == "best is 'plain': loss 1.403; 'four' is worse by 0.023 (0.009 to 0.038), n = 3"
    assert bounded.claimed == "'four': loss against the baseline at most +0.010"
    assert bounded.measured == "+0.023 (+0.009 to +0.038), n = 3"
    assert overhead.claimed == "'four': time overhead between 5.0% and 10%"
    assert overhead.measured == "22% (20% to 24%), n = 3"
    assert [best.verdict, bounded.verdict, overhead.verdict] == [REFUTED, NOT_RESOLVED, REFUTED]


def test_who_leads_and_who_decides_are_both_named():
    found = compared("loss", lucky=[1.0, 1.4, 1.0], b=[1.3, 1.3, 1.3], sure=[1.2, 1.2, 1.2])
    text = measured(found, metric="loss", best="b")
    assert text == "best is 'lucky': loss 1.133; 'b' is worse than 'sure' by 0.100 (0.100 to 0.100), n = 3"


def test_a_difference_that_rounds_to_nothing_has_no_minus():
    assert shown(-0.0001, METRICS["loss"]) == "0.000"


# Claims


def test_a_claim_is_confirmed_by_all_of_its_tests_and_refuted_by_any():
    found = compared("loss", a=[1.5, 1.5, 1.5], b=[1.39, 1.40, 1.41])
    true, false, unclear = (Criterion("loss", variant="b", high=high) for high in (1.45, 1.3, 1.405))
    for tests, expected in [
        ((true, true), CONFIRMED),
        ((true, unclear), NOT_RESOLVED),
        ((true, unclear, false), REFUTED),
    ]:
        assert judge(Claim("", tests), found, "a").verdict == expected


def test_a_claim_about_what_was_not_measured_is_not_resolved_and_says_why():
    found = compared("loss", a=[1.5, 1.5], b=[1.4, 1.4])
    for name, why in [
        ("steps_ratio", "ladder = [0.5, 2.0]"),
        ("al_greedy", "evaluation.num_prompts is 0"),
        ("parse_share", "evaluation.num_completions is 0"),
        ("task/mmlu/acc", "evaluation.tasks"),
        ("peak_memory_bytes", "not measured"),
    ]:
        claim = Claim("", (Criterion(metric=name, best="b"),))
        (test,) = judge(claim, found, "a").tests
        assert test.verdict == NOT_RESOLVED
        assert why in test.measured


def test_the_best_of_what_has_no_better_is_an_error():
    found = compared("training_tok_per_s", a=[1.5, 1.5], b=[1.4, 1.4])
    with pytest.raises(ConfigError, match="neither way is better"):
        verdict(found, metric="training_tok_per_s", best="b")


def test_a_value_that_is_no_measure_is_an_error():
    with pytest.raises(ConfigError, match="'los' is not a metric"):
        compared("los", a=[1.5])
