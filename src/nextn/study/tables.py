"""A study's figures as tables: CSV and JSON for machines, Markdown for the documentation."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextn import files
from nextn.study.compare import known_measure, shown, shown_estimate
from nextn.study.measures import Measure, measure_of, measures_in
from nextn.study.results import Comparison, Estimate, StudyResult
from nextn.tables import from_table, to_table
from nextn.wording import NOT_MEASURED

MAIN_MEASURES = (
    "loss", "loss_at_equal_flops", "loss_at_equal_time", "steps_ratio", "effective_speedup", "flops_overhead",
    "time_overhead", "al_greedy", "al_sampled", "decode_speedup_greedy", "decode_speedup_sampled", "parse_share",
    "repeated_share",
)  # fmt: skip
"""Columns of the comparison, those of them that the study has."""
NOT_RESOLVED = "not resolved"
EQUALS = {"loss": "equal tokens", "loss_at_equal_flops": "equal FLOPs", "loss_at_equal_time": "equal training time"}
"""What a setting and the baseline are given alike, by the measure that compares their losses."""


# ------------------------------------------------------------------------------------------------------------- reading


def comparisons_of(result: StudyResult) -> dict[tuple[str, str], Comparison]:
    """Every comparison by its setting and measure."""
    return {(one.setting, one.measure): one for one in result.comparisons}


def baseline_of(result: StudyResult, setting: str) -> str:
    """Name of the setting that this one is compared with: its own choice or the study's."""
    return next(facts.against for facts in result.settings if facts.name == setting) or result.baseline


def other_settings(result: StudyResult) -> list[str]:
    """All settings but the baseline, in the study's order."""
    return [facts.name for facts in result.settings if facts.name != result.baseline]


def title_of(name: str) -> str:
    """Heading of a measure's column, with the depth or the task.

    >>> title_of("acceptance_greedy_2"), title_of("task/arc_easy/acc")
    ('accepted, greedy, depth 2', 'arc_easy, acc')
    """
    if name.startswith("task/"):
        return ", ".join(name.split("/")[1:])
    measure, depth = known_measure(name), name.rpartition("_")[2]
    if not measure.per_depth:
        return measure.title
    return f"{measure.title.removesuffix(' of depth')}{',' if measure.form == 'share' else ' of'} depth {depth}"


def against_baseline(comparison: Comparison) -> Estimate | None:
    """What sets it apart from the baseline: the paired difference, or the value of a measure that compares by itself.

    None for the baseline, and for a setting that shares no seed with it.
    """
    if known_measure(comparison.measure).pair and comparison.resolved is not None:
        return comparison.value
    return comparison.difference


def is_difference(measure: Measure) -> bool:
    """Whether `against_baseline` is a difference (0: equal) rather than an overhead or a ratio."""
    return not measure.pair or measure.form == "number"


# --------------------------------------------------------------------------------------------------------------- words


@dataclasses.dataclass(frozen=True)
class Cell:
    """A setting's figure in a table.

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
    found, measure = against_baseline(comparison), known_measure(comparison.measure)
    if found is None:
        return ""
    text = shown_estimate(found, measure, difference=is_difference(measure))
    if found.low is not None and (found.n == num_seeds or not comparison.seeds):
        text = text.removesuffix(f", n = {found.n}")
    return text if comparison.resolved else f"{NOT_RESOLVED}, {text}"


def cell(comparison: Comparison | None, num_seeds: int) -> Cell:
    """What a table says of one setting and measure; None: not measured."""
    if comparison is None:
        return Cell(NOT_MEASURED)
    measure, found = known_measure(comparison.measure), against_baseline(comparison)
    value = shown(comparison.value.mean, measure, difference=measure.pair and is_difference(measure))
    if found is None:
        spread = shown_estimate(comparison.value, measure).removeprefix(f"{value} ").split(", n =")[0]
        return Cell(value, "" if measure.pair or comparison.value.low is None else spread)
    tone = ""
    if not comparison.resolved:
        tone = "unresolved"
    elif measure.better is not None:
        equal = 0.0 if is_difference(measure) or measure.form != "ratio" else 1.0
        tone = "better" if (found.mean < equal) == (measure.better == "lower") else "worse"
    text = difference_text(comparison, num_seeds)
    return Cell(value, text.replace(f"{value} ", "", 1) if measure.pair else text, tone)


# --------------------------------------------------------------------------------------------------------- CSV and JSON


def write_csv(result: StudyResult, path: Path) -> None:
    """One row per run, with its measures in full digits, pair measures of its seed included; empty: not measured.

    Besides: `step`, `num_tokens`, `training_s` at the end, and `loss_eighth_1` .. `_8`, the loss by eighth of a row.
    Raises CheckpointError when the file cannot be written.
    """
    rows = [_csv_row(result, index) for index in range(len(result.runs))]
    found = dict.fromkeys(name for row in rows for name in row)
    first = [name for name in found if measure_of(name) is None]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*first, *measures_in(found.keys() - set(first))], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, text.getvalue())


def _csv_row(result: StudyResult, index: int) -> dict[str, Any]:
    run = result.runs[index]
    row: dict[str, Any] = {"setting": run.setting, "seed": run.seed, "ladder": run.ladder, "id": run.id}
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
        if run.ladder is None and one.setting == run.setting and run.seed in one.seeds:
            values.setdefault(one.measure, one.values[one.seeds.index(run.seed)])
    return values


def write_json(result: StudyResult, path: Path) -> None:
    """The whole study; `read_json` gives back an equal one. Raises CheckpointError when it cannot be written.

    JSON has no tuples: inside `changes`, `base_recipe`, `measure` and `provenance` they become lists.
    """
    files.write_json(path, to_table(result))


def read_json(path: Path) -> StudyResult:
    """What `write_json` wrote.

    Raises:
        CheckpointError: the file is missing or is not JSON.
        ConfigError: it is no study, or one of another version: a key is missing or unknown.
    """
    return from_table(StudyResult, files.read_json(path), str(path))


# ------------------------------------------------------------------------------------------------------------ Markdown


def markdown_tables(result: StudyResult) -> str:
    """The claims and the comparison as Markdown tables, each mean above its difference from the baseline."""
    found = comparisons_of(result)
    names = [name for name in MAIN_MEASURES if any(measure == name for _, measure in found)]
    parts = []
    if result.claims:
        claims = []
        for claim in result.claims:
            several = f"; claim {claim.verdict}" if len(claim.tests) > 1 else ""
            claims += [[claim.text, test.claimed, test.measured, test.verdict + several] for test in claim.tests]
        parts.append(_markdown(["claim", "claimed", "measured", "verdict"], claims))
    rows = []
    for facts in result.settings:
        cells = [cell(found.get((facts.name, name)), len(result.seeds)) for name in names]
        rows.append([facts.name, *("<br>".join(filter(None, (one.value, one.difference))) for one in cells)])
    parts.append(_markdown(["setting", *(title_of(name) for name in names)], rows))
    return "\n\n".join(parts) + "\n"


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(_markdown_cell(text) for text in line)} |" for line in lines)


def _markdown_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
