"""A study's figures as table cells and as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from nextn import files
from nextn.study.compare import known_metric, shown, shown_estimate
from nextn.study.metrics import Metric, metric_of, metrics_in
from nextn.study.results import Comparison, Estimate, StudyResult
from nextn.wording import NOT_MEASURED

MAIN_METRICS = (
    "loss", "loss_at_equal_flops", "loss_at_equal_time", "steps_ratio", "effective_speedup", "flops_overhead",
    "time_overhead", "al_greedy", "al_sampled", "decode_speedup_greedy", "decode_speedup_sampled", "parse_share",
    "repeated_share",
)  # fmt: skip
"""Columns of the comparison, those of them that the study has."""
NOT_RESOLVED = "not resolved"
EQUALS = {"loss": "equal tokens", "loss_at_equal_flops": "equal FLOPs", "loss_at_equal_time": "equal training time"}
"""What a variant and the baseline are given alike, by the metric that compares their losses."""


# ------------------------------------------------------------------------------------------------------------- reading


def comparisons_of(result: StudyResult) -> dict[tuple[str, str], Comparison]:
    """Every comparison by its variant and metric."""
    return {(one.variant, one.metric): one for one in result.comparisons}


def baseline_of(result: StudyResult, variant: str) -> str:
    """Name of the variant that this one is compared with: its own choice or the study's."""
    return next(facts.against for facts in result.variants if facts.name == variant) or result.baseline


def other_variants(result: StudyResult) -> list[str]:
    """All variants but the baseline, in the study's order."""
    return [facts.name for facts in result.variants if facts.name != result.baseline]


def title_of(name: str) -> str:
    """Heading of a metric's column, with the depth or the task.

    >>> title_of("acceptance_greedy_2"), title_of("task/arc_easy/acc")
    ('accepted, greedy, depth 2', 'arc_easy, acc')
    """
    if name.startswith("task/"):
        return ", ".join(name.split("/")[1:])
    metric, depth = known_metric(name), name.rpartition("_")[2]
    if not metric.per_depth:
        return metric.title
    return f"{metric.title.removesuffix(' of depth')}{',' if metric.form == 'share' else ' of'} depth {depth}"


def against_baseline(comparison: Comparison) -> Estimate | None:
    """What sets it apart from the baseline: the paired difference, or the value of a metric that compares by itself.

    None for the baseline, and for a variant that shares no seed with it.
    """
    if known_metric(comparison.metric).pair and comparison.resolved is not None:
        return comparison.value
    return comparison.difference


def is_difference(metric: Metric) -> bool:
    """Whether `against_baseline` is a difference (0: equal) rather than an overhead or a ratio."""
    return not metric.pair or metric.form == "number"


# --------------------------------------------------------------------------------------------------------------- words


@dataclasses.dataclass(frozen=True)
class Cell:
    """A variant's figure in a table.

    Attributes:
        value: the mean over seeds; a dash if not measured.
        difference: how it stands beside the baseline, with the 95% interval; the mean's own interval where there is
            nothing to compare it with.
        tone: `better`, `worse`, `unresolved`, or empty where there is nothing to say.
    """

    value: str
    difference: str = ""
    tone: str = ""


def difference_text(comparison: Comparison, num_seeds: int) -> str:
    """What sets it apart from the baseline, with its interval; `not resolved` comes first where that holds equality.

    Empty for the baseline. The number of values is said where it is not that of the study's seeds, `num_seeds`.
    """
    found, metric = against_baseline(comparison), known_metric(comparison.metric)
    if found is None:
        return ""
    text = shown_estimate(found, metric, difference=is_difference(metric))
    if found.low is not None and (found.n == num_seeds or not comparison.seeds):
        text = text.removesuffix(f", n = {found.n}")
    return text if comparison.resolved else f"{NOT_RESOLVED}, {text}"


def cell(comparison: Comparison | None, num_seeds: int) -> Cell:
    """What a table says of one variant and metric; None: not measured."""
    if comparison is None:
        return Cell(NOT_MEASURED)
    metric, found = known_metric(comparison.metric), against_baseline(comparison)
    value = shown(comparison.value.mean, metric, difference=metric.pair and is_difference(metric))
    if found is None:
        spread = shown_estimate(comparison.value, metric).removeprefix(f"{value} ").split(", n =")[0]
        return Cell(value, "" if metric.pair or comparison.value.low is None else spread)
    tone = ""
    if not comparison.resolved:
        tone = "unresolved"
    elif metric.better is not None:
        equal = 0.0 if is_difference(metric) or metric.form != "ratio" else 1.0
        tone = "better" if (found.mean < equal) == (metric.better == "lower") else "worse"
    text = difference_text(comparison, num_seeds)
    return Cell(value, text.replace(f"{value} ", "", 1) if metric.pair else text, tone)


# --------------------------------------------------------------------------------------------------------- CSV and JSON


def write_csv(result: StudyResult, path: Path) -> None:
    """One row per run, with its metrics in full digits, pair metrics of its seed included; empty: not measured.

    Besides: `step`, `num_tokens`, `training_s` at the end, and `loss_eighth_1` .. `_8`, the loss by eighth of a row.
    Raises CheckpointError when the file cannot be written.
    """
    rows = [_csv_row(result, index) for index in range(len(result.runs))]
    found = dict.fromkeys(name for row in rows for name in row)
    first = [name for name in found if metric_of(name) is None]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*first, *metrics_in(found.keys() - set(first))], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, text.getvalue())


def _csv_row(result: StudyResult, index: int) -> dict[str, Any]:
    run = result.runs[index]
    row: dict[str, Any] = {"variant": run.variant, "seed": run.seed, "ladder": run.ladder, "id": run.id}
    if run.curve:
        end = run.curve[-1]
        row |= {"step": end.step, "num_tokens": end.num_tokens, "training_s": end.training_s}
    row |= {f"loss_eighth_{number}": loss for number, loss in enumerate(run.loss_by_position, 1)}
    return row | values_of_run(result, index)


def values_of_run(result: StudyResult, index: int) -> dict[str, float]:
    """Measures of run `index` and those that compare it with the baseline's run of its seed, by name."""
    run = result.runs[index]
    values = dict(run.values)
    for one in result.comparisons:
        if run.ladder is None and one.variant == run.variant and run.seed in one.seeds:
            values.setdefault(one.metric, one.values[one.seeds.index(run.seed)])
    return values
