"""What a comparison of arms found: figures of an arm, of a scenario with its verdict, and of a whole `nextn bench`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nextn.bench.approaches import Approach
from nextn.bench.arms import CHECKPOINT
from nextn.bench.peers import PeerFigures
from nextn.bench.verdict import decide, summarise
from nextn.evaluation.results import Speedup


@dataclass(frozen=True)
class Scenario:
    """What all arms share while they are compared.

    Attributes:
        prompts: name of the prompt set.
        prompt_length: tokens of each prompt; None: as the set has them.
        batch_size: rows decoded at a time.
        temperature: 0 is greedy.
    """

    prompts: str
    prompt_length: int | None
    batch_size: int
    temperature: float

    @property
    def name(self) -> str:
        """For people.

        >>> Scenario("code", 128, batch_size=4, temperature=0.0).name
        'batch 4, temperature 0, code, prompts of 128 tokens'
        """
        return f"batch {self.batch_size}, {self.within_batch_size}"

    @property
    def within_batch_size(self) -> str:
        """The same without the batch size."""
        length = "" if self.prompt_length is None else f", prompts of {self.prompt_length} tokens"
        return f"temperature {self.temperature:g}, {self.prompts}{length}"


@dataclass(frozen=True)
class ArmFigures:
    """What was measured of one arm in one scenario.

    Attributes:
        name, weights, drafter, is_lossless: of the arm; the drafter of plain decoding is None.
        draft_length: N; 0 is plain decoding; None: adaptive.
        decode_tok_per_s: one rate per repeat, without reading the prompts.
        end_to_end_tok_per_s: the same with reading the prompts and everything else.
        speedup: of decoding, against the baseline.
        mean_acceptance_length: AL, of the cycles that drafted.
        tokens_per_forward: tokens of a row per cycle of that row, cycles that drafted nothing included.
        acceptance_unconditional, acceptance_conditional: index 0 is drafted token 1; None: never drafted or reached.
        verify_cost: v, a verifying forward over N + 1 tokens, in plain steps of the baseline; None: not of one N.
        draft_cost: c, one drafted token, in the same unit.
        predicted_speedup: tokens_per_forward / (v + N c).
        num_identical_outputs, num_compared_outputs: greedy outputs equal to eager plain decoding; None: not comparable.
        changed_share: of the new tokens, those that a lossy verifier changed.
        repeated_text_share: of the outputs.
    """

    name: str
    weights: str
    drafter: str | None
    is_lossless: bool
    draft_length: int | None
    decode_tok_per_s: tuple[float, ...]
    end_to_end_tok_per_s: tuple[float, ...]
    speedup: Speedup
    mean_acceptance_length: float
    tokens_per_forward: float
    acceptance_unconditional: tuple[float | None, ...]
    acceptance_conditional: tuple[float | None, ...]
    verify_cost: float | None
    draft_cost: float | None
    predicted_speedup: float | None
    num_identical_outputs: int | None
    num_compared_outputs: int | None
    changed_share: float
    repeated_text_share: float

    @property
    def is_plain(self) -> bool:
        """Whether it drafts nothing."""
        return self.drafter is None


@dataclass(frozen=True)
class ScenarioFigures:
    """All arms in one scenario.

    Attributes:
        scenario: what they shared.
        num_prompts: decoded in each repeat.
        max_new_tokens: after each prompt.
        source: of the prompts, for the provenance.
        arms: plain ones first.
    """

    scenario: Scenario
    num_prompts: int
    max_new_tokens: int
    source: dict[str, Any]
    arms: tuple[ArmFigures, ...]

    @property
    def speedups(self) -> dict[str, Speedup]:
        """Of the checkpoint's lossless arms that draft: what a verdict rests on."""
        chosen = [arm for arm in self.arms if arm.weights == CHECKPOINT and arm.is_lossless and not arm.is_plain]
        return {arm.name: arm.speedup for arm in chosen}

    @property
    def verdict(self) -> str:
        """What to do in this scenario."""
        return decide(self.speedups).text

    def fastest(self, weights: str, drafter: str | None, *, fixed: bool = False) -> ArmFigures | None:
        """The lossless arm of those weights and that drafter with the best median rate; None if there is none.

        Args:
            weights: CHECKPOINT, STANDARD or PARALLEL.
            drafter: one of DRAFTERS; None: plain decoding.
            fixed: of one N, not adaptive.
        """
        arms = [arm for arm in self.arms if (arm.weights, arm.drafter, arm.is_lossless) == (weights, drafter, True)]
        arms = [arm for arm in arms if arm.draft_length is not None or not fixed]
        return max(arms, key=lambda arm: statistics.median(arm.decode_tok_per_s), default=None)


@dataclass(frozen=True)
class BenchReport:
    """Everything `nextn bench` found, ready for JSON and for the page.

    Attributes:
        model: as the user named it.
        summary: the verdict in one line.
        verdicts: one per scenario.
        scenarios: the figures.
        peers: other engines with the same weights.
        approaches: the four ways to decode faster, compared; empty if none was named.
        notes: what a reader must know.
        options: dtype, repeats and the like.
        provenance: as `provenance.collect` gives it.
    """

    model: str
    summary: str
    verdicts: tuple[str, ...]
    scenarios: tuple[ScenarioFigures, ...]
    peers: tuple[PeerFigures, ...]
    approaches: tuple[Approach, ...]
    notes: tuple[str, ...]
    options: dict[str, Any]
    provenance: dict[str, Any]

    @classmethod
    def of_scenarios(cls, model: str, scenarios: Sequence[ScenarioFigures], **others: Any) -> BenchReport:
        """A report with its verdicts taken from the figures; `others` are the other fields, by name."""
        rows = [(own.scenario.batch_size, own.scenario.within_batch_size, own.speedups) for own in scenarios]
        verdicts = tuple(f"{own.scenario.name}: {own.verdict}" for own in scenarios)
        return cls(model=model, summary=summarise(rows), verdicts=verdicts, scenarios=tuple(scenarios), **others)
