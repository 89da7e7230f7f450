"""What to do with drafts, from measured speedups: use which arm, or leave them off.

An arm gains where its whole range over the repeats lies above 1, the speed of plain decoding. Of the arms that gain the
one with the best median is named. Where none gains, the best one is still told, with its figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nextn.evaluation.results import Speedup


@dataclass(frozen=True)
class Decision:
    """What to do in one scenario.

    Attributes:
        arm: the arm to use; None: leave drafts off.
        best: the arm with the best median, used or not; None: no arm drafted.
        speedup: of `arm`, or of `best` where nothing gains.
    """

    arm: str | None
    best: str | None
    speedup: Speedup | None

    @property
    def text(self) -> str:
        """The decision in words, with the figure that it rests on."""
        if self.best is None or self.speedup is None:
            return "nothing but plain decoding was measured"
        figure = _figure(self.speedup)
        if self.arm is not None:
            return f"use {self.arm}: {figure}"
        if self.speedup.highest > 1:
            return f"no gain resolved, leave it off: the best, {self.best}, gives {figure}"
        return f"leave it off: the best, {self.best}, gives {figure}"


def decide(speedups: Mapping[str, Speedup]) -> Decision:
    """The decision in one scenario.

    Args:
        speedups: by name, of the lossless arms that draft.

    N = 3 has the best median, but its range reaches below 1, so N = 2 is the one to use:

    >>> decide({"N = 2": Speedup(1.5, 1.4, 1.6), "N = 3": Speedup(1.6, 0.9, 1.8)}).text
    'use N = 2: 1.50x (1.40 to 1.60)'
    >>> decide({"N = 1": Speedup(0.93, 0.91, 0.95)}).text
    'leave it off: the best, N = 1, gives 0.93x (0.91 to 0.95)'
    >>> decide({"N = 1": Speedup(1.02, 0.98, 1.05)}).text
    'no gain resolved, leave it off: the best, N = 1, gives 1.02x (0.98 to 1.05)'
    """
    if not speedups:
        return Decision(None, None, None)
    gaining = {name: speedup for name, speedup in speedups.items() if speedup.lowest > 1}
    best = max(gaining or speedups, key=lambda name: speedups[name].median)
    return Decision(best if gaining else None, best, speedups[best])


def summarise(scenarios: Sequence[tuple[int, str, Mapping[str, Speedup]]]) -> str:
    """One line for all scenarios: for each batch size the one arm to use, if one gains in all its scenarios.

    Of several such arms the one with the best geometric mean of medians is named, with the span of its medians.

    Args:
        scenarios: batch size, what else the scenario is, and the speedups as for `decide`.

    >>> summarise([
    ...     (1, "temperature 0", {"N = 2": Speedup(1.7, 1.6, 1.8), "N = 3": Speedup(1.9, 1.8, 2.0)}),
    ...     (1, "temperature 1", {"N = 2": Speedup(1.5, 1.4, 1.6), "N = 3": Speedup(1.1, 0.9, 1.2)}),
    ...     (16, "temperature 0", {"N = 2": Speedup(0.93, 0.9, 0.96)}),
    ... ])
    'use N = 2: 1.50x to 1.70x; at batch 16 leave it off: 0.93x'
    """
    texts: list[str] = []
    for batch_size in dict.fromkeys(batch_size for batch_size, _, _ in scenarios):
        own = [(name, speedups) for size, name, speedups in scenarios if size == batch_size]
        texts.append(f"at batch {batch_size} " * bool(texts) + _of_one_batch_size(own))
    return "; ".join(texts)


def _of_one_batch_size(scenarios: Sequence[tuple[str, Mapping[str, Speedup]]]) -> str:
    tables = [speedups for _, speedups in scenarios]
    everywhere = [name for name in tables[0] if all(name in table and table[name].lowest > 1 for table in tables)]
    if everywhere:
        best = max(everywhere, key=lambda name: math.prod(table[name].median for table in tables))
        return f"use {best}: {_span([table[best].median for table in tables])}"
    decisions = [decide(table) for table in tables]
    if not any(decision.arm for decision in decisions):
        medians = [decision.speedup.median for decision in decisions if decision.speedup is not None]
        return f"leave it off: {_span(medians)}" if medians else "only plain decoding was measured"
    return ", ".join(
        f"{name}: {f'use {decision.arm}' if decision.arm else 'leave it off'}"
        + (f" ({decision.speedup.median:.2f}x)" if decision.speedup is not None else "")
        for (name, _), decision in zip(scenarios, decisions, strict=True)
    )


def _figure(speedup: Speedup) -> str:
    if speedup.lowest == speedup.highest:
        return f"{speedup.median:.2f}x (one repeat)"
    return f"{speedup.median:.2f}x ({speedup.lowest:.2f} to {speedup.highest:.2f})"


def _span(medians: Sequence[float]) -> str:
    lowest, highest = f"{min(medians):.2f}x", f"{max(medians):.2f}x"
    return lowest if lowest == highest else f"{lowest} to {highest}"
