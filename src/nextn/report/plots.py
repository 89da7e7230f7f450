"""Plots the page of a run. Every number that a plot shows also stands in a table of the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from matplotlib.ticker import MaxNLocator, PercentFormatter

from nextn.evaluation.results import DecodingArm, Speedup
from nextn.report.figure import HEIGHT, label_ends, new_figure, styled, token_unit
from nextn.report.svg import INK, MUTED, arm_colour, depth_colour, to_svg
from nextn.training import TeacherForcedEvaluation

MAX_BARS_WITH_NUMBERS = 10  # more would overlap

_DEPTH_MARKERS = "osD^vP"
_ARM_MARKERS = "oDsP"


class AcceptingArm(Protocol):
    """What a plot of acceptance reads of an arm; see `DecodingArm`."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def draft_length(self) -> int: ...  # noqa: D102

    @property
    def acceptance_unconditional(self) -> Sequence[float | None]: ...  # noqa: D102

    @property
    def acceptance_conditional(self) -> Sequence[float | None]: ...  # noqa: D102


@styled
def loss_plot(history: Sequence[Mapping[str, Any]]) -> str:
    """Cross-entropy per depth over trained tokens: training as a running mean, evaluations as markers."""
    train = [line for line in history if line["kind"] == "train"]
    evaluations = [line for line in history if line["kind"] == "evaluation"]
    figure, axes = new_figure(height=1.2 * HEIGHT)
    num_depths = len(history[0]["loss_per_depth"])
    scale, unit = token_unit(max(line["num_tokens"] for line in history))
    ends: list[tuple[float, str, str]] = []
    settled: list[float] = []  # losses after the first tenth of training decide the frame
    for depth in range(num_depths):
        tokens = [line["num_tokens"] / scale for line in train]
        smooth = _running_mean([_number(line["loss_per_depth"][depth]) for line in train])
        axes.plot(tokens, smooth, color=depth_colour(depth), linewidth=1.2, alpha=0.65)
        marks = [_number(line["loss_per_depth"][depth]) for line in evaluations]
        axes.plot(
            [line["num_tokens"] / scale for line in evaluations],
            marks,
            _DEPTH_MARKERS[depth % len(_DEPTH_MARKERS)],
            color=depth_colour(depth),
            markersize=5,
        )
        settled += [value for value in smooth[len(smooth) // 10 :] + marks if math.isfinite(value)]
        if last := [value for value in marks or smooth if math.isfinite(value)]:
            ends.append((last[-1], f"depth {depth}: {last[-1]:.2f}", depth_colour(depth)))
    axes.set_xlim(left=0, right=max(line["num_tokens"] for line in history) / scale * 1.03)
    if settled:
        lowest, highest = min(settled), max(settled)
        axes.set_ylim(lowest - 0.08 * (highest - lowest), highest + 0.02 * (highest - lowest))
    axes.set_xlabel(f"trained tokens ({unit})")
    axes.set_ylabel("loss (nats per token)")
    label_ends(axes, ends)
    alternative = "Loss per depth over trained tokens; last values: " + ", ".join(text for _, text, _ in ends)
    return to_svg(figure, "loss", alternative)


@styled
def acceptance_kinds_plot(teacher_forced: TeacherForcedEvaluation, arms: Sequence[DecodingArm]) -> str:
    """For each depth k >= 1: teacher_forced_accuracy, main_agreement, and conditional acceptance of every arm."""
    num_depths = len(teacher_forced.main_agreement)
    names = ["teacher_forced_accuracy", "main_agreement", *(f"acceptance, {arm.name}" for arm in arms)]
    rows: list[tuple[int, str, float, str]] = []
    for depth in range(1, num_depths + 1):
        values = [teacher_forced.teacher_forced_accuracy[depth], teacher_forced.main_agreement[depth - 1]]
        values += [
            _number(arm.acceptance_conditional[depth - 1]) if depth <= arm.draft_length else math.nan for arm in arms
        ]
        rows += [(depth, name, value, f"{value:.0%}") for name, value in zip(names, values, strict=True)]
    figure, axes = new_figure(height=max(HEIGHT, 60 + 22 * len(rows) + 14 * num_depths))
    places = [index + 0.7 * (index // len(names)) for index in range(len(rows))]
    for place, (depth, name, value, text) in zip(places, rows, strict=True):
        if math.isfinite(value):
            decoded = name.startswith("acceptance")
            axes.barh(place, value, height=0.62, color=depth_colour(depth), alpha=0.9 if decoded else 0.45)
            axes.annotate(text, (value, place), (4, 0), textcoords="offset points", va="center", fontsize=11)
    axes.set_yticks(places, [name for _, name, _, _ in rows], fontsize=11)
    for depth in range(1, num_depths + 1):
        axes.annotate(
            f"depth {depth}",
            (1, places[(depth - 1) * len(names)]),
            (4, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=depth_colour(depth),
            fontweight="bold",
        )
    axes.set_ylim(places[-1] + 0.6, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False)  # it would show through the pale bars, and every bar has its number
    axes.set_xlabel("share of drafted or predicted tokens")
    alternative = "Three kinds of acceptance: " + "; ".join(
        f"depth {depth} {name} {text}" for depth, name, value, text in rows if math.isfinite(value)
    )
    return to_svg(figure, "kinds", alternative)


@styled
def acceptance_by_depth_plot(arms: Sequence[AcceptingArm]) -> str:
    """Free-running acceptance of drafted token 1..N: conditional solid, unconditional dashed, one colour per arm."""
    figure, axes = new_figure()
    conditional_ends, unconditional_ends, texts = [], [], []
    for index, arm in enumerate(arms):
        depths = list(range(1, arm.draft_length + 1))
        conditional = [_number(value) for value in arm.acceptance_conditional]
        unconditional = [_number(value) for value in arm.acceptance_unconditional]
        colour, marker = arm_colour(index), _ARM_MARKERS[index % len(_ARM_MARKERS)]
        axes.plot(depths, conditional, "-", marker=marker, color=colour, linewidth=1.8, markersize=6)
        axes.plot(depths, unconditional, "--", marker=marker, color=colour, linewidth=1.4, markersize=6, mfc="none")
        conditional_ends.append((conditional[-1], f"{arm.name}, conditional", colour))
        unconditional_ends.append((unconditional[-1], f"{arm.name}, unconditional", colour))
        texts += [f"{arm.name} token {d} {c:.0%} conditional, {u:.0%} unconditional" for d, c, u in
                  zip(depths, conditional, unconditional, strict=True)]  # fmt: skip
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    longest = max(arm.draft_length for arm in arms)
    axes.set_xlim(0.85, longest + 0.15)
    axes.set_xticks(range(1, longest + 1))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("drafted token (depth)")
    axes.set_ylabel("acceptance")
    label_ends(axes, [end for end in conditional_ends + unconditional_ends if math.isfinite(end[0])])
    return to_svg(figure, "by-depth", "Acceptance by depth: " + "; ".join(texts))


@styled
def accepted_length_plot(arms: Sequence[DecodingArm]) -> str:
    """Histogram: share of verify cycles that accepted 0, 1, .. N drafted tokens, one bar per arm."""
    figure, axes = new_figure()
    longest = max(arm.draft_length for arm in arms)
    width = 0.84 / len(arms)
    texts = []
    for index, arm in enumerate(arms):
        num_cycles = sum(arm.histogram) or 1
        for num_accepted, count in enumerate(arm.histogram):
            place = num_accepted + (index - (len(arms) - 1) / 2) * width
            share = count / num_cycles
            axes.bar(place, share, width=width * 0.92, color=arm_colour(index))
            if len(arms) * (longest + 1) <= MAX_BARS_WITH_NUMBERS:
                axes.annotate(
                    f"{share:.0%}", (place, share), (0, 3), textcoords="offset points", ha="center", fontsize=11
                )
            texts.append(f"{arm.name} {num_accepted} accepted {share:.0%}")
        axes.annotate(
            arm.name, (1, 1), (0, -4 - 17 * index), xycoords="axes fraction", textcoords="offset points",
            ha="right", va="top", color=arm_colour(index), fontweight="bold",
        )  # fmt: skip
    top = axes.get_ylim()[1] * 1.25  # room for the arms' names
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_yticks([share for share in MaxNLocator(5).tick_values(0, top) if share <= min(1, top)])
    axes.set_ylim(0, top)
    axes.set_xticks(range(longest + 1))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("drafted tokens accepted in a cycle")
    axes.set_ylabel("share of cycles")
    return to_svg(figure, "lengths", "Accepted lengths: " + "; ".join(texts))


@styled
def tok_per_s_plot(arms: Sequence[DecodingArm]) -> str:
    """Wall-clock rate of plain and speculative decoding: every repeat a dot, the median a bar with its value."""
    rows = []
    for index, arm in enumerate(arms):
        rows.append((f"{arm.name}\nplain", arm.plain_tok_per_s, arm_colour(index), False))
        rows.append((f"{arm.name}\nspeculative", arm.speculative_tok_per_s, arm_colour(index), True))
    figure, axes = new_figure(height=max(HEIGHT, 60 + 60 * len(rows)))
    texts = []
    for row, (name, rates, colour, filled) in enumerate(rows):
        place = row + 0.35 * (row // 2)
        spread = [place + 0.16 * math.sin(2.4 * index) for index in range(len(rates))]  # apart, and the same every time
        axes.scatter(rates, spread, s=34, facecolors=colour if filled else "none", edgecolors=colour, alpha=0.75)
        median = statistics.median(rates)
        axes.plot([median, median], [place - 0.32, place + 0.32], color=INK, linewidth=2)
        axes.annotate(
            f"{median:.0f}", (median, place - 0.34), (0, 2), textcoords="offset points", ha="center", va="bottom",
            fontweight="bold", fontsize=11,
        )  # fmt: skip
        texts.append(f"{name.replace(chr(10), ' ')} median {median:.0f}, {min(rates):.0f} to {max(rates):.0f}")
    axes.set_yticks([row + 0.35 * (row // 2) for row in range(len(rows))], [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 1 + 0.35 * ((len(rows) - 1) // 2) + 0.6, -0.8)
    axes.set_xlim(left=0, right=max(max(rates) for _, rates, _, _ in rows) * 1.08)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("new tokens per second, batch 1")
    return to_svg(figure, "rates", "Tokens per second: " + "; ".join(texts))


@styled
def speedup_plot(number: int, speedups: Mapping[str, Speedup]) -> str:
    """Speedup of each arm: the median a bar with its value, the range a line; 1 is plain decoding.

    Args:
        number: of the plot on its page.
        speedups: by name of the arm, from top to bottom.
    """
    figure, axes = new_figure(height=max(0.5 * HEIGHT, 60 + 26 * len(speedups)))
    for place, speedup in enumerate(speedups.values()):
        axes.barh(place, speedup.median, height=0.62, color=depth_colour(1), alpha=0.85 if speedup.lowest > 1 else 0.4)
        axes.plot([speedup.lowest, speedup.highest], [place, place], color=INK, linewidth=1.6)
        axes.annotate(
            f"{speedup.median:.2f}", (speedup.highest, place), (5, 0), textcoords="offset points", va="center",
            fontsize=11,
        )  # fmt: skip
    axes.axvline(1.0, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    axes.set_yticks(range(len(speedups)), list(speedups), fontsize=11)
    axes.set_ylim(len(speedups) - 0.4, -0.6)
    axes.set_xlim(0, max([1.0, *(speedup.highest for speedup in speedups.values())]) * 1.15)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("speedup over the fastest plain decoding")
    texts = [f"{name} {one.median:.2f}, {one.lowest:.2f} to {one.highest:.2f}" for name, one in speedups.items()]
    return to_svg(figure, f"speedup-{number}", "Speedup: " + "; ".join(texts))


@styled
def expert_load_plot(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Load of the busiest expert over the mean load, in the worst layer and the median one; None for a dense model."""
    lines = [line for line in history if line["kind"] == "train" and line.get("expert_load_max_over_mean")]
    if not lines:
        return None
    figure, axes = new_figure()
    scale, unit = token_unit(lines[-1]["num_tokens"])
    ratios = [sorted(line["expert_load_max_over_mean"].values()) for line in lines]
    loads, medians = [layers[-1] for layers in ratios], [statistics.median(layers) for layers in ratios]
    tokens = [line["num_tokens"] / scale for line in lines]
    axes.plot(tokens, loads, color=depth_colour(0), linewidth=0.7, alpha=0.35)
    axes.plot(tokens, _running_mean(loads), color=depth_colour(0), linewidth=1.8, label="worst layer")
    axes.plot(
        tokens, _running_mean(medians), color=depth_colour(0), linewidth=1.2, linestyle="--", label="median layer"
    )
    axes.legend(frameon=False, loc="upper right", fontsize=11)
    axes.axhline(1.0, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
    axes.annotate("1 = perfectly even", (0.02, 1.0), (0, -4), xycoords=("axes fraction", "data"),
                  textcoords="offset points", va="top", color=MUTED, fontsize=11)  # fmt: skip
    axes.set_xlim(left=0, right=tokens[-1] * 1.03)
    axes.set_ylim(bottom=min(0.75, min(medians) * 0.9))
    axes.set_xlabel(f"trained tokens ({unit})")
    axes.set_ylabel("busiest expert / mean load")
    return to_svg(figure, "experts", f"Busiest expert: at first {loads[0]:.2f}, at last {loads[-1]:.2f} times the mean")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over a window of a fortieth of the points, fewer at the ends."""
    reach = len(values) // 80
    windows = [values[max(0, index - reach) : index + reach + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]
