"""Draws what the plots of a study share: a variant's colour and marker, legends, intervals and rows.

A variant has one colour and one marker in all plots: the baseline is ink, the others follow in the study's order, and
no two of the first two dozen share both.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nextn.report.figure import HEIGHT, blank_figure
from nextn.report.svg import INK, NUM_ARM_COLOURS, arm_colour
from nextn.study.results import Estimate, RunResult, StudyResult
from nextn.study.tables import other_variants
from nextn.wording import plain

DASH = (0, (2, 2))
"""Line style of what is no variant's own."""

_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "p", "h", "*")
_COLOURS = (0, 4, 1, 5, 2, 6, 7, 3)  # neighbours differ in hue
_LEGEND_LINE, _LEGEND_LETTERS = 17, 46  # px a line; letters that fit in one


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
class Style:
    """How a variant looks.

    Attributes:
        colour: stand-in for a colour of the page.
        marker: matplotlib's letter.
    """

    colour: str
    marker: str


# ------------------------------------------------------------------------------------------------------------ variants


def runs_by_variant(result: StudyResult) -> dict[str, list[RunResult]]:
    """Runs of each variant that has any, those of the ladder left out."""
    runs: dict[str, list[RunResult]] = {}
    for facts in result.variants:
        if own := [run for run in result.runs if run.variant == facts.name and run.ladder is None]:
            runs[facts.name] = own
    return runs


def style_of(result: StudyResult, variant: str) -> Style:
    """Ink for the baseline; colours and markers go around at different lengths, so that pairs do not recur soon."""
    if variant == result.baseline:
        return Style(INK, _MARKERS[0])
    index = other_variants(result).index(variant)
    return Style(arm_colour(_COLOURS[index % NUM_ARM_COLOURS]), _MARKERS[(index + 1) % len(_MARKERS)])


# -------------------------------------------------------------------------------------------------------------- figure


def figure_with_legend(result: StudyResult, names: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure with a legend of these variants below it, and its only axes."""
    figure, panels = panels_with_legend(result, names, 1)
    return figure, panels[0]


def panels_with_legend(result: StudyResult, names: Sequence[str], num_panels: int) -> tuple[Figure, list[Axes]]:
    """The same with several axes beside each other that share their y axis."""
    num_columns = max(1, min(3, _LEGEND_LETTERS // (max(map(len, names)) + 6)))
    num_lines = -(-len(names) // num_columns)
    figure = blank_figure(HEIGHT + _LEGEND_LINE * num_lines + 6)
    panels = list(figure.subplots(1, num_panels, sharey=True, squeeze=False)[0])
    styles = [style_of(result, name) for name in names]
    keys = [
        Line2D([], [], color=style.colour, marker=style.marker, linewidth=1.4, markersize=5.5, label=plain(name))
        for style, name in zip(styles, names, strict=True)
    ]
    figure.legend(
        handles=keys, loc="outside lower left", ncols=num_columns, frameon=False, fontsize=11,
        handlelength=1.6, columnspacing=1.2, labelspacing=0.25, borderpad=0,
    )  # fmt: skip
    return figure, panels


def draw_interval(
    axes: Axes, found: Estimate, place: float, style: Style, *, filled: bool, upright: bool = False
) -> None:
    """A mean with its interval: along x at height `place`, or `upright` along y at abscissa `place`."""
    low, high = (found.mean if end is None else end for end in (found.low, found.high))
    ends, places = (low, high), (place, place)
    axes.plot(*((places, ends) if upright else (ends, places)), color=style.colour, linewidth=1.4)
    at = (place, found.mean) if upright else (found.mean, place)
    face = style.colour if filled else "none"
    axes.plot(*at, style.marker, color=style.colour, markersize=6.5, markerfacecolor=face, markeredgewidth=1.4)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Rows 0, 1, ... from the top, each with its name at the left."""
    axes.set_yticks(range(len(names)), [textwrap.fill(plain(name), 20) for name in names], fontsize=11)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def time_unit(longest_s: float) -> tuple[float, str]:
    """By what to divide times up to `longest_s` seconds, and what that is called.

    >>> time_unit(90.0), time_unit(600.0), time_unit(7200.0)
    ((1.0, 'seconds'), (60.0, 'minutes'), (3600.0, 'hours'))
    """
    for size, name in ((3600.0, "hours"), (60.0, "minutes")):
        if longest_s >= 2 * size:
            return size, name
    return 1.0, "seconds"
