"""Counters of speculative decoding: a histogram of accepted lengths first, every ratio derived from it.

A cycle is one trunk forward that verifies at least one drafted token. It counts what verification accepted, even where
the end of the text (EOS) then cuts the emitted tokens short: acceptance is a property of draft and target, not of where
the text ends. Near `max_new_tokens` a cycle drafts fewer tokens, because more could not be emitted; a forward that
verifies no draft (the last token alone, or plain decoding) is not a cycle.

Worked example, N = 2, four cycles that drafted 2 tokens and accepted 2, 1, 0, 2, and a last one that drafted and
accepted 1:

    accepted             0   1   2
    2 drafted            1   1   2      num_drafts = 5, num_draft_tokens = 9, num_accepted_tokens = 6
    1 drafted            0   1          acceptance_rate = 6/9, mean_acceptance_length = 1 + 6/5

    unconditional        k = 1: 4 of 5 cycles that drafted a token at depth 1;  k = 2: 2 of 4
    conditional          k = 1: 4 of 5;  k = 2: 2 of the 3 that drafted two and accepted the first
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AcceptanceStatistics:
    """Accepted lengths of speculative decoding at one draft length. Statistics add up with `+`.

    When every cycle drafted N tokens, mean_acceptance_length = 1 + sum of acceptance_unconditional, and
    acceptance_unconditional[k] is the product of acceptance_conditional up to k. In general each depth counts only the
    cycles that drafted that far, and the sum is weighted by the share of such cycles.

    Attributes:
        draft_length: N, tokens drafted in a full cycle.
        histograms: for each number drafted, 1..N, how many cycles accepted 0, 1, ..., that many tokens.
    """

    draft_length: int
    histograms: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for num_drafted, counts in self.histograms.items():
            if not 1 <= num_drafted <= self.draft_length:
                raise ValueError(f"a cycle drafts 1..{self.draft_length} tokens, got {num_drafted}")
            if len(counts) != num_drafted + 1:
                raise ValueError(f"{num_drafted} drafted tokens have {num_drafted + 1} outcomes, got {len(counts)}")

    @classmethod
    def of_cycles(cls, draft_length: int, cycles: Iterable[tuple[int, int]]) -> AcceptanceStatistics:
        """Count (tokens drafted, tokens accepted) of each cycle; pairs that drafted nothing are not cycles.

        >>> AcceptanceStatistics.of_cycles(2, [(2, 2), (2, 1), (2, 0), (2, 2), (1, 1), (0, 0)]).histograms
        {1: (0, 1), 2: (1, 1, 2)}
        """
        counts: dict[int, list[int]] = {}
        for num_drafted, num_accepted in cycles:
            if not 0 <= num_accepted <= num_drafted <= draft_length:
                raise ValueError(f"got {num_accepted} accepted of {num_drafted} drafted tokens with N = {draft_length}")
            if num_drafted:
                counts.setdefault(num_drafted, [0] * (num_drafted + 1))[num_accepted] += 1
        return cls(draft_length, {drafted: tuple(counts[drafted]) for drafted in sorted(counts)})

    def __add__(self, other: AcceptanceStatistics) -> AcceptanceStatistics:
        """Both runs counted together. Raises ValueError when their draft lengths differ."""
        if not isinstance(other, AcceptanceStatistics):
            return NotImplemented
        if self.draft_length != other.draft_length:
            raise ValueError(f"acceptance is stated at one N: cannot add {self.draft_length} and {other.draft_length}")
        merged = dict(self.histograms)
        for drafted, counts in other.histograms.items():
            merged[drafted] = tuple(map(sum, zip(merged.get(drafted, (0,) * len(counts)), counts, strict=True)))
        return AcceptanceStatistics(self.draft_length, {drafted: merged[drafted] for drafted in sorted(merged)})

    @property
    def histogram(self) -> tuple[int, ...]:
        """Cycles that accepted 0, 1, ..., N tokens, whatever they drafted."""
        return tuple(
            sum(counts[accepted] for counts in self.histograms.values() if accepted < len(counts))
            for accepted in range(self.draft_length + 1)
        )

    @property
    def num_drafts(self) -> int:
        """Cycles: trunk forwards that verified at least one drafted token."""
        return sum(self.histogram)

    @property
    def num_draft_tokens(self) -> int:
        """Tokens drafted in all cycles."""
        return sum(drafted * sum(counts) for drafted, counts in self.histograms.items())

    @property
    def num_accepted_tokens(self) -> int:
        """Drafted tokens that verification accepted."""
        return sum(accepted * count for accepted, count in enumerate(self.histogram))

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted tokens, a ratio that means something only beside `draft_length`; nan without a draft."""
        return _ratio(self.num_accepted_tokens, self.num_draft_tokens)

    @property
    def mean_acceptance_length(self) -> float:
        """AL = 1 + accepted / cycles: tokens per cycle, bonus or correction included; 1 without a cycle."""
        return 1.0 + (self.num_accepted_tokens / self.num_drafts if self.num_drafts else 0.0)

    @property
    def acceptance_unconditional(self) -> tuple[float, ...]:
        """For k = 1..N (index k-1): cycles that accepted at least k / cycles that drafted at least k, or nan."""
        return tuple(_ratio(self._num_cycles(k, k), self._num_cycles(k, 0)) for k in self._depths)

    @property
    def acceptance_conditional(self) -> tuple[float, ...]:
        """For k = 1..N (index k-1): the same among cycles that accepted the k-1 drafts before, or nan."""
        return tuple(_ratio(self._num_cycles(k, k), self._num_cycles(k, k - 1)) for k in self._depths)

    @property
    def _depths(self) -> range:
        return range(1, self.draft_length + 1)

    def _num_cycles(self, min_drafted: int, min_accepted: int) -> int:
        return sum(sum(counts[min_accepted:]) for drafted, counts in self.histograms.items() if drafted >= min_drafted)

    def to_table(self) -> dict[str, Any]:
        """Counts and ratios as JSON values, `draft_length` beside them; a ratio without cases (nan) becomes None."""
        return {
            "draft_length": self.draft_length,
            "histogram": list(self.histogram),
            "histograms": {str(drafted): list(counts) for drafted, counts in self.histograms.items()},
            "num_drafts": self.num_drafts,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "acceptance_rate": _none_if_nan(self.acceptance_rate),
            "mean_acceptance_length": self.mean_acceptance_length,
            "acceptance_unconditional": [_none_if_nan(ratio) for ratio in self.acceptance_unconditional],
            "acceptance_conditional": [_none_if_nan(ratio) for ratio in self.acceptance_conditional],
        }


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan


def _none_if_nan(ratio: float) -> float | None:
    return None if math.isnan(ratio) else ratio
