"""What `nextn bench` prints: how far it is, then the tables and the verdict."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nextn.bench.approaches import Approach
from nextn.bench.figures import BenchReport, Scenario, ScenarioFigures
from nextn.bench.peers import PeerFigures
from nextn.cli.console import figures_table, results
from nextn.wording import count, duration, plural


class BenchProgress:
    """A bar with the time left on a terminal; elsewhere a line at the beginning of each scenario."""

    def __init__(self, console: Console, num_runs: int):
        self._console, self._num_runs, self._num_done = console, num_runs, 0
        self._bar = Progress(console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=num_runs)
        self._started = time.monotonic()

    def __enter__(self) -> BenchProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, text: str) -> None:
        """A scenario begins."""
        left = ""
        if self._num_done:
            per_run_s = (time.monotonic() - self._started) / self._num_done
            left = f" (about {duration(per_run_s * (self._num_runs - self._num_done))} left)"
        self._console.print(text + left)

    def describe(self, text: str) -> None:
        """Tell what is being done."""
        self._bar.update(self._task, description=text)

    def advance(self, arm: str) -> None:
        """A run is done."""
        self._num_done += 1
        self._bar.update(self._task, description=arm, advance=1)


def print_report(report: BenchReport) -> None:
    """To standard output: a table per scenario, then peers, approaches, notes and the verdict."""
    console = results()
    for figures in report.scenarios:
        console.print(_arms_table(figures))
    if report.peers:
        for scenario in dict.fromkeys(peer.scenario for peer in report.peers):
            console.print(_peers_table(scenario, [peer for peer in report.peers if peer.scenario == scenario]))
    if report.approaches:
        console.print(_approaches_table(report.approaches, report.scenarios[0].scenario))
    for line in (*report.notes, *report.verdicts):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(f"verdict: {report.summary}", style="bold", soft_wrap=True, markup=False, highlight=False)


def _arms_table(figures: ScenarioFigures) -> Table:
    """One row per arm; rates and speedups are medians with their range, acceptance is unconditional, in percent."""
    repeated = figures.arms[0].repeated_text_share
    title = (
        f"{figures.scenario.name}: {plural(figures.num_prompts, 'prompt')}, {figures.max_new_tokens} tokens each, "
        f"repeated text {repeated:.0%}"
    )
    headings = ("arm", "AL", "v", "c", "pred.", "speedup", "range", "tok/s", "same", "accepted %")
    table = figures_table(title, headings)
    table.padding = (0, 0)
    for column in table.columns[1:-1]:
        column.no_wrap = True
    for arm in figures.arms:
        compared = arm.num_compared_outputs
        same = "-" if compared is None else f"{arm.num_identical_outputs}/{compared}"
        table.add_row(
            arm.name,
            "-" if arm.is_plain else f"{arm.mean_acceptance_length:.2f}",
            _fixed(arm.verify_cost),
            "-" if arm.is_plain else _fixed(arm.draft_cost),
            "-" if arm.is_plain else _fixed(arm.predicted_speedup),
            f"{arm.speedup.median:.2f}x",
            f"{arm.speedup.lowest:.2f}-{arm.speedup.highest:.2f}",
            f"{statistics.median(arm.decode_tok_per_s):.0f}",
            same if arm.is_lossless else f"{arm.changed_share:.0%} other",
            " ".join("-" if share is None else f"{100 * share:.0f}" for share in arm.acceptance_unconditional) or "-",
        )
    return table


def _peers_table(scenario: str, peers: Sequence[PeerFigures]) -> Table:
    """Rates include reading the prompt; speedup is over the same engine's plain decoding."""
    table = figures_table(
        f"other engines, prompts included: {scenario}", ("engine", "N", "AL", "tok/s", "range", "speedup", "same")
    )
    for peer in peers:
        rates = peer.end_to_end_tok_per_s
        table.add_row(
            peer.engine,
            str(peer.draft_length),
            f"{peer.mean_acceptance_length:.2f}" if peer.draft_length else "-",
            f"{statistics.median(rates):.0f}",
            f"{min(rates):.0f}-{max(rates):.0f}",
            f"{peer.speedup.median:.2f}x",
            f"{peer.num_identical_outputs}/{peer.num_compared_outputs}",
        )
    return table


def _approaches_table(rows: Sequence[Approach], scenario: Scenario) -> Table:
    headings = (
        "approach",
        "training",
        "tokens",
        "bits/byte",
        "parameters",
        "extra",
        "tok/s",
        "speedup",
        "decoded with",
    )
    table = figures_table(f"four approaches, {scenario.name}", headings)
    table.padding = (0, 0)
    for row in rows:
        table.add_row(
            row.name,
            "-" if row.training_s is None else duration(row.training_s),
            _count(row.num_training_tokens),
            _fixed(row.bits_per_byte, 3),
            _count(row.num_parameters),
            _count(row.num_extra_parameters),
            _fixed(row.decode_tok_per_s, 0),
            "-" if row.speedup is None else f"{row.speedup:.2f}x",
            row.arm,
        )
    return table


def _fixed(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _count(value: int | None) -> str:
    return "-" if value is None else count(value)
