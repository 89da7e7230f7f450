"""Judges a claim: measured results confirm it, refute it, or cannot tell.

A verdict rests on 95% intervals over seeds: a claim that some bound holds is confirmed when the whole interval is on
its right side, refuted when all of it is on the wrong one. A variant is the best when it beats each of the others, in
differences paired by seed. A metric that some of a variant's seeds lack (a run beyond the reach of the baseline's
ladder, say) resolves nothing, since those that have it are no fair sample.
"""

from __future__ import annotations

from collections.abc import Sequence

from nextn.errors import ConfigError
from nextn.study.compare import difference_by_seed, known_metric, shown, shown_estimate
from nextn.study.definition import Claim, Criterion
from nextn.study.ladder import LADDER_METRICS
from nextn.study.metrics import METRICS, Metric
from nextn.study.results import ClaimResult, Comparison, CriterionResult, Estimate, Verdict

CONFIRMED: Verdict = "confirmed"
REFUTED: Verdict = "refuted"
NOT_RESOLVED: Verdict = "not resolved at this scale"

_REASONS = (
    (LADDER_METRICS, "it needs baselines of other lengths: ladder = [0.5, 2.0]"),
    (("time_overhead", "flops_overhead"), "no training steps were measured side by side"),
    (("al_", "acceptance_"), "evaluation.num_prompts is 0, or no variant drafts that far"),
    (("decode_",), "evaluation.num_timed_prompts is 0, or no variant drafts"),
    (("parse_share",), "evaluation.num_completions is 0, or the text has no Python functions"),
    (("repeated_share",), "evaluation.num_completions is 0"),
    (("loss_of_depth_",), "no variant has so many depths"),
    (("task/",), "evaluation.tasks does not name its task, or the task has no such metric"),
)
"""Why no run may have a metric, by how its name begins."""


def judge(claim: Claim, comparisons: Sequence[Comparison], baseline: str) -> ClaimResult:
    """The verdicts on a claim and on each of its tests.

    Args:
        claim: what is claimed.
        comparisons: of all variants, as `compare` gives them.
        baseline: name of the variant that differences are from.

    Raises:
        ConfigError: a test names a metric that there is not, or one of which neither way is better.
    """
    tests = tuple(_tested(test, comparisons, baseline) for test in claim.tests)
    verdicts = [test.verdict for test in tests]
    if REFUTED in verdicts:
        return ClaimResult(claim.text, tests, REFUTED)
    return ClaimResult(claim.text, tests, NOT_RESOLVED if NOT_RESOLVED in verdicts else CONFIRMED)


def verdict_of_bounds(found: Estimate, low: float | None, high: float | None) -> Verdict:
    """Whether an interval lies wholly within the bounds, wholly outside, or across one of them.

    >>> [verdict_of_bounds(Estimate(1.0, 0.9, 1.1, 3), None, high) for high in (1.2, 1.05, 0.8)]
    ['confirmed', 'not resolved at this scale', 'refuted']
    """
    if found.low is None or found.high is None:
        return NOT_RESOLVED
    if (low is None or found.low >= low) and (high is None or found.high <= high):
        return CONFIRMED
    outside = (low is not None and found.high < low) or (high is not None and found.low > high)
    return REFUTED if outside else NOT_RESOLVED


def _tested(test: Criterion, comparisons: Sequence[Comparison], baseline: str) -> CriterionResult:
    of_metric = {found.variant: found for found in comparisons if found.metric == test.metric}
    if not of_metric:
        who = test.best or test.variant
        return CriterionResult(
            f"{who!r}: {known_metric(test.metric).title}", _missing(test.metric), test.metric, NOT_RESOLVED
        )
    seeds: dict[str, set[int]] = {}
    for found in comparisons:
        seeds.setdefault(found.variant, set()).update(found.seeds)
    if test.best:
        return _best(test, of_metric, seeds)
    return _within(test, of_metric.get(test.variant), seeds, baseline)


def _within(test: Criterion, found: Comparison | None, seeds: dict[str, set[int]], baseline: str) -> CriterionResult:
    """The test that a variant lies within bounds."""
    metric = known_metric(test.metric)
    is_difference = test.against_baseline and not metric.pair
    claimed = f"{test.variant!r}: {metric.title} {_bounds(test, metric, is_difference)}"
    value = None if found is None else found.difference if is_difference else found.value
    if found is None or value is None:
        what = f"{test.variant!r} against its baseline" if is_difference else repr(test.variant)
        return CriterionResult(claimed, _unmeasured(what, metric), test.metric, NOT_RESOLVED)
    expected = seeds[test.variant] & seeds[baseline] if is_difference else seeds[test.variant]
    missing = bool(found.seeds) and value.n < len(expected)
    value = _without_interval(value) if missing else value
    measured = shown_estimate(value, metric, difference=is_difference) + (f" of {len(expected)}" if missing else "")
    return CriterionResult(claimed, measured, test.metric, verdict_of_bounds(value, test.low, test.high))


def _best(test: Criterion, of_metric: dict[str, Comparison], seeds: dict[str, set[int]]) -> CriterionResult:
    """The test that a variant is the best."""
    metric = known_metric(test.metric)
    if metric.better is None:
        raise ConfigError(f"a claim says which variant is best in {test.metric!r}, of which neither way is better")
    # A variant that does not draft has no AL and is no rival; one beyond the ladder's reach may be the best of all.
    names = test.among or tuple(seeds if metric.pair else of_metric)
    others = [name for name in names if name != test.best]
    claimed = f"{test.best!r} has the best {metric.title}"
    if test.among:
        claimed += f" among {', '.join(map(repr, test.among))}"
    worse = _worse_than(test.best, others, of_metric, seeds)
    unmeasured = [name for name in others if name not in worse] if test.best in of_metric else [test.best]
    if not worse:
        what = ", ".join(map(repr, unmeasured)) or f"any but {test.best!r}"
        return CriterionResult(claimed, _unmeasured(what, metric), test.metric, NOT_RESOLVED)
    better = {name: found for name, found in worse.items() if found.high is not None and found.high < 0}
    level = {name: found for name, found in worse.items() if found.low is None or found.low <= 0}
    verdict = REFUTED if better else NOT_RESOLVED if level or unmeasured else CONFIRMED
    telling = better or level or worse
    rival = min(telling, key=lambda name: telling[name].mean)
    means = {name: of_metric[name].value.mean for name in (test.best, *worse)}
    measured = _standing(means, test.best, rival, worse[rival], metric)
    if unmeasured:
        measured += f"; {_unmeasured(', '.join(map(repr, unmeasured)), metric)}"
    return CriterionResult(claimed, measured, test.metric, verdict)


def _worse_than(
    best: str, others: Sequence[str], of_metric: dict[str, Comparison], seeds: dict[str, set[int]]
) -> dict[str, Estimate]:
    """By how much the others that share a seed with `best` are worse than it; negative: better."""
    worse = {}
    for name in others:
        if best not in of_metric or name not in of_metric:
            continue
        one, other = of_metric[name], of_metric[best]
        if known_metric(one.metric).better == "higher":
            one, other = other, one
        found = difference_by_seed(one, other)
        if found is not None:
            missing = bool(one.seeds) and found.n < len(seeds[name] & seeds[best])
            worse[name] = _without_interval(found) if missing else found
    return worse


def _standing(means: dict[str, float], best: str, rival: str, worse: Estimate, metric: Metric) -> str:
    """Who leads, and how the variant claimed to be best stands to the rival that decides."""
    leader = (min if metric.better == "lower" else max)(means, key=lambda name: means[name])
    ahead, behind = best, rival
    if worse.mean < 0:
        ahead, behind = rival, best
        low, high = (None if end is None else -end for end in (worse.high, worse.low))
        worse = Estimate(-worse.mean, low, high, worse.n)
    than = "" if ahead == leader else f" than {ahead!r}"
    margin = shown_estimate(worse, metric, difference=True).replace("+", "")
    return f"best is {leader!r}: {metric.title} {shown(means[leader], metric)}; {behind!r} is worse{than} by {margin}"


def _without_interval(found: Estimate) -> Estimate:
    """An estimate of which the seeds are no fair sample."""
    return Estimate(found.mean, None, None, found.n)


def _bounds(test: Criterion, metric: Metric, is_difference: bool) -> str:
    """The claimed bounds in words: `at most 0.70x`."""
    low, high = (
        None if bound is None else shown(bound, metric, difference=is_difference) for bound in (test.low, test.high)
    )
    words = f"between {low} and {high}" if low and high else f"at least {low}" if low else f"at most {high}"
    return f"against the baseline {words}" if is_difference else words


def _unmeasured(what: str, metric: Metric) -> str:
    """Says that a variant has no such metric, and for those read from the ladder why."""
    ladder = [METRICS[name] for name in LADDER_METRICS]
    return f"not measured for {what}" + (": no ladder of its baseline reaches it" if metric in ladder else "")


def _missing(name: str) -> str:
    """Says that no run has a metric, and why that may be."""
    reasons = [reason for beginnings, reason in _REASONS if name.startswith(beginnings)]
    return "not measured" + (f"; perhaps {reasons[0]}" if reasons else "")
