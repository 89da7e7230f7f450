"""Makes figures of one size and style, and names the ends of curves.

matplotlib knows only fixed colours, so each role is drawn in a stand-in colour that `nextn.report.svg` replaces by a
CSS variable: one SVG serves the light and the dark theme. Text stays text. All plots have one width, so that type has
the same size everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextn.report.svg import FRAME, INK, MUTED

WIDTH, HEIGHT = 410, 280  # px of the page at scale 1

_STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "nextn",
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": FRAME,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FRAME,
    "grid.linewidth": 0.7,
    "xtick.color": FRAME,
    "ytick.color": FRAME,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}
styled = matplotlib.rc_context(_STYLE)
"""Decorator of every plot: the settings hold while it is made, and only then."""


def blank_figure(height: float = HEIGHT) -> Figure:
    """A figure of the page's width, `height` px, without axes."""
    return Figure((WIDTH / 72, height / 72), dpi=72, layout="constrained")


def new_figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of the page's width, `height` px, and its only axes."""
    figure = blank_figure(height)
    return figure, figure.subplots()


def token_unit(num_tokens: int) -> tuple[float, str]:
    """By what to divide token counts up to `num_tokens`, and what that is called."""
    return (1e6, "millions") if num_tokens >= 1_000_000 else (1e3, "thousands")


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name curves at their right ends, moved apart where the names would overlap; (height, text, colour) each."""
    low, high = axes.get_ylim()
    gap = 0.075 * (high - low)
    ordered = sorted(ends)
    heights = [height for height, _, _ in ordered]
    for _ in range(100):  # push neighbours apart until nothing overlaps, and up from the frame's lower edge
        heights[:1] = [max(height, low) for height in heights[:1]]
        for index in range(1, len(heights)):
            overlap = gap - (heights[index] - heights[index - 1])
            if overlap > 0:
                heights[index - 1] -= overlap / 2
                heights[index] += overlap / 2
    for height, (_, text, colour) in zip(heights, ordered, strict=True):
        axes.annotate(text, (1, height), (5, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                      va="center", color=colour, fontsize=11.5, annotation_clip=False)  # fmt: skip
