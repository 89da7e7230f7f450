"""Compares variants: every metric over seeds, and its difference from the baseline, paired by seed.

A seed moves all variants alike (initial weights, order of the text). So a variant is compared with the baseline's run
of the same seed, and the interval is that of the differences.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from nextn.errors import ConfigError
from nextn.study.intervals import estimate, excludes
from nextn.study.ladder import LADDER_METRICS, pair_values
from nextn.study.metrics import METRICS, Metric, metric_of, metrics_in
from nextn.study.results import Comparison, Estimate, RunResult, VariantFacts

_SIZES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def compare(
    runs: Sequence[RunResult],
    baseline: str,
    seeds: Sequence[int],
    overheads: Mapping[str, Mapping[str, Sequence[float]]],
) -> tuple[Comparison, ...]:
    """All metrics of all variants: baseline first, then in the order of the runs; metrics in that of `METRICS`.

    Args:
        runs: of all variants and of the ladder.
        baseline: name of the variant that others are compared with.
        seeds: order in which values are listed.
        overheads: samples of `time_overhead` and `flops_overhead`, by metric and variant. They are of timing runs,
            not of seeds, so their `Comparison.seeds` is empty. The baseline's are 0 where they are not given.

    Raises:
        ConfigError: a run has a value that is no metric.
    """
    by_seed = _values_by_seed(runs, baseline, seeds)
    comparisons = []
    for variant in dict.fromkeys([baseline, *(run.variant for run in runs)]):
        num_seeds = len({run.seed for run in runs if run.variant == variant and run.ladder is None})
        found = []
        for (owner, name), values in by_seed.items():
            if owner == variant:
                baselines = by_seed.get((baseline, name), {})
                differences = [value - baselines[seed] for seed, value in values.items() if seed in baselines]
                found.append(
                    _comparison(variant, name, list(values.values()), tuple(values), differences, baseline, num_seeds)
                )
        for name, samples in overheads.items():
            nothing = [0.0] * min(map(len, samples.values()), default=0) if variant == baseline else []
            if sample := samples.get(variant, nothing):
                found.append(_comparison(variant, name, sample, (), [], baseline, len(sample)))
        by_metric = {comparison.metric: comparison for comparison in found}
        comparisons += [by_metric[name] for name in metrics_in(by_metric)]
    return tuple(comparisons)


def compare_all(
    runs: Sequence[RunResult],
    variants: Sequence[VariantFacts],
    baseline: str,
    seeds: Sequence[int],
    overheads: Mapping[str, Mapping[str, Sequence[float]]],
) -> tuple[Comparison, ...]:
    """Compare every variant with its own baseline, the study's or the one it names, in the order of `variants`.

    A variant that others are compared with, and that is itself compared with the study's baseline, is listed once.

    Args:
        runs: of all variants and of the ladder.
        variants: of the study.
        baseline: name of the study's baseline.
        seeds: order in which values are listed.
        overheads: samples as `compare` takes them, each over the variant's own baseline.
    """
    baselines = {facts.name: facts.against or baseline for facts in variants}
    comparisons: dict[str, list[Comparison]] = {name: [] for name in baselines}
    for against in dict.fromkeys([baseline, *baselines.values()]):
        members = [name for name, other in baselines.items() if other == against and name != against]
        group = [run for run in runs if run.variant in (against, *members)]
        samples = {
            metric: {name: by_variant[name] for name in members if name in by_variant}
            for metric, by_variant in overheads.items()
        }
        is_compared = bool(comparisons[against])  # with the study's own baseline
        for comparison in compare(group, against, seeds, samples):
            if comparison.variant != against or not is_compared:
                comparisons[comparison.variant].append(comparison)
    return tuple(itertools.chain.from_iterable(comparisons.values()))


def known_metric(name: str) -> Metric:
    """The metric of a full name.

    Raises:
        ConfigError: there is none.
    """
    metric = metric_of(name)
    if metric is None:
        raise ConfigError(f"{name!r} is not a metric of a study; they are: {', '.join(METRICS)}, task/NAME/METRIC")
    return metric


def difference_by_seed(one: Comparison, other: Comparison) -> Estimate | None:
    """`one` less `other` in the same seeds (in the same timing runs, for overheads); None: they share none.

    >>> def of(*values):
    ...     return Comparison("", "loss", values, (0, 1), estimate(values), None, None)
    >>> difference_by_seed(of(2.5, 1.25), of(2.25, 1.0))
    Estimate(mean=0.25, low=0.25, high=0.25, n=2)
    """
    seeds = (one.seeds or tuple(range(len(one.values))), other.seeds or tuple(range(len(other.values))))
    ones, others = (dict(zip(s, c.values, strict=True)) for s, c in zip(seeds, (one, other), strict=True))
    differences = [value - others[seed] for seed, value in ones.items() if seed in others]
    return estimate(differences) if differences else None


def shown(value: float, metric: Metric, *, difference: bool = False) -> str:
    """A value in its metric's form.

    Args:
        value: in the metric's unit.
        metric: what it is a value of.
        difference: it is one, so its sign is always written, and a difference of shares is in percentage points.

    >>> loss, steps, parses, flops = (METRICS[n] for n in ("loss", "steps_ratio", "parse_share", "training_flops"))
    >>> shown(1.4, loss), shown(0.7, steps), shown(0.061, parses), shown(0.61, parses), shown(1.51e13, flops)
    ('1.400', '0.70x', '6.1%', '61%', '15.1T')
    >>> shown(0.0213, loss, difference=True), shown(-0.021, parses, difference=True)
    ('+0.021', '-2.1 points')
    """
    sign = "+" if difference and value >= 0 else ""
    if metric.form == "ratio":
        return f"{sign}{value:z.2f}x"
    if metric.form == "count":
        return sign + _count(value)
    if metric.form == "share":
        return f"{sign}{100 * value:z.1f} points" if difference else f"{value:z.{1 if abs(value) < 0.1 else 0}%}"
    return f"{sign}{value:z.3f}"


def shown_estimate(found: Estimate, metric: Metric, *, difference: bool = False) -> str:
    """A mean with its interval and its n.

    >>> shown_estimate(Estimate(1.04, 0.98, 1.11, 3), METRICS["steps_ratio"])
    '1.04x (0.98 to 1.11), n = 3'
    """
    mean = shown(found.mean, metric, difference=difference)
    if found.low is None or found.high is None:
        return f"{mean}, n = {found.n}"
    ends = (shown(end, metric, difference=difference) for end in (found.low, found.high))
    low, high = (end.removesuffix("x").removesuffix(" points") for end in ends)
    return f"{mean} ({low} to {high}), n = {found.n}"


def _values_by_seed(
    runs: Sequence[RunResult], baseline: str, seeds: Sequence[int]
) -> dict[tuple[str, str], dict[int, float]]:
    """Values by seed, in the order of the seeds, by variant and metric; what needs a ladder included."""
    by_seed: dict[tuple[str, str], dict[int, float]] = {}
    for seed in seeds:
        own = {run.variant: run for run in runs if run.ladder is None and run.seed == seed}
        ladder = [run for run in runs if run.ladder is not None and run.seed == seed]
        for variant, run in own.items():
            values = dict(run.values)
            if ladder and variant == baseline:
                values |= {name: _equal(METRICS[name]) for name in LADDER_METRICS}
            elif ladder and baseline in own:
                values |= pair_values(run, own[baseline], ladder)
            for name, value in values.items():
                by_seed.setdefault((variant, name), {})[seed] = value
    return by_seed


def _comparison(
    variant: str,
    name: str,
    values: Sequence[float],
    seeds: tuple[int, ...],
    differences: Sequence[float],
    baseline: str,
    num_expected: int,
) -> Comparison:
    metric, value = known_metric(name), estimate(values)
    difference = resolved = None
    if variant == baseline or metric.better is None:
        pass
    elif metric.pair:  # where a seed lacks it, beyond the ladder's reach say, the others are no fair sample
        resolved = len(values) == num_expected and excludes(value, _equal(metric))
    elif differences:
        difference = estimate(differences)
        resolved = excludes(difference, 0)
    return Comparison(variant, name, tuple(values), seeds, value, difference, resolved)


def _equal(metric: Metric) -> float:
    """Value of a pair metric for a variant that does as the baseline does."""
    return 1.0 if metric.form == "ratio" else 0.0


def _count(value: float) -> str:
    """Three digits and a unit.

    >>> _count(999_700), _count(-1_234_567), _count(42.5)
    ('1M', '-1.23M', '42.5')
    """
    value = float(f"{value:.3g}")
    for size, letter in _SIZES:
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
