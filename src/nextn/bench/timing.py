"""Arms timed side by side: all decode the same prompts in turn, and what their cycles cost is timed in between.

The *baseline* of a speedup is the fastest plain arm of the same weights in the same scenario,
eager or compiled. Rates are of decoding: reading the prompt with the trunk is left out, the drafter's reading is not.

What a cycle costs is measured apart from the rates, between the timed repeats, on other text: the prompts backwards, as
long as they are, so that contexts and compiled steps are the same. So three figures stand beside each other that do not
follow from one another:

    tokens per forward   counted while decoding the prompts
    v, c                 seconds of a verifying forward and of a drafted token over those of a plain step, timed on
                         other text
    speedup              wall clock on the prompts

and predicted speedup = tokens per forward / (v + N c) can be held against the measured one. The prediction leaves out
the drafter's reading of the prompts, the shorter drafts before `max_new_tokens`, and batches that run empty at the end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nextn.bench.arms import Arm
from nextn.bench.figures import ArmFigures, Scenario, ScenarioFigures
from nextn.decoding import GenerationResult
from nextn.decoding.policy import Cycle, DraftPolicy
from nextn.decoding.statistics import AcceptanceStatistics
from nextn.evaluation.interleaving import rotated
from nextn.evaluation.repetition import mean_repeated_share
from nextn.evaluation.results import Speedup


@dataclass(frozen=True)
class Timed:
    """One decoding of all prompts, and its seconds from beginning to end."""

    result: GenerationResult
    wall_s: float

    @property
    def end_to_end_tok_per_s(self) -> float:
        """New tokens per second, prompts included."""
        return sum(map(len, self.result.token_ids)) / self.wall_s


class Runner:
    """An arm at one batch size, ready to decode again and again.

    Args:
        arm: what to run.
        batch_size: places.
        say: told what is being compiled.
    """

    def __init__(self, arm: Arm, batch_size: int, say: Callable[[str], None] = lambda _: None):
        self.arm = arm
        self._num_compiled, self._say = 0, say
        self.decoder = arm.decoder(batch_size, self._compiling)

    def _compiling(self, _: str) -> None:
        self._num_compiled += 1
        self._say(f"compiling {self.arm.name}")

    def decode(self, prompts: Sequence[Sequence[int]], **options: Any) -> Timed:
        """Decode all prompts, once more whenever something had to be compiled meanwhile.

        Adaptive drafting may come to a length that it has not run before; such a run is not a measurement.
        """
        while True:
            num_compiled, started = self._num_compiled, time.perf_counter()
            result = self.decoder.generate(prompts, **options)
            wall_s = time.perf_counter() - started
            if num_compiled == self._num_compiled:
                return Timed(result, wall_s)

    def cycle(self, prompts: Sequence[Sequence[int]], **options: Any) -> CycleSeconds | None:
        """Seconds of a full cycle, None where no cycle drafted N tokens, or where N changes."""
        if self.arm.draft_length == "adaptive":
            return None
        if self.arm.draft_length == 0:
            costs = self.decode(prompts, **options).result.costs
            num_cycles = sum(costs.num_cycles.values())
            return CycleSeconds(costs.verify_s / num_cycles, 0.0) if num_cycles else None
        policy = self.decoder.policy
        recorder = _Recorder(policy)
        self.decoder.policy = recorder
        try:
            self.decode(prompts, **options)
        finally:
            self.decoder.policy = policy
        cycles = [cycle for cycle in recorder.cycles if cycle.draft_length == self.arm.draft_length]
        if not cycles:
            return None
        return CycleSeconds(
            statistics.mean(cycle.verify_s for cycle in cycles),
            statistics.mean(cycle.draft_s for cycle in cycles) / policy.longest,
        )


@dataclass(frozen=True)
class CycleSeconds:
    """Means over the cycles of one decoding: of the verifying forward, and of one drafted token."""

    verify_s: float
    draft_s: float


class _Recorder:
    """A policy that keeps the cycles which it passes on."""

    def __init__(self, policy: DraftPolicy):
        self._policy, self.cycles = policy, []  # type: DraftPolicy, list[Cycle]
        self.longest = policy.longest

    def next_length(self) -> int:
        return self._policy.next_length()

    def record(self, cycle: Cycle) -> None:
        self.cycles.append(cycle)
        self._policy.record(cycle)


def measure_scenario(
    scenario: Scenario,
    runners: Sequence[Runner],
    prompts: Sequence[Sequence[int]],
    source: dict[str, Any],
    *,
    max_new_tokens: int,
    num_repeats: int,
    progress: Callable[[str], None] = lambda _: None,
) -> ScenarioFigures:
    """Warm every arm up, then time all arms in turn, and between the repeats what their cycles cost.

    No text is ended at EOS, so that all arms do equal work. Repeat r samples with seed r. Prompts are repeated until
    they fill whole batches.

    Args:
        scenario: batch size and temperature of the runners.
        runners: plain ones first, the one that outputs are compared with before all others of its weights.
        prompts: token ids.
        source: what the prompts are.
        max_new_tokens: at least 2, since a prompt's first token is read off the prompt.
        num_repeats: how often each arm is timed.
        progress: told the arm after each of its 2 * num_repeats + 1 runs.
    """
    filled = fill(prompts, scenario.batch_size)
    usual = {"max_new_tokens": max_new_tokens, "temperature": scenario.temperature, "eos_token_id": None}
    first_batch = sorted(filled, key=len, reverse=True)[: scenario.batch_size]
    backwards = [prompt[::-1] for prompt in first_batch]
    for runner in runners:
        runner.decode(first_batch, **usual)
        progress(runner.arm.name)
    timings: dict[str, list[Timed]] = {runner.arm.name: [] for runner in runners}
    cycles: dict[str, list[CycleSeconds]] = {runner.arm.name: [] for runner in runners}
    for repeat in range(num_repeats):
        for runner in rotated(runners, repeat):
            timings[runner.arm.name].append(runner.decode(filled, seed=repeat, **usual))
            progress(runner.arm.name)
        for runner in rotated(runners, repeat):
            if (seconds := runner.cycle(backwards, seed=repeat, **usual)) is not None:
                cycles[runner.arm.name].append(seconds)
            progress(runner.arm.name)
    measured = [
        _Measured(runner.arm, tuple(timings[runner.arm.name]), _median_cycle(cycles[runner.arm.name]))
        for runner in runners
    ]
    plain = [one for one in measured if one.arm.draft_length == 0]
    references = {one.arm.weights: one for one in reversed(plain)}
    baselines = {
        weights: max(
            (one for one in plain if one.arm.weights == weights),
            key=lambda one: statistics.median(one.decode_tok_per_s),
        )
        for weights in references
    }
    return ScenarioFigures(
        scenario=scenario,
        num_prompts=len(filled),
        max_new_tokens=max_new_tokens,
        source=source,
        arms=tuple(
            one.figures(baselines[one.arm.weights], references[one.arm.weights] if scenario.temperature == 0 else None)
            for one in measured
        ),
    )


@dataclass(frozen=True)
class _Measured:
    """An arm's decodings, one per repeat, and what a cycle took."""

    arm: Arm
    timings: tuple[Timed, ...]
    cycle: CycleSeconds | None

    @property
    def decode_tok_per_s(self) -> tuple[float, ...]:
        return tuple(timed.result.decode_tok_per_s for timed in self.timings)

    def figures(self, baseline: _Measured, reference: _Measured | None) -> ArmFigures:
        """Against the fastest plain arm, and compared with the outputs of the reference, None where sampled."""
        results = [timed.result for timed in self.timings]
        stats = sum((result.stats for result in results[1:]), start=results[0].stats)
        outputs = results[0].token_ids
        compared = None if reference is None else reference.timings[0].result.token_ids
        identical = None if compared is None else sum(a == b for a, b in zip(outputs, compared, strict=True))
        forward, draft_length = tokens_per_forward(results), self.arm.draft_length
        verify_cost = draft_cost = predicted = None
        if self.cycle is not None and baseline.cycle is not None and isinstance(draft_length, int):
            verify_cost = self.cycle.verify_s / baseline.cycle.verify_s
            draft_cost = self.cycle.draft_s / baseline.cycle.verify_s
            predicted = predicted_speedup(forward, verify_cost, draft_cost, draft_length)
        return ArmFigures(
            name=self.arm.name,
            weights=self.arm.weights,
            drafter=self.arm.drafter,
            is_lossless=self.arm.is_lossless,
            draft_length=draft_length if isinstance(draft_length, int) else None,
            decode_tok_per_s=self.decode_tok_per_s,
            end_to_end_tok_per_s=tuple(timed.end_to_end_tok_per_s for timed in self.timings),
            speedup=Speedup.of_repeats(baseline.decode_tok_per_s, self.decode_tok_per_s),
            mean_acceptance_length=stats.mean_acceptance_length,
            tokens_per_forward=forward,
            **_acceptance(stats),
            verify_cost=verify_cost,
            draft_cost=draft_cost,
            predicted_speedup=predicted,
            num_identical_outputs=identical,
            num_compared_outputs=None if identical is None else len(outputs),
            changed_share=statistics.mean(result.changed_share for result in results),
            repeated_text_share=mean_repeated_share(outputs),
        )


def fill(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """The prompts as lists, the first ones once more until all batches are full.

    >>> fill([[1], [2], [3]], batch_size=2)
    [[1], [2], [3], [1]]
    """
    num_filled = -(-len(prompts) // batch_size) * batch_size
    return [list(prompts[index % len(prompts)]) for index in range(num_filled)]


def predicted_speedup(tokens_per_forward: float, verify_cost: float, draft_cost: float, draft_length: int) -> float:
    """Tokens of a cycle over its cost in plain steps, v + N c.

    >>> predicted_speedup(2.6, verify_cost=1.1, draft_cost=0.1, draft_length=2)
    2.0
    """
    return tokens_per_forward / (verify_cost + draft_length * draft_cost)


def tokens_per_forward(results: Sequence[GenerationResult]) -> float:
    """Tokens that a row gets per cycle, its first one left out; 1 where no row had a cycle.

    Where no EOS ends a row, each of its cycles ends with one token of the trunk's own: those are counted.
    """
    further = [origins[1:] for result in results for origins in result.origins]
    num_cycles = sum(origins.count(0) for origins in further)
    return sum(map(len, further)) / num_cycles if num_cycles else 1.0


def _acceptance(stats: AcceptanceStatistics) -> dict[str, tuple[float | None, ...]]:
    table = stats.to_table()  # there a ratio without cases is None, not nan
    kinds = ("acceptance_unconditional", "acceptance_conditional")
    return {kind: tuple(table[kind]) for kind in kinds}


def _median_cycle(repeats: Sequence[CycleSeconds]) -> CycleSeconds | None:
    if not repeats:
        return None
    return CycleSeconds(
        statistics.median(seconds.verify_s for seconds in repeats),
        statistics.median(seconds.draft_s for seconds in repeats),
    )
