"""How many tokens to draft in the next cycle. One number for the whole batch; no model, no text.

Drafting N tokens pays when the tokens it adds are worth the seconds it takes. A cycle at draft length n gives each row
AL(n) tokens and lasts T(n) seconds, so that a row runs at AL(n) / T(n) tokens per second. `AdaptiveLength` estimates
both from the cycles that were run and takes the n where the ratio is highest; SmartSpec, arXiv 2406.14066, maximises
the same quantity under the name of goodput.

A policy decides what is drafted, never what is accepted: it changes the speed, not the output (greedy) or its
distribution (sampling).

Worked example, two depths with conditional acceptance 0.8 and 0.5, a forward of 10 ms and 2 ms per drafted token:

    n                  0      1            2
    AL(n)              1      1 + 0.8      1 + 0.8 + 0.8 * 0.5 = 2.2
    T(n)               10     12           14 ms
    AL(n) / T(n)       100    150          157 tokens per second; with 8 ms per drafted token 100, 100, 85
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Cycle:
    """What one cycle drafted, what was accepted and how long it took. Rows are those still decoding.

    Attributes:
        draft_length: N, tokens that each row was asked to draft; 0 is a plain step.
        num_drafted: tokens that each row drafted, 0..N: fewer where the row could not use more.
        num_accepted: accepted drafts of each row, 0..num_drafted.
        draft_s: seconds spent drafting.
        verify_s: seconds of the verifying forward and of everything else in the cycle.

    Raises:
        ValueError: the rows differ in number, or a count is out of its range.
    """

    draft_length: int
    num_drafted: tuple[int, ...]
    num_accepted: tuple[int, ...]
    draft_s: float
    verify_s: float

    def __post_init__(self) -> None:
        for drafted, accepted in zip(self.num_drafted, self.num_accepted, strict=True):
            if not 0 <= accepted <= drafted <= self.draft_length:
                raise ValueError(f"got {accepted} accepted of {drafted} drafted tokens with N = {self.draft_length}")


class DraftPolicy(Protocol):
    """A rule for the draft length of each cycle, which may learn from the cycles before it."""

    @property
    def longest(self) -> int:
        """The most tokens it will ever ask for."""
        ...

    def next_length(self) -> int:
        """N for the next cycle, 0..longest; 0 is a plain step. Asking changes nothing."""
        ...

    def record(self, cycle: Cycle) -> None:
        """Take note of what a cycle gave."""
        ...


@dataclass(frozen=True)
class FixedLength:
    """The same N in every cycle."""

    longest: int

    def next_length(self) -> int:
        """N."""
        return self.longest

    def record(self, cycle: Cycle) -> None:
        """Nothing is learnt."""


class AdaptiveLength:
    """The draft length with the most tokens per second, as far as the cycles so far tell; 0 where drafting loses.

    - *Acceptance* (`AcceptanceEstimate`): conditional acceptance of each depth, forgetting exponentially, optimistic
      where little is known, so that depths get tried.
    - *Costs* (`CycleCosts`): the usual seconds of a cycle at each length, apart for 1, 2, 3-4, 5-8, ... rows. When
      such a number of rows is met for the first time, the plain step and one draft length are measured; other lengths
      are predicted until they have been run.
    - *Hysteresis*: to change to a longer draft it must promise `GAIN` more tokens per second, to a shorter one just
      more, so that noise does not make the choice hop.
    - *Probes*: while n tokens are drafted nothing is learnt about depths beyond n. `FIRST_PROBE` cycles later what was
      known about them is forgotten, and optimism tries them anew where they could win at their cost; what disappoints
      is given up within a few cycles. Then twice as many cycles pass, up to `LAST_PROBE`, but `FIRST_PROBE` again when
      the choice has changed since the last probe. A probe while drafting runs one plain step, whose cost stays known.

    What it cannot see: a length whose measured cost was high, and has fallen since, is not tried again while even a
    fully accepted draft would lose at that cost.

    Everything follows from the cycles recorded; nothing is random.

    Args:
        longest: most tokens it will ever ask for, 0 or more.
    """

    GAIN = 0.02
    FIRST_LENGTH = 3
    FIRST_PROBE = 32
    LAST_PROBE = 1024

    def __init__(self, longest: int):
        self.longest = longest
        self._acceptance = AcceptanceEstimate(longest)
        self._costs: dict[int, CycleCosts] = {}
        self._choice = 0
        self._plan = self._opening()  # lengths to run before the choice counts again
        self._probe_gap = self.FIRST_PROBE
        self._num_until_probe = self._probe_gap
        self._choice_at_probe = 0

    def next_length(self) -> int:
        """N for the next cycle."""
        return self._plan[0] if self._plan else self._choice

    def record(self, cycle: Cycle) -> None:
        """Learn from a cycle and choose the next length. Raises ValueError when it drafted more than `longest`."""
        if cycle.draft_length > self.longest:
            raise ValueError(f"this policy asks for at most {self.longest} tokens, got a cycle of {cycle.draft_length}")
        num_rows = len(cycle.num_drafted)
        if num_rows == 0:
            return
        if self._plan:
            self._plan.popleft()
        bucket = (num_rows - 1).bit_length()
        if self._costs and bucket not in self._costs:
            self._plan = self._opening()
        costs = self._costs.setdefault(bucket, CycleCosts(self.longest))
        self._acceptance.add(cycle)
        costs.add(cycle)

        self._num_until_probe -= 1
        if self._num_until_probe <= 0 and not self._plan:
            self._probe()
        if not self._plan and costs.is_measured(0):
            self._choose(costs)

    def _opening(self) -> deque[int]:
        """The lengths to measure first with a new number of rows."""
        draft_length = self._choice or min(self.FIRST_LENGTH, self.longest)
        num_cycles = CycleCosts.NUM_TO_MEASURE
        return deque([0] * num_cycles + [draft_length] * num_cycles)

    def _probe(self) -> None:
        changed = self._choice != self._choice_at_probe
        self._probe_gap = self.FIRST_PROBE if changed else min(2 * self._probe_gap, self.LAST_PROBE)
        self._num_until_probe = self._probe_gap
        self._choice_at_probe = self._choice
        self._acceptance.forget(self._choice)
        if self._choice:
            self._plan.append(0)

    def _choose(self, costs: CycleCosts) -> None:
        lengths, seconds = self._acceptance.mean_lengths(), costs.seconds()
        rates = [tokens / cycle_s for tokens, cycle_s in zip(lengths, seconds, strict=True)]
        best = max(range(self.longest + 1), key=rates.__getitem__)
        if best < self._choice or rates[best] > (1 + self.GAIN) * rates[self._choice]:
            self._choice = best


class AcceptanceEstimate:
    """Conditional acceptance of depths 1..longest from counts that fade.

    As in `AcceptanceStatistics`, a row tells about depth k when it drafted k tokens and the k-1 before were accepted.
    Each cycle with such a row fades the depth's counts by `KEPT`; a depth that no row reaches keeps what it has. To
    begin with, each depth counts `PRIOR_WEIGHT` drafts, accepted as often as at the depth before, but at most `PRIOR`;
    they fade like the others.

    Args:
        longest: deepest depth.

    Two rows draft 2 tokens each and accept 1 and 0. The prior counts as 2 * 0.98 drafts; depth 2 is told about by one
    row: depth 1 (0.9 * 1.96 + 1) / (1.96 + 2) = 0.698, depth 2 (0.698 * 1.96 + 0) / (1.96 + 1) = 0.462, and
    AL = 1, 1 + 0.698, 1 + 0.698 + 0.698 * 0.462:

    >>> acceptance = AcceptanceEstimate(longest=2)
    >>> acceptance.add(Cycle(2, num_drafted=(2, 2), num_accepted=(1, 0), draft_s=0.002, verify_s=0.010))
    >>> [round(tokens, 3) for tokens in acceptance.mean_lengths()]
    [1.0, 1.698, 2.021]
    """

    KEPT = 0.98
    PRIOR_WEIGHT = 2.0
    PRIOR = 0.9

    def __init__(self, longest: int):
        self._num_seen = [0.0] * longest
        self._num_accepted = [0.0] * longest
        self._prior_weights = [self.PRIOR_WEIGHT] * longest

    def add(self, cycle: Cycle) -> None:
        """Count a cycle."""
        rows = list(zip(cycle.num_drafted, cycle.num_accepted, strict=True))
        for depth in range(1, cycle.draft_length + 1):
            num_seen = sum(drafted >= depth and accepted >= depth - 1 for drafted, accepted in rows)
            if num_seen == 0:
                break
            num_accepted = sum(accepted >= depth for _, accepted in rows)
            self._num_seen[depth - 1] = self.KEPT * self._num_seen[depth - 1] + num_seen
            self._num_accepted[depth - 1] = self.KEPT * self._num_accepted[depth - 1] + num_accepted
            self._prior_weights[depth - 1] *= self.KEPT

    def forget(self, after: int) -> None:
        """Drop what was learnt about depths beyond `after`."""
        for index in range(after, len(self._num_seen)):
            self._num_seen[index] = self._num_accepted[index] = 0.0
            self._prior_weights[index] = self.PRIOR_WEIGHT

    def mean_lengths(self) -> list[float]:
        """AL(n) for n = 0..longest: 1 + the sum over k <= n of the product of conditional acceptance up to k."""
        lengths, all_accepted, prior = [1.0], 1.0, self.PRIOR
        for num_seen, num_accepted, weight in zip(self._num_seen, self._num_accepted, self._prior_weights, strict=True):
            conditional = (weight * prior + num_accepted) / (weight + num_seen)
            prior = min(self.PRIOR, conditional)
            all_accepted *= conditional
            lengths.append(lengths[-1] + all_accepted)
        return lengths


class CycleCosts:
    """Seconds of a cycle at draft lengths 0..longest, for one number of rows.

    A length is measured once it was run `NUM_TO_MEASURE` times. Its first time is dropped (it may compile or allocate);
    of the last `NUM_KEPT` the lower quartile counts, of drafting and of verifying: what disturbs a cycle lengthens it.

    A length n that is not measured is predicted as v + n c: v from verifying at the next shorter measured length, c the
    lowest measured drafting time per token. That is a low guess, so the length gets tried where it matters.

    Args:
        longest: greatest draft length.

    Plain steps of 10 ms, cycles of 3 tokens with 6 ms of drafting and 12 ms of verifying; one call of 2 s compiled:

    >>> costs = CycleCosts(longest=4)
    >>> for draft_length, draft_s, verify_s in 4 * [(0, 0.0, 0.010)] + [(3, 0.006, 2.0)] + 3 * [(3, 0.006, 0.012)]:
    ...     costs.add(Cycle(draft_length, (draft_length,), (0,), draft_s, verify_s))
    >>> [round(1000 * cycle_s) for cycle_s in costs.seconds()]
    [10, 12, 14, 18, 20]
    """

    NUM_KEPT = 32
    NUM_TO_MEASURE = 4

    def __init__(self, longest: int):
        self._num_runs = [0] * (longest + 1)
        self._draft_s: list[deque[float]] = [deque(maxlen=self.NUM_KEPT) for _ in range(longest + 1)]
        self._verify_s: list[deque[float]] = [deque(maxlen=self.NUM_KEPT) for _ in range(longest + 1)]

    def add(self, cycle: Cycle) -> None:
        """Take a measurement; a cycle in which no row drafted all N tokens does not tell what N tokens cost."""
        draft_length = cycle.draft_length
        if max(cycle.num_drafted) < draft_length:
            return
        self._num_runs[draft_length] += 1
        if self._num_runs[draft_length] > 1:
            self._draft_s[draft_length].append(cycle.draft_s)
            self._verify_s[draft_length].append(cycle.verify_s)

    def is_measured(self, draft_length: int) -> bool:
        """Whether the length was run often enough for its own seconds to count."""
        return self._num_runs[draft_length] >= self.NUM_TO_MEASURE

    def seconds(self) -> list[float]:
        """T(n) for n = 0..longest; length 0 must be measured."""
        measured = [length for length in range(len(self._num_runs)) if self.is_measured(length)]
        draft_s = {length: _lower_quartile(self._draft_s[length]) / length for length in measured if length}
        per_token_s = min(draft_s.values(), default=0.0)
        table = []
        for length in range(len(self._num_runs)):
            if length in measured:
                verify_s = _lower_quartile(self._verify_s[length])
            table.append(verify_s + length * draft_s.get(length, per_token_s))
        return table


def _lower_quartile(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 4]
