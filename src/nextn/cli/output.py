"""What several commands print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_evaluation(console: Console, evaluation: Mapping[str, Any]) -> None:
    """Tables of an evaluation: one row per depth, then one per decoding arm."""
    depths = Table(title="held-out text, true tokens as input", title_justify="left")
    for heading in ("depth", "loss (nats)", "bits per byte", "teacher-forced accuracy", "main agreement"):
        depths.add_column(heading, justify="right")
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
    arms = Table(title="held-out prompts, decoded", title_justify="left")
    for heading in ("arm", "N", "mean acceptance length", "acceptance_rate", "unconditional acceptance by draft"):
        arms.add_column(heading, justify="right")
    for name, stats in evaluation["decoding"].items():
        arms.add_row(
            name,
            str(stats["draft_length"]),
            _number(stats["mean_acceptance_length"], 2),
            _number(stats["acceptance_rate"], 3),
            "  ".join(_number(share, 2) for share in stats["acceptance_unconditional"]),
        )
    console.print(arms)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
