"""Holds a study's result, as frozen dataclasses that go to JSON and come back equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["confirmed", "refuted", "not resolved at this scale"]


@dataclass(frozen=True)
class CurvePoint:
    """The held-out next-token loss during a run.

    Attributes:
        step: optimizer steps done.
        num_tokens: tokens trained.
        flops: floating-point operations of the training so far.
        training_s: seconds they take on a quiet machine: by interleaved step times, not by the run's own clock.
        loss: nats per token.
    """

    step: int
    num_tokens: int
    flops: float
    training_s: float
    loss: float


@dataclass(frozen=True)
class RunResult:
    """One trained and measured run.

    Attributes:
        id: name of its folder.
        variant: the variant that it is of.
        seed: pairs it with the baseline's run of the same seed.
        ladder: multiple of the baseline's length, for a baseline of another length; None: a variant's own run.
        curve: the loss at every evaluation, its end last.
        values: metrics by full name (`nextn.study.metrics`); empty for a run of the ladder but for `loss`.
        loss_by_position: loss where 0, 1, ... eighths of a row are before the token, nats, [8].
        num_by_position: labels counted in them, [8].
    """

    id: str
    variant: str
    seed: int
    ladder: float | None
    curve: tuple[CurvePoint, ...]
    values: dict[str, float]
    loss_by_position: tuple[float, ...]
    num_by_position: tuple[int, ...]


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds and its two-sided 95% interval (Student's t, n - 1 degrees of freedom); None below n = 2."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """One metric of one variant, over seeds.

    Attributes:
        variant, metric: full names.
        values: one per seed that has it, in the order of `seeds`.
        seeds: whose values these are.
        value: their mean with its interval.
        difference: from the baseline's value of the same seed; None for the baseline itself, and for a metric that is
            a comparison already (`Metric.pair`), whose `value` it is then.
        resolved: the interval of the difference (for a pair metric: of its distance from "equal") does not hold 0;
            None where there is nothing to compare.
    """

    variant: str
    metric: str
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    value: Estimate
    difference: Estimate | None
    resolved: bool | None


@dataclass(frozen=True)
class CriterionResult:
    """One test of a claim: what was asked, what was measured (in words, with the interval), and what follows."""

    claimed: str
    measured: str
    metric: str
    verdict: Verdict


@dataclass(frozen=True)
class ClaimResult:
    """A claim: `confirmed` if all its tests are, `refuted` if one of them is."""

    text: str
    tests: tuple[CriterionResult, ...]
    verdict: Verdict


@dataclass(frozen=True)
class TargetReached:
    """When a variant's curve reaches a loss, interpolated, mean over the seeds that reach it; None: none does.

    Attributes:
        variant: its name.
        loss: nats per token.
        num_reached: of `num_seeds` runs.
        step, flops, training_s: when.
    """

    variant: str
    loss: float
    num_reached: int
    num_seeds: int
    step: float | None
    flops: float | None
    training_s: float | None


@dataclass(frozen=True)
class VariantFacts:
    """A variant as the page shows it.

    Attributes:
        name: of the variant.
        changes: dotted names and values that it changes in the base recipe.
        against: name of the variant that it is compared with; empty: the study's baseline.
        step_s: median seconds of an optimizer step, averaged over a run whose depths change; measured interleaved.
    """

    name: str
    changes: dict[str, Any]
    against: str
    step_s: float


@dataclass(frozen=True)
class StudyResult:
    """A finished study; the page, the CSV and the verdicts follow from it."""

    name: str
    title: str
    question: str
    scale: str
    baseline: str
    seeds: tuple[int, ...]
    variants: tuple[VariantFacts, ...]
    runs: tuple[RunResult, ...]
    comparisons: tuple[Comparison, ...]
    targets: tuple[TargetReached, ...]
    claims: tuple[ClaimResult, ...]
    notes: tuple[str, ...]
    base_recipe: dict[str, Any]
    evaluation: dict[str, Any]
    provenance: dict[str, Any]
