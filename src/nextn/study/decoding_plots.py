"""Plots of self-speculative decoding: tokens per trunk forward, acceptance by depth."""

from __future__ import annotations

from matplotlib.ticker import PercentFormatter

from nextn.report.figure import HEIGHT, new_figure, styled
from nextn.report.svg import to_svg
from nextn.study.compare import shown_estimate
from nextn.study.drawing import Plot, draw_interval, name_rows, panels_with_legend, style_of
from nextn.study.metrics import METRICS
from nextn.study.results import StudyResult
from nextn.study.tables import comparisons_of


@styled
def lengths_plot(result: StudyResult) -> Plot | None:
    """Mean acceptance length by variant, greedy filled and sampled hollow, with 95% intervals."""
    found = comparisons_of(result)
    names = [one.name for one in result.variants if {(one.name, "al_greedy"), (one.name, "al_sampled")} & found.keys()]
    if not names:
        return None
    figure, axes = new_figure(max(HEIGHT, 80 + 34 * len(names)))
    texts = []
    for row, variant in enumerate(names):
        for metric, shift, filled in (("al_greedy", -0.16, True), ("al_sampled", 0.16, False)):
            if comparison := found.get((variant, metric)):
                draw_interval(axes, comparison.value, row + shift, style_of(result, variant), filled=filled)
                texts.append(f"{variant} {metric} {shown_estimate(comparison.value, METRICS[metric])}")
    name_rows(axes, names)
    axes.set_xlim(left=1)
    axes.set_xlabel("tokens per trunk forward (AL)")
    words = "Bonus token included, so plain decoding has 1. Filled: greedy. Hollow: sampled. Bars: 95% intervals."
    alternative = "Mean acceptance length: " + "; ".join(texts)
    return Plot("lengths", "Tokens per trunk forward", words, to_svg(figure, "lengths", alternative))


def conditional_acceptance_plot(result: StudyResult) -> Plot | None:
    """Conditional acceptance by depth of every variant, greedy and sampled beside each other."""
    words = "Share of drafts of each depth that are accepted, given that all earlier ones of the cycle were."
    return _acceptance_plot(result, "acceptance", "Acceptance by depth", words, unconditional=False)


def unconditional_acceptance_plot(result: StudyResult) -> Plot | None:
    """The same of unconditional acceptance."""
    words = "Share of cycles in which the draft of each depth and all earlier ones are accepted."
    title = "Unconditional acceptance by depth"
    return _acceptance_plot(result, "acceptance-unconditional", title, words, unconditional=True)


@styled
def _acceptance_plot(result: StudyResult, name: str, title: str, words: str, *, unconditional: bool) -> Plot | None:
    suffix = "_unconditional" if unconditional else ""
    panels = {kind: _by_depth(result, f"acceptance_{kind}{suffix}") for kind in ("greedy", "sampled")}
    panels = {kind: lines for kind, lines in panels.items() if lines}
    if not panels:
        return None
    names = [one.name for one in result.variants if any(one.name in lines for lines in panels.values())]
    figure, row = panels_with_legend(result, names, len(panels))
    texts = []
    for axes, (kind, lines) in zip(row, panels.items(), strict=True):
        for variant, shares in lines.items():
            style = style_of(result, variant)
            axes.plot(
                list(shares), list(shares.values()), color=style.colour, marker=style.marker, markersize=6,
                linewidth=1.5,
            )  # fmt: skip
            texts.append(f"{variant}, {kind}: " + ", ".join(f"{share:.0%}" for share in shares.values()))
        deepest = max(max(shares) for shares in lines.values())
        axes.set_xticks(range(1, deepest + 1))
        axes.set_xlim(0.75, deepest + 0.25)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(f"depth, {kind}")
    row[0].set_ylabel(f"acceptance, {'unconditional' if unconditional else 'conditional'}")
    return Plot(name, title, words, to_svg(figure, name, "; ".join(texts)))


def _by_depth(result: StudyResult, stem: str) -> dict[str, dict[int, float]]:
    """By variant and depth, the means of this metric, the first depth first; variants without it are left out."""
    means: dict[str, dict[int, float]] = {facts.name: {} for facts in result.variants}
    for (variant, metric), comparison in comparisons_of(result).items():
        if (depth := metric.removeprefix(f"{stem}_")).isdigit():
            means[variant][int(depth)] = comparison.value.mean
    return {variant: dict(sorted(shares.items())) for variant, shares in means.items() if shares}
