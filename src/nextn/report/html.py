"""Renders the page of a run as one self-contained HTML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nextn import files
from nextn.config import Recipe
from nextn.evaluation.results import DecodingArm, Sample
from nextn.report.parts import colours, settings_rows, template
from nextn.report.schema import RunReport
from nextn.tables import flattened
from nextn.wording import TIMES, count, duration, fixed, plain


@dataclasses.dataclass(frozen=True)
class KeyFigure:
    """One of the large figures at the top."""

    value: str
    label: str
    detail: str


def render(report: RunReport) -> str:
    """The whole page as text. Everything that comes from outside (text, settings, names) is escaped."""
    longest = max([report.model.num_depths, *(arm.draft_length for arm in report.arms)])
    return template("report.html.j2").render(
        report=report,
        headline=headline(report),
        figures=key_figures(report),
        plots=_plots(report),
        colours=colours(longest),
        sample_groups=_group_by_prompt(report.samples),
        used_depths=sorted({piece.depth for sample in report.samples for piece in sample.pieces}),
        longest=longest,
        expert_loads=expert_loads(report.training.history),
        settings=list(settings_rows(report.settings, Recipe)),
        provenance=[(name, plain(value)) for name, value in flattened(report.provenance)],
    )


def write_report(report: RunReport, path: Path) -> None:
    """Render to `path`, atomically, replacing an older file. Raises CheckpointError when that cannot be written."""
    files.write_text(path, render(report))


def headline(report: RunReport) -> list[str]:
    """The result in a few plain sentences, good or bad."""
    model, training = report.model, report.training
    kind = "mixture-of-experts " if model.num_routed_experts else ""
    aim = f"to predict the next {model.num_depths + 1} tokens at every position instead of one"
    sentences = [
        f"A {count(model.num_parameters)}-parameter {kind}language model was trained for "
        f"{duration(training.training_s)} on {count(training.num_tokens)} tokens of {report.data.corpus}, "
        f"{aim if model.num_depths else 'without multi-token prediction'}."
    ]
    if not report.arms:
        return [*sentences, "It was not decoded in this run."]
    drafted = " and ".join(sorted({str(arm.draft_length) for arm in report.arms}))
    lengths = " and ".join(f"{fixed(arm.mean_acceptance_length)} ({manner(arm)})" for arm in report.arms)
    speeds = " and ".join(f"{fixed(arm.speedup.median)} times ({arm.name})" for arm in report.arms)
    sentences += [
        f"Drafting {drafted} {'token' if drafted == '1' else 'tokens'} at a time to continue held-out text, it emits "
        f"{lengths} tokens per trunk forward.",
        f"By the clock, it decodes at {speeds} the speed of plain decoding in the same run.",
    ]
    if any(arm.speedup.median < 1 for arm in report.arms):
        sentences.append("A factor below 1 is slower: there, leave speculation off.")
    for arm in report.arms:
        if arm.num_identical_outputs is None:
            continue
        if arm.num_identical_outputs == arm.num_compared_outputs:
            sentences.append(f"All {arm.num_compared_outputs} {arm.name} outputs equal plain decoding token for token.")
        else:
            sentences.append(
                f"Warning: only {arm.num_identical_outputs} of {arm.num_compared_outputs} {arm.name} outputs equal "
                f"plain decoding; lossless decoding must give all."
            )
    return sentences


def key_figures(report: RunReport) -> list[KeyFigure]:
    """The figures one looks for first, each with what it means."""
    figures = [
        KeyFigure(
            fixed(arm.mean_acceptance_length),
            f"tokens per forward, {arm.name}",
            f"mean acceptance length, N = {arm.draft_length}",
        )
        for arm in report.arms
    ]
    figures += [
        KeyFigure(
            f"{fixed(arm.speedup.median)}{TIMES}",
            f"speedup, {arm.name}",
            f"wall clock, {fixed(arm.speedup.lowest)}\u00a0to\u00a0{fixed(arm.speedup.highest)}",
        )
        for arm in report.arms
    ]
    figures += [
        KeyFigure(
            f"{arm.num_identical_outputs} of {arm.num_compared_outputs}",
            "identical outputs",
            f"{arm.name}, against plain",
        )
        for arm in report.arms
        if arm.num_identical_outputs is not None
    ]
    figures.append(
        KeyFigure(fixed(report.teacher_forced.bits_per_byte_per_depth[0]), "bits per byte", "next token, held-out text")
    )
    return figures


def manner(arm: DecodingArm) -> str:
    """How the arm chooses tokens, for readers: `greedy`, or its name with the temperature."""
    return arm.name if arm.temperature == 0 else f"{arm.name} at temperature {arm.temperature:g}"


def expert_loads(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[float]]]:
    """Every layer with experts, and the loads of its experts relative to their mean, at the last evaluation."""
    evaluations = [line for line in history if line["kind"] == "evaluation" and line.get("expert_load")]
    if not evaluations:
        return []
    rows = []
    for name, shares in evaluations[-1]["expert_load"].items():
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        layer = name
        if number is not None:
            layer = f"trunk layer {number}" if name.startswith("trunk.") else f"MTP layer {number + 1}"
        rows.append((layer, [share * len(shares) for share in shares]))
    return rows


def _plots(report: RunReport) -> dict[str, Markup]:
    """Plots by name; one that has nothing to show is left out."""
    from nextn.report import plots  # matplotlib is slow to import, and only a report needs it

    svgs: dict[str, str | None] = {"experts": plots.expert_load_plot(report.training.history)}
    if report.training.history:
        svgs["loss"] = plots.loss_plot(report.training.history)
    if report.model.num_depths:
        svgs["kinds"] = plots.acceptance_kinds_plot(report.teacher_forced, report.arms)
    if report.arms:
        svgs["by_depth"] = plots.acceptance_by_depth_plot(report.arms)
        svgs["lengths"] = plots.accepted_length_plot(report.arms)
        svgs["rates"] = plots.tok_per_s_plot(report.arms)
    return {name: Markup(svg) for name, svg in svgs.items() if svg is not None}


def _group_by_prompt(samples: Sequence[Sample]) -> list[tuple[str, list[Sample]]]:
    """Samples of one prompt together, in order of first appearance."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt, []).append(sample)
    return list(groups.items())
