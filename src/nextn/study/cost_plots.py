"""Plots costs and their return: time and FLOPs of a step, loss against training time and decoding speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.ticker import PercentFormatter

from nextn.report.figure import styled
from nextn.report.svg import MUTED, to_svg
from nextn.study.drawing import (
    DASH,
    Plot,
    draw_interval,
    figure_with_legend,
    runs_by_variant,
    style_of,
    time_unit,
)
from nextn.study.results import StudyResult
from nextn.study.tables import comparisons_of, other_variants


@styled
def overhead_plot(result: StudyResult) -> Plot | None:
    """Measured time of a training step against its calculated FLOPs, both beside the baseline's."""
    found = comparisons_of(result)
    metrics = ("flops_overhead", "time_overhead")
    names = [name for name in other_variants(result) if all((name, metric) in found for metric in metrics)]
    if not names:
        return None
    figure, axes = figure_with_legend(result, names)
    texts = []
    highest = 0.0
    for variant in names:
        flops, seconds = (found[variant, metric].value for metric in metrics)
        draw_interval(axes, seconds, flops.mean, style_of(result, variant), filled=True, upright=True)
        highest = max(highest, flops.mean, seconds.mean)
        texts.append(f"{variant}: FLOPs {flops.mean:+.0%}, time {seconds.mean:+.0%}")
    axes.plot([0, highest], [0, highest], color=MUTED, linewidth=1, linestyle=DASH)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("more FLOPs per step, calculated")
    axes.set_ylabel("more time per step, measured")
    words = "A training step beside the baseline's. On the dashed line, the time grows as the FLOPs do; above it, more."
    return Plot("overhead", "What a step costs", words, to_svg(figure, "overhead", "; ".join(texts)))


def training_cost_plot(result: StudyResult) -> Plot | None:
    """Loss against the seconds of training; the variants that nothing beats in both are joined."""
    points: dict[str, list[tuple[float, float]]] = {}
    for variant, runs in runs_by_variant(result).items():
        for run in runs:
            if run.curve and "loss" in run.values:
                points.setdefault(variant, []).append((run.curve[-1].training_s, run.values["loss"]))
    scale, unit = time_unit(max((seconds for seeds in points.values() for seconds, _ in seeds), default=0.0))
    scaled = {variant: [(seconds / scale, loss) for seconds, loss in seeds] for variant, seeds in points.items()}
    label = f"training time ({unit})"
    return _pareto_plot(result, scaled, "training-cost", "Loss against training time", label, more_is_better=False)


def decoding_speed_plot(result: StudyResult) -> Plot | None:
    """Loss against decoding speed: with drafts where there are any, plain otherwise."""
    points: dict[str, list[tuple[float, float]]] = {}
    for variant, runs in runs_by_variant(result).items():
        for run in runs:
            rate = run.values.get("decode_tok_per_s", run.values.get("decode_tok_per_s_plain"))
            if rate is not None and "loss" in run.values:
                points.setdefault(variant, []).append((rate, run.values["loss"]))
    label = "greedy decoding (tokens per second)"
    return _pareto_plot(result, points, "decoding-speed", "Loss against decoding speed", label, more_is_better=True)


@styled
def _pareto_plot(
    result: StudyResult, points: Mapping[str, Sequence[tuple[float, float]]], name: str, title: str, label: str, *,
    more_is_better: bool,
) -> Plot | None:  # fmt: skip
    if len(points) < 2:
        return None
    figure, axes = figure_with_legend(result, list(points))
    means = {variant: (fmean(x for x, _ in seeds), fmean(y for _, y in seeds)) for variant, seeds in points.items()}
    sign = -1 if more_is_better else 1
    front = pareto_front({variant: (sign * x, y) for variant, (x, y) in means.items()})
    joined = sorted(means[variant] for variant in front)
    axes.plot([x for x, _ in joined], [y for _, y in joined], color=MUTED, linewidth=1, linestyle=DASH, zorder=1)
    for variant, seeds in points.items():
        style = style_of(result, variant)
        axes.plot(
            [x for x, _ in seeds], [y for _, y in seeds], style.marker, color=style.colour, markersize=3.5, alpha=0.4
        )
        axes.plot(*means[variant], style.marker, color=style.colour, markersize=8)
    axes.set_xlabel(label)
    axes.set_ylabel("loss (nats per token)")
    axes.margins(0.12)
    corner = "right" if more_is_better else "left"
    words = (
        f"Small: seeds. Large: their mean. Better is lower and further {corner}; the dashed line joins the variants "
        "that no other beats in both."
    )
    texts = [f"{variant} loss {y:.3f} at {x:.3g}" for variant, (x, y) in means.items()]
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
