"""Plots of the loss: over tokens and time, against the baseline's, by position, and beside the ladder's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean

from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from nextn.report.figure import HEIGHT, new_figure, styled, token_unit
from nextn.report.svg import INK, MUTED, to_svg
from nextn.study.drawing import (
    DASH,
    Plot,
    Style,
    draw_interval,
    figure_with_legend,
    name_rows,
    runs_by_variant,
    style_of,
    time_unit,
)
from nextn.study.intervals import estimate, excludes
from nextn.study.results import CurvePoint, Estimate, StudyResult
from nextn.study.tables import (
    EQUALS,
    against_baseline,
    baseline_of,
    comparisons_of,
    difference_text,
    other_variants,
)

_NUM_EIGHTHS = 8
_MARKERS = dict(zip(EQUALS, "osD", strict=True))


# -------------------------------------------------------------------------------------------------------------- curves


@styled
def loss_by_tokens_plot(result: StudyResult) -> Plot | None:
    """Held-out loss over tokens, mean over seeds with a band from the lowest to the highest."""
    curves = _curves(result)
    if not curves:
        return None
    scale, unit = token_unit(max(points[-1][0].num_tokens for points in curves.values()))
    label = f"trained tokens ({unit})"
    return _curves_plot(result, curves, "loss-tokens", "Loss over tokens", label, lambda at: at.num_tokens / scale)


@styled
def loss_by_time_plot(result: StudyResult) -> Plot | None:
    """The same over the training's seconds on a quiet machine."""
    curves = _curves(result)
    if not curves:
        return None
    scale, unit = time_unit(max(point.training_s for points in curves.values() for point in points[-1]))
    label = f"training time ({unit})"
    return _curves_plot(result, curves, "loss-time", "Loss over time", label, lambda at: at.training_s / scale)


def _curves_plot(
    result: StudyResult, curves: Mapping[str, list[list[CurvePoint]]], name: str, title: str, label: str,
    place: Callable[[CurvePoint], float],
) -> Plot:  # fmt: skip
    figure, axes = figure_with_legend(result, list(curves))
    settled, texts = [], []
    for variant, points in curves.items():
        style = style_of(result, variant)
        places = [fmean(place(one) for one in seeds) for seeds in points]
        losses = [[one.loss for one in seeds] for seeds in points]
        means = [fmean(values) for values in losses]
        lowest, highest = [min(values) for values in losses], [max(values) for values in losses]
        axes.fill_between(places, lowest, highest, color=style.colour, alpha=0.18, lw=0)
        axes.plot(places, means, color=style.colour, linewidth=1.4, marker=style.marker, markersize=4)
        settled += [
            value for at, values in zip(places, losses, strict=True) if at >= places[-1] / 4 for value in values
        ]
        texts.append(f"{variant} {means[-1]:.3f} at {places[-1]:.3g}")
    spread = max(settled) - min(settled)
    axes.set_ylim(min(settled) - 0.06 * spread, max(settled) + 0.04 * spread)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel("loss (nats per token)")
    words = (
        "Held-out next-token loss: mean over seeds, and a band from the lowest to the highest. What comes before a "
        "quarter of the training may lie above the frame."
    )
    return Plot(name, title, words, to_svg(figure, name, f"{title}, {label}; at the end: {'; '.join(texts)}"))


def _curves(result: StudyResult) -> dict[str, list[list[CurvePoint]]]:
    """By variant and step, the points of all its seeds; steps that a seed lacks are left out."""
    curves = {}
    for variant, runs in runs_by_variant(result).items():
        by_step = [{point.step: point for point in run.curve} for run in runs]
        steps = [step for step in sorted(by_step[0]) if all(step in points for points in by_step)]
        if steps:
            curves[variant] = [[points[step] for points in by_step] for step in steps]
    return curves


# -------------------------------------------------------------------------------------------------------- differences


@styled
def differences_plot(result: StudyResult) -> Plot | None:
    """Forest plot: the loss less the baseline's with 95% intervals, at equal tokens, FLOPs and time."""
    found = comparisons_of(result)
    variants = [name for name in other_variants(result) if any((name, metric) in found for metric in EQUALS)]
    metrics = [metric for metric in EQUALS if any((name, metric) in found for name in variants)]
    if not variants:
        return None
    figure, axes = new_figure(max(HEIGHT, 90 + (16 * len(metrics) + 12) * len(variants)))
    texts = []
    for row, variant in enumerate(variants):
        for index, metric in enumerate(metrics):
            comparison = found.get((variant, metric))
            difference = None if comparison is None else against_baseline(comparison)
            if comparison is None or difference is None:
                continue
            place = row + 0.7 * ((index + 0.5) / len(metrics) - 0.5)
            style = Style(style_of(result, variant).colour, _MARKERS[metric])
            draw_interval(axes, difference, place, style, filled=comparison.resolved is True)
            texts.append(f"{variant} at {EQUALS[metric]} {difference_text(comparison, len(result.seeds))}")
    name_rows(axes, variants)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_xlabel("loss less the baseline's (nats per token)")
    keys = [
        Line2D([], [], color=MUTED, marker=_MARKERS[metric], linestyle="", label=EQUALS[metric]) for metric in metrics
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    words = (
        "Left of the line is better than the baseline. Mean of the paired differences and 95% interval; hollow: not "
        "resolved, the interval holds 0."
    )
    alternative = "Loss less the baseline's: " + "; ".join(texts)
    return Plot("differences", "Loss against the baseline", words, to_svg(figure, "differences", alternative))


@styled
def position_plot(result: StudyResult) -> Plot | None:
    """Loss less the baseline's by eighth of a row, with 95% intervals over seeds."""
    lines = _differences_by_eighth(result)
    if not lines:
        return None
    figure, axes = figure_with_legend(result, list(lines))
    texts = []
    for index, (variant, line) in enumerate(lines.items()):
        shift = 0.6 * ((index + 0.5) / len(lines) - 0.5)
        style = style_of(result, variant)
        places = [eighth + shift for eighth in range(1, _NUM_EIGHTHS + 1)]
        axes.plot(places, [one.mean for one in line], color=style.colour, linewidth=1, alpha=0.5)
        for place, one in zip(places, line, strict=True):
            draw_interval(axes, one, place, style, filled=excludes(one, 0.0), upright=True)
        texts.append(f"{variant} " + " ".join(f"{one.mean:+.3f}" for one in line))
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_xticks(range(1, _NUM_EIGHTHS + 1))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("context before the token (eighth of a row)")
    axes.set_ylabel("loss less the baseline's (nats)")
    words = (
        "Below the line is better than the baseline. Bars: 95% intervals over seeds; hollow: not resolved. A gain that "
        "grows to the right is one in the use of long context."
    )
    alternative = "Loss less the baseline's in eighths 1 to 8 of a row: " + "; ".join(texts)
    return Plot("position", "Loss by position", words, to_svg(figure, "position", alternative))


def _differences_by_eighth(result: StudyResult) -> dict[str, list[Estimate]]:
    """By variant, for each eighth of a row, over the seeds that it shares with its baseline."""
    losses = {
        variant: {run.seed: run.loss_by_position for run in runs if len(run.loss_by_position) == _NUM_EIGHTHS}
        for variant, runs in runs_by_variant(result).items()
    }
    lines = {}
    for variant in other_variants(result):
        own, other = losses.get(variant, {}), losses.get(baseline_of(result, variant), {})
        if seeds := own.keys() & other.keys():
            lines[variant] = [
                estimate([own[seed][eighth] - other[seed][eighth] for seed in seeds]) for eighth in range(_NUM_EIGHTHS)
            ]
    return lines


# -------------------------------------------------------------------------------------------------------------- ladder


@styled
def ladder_plot(result: StudyResult) -> Plot | None:
    """The baseline's loss by its length in steps (logarithmic), and the variants' final losses beside it."""
    runs = [run for run in result.runs if run.curve and "loss" in run.values]
    if all(run.ladder is None for run in runs if run.variant == result.baseline):
        return None
    rungs: dict[int, list[float]] = {}
    others: dict[str, list[tuple[int, float]]] = {name: [] for name in other_variants(result)}
    for run in runs:
        step, loss = run.curve[-1].step, run.values["loss"]
        if run.variant == result.baseline:
            rungs.setdefault(step, []).append(loss)
        elif run.ladder is None:
            others[run.variant].append((step, loss))
    others = {variant: points for variant, points in others.items() if points}
    figure, axes = figure_with_legend(result, [result.baseline, *others])
    style = style_of(result, result.baseline)
    steps = sorted(rungs)
    means = [fmean(rungs[step]) for step in steps]
    axes.plot(steps, means, color=style.colour, marker=style.marker, linewidth=1.6, markersize=6)
    for step in steps:
        axes.plot([step] * len(rungs[step]), rungs[step], style.marker, color=style.colour, markersize=3.5, alpha=0.4)
    texts = [f"{result.baseline} {loss:.3f} at {step} steps" for step, loss in zip(steps, means, strict=True)]
    found = comparisons_of(result)
    for variant, points in others.items():
        end, loss = fmean(step for step, _ in points), fmean(loss for _, loss in points)
        style = style_of(result, variant)
        axes.plot(end, loss, style.marker, color=style.colour, markersize=8, mec=INK, mew=0.6, zorder=3)
        texts.append(f"{variant} {loss:.3f} at {end:.0f} steps")
        ratio = found.get((variant, "steps_ratio"))
        if ratio is not None and baseline_of(result, variant) == result.baseline:
            needed = end / ratio.value.mean
            axes.plot([end, needed], [loss, loss], color=style.colour, linewidth=1, linestyle=DASH)
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("optimizer steps of the whole training (logarithmic)")
    axes.set_ylabel("final loss (nats per token)")
    words = (
        "Line: the baseline trained at several lengths, with schedules of their own. A variant below it gains; dots "
        "lead to the steps that the baseline needs to its loss."
    )
    return Plot("ladder", "Steps to the same loss", words, to_svg(figure, "ladder", "; ".join(texts)))
