"""Tables that several commands print."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nextn.cli.console import figures_table
from nextn.evaluation.results import DecodingArm
from nextn.lossless import Check

if TYPE_CHECKING:  # importing it needs lm-evaluation-harness
    from nextn.evaluation.tasks import TaskScore


VERDICTS = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("-", "")}
"""Word and style of a check that passed, failed, or cannot fail."""

NUM_SHOWN = 3
"""Pieces of evidence printed for a failed check; the JSON file has all."""


def print_evaluation(console: Console, evaluation: Mapping[str, Any]) -> None:
    """An evaluation line of metrics.jsonl: one row per depth, then one per decoding arm."""
    depths = figures_table(
        "held-out text, true tokens as input",
        ("depth", "loss (nats)", "bits per byte", "teacher-forced accuracy", "main agreement"),
    )
    for depth, loss in enumerate(evaluation["loss_per_depth"]):
        depths.add_row(
            str(depth),
            _number(loss, 3),
            _number(evaluation["bits_per_byte_per_depth"][depth], 3),
            _number(evaluation["teacher_forced_accuracy"][depth], 3),
            _number(evaluation["main_agreement"][depth - 1], 3) if depth else "-",
        )
    console.print(depths)
    if not evaluation.get("decoding"):
        return
    arms = figures_table(
        "held-out prompts, decoded", ("arm", "N", "AL", "acceptance rate", "unconditional acceptance by draft")
    )
    for name, stats in evaluation["decoding"].items():
        arms.add_row(
            name,
            str(stats["draft_length"]),
            _number(stats["mean_acceptance_length"], 2),
            _number(stats["acceptance_rate"], 3),
            "  ".join(_number(share, 2) for share in stats["acceptance_unconditional"]),
        )
    console.print(arms)


def print_arms(console: Console, arms: Sequence[DecodingArm]) -> None:
    """Speculative beside plain decoding; AL is the mean acceptance length, rates are medians; `same`: equal outputs."""
    table = figures_table(
        "held-out prompts, speculative beside plain decoding",
        ("arm", "N", "AL", "plain tok/s", "MTP tok/s", "speedup", "range", "same", "repeated"),
    )
    for arm in arms:
        compared = arm.num_compared_outputs
        table.add_row(
            arm.name,
            str(arm.draft_length),
            _number(arm.mean_acceptance_length, 2),
            _number(statistics.median(arm.plain_tok_per_s), 0),
            _number(statistics.median(arm.speculative_tok_per_s), 0),
            f"{arm.speedup.median:.2f}x",
            f"{arm.speedup.lowest:.2f}-{arm.speedup.highest:.2f}",
            "-" if compared is None else f"{arm.num_identical_outputs}/{compared}",
            f"{arm.repeated_text_share_speculative:.0%}",
        )
    console.print(table)


def print_task_scores(console: Console, scores: Iterable[TaskScore]) -> None:
    """One row per metric; `n` is the number of questions, `+-` the standard error over them."""
    table = figures_table("tasks", ("task", "version", "filter", "n-shot", "n", "metric", "value", "+-"))
    for score in scores:
        table.add_row(
            score.task,
            score.version or "-",
            score.filter,
            _count(score.num_fewshot),
            _count(score.num_documents),
            score.metric,
            _number(score.value, 4),
            _number(score.stderr, 4),
        )
    console.print(table)


def print_checks(console: Console, title: str, checks: Sequence[Check]) -> None:
    """A row per check of the lossless suite, evidence of those that failed, and the verdict."""
    console.print(_checks_table(title, checks))
    failed = [check for check in checks if check.passed is False]
    for check in failed:
        for evidence in check.evidence[:NUM_SHOWN]:
            console.print(f"{check.name}: {evidence}", markup=False, highlight=False, soft_wrap=True)
    verdict = f"NOT lossless: {', '.join(check.name for check in failed)}" if failed else "lossless"
    console.print(verdict, style="bold red" if failed else "bold green", soft_wrap=True)


def _checks_table(title: str, checks: Sequence[Check]) -> Table:
    table = figures_table(title, ("check", "n", "verdict", "finding", "compared"))
    for column in table.columns:
        column.justify, column.overflow = "left", "fold"
    for check in checks:
        word, style = VERDICTS[check.passed]
        table.add_row(check.name, str(check.num_compared), Text(word, style), Text(check.finding), Text(check.compared))
    return table


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
