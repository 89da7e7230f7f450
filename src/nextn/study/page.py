"""Renders a finished study as one self-contained HTML page."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from markupsafe import Markup

from nextn import files
from nextn.config import Recipe
from nextn.report.parts import colours, settings_rows, template
from nextn.study.compare import known_metric, shown, shown_estimate
from nextn.study.definition import ModelEvaluationConfig
from nextn.study.metrics import METRICS, metrics_in
from nextn.study.results import ClaimResult, Comparison, StudyResult, TargetReached
from nextn.study.tables import (
    EQUALS,
    MAIN_METRICS,
    Cell,
    against_baseline,
    baseline_of,
    cell,
    comparisons_of,
    difference_text,
    other_variants,
    title_of,
    values_of_run,
)  # fmt: skip
from nextn.tables import flattened, to_table
from nextn.wording import NOT_MEASURED, plain, plural

if TYPE_CHECKING:
    from nextn.study.drawing import Plot

AnyCell = TypeVar("AnyCell")
_TONES = {"confirmed": "better", "refuted": "worse", "not resolved at this scale": "unresolved"}
MAX_NAMES = 4
"""Settings that a sentence lists by name."""


@dataclass(frozen=True)
class _ShownClaim:
    """A claim with the plots that stand beside it, and those that it shares with an earlier one."""

    claim: ClaimResult
    tone: str
    own: list[Plot]
    shared: list[Plot]


def render(result: StudyResult) -> str:
    """The whole page as text. Everything that comes from outside is escaped."""
    claims, plots = _claims_and_plots(result)
    found = comparisons_of(result)
    metrics = metrics_in(metric for _, metric in found)
    main = [name for name in MAIN_METRICS if name in metrics]
    run_values = [values_of_run(result, index) for index in range(len(result.runs))]
    claimed = {test.metric for claim in result.claims for test in claim.tests}
    run_metrics = [
        name
        for name in metrics_in(name for values in run_values for name in values)
        if name in claimed or name in MAIN_METRICS
    ]
    return template("study.html.j2", "nextn.study").render(
        result=result,
        colours=colours(1),
        longest=0,
        answer=answer(result),
        claims=claims,
        plots=plots,
        tones=_TONES,
        svg=Markup,
        tables=[
            (title, names, _comparison_rows(result, found, names))
            for title, names in (("main", main), ("other", [name for name in metrics if name not in main]))
        ],
        metrics=metrics,
        title_of=title_of,
        metric_of=known_metric,
        targets=_targets(result),
        run_metrics=run_metrics,
        run_cells=[_run_cells(values, run_metrics) for values in run_values],
        shown=shown,
        plain=plain,
        baseline_of=baseline_of,
        settings=_changed_settings(result),
        evaluation=list(settings_rows(result.evaluation, ModelEvaluationConfig)),
        provenance=[(name, plain(value)) for name, value in flattened(result.provenance)],
    )


def write_page(result: StudyResult, path: Path) -> None:
    """Render to `path`, atomically, replacing an older file. Raises CheckpointError when that cannot be written."""
    files.write_text(path, render(result))


def _changed_settings(result: StudyResult) -> list[tuple[str, str, str]]:
    """Return (name, value, meaning) of the base recipe's settings that are not at their default."""
    usual = {name: value for name, value, _ in settings_rows(to_table(Recipe()), Recipe)}
    return [row for row in settings_rows(result.base_recipe, Recipe) if usual.get(row[0]) != row[1]]


# -------------------------------------------------------------------------------------------------------------- answer


def answer(result: StudyResult) -> list[str]:
    """What came out, in a few plain sentences: losses at equal cost, decoding, costs, claims. Good or bad."""
    found = comparisons_of(result)
    seeds = plural(len(result.seeds), "seed")
    sentences = [f"{plural(len(result.variants), 'variant')}, {seeds} each, against {result.baseline!r}."]
    if len(result.seeds) < 2:
        sentences.append("With one seed there are no intervals, and nothing is resolved.")
    for metric, equal in EQUALS.items():
        rows = [found[name, metric] for name in other_variants(result) if (name, metric) in found]
        if others := [one for one in rows if baseline_of(result, one.variant) == result.baseline]:
            sentences.append(_losses_sentence(equal, others, result))
        for one in rows:
            if (baseline := baseline_of(result, one.variant)) != result.baseline and against_baseline(one) is not None:
                text = difference_text(one, len(result.seeds))
                sentences.append(f"At {equal}, the loss of {one.variant!r} less that of {baseline!r}: {text} nats.")
    sentences += _best_sentence(found, "al_greedy", "most tokens per trunk forward, greedy")
    sentences += _best_sentence(found, "decode_speedup_greedy", "fastest decoding against plain, greedy")
    sentences += _cost_sentences(result)
    if result.claims:
        verdicts = [claim.verdict for claim in result.claims]
        counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in _TONES if verdict in verdicts]
        sentences.append(f"Of {plural(len(verdicts), 'claim')}: {', '.join(counts)}.")
    return sentences


def _losses_sentence(equal: str, others: Sequence[Comparison], result: StudyResult) -> str:
    """Who has the lowest loss, then whose differences from the baseline are resolved and whose are not."""
    differences = {one.variant: found.mean for one in others if (found := against_baseline(one)) is not None}
    rows = [one for one in others if one.variant in differences]
    if not rows:
        return f"At {equal}, no variant shares a seed with the baseline."
    best = min(rows, key=lambda one: differences[one.variant])
    if differences[best.variant] < 0:
        text = f"{best.variant!r}: {difference_text(best, len(result.seeds))} nats against the baseline"
    else:
        text = repr(result.baseline)
    kinds: dict[str, list[str]] = {"lower": [], "higher": [], "not resolved": []}
    for one in rows:
        kind = "not resolved" if not one.resolved else "lower" if differences[one.variant] < 0 else "higher"
        kinds[kind].append(repr(one.variant))
    rest = "; ".join(f"{kind}: {_listed(names, len(rows))}" for kind, names in kinds.items() if names)
    return f"At {equal}, the lowest loss is that of {text}. Beside the baseline, {rest}."


def _listed(names: Sequence[str], num_all: int) -> str:
    """A few names, or how many there are.

    >>> _listed(["a", "b"], 3), _listed(["a", "b"], 2), _listed(list("abcdef"), 8)
    ('a, b', 'all 2 others', '6 of 8')
    """
    if len(names) == num_all > 1:
        return f"all {num_all} others"
    return ", ".join(names) if len(names) <= MAX_NAMES else f"{len(names)} of {num_all}"


def _best_sentence(found: Mapping[tuple[str, str], Comparison], name: str, what: str) -> list[str]:
    rows = [one for (_, metric), one in found.items() if metric == name]
    if not rows:
        return []
    best = max(rows, key=lambda one: one.value.mean)
    return [f"{what[:1].upper()}{what[1:]}: {best.variant!r} with {shown_estimate(best.value, METRICS[name])}."]


def _cost_sentences(result: StudyResult) -> list[str]:
    sentences = []
    for name, what in (("time_overhead", "in seconds"), ("flops_overhead", "in FLOPs")):
        rows = [one for one in result.comparisons if one.metric == name and one.variant != result.baseline]
        if not rows:
            continue
        least, most = (choose(rows, key=lambda one: one.value.mean) for choose in (min, max))
        ends = [f"{_more(one.value.mean)} ({one.variant!r})" for one in (least, most)]
        range_of = ends[0] if least is most else f"from {ends[0]} to {ends[1]}"
        sentences.append(f"A training step {what}, beside the baseline's: {range_of}.")
    return sentences


def _more(share: float) -> str:
    """A relative overhead in words.

    >>> _more(0.25), _more(-0.03)
    ('25% more', '3.0% less')
    """
    return f"{shown(abs(share), METRICS['time_overhead'])} {'less' if share < 0 else 'more'}"


# --------------------------------------------------------------------------------------------------------------- parts


def _claims_and_plots(result: StudyResult) -> tuple[list[_ShownClaim], dict[str, Plot]]:
    """Claims with their plots, and all plots by name in the order in which the page shows them."""
    from nextn.study import plots  # matplotlib is slow to import, and only a page needs it

    general = plots.plots(result)
    with_claims: dict[str, Plot] = {}
    shown_claims = []
    for claim in result.claims:
        own: list[Plot] = []
        shared: list[Plot] = []
        for metric in dict.fromkeys(test.metric for test in claim.tests):
            plot = general.get(plots.plot_name(metric)) or plots.metric_plot(result, metric)
            if plot is None or plot in own or plot in shared:
                continue
            (shared if plot.name in with_claims else own).append(plot)
            with_claims[plot.name] = plot
        shown_claims.append(_ShownClaim(claim, _TONES[claim.verdict], own, shared))
    return shown_claims, with_claims | general


def _comparison_rows(
    result: StudyResult, found: Mapping[tuple[str, str], Comparison], names: Sequence[str]
) -> list[tuple[str, list[Any]]]:
    num_seeds = len(result.seeds)
    return [
        (facts.name, spanned([cell(found.get((facts.name, name)), num_seeds) for name in names], Cell(NOT_MEASURED)))
        for facts in result.variants
    ]


def _run_cells(values: Mapping[str, float], names: Sequence[str]) -> list[tuple[str, int]]:
    """Return a run's values as text, each with the number of columns that it spans."""
    texts = [shown(values[name], known_metric(name)) if name in values else NOT_MEASURED for name in names]
    return spanned(texts, NOT_MEASURED)


def spanned(cells: Sequence[AnyCell], missing: AnyCell) -> list[tuple[AnyCell, int]]:
    """Return cells with the number of columns that each spans: neighbours that are `missing` become one.

    >>> spanned(["1", "-", "-", "2", "2"], "-")
    [('1', 1), ('-', 2), ('2', 1), ('2', 1)]
    """
    row: list[tuple[AnyCell, int]] = []
    for is_missing, group in itertools.groupby(cells, lambda one: one == missing):
        neighbours = list(group)
        row += [(missing, len(neighbours))] if is_missing else [(one, 1) for one in neighbours]
    return row


def _targets(result: StudyResult) -> dict[float, dict[str, TargetReached]]:
    """By loss, then by variant."""
    targets: dict[float, dict[str, TargetReached]] = {}
    for target in result.targets:
        targets.setdefault(target.loss, {})[target.variant] = target
    return targets
