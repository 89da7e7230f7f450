"""Plots a study as inline SVG: the plots of every study, and one of any metric.

They are drawn by the means of `nextn.report.plots`. Every plot says in words what it shows, for readers who do not see
it.
"""

from __future__ import annotations

import re

from matplotlib.ticker import FuncFormatter

from nextn.report.figure import HEIGHT, new_figure, styled
from nextn.report.svg import INK, to_svg
from nextn.study.compare import known_metric, shown_estimate
from nextn.study.cost_plots import decoding_speed_plot, overhead_plot, training_cost_plot
from nextn.study.decoding_plots import (
    conditional_acceptance_plot,
    lengths_plot,
    unconditional_acceptance_plot,
)
from nextn.study.drawing import Plot, draw_interval, name_rows, style_of
from nextn.study.loss_plots import (
    differences_plot,
    ladder_plot,
    loss_by_time_plot,
    loss_by_tokens_plot,
    position_plot,
)
from nextn.study.metrics import Metric
from nextn.study.results import StudyResult
from nextn.study.tables import title_of
from nextn.wording import count

_MAKERS = (
    loss_by_tokens_plot, loss_by_time_plot, differences_plot, position_plot, lengths_plot, conditional_acceptance_plot,
    unconditional_acceptance_plot, overhead_plot, training_cost_plot, decoding_speed_plot, ladder_plot,
)  # fmt: skip
_SHOWN_IN = {
    "differences": ("loss", "loss_at_equal_flops", "loss_at_equal_time"),
    "position": ("loss_near", "loss_far"),
    "ladder": ("steps_ratio", "flops_ratio", "effective_speedup"),
    "overhead": ("time_overhead", "flops_overhead"),
    "acceptance": ("acceptance_greedy", "acceptance_sampled"),
    "acceptance-unconditional": ("acceptance_greedy_unconditional", "acceptance_sampled_unconditional"),
    "lengths": ("al_greedy", "al_sampled"),
}  # plot: metrics, without their depth


def plots(result: StudyResult) -> dict[str, Plot]:
    """Every plot that the study has data for, by name, in the order of the page."""
    drawn = [maker(result) for maker in _MAKERS]
    return {plot.name: plot for plot in drawn if plot is not None}


def plot_name(metric: str) -> str:
    """The plot in which a claim about this metric shows best.

    >>> plot_name("steps_ratio"), plot_name("acceptance_greedy_unconditional_2"), plot_name("parse_share")
    ('ladder', 'acceptance-unconditional', 'metric-parse_share')
    """
    stem = re.sub(r"_\d+$", "", metric)
    return next((name for name, stems in _SHOWN_IN.items() if stem in stems), f"metric-{metric}")


@styled
def metric_plot(result: StudyResult, name: str) -> Plot | None:
    """Any metric by variant, mean and 95% interval over seeds; None: no run has it."""
    metric, title = known_metric(name), title_of(name)
    rows = [one for one in result.comparisons if one.metric == name]
    if not rows:
        return None
    figure, axes = new_figure(max(0.6 * HEIGHT, 80 + 30 * len(rows)))
    for row, comparison in enumerate(rows):
        filled = comparison.resolved is not False
        draw_interval(axes, comparison.value, row, style_of(result, comparison.variant), filled=filled)
    name_rows(axes, [one.variant for one in rows])
    if metric.pair:
        axes.axvline(1.0 if metric.form == "ratio" else 0.0, color=INK, linewidth=1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, metric)))
    axes.set_xlabel(title)
    hint = "" if metric.better is None else f" {_capitalised(metric.better)} is better."
    words = (
        f"{_capitalised(metric.meaning)}.{hint} Mean and 95% interval over seeds; hollow: the difference from the "
        "baseline is not resolved."
    )
    texts = [f"{one.variant} {shown_estimate(one.value, metric)}" for one in rows]
    svg = to_svg(figure, f"metric-{name.replace('/', '-')}", f"{title}: {'; '.join(texts)}")
    return Plot(f"metric-{name}", _capitalised(title), words, svg)


def _tick(value: float, metric: Metric) -> str:
    if metric.form == "share":
        return f"{100 * value:.3g}%"
    return count(round(value)) if metric.form == "count" else f"{value:.4g}"


def _capitalised(text: str) -> str:
    """With a large first letter and the rest as it is."""
    return text[:1].upper() + text[1:]
