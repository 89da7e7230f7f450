"""Plots of a study as inline SVG, by the means of `nextn.report.plots`.

A setting has one colour and one marker in all plots: the baseline is ink, the others follow in the study's order, and
no two of the first two dozen share both. Every plot says in words what it shows, for readers who do not see it.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from nextn.report.html import count, plain
from nextn.report.plots import (
    HEIGHT,
    INK,
    MUTED,
    NUM_ARM_COLOURS,
    arm_colour,
    blank_figure,
    new_figure,
    styled,
    to_svg,
    token_unit,
)  # fmt: skip
from nextn.report.study.compare import known_measure, shown_estimate
from nextn.report.study.intervals import estimate
from nextn.report.study.measures import MEASURES, Measure
from nextn.report.study.results import CurvePoint, Estimate, RunResult, StudyResult
from nextn.report.study.tables import (
    against_baseline,
    baseline_of,
    comparisons_of,
    difference_text,
    title_of,
)  # fmt: skip

_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "p", "h", "*")
_COLOURS = (0, 4, 1, 5, 2, 6, 7, 3)  # neighbours differ in hue
_DASH = (0, (2, 2))
_LEGEND_LINE, _LEGEND_LETTERS = 17, 46  # px a line; letters that fit in one
_NUM_EIGHTHS = 8


@dataclass(frozen=True)
class Plot:
    """A plot with its words.

    Attributes:
        name: one per page.
        title: heading.
        words: how to read it, a sentence or two.
        svg: the drawing, with an alternative text.
    """

    name: str
    title: str
    words: str
    svg: str


@dataclass(frozen=True)
class _Style:
    colour: str
    marker: str


# --------------------------------------------------------------------------------------------------------------- which


def plots(result: StudyResult) -> dict[str, Plot]:
    """Every plot that the study has data for, by name, in the order of the page."""
    drawn = [maker(result) for maker in _MAKERS]
    return {plot.name: plot for plot in drawn if plot is not None}


def plot_name(measure: str) -> str:
    """The plot in which a claim about this measure shows best.

    >>> plot_name("steps_ratio"), plot_name("acceptance_greedy_2"), plot_name("parse_share")
    ('ladder', 'acceptance', 'measure-parse_share')
    """
    stem = re.sub(r"_\d+$", "", measure)
    return next((name for name, stems in _SHOWN_IN.items() if stem in stems), f"measure-{measure}")


_SHOWN_IN = {
    "differences": ("loss", "loss_at_equal_flops", "loss_at_equal_time"),
    "position": ("loss_near", "loss_far"),
    "ladder": ("steps_ratio", "flops_ratio", "effective_speedup"),
    "overhead": ("time_overhead", "flops_overhead"),
    "acceptance": ("acceptance_greedy", "acceptance_sampled"),
    "lengths": ("al_greedy", "al_sampled"),
}


# -------------------------------------------------------------------------------------------------------------- curves


@styled
def loss_by_tokens_plot(result: StudyResult) -> Plot | None:
    """Held-out loss over tokens, mean over seeds with a band from the lowest to the highest."""
    curves = _curves(result)
    if not curves:
        return None
    scale, unit = token_unit(max(points[-1][0].num_tokens for points in curves.values()))
    return _loss_plot(
        result, curves, "loss-tokens", "Loss over tokens", f"trained tokens ({unit})", lambda at: at.num_tokens / scale
    )


@styled
def loss_by_time_plot(result: StudyResult) -> Plot | None:
    """The same over the training's seconds on a quiet machine."""
    curves = _curves(result)
    if not curves:
        return None
    scale, unit = _time_unit(max(point.training_s for points in curves.values() for point in points[-1]))
    return _loss_plot(
        result, curves, "loss-time", "Loss over time", f"training time ({unit})", lambda at: at.training_s / scale
    )


def _loss_plot(
    result: StudyResult, curves: Mapping[str, list[list[CurvePoint]]], name: str, title: str, label: str,
    place: Callable[[CurvePoint], float],
) -> Plot:  # fmt: skip
    figure, axes = _figure_with_legend(result, list(curves))
    settled, texts = [], []
    for setting, points in curves.items():
        style = _style(result, setting)
        places = [_mean([place(one) for one in seeds]) for seeds in points]
        losses = [[one.loss for one in seeds] for seeds in points]
        means = [_mean(values) for values in losses]
        axes.fill_between(
            places, [min(v) for v in losses], [max(v) for v in losses], color=style.colour, alpha=0.18, lw=0
        )
        axes.plot(places, means, color=style.colour, linewidth=1.4, marker=style.marker, markersize=4)
        settled += [
            value for at, values in zip(places, losses, strict=True) if at >= places[-1] / 4 for value in values
        ]
        texts.append(f"{setting} {means[-1]:.3f} at {places[-1]:.3g}")
    spread = max(settled) - min(settled)
    axes.set_ylim(min(settled) - 0.06 * spread, max(settled) + 0.04 * spread)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel("loss (nats per token)")
    words = "Held-out next-token loss: mean over seeds, and a band from the lowest to the highest. What comes before a "
    words += "quarter of the training may lie above the frame."
    return Plot(name, title, words, to_svg(figure, name, f"{title}, {label}; at the end: {'; '.join(texts)}"))


def _curves(result: StudyResult) -> dict[str, list[list[CurvePoint]]]:
    """By setting and step, the points of all its seeds; steps that a seed lacks are left out."""
    curves = {}
    for setting, runs in _runs(result).items():
        by_step = [{point.step: point for point in run.curve} for run in runs]
        steps = [step for step in sorted(by_step[0]) if all(step in points for points in by_step)]
        if steps:
            curves[setting] = [[points[step] for points in by_step] for step in steps]
    return curves


# --------------------------------------------------------------------------------------------------------- differences

_EQUALS = {
    "loss": ("equal tokens", "o"),
    "loss_at_equal_flops": ("equal FLOPs", "s"),
    "loss_at_equal_time": ("equal time", "D"),
}


@styled
def differences_plot(result: StudyResult) -> Plot | None:
    """Forest plot: the loss less the baseline's with 95% intervals, at equal tokens, FLOPs and time."""
    found = comparisons_of(result)
    settings = [name for name in _others(result) if any((name, measure) in found for measure in _EQUALS)]
    measures = [measure for measure in _EQUALS if any((name, measure) in found for name in settings)]
    if not settings:
        return None
    figure, axes = new_figure(max(HEIGHT, 90 + (16 * len(measures) + 12) * len(settings)))
    texts = []
    for row, setting in enumerate(settings):
        for index, measure in enumerate(measures):
            comparison = found.get((setting, measure))
            difference = None if comparison is None else against_baseline(comparison)
            if comparison is None or difference is None:
                continue
            place = row + 0.7 * ((index + 0.5) / len(measures) - 0.5)
            style = _Style(_style(result, setting).colour, _EQUALS[measure][1])
            _interval(axes, difference, place, style, filled=comparison.resolved is True)
            texts.append(f"{setting} at {_EQUALS[measure][0]} {difference_text(comparison, len(result.seeds))}")
    _name_rows(axes, settings)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_xlabel("loss less the baseline's (nats per token)")
    keys = [
        Line2D([], [], color=MUTED, marker=_EQUALS[one][1], linestyle="", label=_EQUALS[one][0]) for one in measures
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    words = (
        "Left of the line is better than the baseline. Mean of the paired differences and 95% interval; hollow: not "
    )
    words += "resolved, the interval holds 0."
    alternative = "Loss less the baseline's: " + "; ".join(texts)
    return Plot("differences", "Loss against the baseline", words, to_svg(figure, "differences", alternative))


@styled
def position_plot(result: StudyResult) -> Plot | None:
    """Loss less the baseline's by eighth of a row, with 95% intervals over seeds."""
    runs = {
        setting: {run.seed: run.loss_by_position for run in own if len(run.loss_by_position) == _NUM_EIGHTHS}
        for setting, own in _runs(result).items()
    }
    lines: dict[str, list[Estimate]] = {}
    for setting in _others(result):
        own, other = runs.get(setting, {}), runs.get(baseline_of(result, setting), {})
        if seeds := own.keys() & other.keys():
            differences = [
                [own[seed][eighth] - other[seed][eighth] for seed in seeds] for eighth in range(_NUM_EIGHTHS)
            ]
            lines[setting] = [estimate(values) for values in differences]
    if not lines:
        return None
    figure, axes = _figure_with_legend(result, list(lines))
    texts = []
    for index, (setting, line) in enumerate(lines.items()):
        shift = 0.6 * ((index + 0.5) / len(lines) - 0.5)
        style = _style(result, setting)
        places = [eighth + shift for eighth in range(1, _NUM_EIGHTHS + 1)]
        axes.plot(places, [one.mean for one in line], color=style.colour, linewidth=1, alpha=0.5)
        for place, one in zip(places, line, strict=True):
            filled = one.low is not None and one.high is not None and not one.low <= 0 <= one.high
            _interval(axes, one, place, style, filled=filled, upright=True)
        texts.append(f"{setting} " + " ".join(f"{one.mean:+.3f}" for one in line))
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_xticks(range(1, _NUM_EIGHTHS + 1))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("context before the token (eighth of a row)")
    axes.set_ylabel("loss less the baseline's (nats)")
    words = (
        "Below the line is better than the baseline. Bars: 95% intervals over seeds; hollow: not resolved. A gain that "
    )
    words += "grows to the right is one in the use of long context."
    alternative = "Loss less the baseline's in eighths 1 to 8 of a row: " + "; ".join(texts)
    return Plot("position", "Loss by position", words, to_svg(figure, "position", alternative))


# ------------------------------------------------------------------------------------------------------------ decoding


@styled
def lengths_plot(result: StudyResult) -> Plot | None:
    """Mean acceptance length by setting, greedy filled and sampled hollow, with 95% intervals."""
    found = comparisons_of(result)
    names = [one.name for one in result.settings if {(one.name, "al_greedy"), (one.name, "al_sampled")} & found.keys()]
    if not names:
        return None
    figure, axes = new_figure(max(HEIGHT, 80 + 34 * len(names)))
    texts = []
    for row, setting in enumerate(names):
        for measure, shift, filled in (("al_greedy", -0.16, True), ("al_sampled", 0.16, False)):
            if comparison := found.get((setting, measure)):
                _interval(axes, comparison.value, row + shift, _style(result, setting), filled=filled)
                texts.append(f"{setting} {measure} {shown_estimate(comparison.value, MEASURES[measure])}")
    _name_rows(axes, names)
    axes.set_xlim(left=1)
    axes.set_xlabel("tokens per trunk forward (AL)")
    words = "Bonus token included, so plain decoding has 1. Filled: greedy. Hollow: sampled. Bars: 95% intervals."
    alternative = "Mean acceptance length: " + "; ".join(texts)
    return Plot("lengths", "Tokens per trunk forward", words, to_svg(figure, "lengths", alternative))


@styled
def acceptance_plot(result: StudyResult) -> Plot | None:
    """Conditional acceptance by depth of every setting, greedy and sampled beside each other."""
    found = comparisons_of(result)
    panels = {"greedy": _by_depth(result, "acceptance_greedy"), "sampled": _by_depth(result, "acceptance_sampled")}
    panels = {kind: lines for kind, lines in panels.items() if lines}
    if not panels:
        return None
    names = [one.name for one in result.settings if any(one.name in lines for lines in panels.values())]
    figure = blank_figure(HEIGHT + _legend(names))
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    texts = []
    for axes, (kind, lines) in zip(row, panels.items(), strict=True):
        for setting, depths in lines.items():
            style = _style(result, setting)
            shares = [found[setting, f"acceptance_{kind}_{depth}"].value.mean for depth in depths]
            axes.plot(depths, shares, color=style.colour, marker=style.marker, markersize=6, linewidth=1.5)
            texts.append(f"{setting}, {kind}: " + ", ".join(f"{share:.0%}" for share in shares))
        deepest = max(depth for depths in lines.values() for depth in depths)
        axes.set_xticks(range(1, deepest + 1))
        axes.set_xlim(0.75, deepest + 0.25)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(f"depth, {kind}")
    row[0].set_ylabel("acceptance, conditional")
    _add_legend(figure, result, names)
    words = "Share of drafts of each depth that are accepted, given that all earlier ones of the cycle were."
    return Plot("acceptance", "Acceptance by depth", words, to_svg(figure, "acceptance", "; ".join(texts)))


def _by_depth(result: StudyResult, stem: str) -> dict[str, list[int]]:
    """By setting, the depths for which it has this measure."""
    depths: dict[str, list[int]] = {facts.name: [] for facts in result.settings}
    for setting, measure in comparisons_of(result):
        if (depth := measure.removeprefix(f"{stem}_")).isdigit():
            depths[setting].append(int(depth))
    return {setting: sorted(line) for setting, line in depths.items() if line}


# ---------------------------------------------------------------------------------------------------------------- cost


@styled
def overhead_plot(result: StudyResult) -> Plot | None:
    """Measured time of a training step against its calculated FLOPs, both beside the baseline's."""
    found = comparisons_of(result)
    names = [name for name in _others(result) if {(name, "time_overhead"), (name, "flops_overhead")} <= found.keys()]
    if not names:
        return None
    figure, axes = _figure_with_legend(result, names)
    texts = []
    highest = 0.0
    for setting in names:
        style = _style(result, setting)
        flops, seconds = found[setting, "flops_overhead"].value, found[setting, "time_overhead"].value
        _interval(axes, seconds, flops.mean, style, filled=True, upright=True)
        highest = max(highest, flops.mean, seconds.mean)
        texts.append(f"{setting}: FLOPs {flops.mean:+.0%}, time {seconds.mean:+.0%}")
    axes.plot([0, highest], [0, highest], color=MUTED, linewidth=1, linestyle=_DASH)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("more FLOPs per step, calculated")
    axes.set_ylabel("more time per step, measured")
    words = "A training step beside the baseline's. On the dashed line, the time grows as the FLOPs do; above it, more."
    return Plot("overhead", "What a step costs", words, to_svg(figure, "overhead", "; ".join(texts)))


@styled
def training_cost_plot(result: StudyResult) -> Plot | None:
    """Loss against the seconds of training; the settings that nothing beats in both are joined."""
    points = {
        setting: [(run.curve[-1].training_s, run.values["loss"]) for run in runs if run.curve and "loss" in run.values]
        for setting, runs in _runs(result).items()
    }
    largest = max((seconds for seeds in points.values() for seconds, _ in seeds), default=0.0)
    scale, unit = _time_unit(largest)
    scaled = {name: [(seconds / scale, loss) for seconds, loss in seeds] for name, seeds in points.items() if seeds}
    return _pareto_plot(
        result, scaled, "training-cost", "Loss against training time", f"training time ({unit})", more_is_better=False
    )


@styled
def decoding_speed_plot(result: StudyResult) -> Plot | None:
    """Loss against decoding speed: with drafts where there are any, plain otherwise."""
    points: dict[str, list[tuple[float, float]]] = {}
    for setting, runs in _runs(result).items():
        for run in runs:
            rate = run.values.get("decode_tok_per_s", run.values.get("decode_tok_per_s_plain"))
            if rate is not None and "loss" in run.values:
                points.setdefault(setting, []).append((rate, run.values["loss"]))
    label = "greedy decoding (tokens per second)"
    return _pareto_plot(result, points, "decoding-speed", "Loss against decoding speed", label, more_is_better=True)


def _pareto_plot(
    result: StudyResult, points: Mapping[str, Sequence[tuple[float, float]]], name: str, title: str, label: str, *,
    more_is_better: bool,
) -> Plot | None:  # fmt: skip
    if len(points) < 2:
        return None
    figure, axes = _figure_with_legend(result, list(points))
    means = {setting: (_mean([x for x, _ in seeds]), _mean([y for _, y in seeds])) for setting, seeds in points.items()}
    sign = -1 if more_is_better else 1
    front = pareto_front({setting: (sign * x, y) for setting, (x, y) in means.items()})
    joined = sorted(means[setting] for setting in front)
    axes.plot([x for x, _ in joined], [y for _, y in joined], color=MUTED, linewidth=1, linestyle=_DASH, zorder=1)
    for setting, seeds in points.items():
        style = _style(result, setting)
        axes.plot(
            [x for x, _ in seeds], [y for _, y in seeds], style.marker, color=style.colour, markersize=3.5, alpha=0.4
        )
        axes.plot(*means[setting], style.marker, color=style.colour, markersize=8)
    axes.set_xlabel(label)
    axes.set_ylabel("loss (nats per token)")
    axes.margins(0.12)
    corner = "right" if more_is_better else "left"
    words = (
        f"Small: seeds. Large: their mean. Better is lower and further {corner}; the dashed line joins the settings "
    )
    words += "that no other beats in both."
    texts = [f"{setting} loss {y:.3f} at {x:.3g}" for setting, (x, y) in means.items()]
    alternative = f"{title}, {label}: {'; '.join(texts)}. Beaten by none in both: {', '.join(front)}"
    return Plot(name, title, words, to_svg(figure, name, alternative))


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points (both lower is better) than which no other is at least as good in both and better in one.

    >>> pareto_front({"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (2.0, 3.0)})
    ['a', 'b']
    """
    return [
        name
        for name, (x, y) in points.items()
        if not any(u <= x and v <= y and (u, v) != (x, y) for u, v in points.values())
    ]


@styled
def ladder_plot(result: StudyResult) -> Plot | None:
    """The baseline's loss by its length in steps (logarithmic), and the settings' final losses beside it."""
    runs = [run for run in result.runs if run.setting == result.baseline and run.curve and "loss" in run.values]
    if all(run.ladder is None for run in runs):
        return None
    rungs: dict[int, list[float]] = {}
    for run in runs:
        rungs.setdefault(run.curve[-1].step, []).append(run.values["loss"])
    steps = sorted(rungs)
    others = [name for name in _others(result) if any(run.curve for run in _runs(result).get(name, []))]
    figure, axes = _figure_with_legend(result, [result.baseline, *others])
    style = _style(result, result.baseline)
    means = [_mean(rungs[step]) for step in steps]
    axes.plot(steps, means, color=style.colour, marker=style.marker, linewidth=1.6, markersize=6)
    for step in steps:
        axes.plot([step] * len(rungs[step]), rungs[step], style.marker, color=style.colour, markersize=3.5, alpha=0.4)
    texts = [f"{result.baseline} {loss:.3f} at {step} steps" for step, loss in zip(steps, means, strict=True)]
    found = comparisons_of(result)
    for setting in others:
        ends = [run for run in _runs(result)[setting] if run.curve and "loss" in run.values]
        end, loss = _mean([run.curve[-1].step for run in ends]), _mean([run.values["loss"] for run in ends])
        style = _style(result, setting)
        axes.plot(end, loss, style.marker, color=style.colour, markersize=8, mec=INK, mew=0.6, zorder=3)
        texts.append(f"{setting} {loss:.3f} at {end:.0f} steps")
        ratio = found.get((setting, "steps_ratio"))
        if ratio is not None and baseline_of(result, setting) == result.baseline:
            needed = end / ratio.value.mean
            axes.plot([end, needed], [loss, loss], color=style.colour, linewidth=1, linestyle=_DASH)
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("optimizer steps of the whole training (logarithmic)")
    axes.set_ylabel("final loss (nats per token)")
    words = "Line: the baseline trained at several lengths, with schedules of their own. A setting below it gains; "
    words += "dots lead to the steps that the baseline needs to its loss."
    return Plot("ladder", "Steps to the same loss", words, to_svg(figure, "ladder", "; ".join(texts)))


# ------------------------------------------------------------------------------------------------------- any measure


@styled
def measure_plot(result: StudyResult, name: str) -> Plot | None:
    """Any measure by setting, mean and 95% interval over seeds; None: no run has it."""
    measure = known_measure(name)
    rows = [one for one in result.comparisons if one.measure == name]
    if not rows:
        return None
    figure, axes = new_figure(max(0.6 * HEIGHT, 80 + 30 * len(rows)))
    for row, comparison in enumerate(rows):
        filled = comparison.resolved is not False
        _interval(axes, comparison.value, row, _style(result, comparison.setting), filled=filled)
    _name_rows(axes, [one.setting for one in rows])
    if measure.pair:
        axes.axvline(1.0 if measure.form == "ratio" else 0.0, color=INK, linewidth=1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, measure)))
    axes.set_xlabel(title_of(name))
    hint = {"lower": " Lower is better.", "higher": " Higher is better.", None: ""}[measure.better]
    words = f"{measure.meaning[:1].upper()}{measure.meaning[1:]}.{hint} Mean and 95% interval over seeds; hollow: the "
    words += "difference from the baseline is not resolved."
    alternative = f"{title_of(name)}: " + "; ".join(
        f"{one.setting} {shown_estimate(one.value, measure)}" for one in rows
    )
    title = title_of(name)
    svg = to_svg(figure, f"measure-{name.replace('/', '-')}", alternative)
    return Plot(f"measure-{name}", title[:1].upper() + title[1:], words, svg)


# --------------------------------------------------------------------------------------------------------------- parts


def _runs(result: StudyResult) -> dict[str, list[RunResult]]:
    """Runs of each setting, those of the ladder left out."""
    runs: dict[str, list[RunResult]] = {}
    for facts in result.settings:
        if own := [run for run in result.runs if run.setting == facts.name and run.ladder is None]:
            runs[facts.name] = own
    return runs


def _others(result: StudyResult) -> list[str]:
    return [facts.name for facts in result.settings if facts.name != result.baseline]


def _style(result: StudyResult, setting: str) -> _Style:
    """Ink for the baseline; colours and markers go around at different lengths, so that pairs do not recur soon."""
    if setting == result.baseline:
        return _Style(INK, _MARKERS[0])
    index = _others(result).index(setting)
    return _Style(arm_colour(_COLOURS[index % NUM_ARM_COLOURS]), _MARKERS[(index + 1) % len(_MARKERS)])


def _figure_with_legend(result: StudyResult, names: Sequence[str]) -> tuple[Figure, Axes]:
    figure, axes = new_figure(HEIGHT + _legend(names))
    _add_legend(figure, result, names)
    return figure, axes


def _legend(names: Sequence[str]) -> float:
    """Height of a legend, px."""
    return _LEGEND_LINE * -(-len(names) // _legend_columns(names)) + 6


def _legend_columns(names: Sequence[str]) -> int:
    return max(1, min(3, _LEGEND_LETTERS // (max(map(len, names)) + 6)))


def _add_legend(figure: Figure, result: StudyResult, names: Sequence[str]) -> None:
    styles = [_style(result, name) for name in names]
    keys = [
        Line2D([], [], color=style.colour, marker=style.marker, linewidth=1.4, markersize=5.5, label=plain(name))
        for style, name in zip(styles, names, strict=True)
    ]
    figure.legend(
        handles=keys, loc="outside lower left", ncols=_legend_columns(names), frameon=False, fontsize=11,
        handlelength=1.6, columnspacing=1.2, labelspacing=0.25, borderpad=0,
    )  # fmt: skip


def _interval(axes: Axes, found: Estimate, place: float, style: _Style, *, filled: bool, upright: bool = False) -> None:
    """A mean with its interval: along x at height `place`, or `upright` along y at abscissa `place`."""
    low, high = (found.mean if end is None else end for end in (found.low, found.high))
    ends, places = (low, high), (place, place)
    axes.plot(*((places, ends) if upright else (ends, places)), color=style.colour, linewidth=1.4)
    at = (place, found.mean) if upright else (found.mean, place)
    face = style.colour if filled else "none"
    axes.plot(*at, style.marker, color=style.colour, markersize=6.5, markerfacecolor=face, markeredgewidth=1.4)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [textwrap.fill(plain(name), 20) for name in names], fontsize=11)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _tick(value: float, measure: Measure) -> str:
    if measure.form == "share":
        return f"{100 * value:.3g}%"
    return count(round(value)) if measure.form == "count" else f"{value:.4g}"


def _time_unit(longest_s: float) -> tuple[float, str]:
    for size, name in ((3600.0, "hours"), (60.0, "minutes")):
        if longest_s >= 2 * size:
            return size, name
    return 1.0, "seconds"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


_MAKERS = (
    loss_by_tokens_plot, loss_by_time_plot, differences_plot, position_plot, lengths_plot, acceptance_plot,
    overhead_plot, training_cost_plot, decoding_speed_plot, ladder_plot,
)  # fmt: skip
