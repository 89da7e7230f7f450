"""`nextn bench` as one HTML page that needs nothing but itself."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from nextn import files
from nextn.bench.arms import CHECKPOINT
from nextn.bench.figures import BenchReport
from nextn.report.parts import colours, template
from nextn.tables import flattened
from nextn.wording import plain

MAX_CURVES = 4
"""Scenarios whose acceptance is drawn; more could not be told apart."""


def render(report: BenchReport) -> str:
    """The whole page as text. Everything that comes from outside is escaped."""
    from nextn.report import plots  # matplotlib is slow to import, and only a page needs it

    curves = _curves(report)
    return template("bench.html.j2", "nextn.bench").render(
        report=report,
        colours=colours(1),
        longest=0,
        speedups=[
            Markup(plots.speedup_plot(number, own.speedups)) if own.speedups else ""
            for number, own in enumerate(report.scenarios)
        ],
        acceptance=Markup(plots.acceptance_by_depth_plot(curves[:MAX_CURVES])) if curves else "",
        median=statistics.median,
        rows=[
            (name, plain(value)) for table in (report.options, report.provenance) for name, value in flattened(table)
        ],
    )


def write_page(report: BenchReport, path: Path) -> None:
    """Render to `path`, atomically, replacing an older file. Raises CheckpointError when that cannot be written."""
    files.write_text(path, render(report))


@dataclass(frozen=True)
class _Curve:
    """Acceptance of an arm with N drafts, named after its scenario; shares as in `ArmFigures`."""

    name: str
    draft_length: int
    acceptance_unconditional: tuple[float | None, ...]
    acceptance_conditional: tuple[float | None, ...]


def _curves(report: BenchReport) -> list[_Curve]:
    """The longest fixed MTP draft in each scenario of one batch size; the batch size does not change acceptance."""
    first, curves = report.scenarios[0].scenario.batch_size, []
    for figures in report.scenarios:
        scenario = figures.scenario
        arms = [arm for arm in figures.arms if (arm.weights, arm.drafter, arm.is_lossless) == (CHECKPOINT, "mtp", True)]
        arm = max((arm for arm in arms if arm.draft_length), key=lambda arm: arm.draft_length or 0, default=None)
        if arm is None or scenario.batch_size != first:
            continue
        length = "" if scenario.prompt_length is None else f", {scenario.prompt_length}"
        name = f"T = {scenario.temperature:g}{length}"
        curves.append(_Curve(name, arm.draft_length or 0, arm.acceptance_unconditional, arm.acceptance_conditional))
    return curves
