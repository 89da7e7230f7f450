"""Draft policies on a simulated machine: seeded acceptance, costs with noise and outliers, a first call that compiles.

Regret is the share of tokens lost against a decoder that runs the best length all along, computed from the machine's
true rates, so that it holds everything: opening, probes, wrong choices, hysteresis.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextn.decoding.policy import (
    AcceptanceEstimate,
    AdaptiveLength,
    Cycle,
    CycleCosts,
    FixedLength,
)
from nextn.decoding.resolve import ADAPTIVE_LONGEST, policy_of
from nextn.decoding.statistics import AcceptanceStatistics
from nextn.errors import GenerationError

LONGEST = 8


@dataclass(frozen=True)
class Machine:
    """The truth about draft and hardware. Seconds are in units of the plain step.

    Attributes:
        conditional: acceptance of depths 1..LONGEST.
        per_token_s: drafting one token.
        overhead_s: what verifying any draft takes beyond the plain step.
        spread: standard deviation of each measured time, relative; beside it one time in 20 is ten times as long.
    """

    conditional: tuple[float, ...]
    per_token_s: float
    overhead_s: float = 0.0
    num_rows: int = 1
    spread: float = 0.05

    def seconds(self, length: int) -> tuple[float, float]:
        return length * self.per_token_s, 1.0 + (self.overhead_s if length else 0.0)

    def mean_length(self, length: int) -> float:
        tokens = all_accepted = 1.0
        for conditional in self.conditional[:length]:
            all_accepted *= conditional
            tokens += all_accepted
        return tokens

    def rate(self, length: int) -> float:
        return self.mean_length(length) / sum(self.seconds(length))

    @property
    def best(self) -> int:
        return max(range(LONGEST + 1), key=self.rate)

    def run(self, length: int, numbers: random.Random, *, is_first: bool = False) -> Cycle:
        accepted = tuple(self._num_accepted(length, numbers) for _ in range(self.num_rows))
        draft_s, verify_s = (self._measured(seconds, numbers) for seconds in self.seconds(length))
        return Cycle(length, (length,) * self.num_rows, accepted, draft_s, 100 * verify_s if is_first else verify_s)

    def _num_accepted(self, length: int, numbers: random.Random) -> int:
        accepted = 0
        while accepted < length and numbers.random() < self.conditional[accepted]:
            accepted += 1
        return accepted

    def _measured(self, seconds: float, numbers: random.Random) -> float:
        return seconds * numbers.gauss(1.0, self.spread) * (10 if numbers.random() < 0.05 else 1)


def steady(acceptance: float, per_token_s: float, **settings: float) -> Machine:
    return Machine((acceptance,) * LONGEST, per_token_s, **settings)


def simulate(machines: Iterable[Machine], policy: AdaptiveLength, seed: int = 0) -> list[int]:
    """The lengths asked for, one cycle on each machine in turn."""
    numbers, lengths, met = random.Random(seed), [], set()
    for machine in machines:
        length = policy.next_length()
        policy.record(machine.run(length, numbers, is_first=(machine.num_rows, length) not in met))
        met.add((machine.num_rows, length))
        lengths.append(length)
    return lengths


def regret(machine: Machine, lengths: list[int]) -> float:
    tokens = sum(machine.mean_length(length) for length in lengths)
    seconds = sum(sum(machine.seconds(length)) for length in lengths)
    return 1 - tokens / (seconds * machine.rate(machine.best))


def usual(lengths: list[int]) -> int:
    return Counter(lengths).most_common(1)[0][0]


DRAFTING_LOSES = {
    "no draft is ever right, drafts nearly free": steady(0.0, 0.05),
    "no draft is ever right": steady(0.0, 0.3),
    "drafts are as dear as plain steps": steady(0.5, 1.1),
    "just below the break-even": steady(0.5, 0.6),
    "few drafts are right": steady(0.2, 0.4),
    "verifying more than one token is dear": steady(0.35, 0.3, overhead_s=1.5),
    "good drafts on a machine too slow for them": steady(0.8, 0.3, overhead_s=1.5),
    "eight rows": steady(0.1, 0.2, num_rows=8),
}
DRAFTING_WINS = {
    "one token": steady(0.6, 0.4),
    "two tokens, none right beyond": Machine((0.9, 0.8, 0, 0, 0, 0, 0, 0), 0.1),
    "falling acceptance": Machine((0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.1, 0.1), 0.1),
    "rising acceptance": Machine((0.7, 0.8, 0.9, 0.95, 0.95, 0.95, 0.95, 0.95), 0.1),
    "medium": steady(0.7, 0.15),
    "as long as it goes": steady(0.95, 0.05),
    "good drafts, dear verifying": steady(0.9, 0.05, overhead_s=0.5),
    "eight rows": steady(0.75, 0.2, num_rows=8),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("truth", DRAFTING_LOSES)
def test_where_drafting_loses_all_trying_costs_less_than_2_percent_in_2000_cycles(truth: str, seed: int):
    machine = DRAFTING_LOSES[truth]
    assert machine.best == 0
    lengths = simulate([machine] * 2000, AdaptiveLength(LONGEST), seed)
    assert regret(machine, lengths) < 0.02


def test_probing_at_a_constant_interval_costs_more_than_that():
    class NoBackOff(AdaptiveLength):
        LAST_PROBE = AdaptiveLength.FIRST_PROBE

    machine = DRAFTING_LOSES["no draft is ever right"]
    assert regret(machine, simulate([machine] * 2000, NoBackOff(LONGEST))) > 0.02


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("truth", DRAFTING_WINS | DRAFTING_LOSES)
def test_the_best_length_is_found_within_100_cycles(truth: str, seed: int):
    machine = (DRAFTING_WINS | DRAFTING_LOSES)[truth]
    found = usual(simulate([machine] * 160, AdaptiveLength(LONGEST), seed)[100:])
    assert machine.rate(found) > 0.95 * machine.rate(machine.best)


@pytest.mark.parametrize("truth", DRAFTING_WINS)
def test_where_drafting_wins_little_is_lost_on_the_way_and_by_probes(truth: str):
    machine = DRAFTING_WINS[truth]
    assert machine.best > 0
    assert regret(machine, simulate([machine] * 2000, AdaptiveLength(LONGEST))) < 0.04


def found_after_a_change(policy: AdaptiveLength, before: Machine, after: Machine, seed: int) -> bool:
    """Whether the length that is best after a change at cycle 300 is run before cycle 600, and kept."""
    lengths = simulate([before] * 300 + [after] * 700, policy, seed)
    return after.rate(usual(lengths[600:])) > 0.95 * after.rate(after.best)


CHANGES = {
    "drafting begins to win": (steady(0.05, 0.2), steady(0.8, 0.2)),
    "drafting begins to lose": (steady(0.8, 0.2), steady(0.05, 0.2)),
    "drafts become dear": (steady(0.8, 0.1), steady(0.8, 0.9)),
    "longer drafts begin to win": (steady(0.4, 0.1), steady(0.9, 0.1)),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found_before_as_many_cycles_again_have_passed(change: str, seed: int):
    assert found_after_a_change(AdaptiveLength(LONGEST), *CHANGES[change], seed)


def test_without_probes_a_draft_that_begins_to_win_is_missed():
    class NoProbes(AdaptiveLength):
        FIRST_PROBE = 10**9

    assert not found_after_a_change(NoProbes(LONGEST), *CHANGES["drafting begins to win"], seed=0)


def test_without_protection_from_outliers_the_best_length_is_missed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nextn.decoding.policy._lower_quartile", lambda values: sum(values) / len(values))
    found = []
    for machine in (DRAFTING_WINS | DRAFTING_LOSES).values():
        best = usual(simulate([machine] * 160, AdaptiveLength(LONGEST))[100:])
        found.append(machine.rate(best) > 0.95 * machine.rate(machine.best))
    assert not all(found)


def test_a_draft_that_could_not_win_is_never_probed():
    lengths = simulate([steady(1.0, 1.1)] * 2000, AdaptiveLength(LONGEST))
    assert not any(lengths[2 * CycleCosts.NUM_TO_MEASURE :])


def test_probes_become_rare_while_the_choice_stays():
    lengths = simulate([steady(0.0, 0.4)] * 3000, AdaptiveLength(LONGEST))
    starts = [i for i in range(1, 3000) if lengths[i] and not lengths[i - 1]]
    gaps = [second - first for first, second in pairwise(starts[1:])]
    assert gaps == [64, 128, 256, 512, 1024]


def test_lengths_of_nearly_equal_worth_are_not_hopped_between():
    class NoHysteresis(AdaptiveLength):
        GAIN = 0.0

    def num_changes(policy: AdaptiveLength) -> int:
        lengths = simulate([steady(0.5, 0.12)] * 1000, policy)
        return sum(first != second for first, second in pairwise(lengths))

    assert num_changes(AdaptiveLength(LONGEST)) < 0.7 * num_changes(NoHysteresis(LONGEST))


def test_each_number_of_rows_has_costs_of_its_own():
    # One row alone leaves the machine idle, so drafts are nearly free; with 16 rows they are not.
    few, many = steady(0.7, 0.1), steady(0.7, 0.1, overhead_s=2.0, num_rows=16)
    assert (few.best > 0, many.best) == (True, 0)
    lengths = simulate(([few] * 200 + [many] * 200) * 3, AdaptiveLength(LONGEST))
    for start in (400, 800):  # both are known by then, and one cycle tells the number of rows
        assert few.rate(usual(lengths[start + 1 : start + 20])) > 1.5 * few.rate(0)
        assert usual(lengths[start + 201 : start + 220]) == 0


def test_the_same_cycles_give_the_same_lengths_and_asking_changes_nothing():
    machine, first, second = steady(0.6, 0.2), AdaptiveLength(LONGEST), AdaptiveLength(LONGEST)
    numbers = random.Random(0)
    for _ in range(300):
        cycle = machine.run(first.next_length(), numbers)
        assert [second.next_length() for _ in range(3)] == [first.next_length()] * 3
        first.record(cycle)
        second.record(cycle)


@given(st.integers(0, 4), st.integers(0, 10_000))
def test_no_length_is_beyond_the_longest_whatever_is_recorded(longest: int, seed: int):
    numbers, policy = random.Random(seed), AdaptiveLength(longest)
    for _ in range(60):
        assert 0 <= policy.next_length() <= longest
        drafted = [numbers.randint(0, policy.next_length()) for _ in range(numbers.randint(0, 5))]
        accepted = tuple(numbers.randint(0, most) for most in drafted)
        policy.record(Cycle(policy.next_length(), tuple(drafted), accepted, numbers.random(), 0.1 + numbers.random()))


CYCLES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)).map(lambda pair: (max(pair), min(pair))), max_size=40)


@given(CYCLES)
def test_acceptance_that_forgets_nothing_is_that_of_the_statistics(cycles: list[tuple[int, int]]):
    class Everything(AcceptanceEstimate):
        KEPT = 1.0
        PRIOR_WEIGHT = 1e-9

    estimate = Everything(3)
    for drafted, accepted in cycles:
        estimate.add(Cycle(3, (drafted,), (accepted,), 0.0, 1.0))  # asked for 3: rows near their end draft fewer
    lengths, all_accepted = estimate.mean_lengths(), 1.0
    for depth, expected in enumerate(AcceptanceStatistics.of_cycles(3, cycles).acceptance_conditional, 1):
        all_accepted *= expected
        if all_accepted != all_accepted:  # nan: no cycle reached this depth
            break
        assert lengths[depth] - lengths[depth - 1] == pytest.approx(all_accepted, abs=1e-6)


def test_what_is_forgotten_leaves_the_shallower_depths_alone():
    estimate = AcceptanceEstimate(3)
    for _ in range(50):
        estimate.add(Cycle(3, (3,), (1,), 0.0, 1.0))
    before = estimate.mean_lengths()
    estimate.forget(1)
    after = estimate.mean_lengths()
    assert after[:2] == before[:2]
    assert after[2] - after[1] > 0.8 > before[2] - before[1]


def test_a_cycle_cut_short_at_the_end_of_the_rows_does_not_tell_what_the_length_costs():
    costs = CycleCosts(3)
    for cycle in [Cycle(0, (0,), (0,), 0.0, 1.0)] * 4 + [Cycle(3, (1,), (1,), 0.1, 1.0)] * 9:
        costs.add(cycle)
    assert not costs.is_measured(3)
    for _ in range(CycleCosts.NUM_TO_MEASURE):
        costs.add(Cycle(3, (1, 3), (1, 0), 0.3, 1.0))  # one row drafted all
    assert costs.is_measured(3)


def test_the_first_cycle_of_a_length_and_rare_slow_ones_do_not_count():
    costs = CycleCosts(1)
    for verify_s in (500.0, 1.0, 10.0, 1.0, 10.0, 1.0):
        costs.add(Cycle(0, (0,), (0,), 0.0, verify_s))
    assert costs.seconds()[0] == 1.0


def test_a_fixed_length_asks_for_the_same_whatever_happens():
    policy = FixedLength(2)
    policy.record(Cycle(2, (2,), (0,), 9.0, 9.0))
    assert (policy.next_length(), policy.longest) == (2, 2)


def test_the_settings_name_their_policies():
    assert policy_of(0, 0) == FixedLength(0)
    assert policy_of(5, None, 0.4) == FixedLength(5)
    assert [policy_of("adaptive", allowed).longest for allowed in (None, 2, 99, 0)] == [
        ADAPTIVE_LONGEST, 2, ADAPTIVE_LONGEST, 0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-1, None), "0 .plain decoding. or more, got -1"),
        ((5, 3), "at most 3"),
        (("fast", None), "'adaptive', got 'fast'"),
        (("adaptive", None, 0.4), "leave one of them out"),
        ((0, None, 0.4), "drafts nothing"),
        ((3, None, 0.0), "between 0 and 1"),
        ((3, None, 1.0), "between 0 and 1"),
    ],
)
def test_settings_that_name_no_policy_are_refused(settings: tuple, message: str):
    with pytest.raises(GenerationError, match=message):
        policy_of(*settings)


def test_a_cycle_that_cannot_have_happened_is_a_misuse():
    with pytest.raises(ValueError, match="2 accepted of 1 drafted"):
        Cycle(3, (1,), (2,), 0.0, 1.0)
    with pytest.raises(ValueError, match="at most 2"):
        AdaptiveLength(2).record(Cycle(3, (3,), (0,), 0.0, 1.0))
