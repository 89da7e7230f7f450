"""What `nextn doctor` prints: the verdict, the findings, accuracies under each convention, and the engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nextn.interop.doctor import Diagnosis, Service, services

STYLES = {"ok": "green", "info": "dim", "warning": "yellow", "problem": "bold red"}


def print_diagnosis(console: Console, diagnosis: Diagnosis, measured: Mapping[str, Any] | None) -> None:
    """Print the verdict, then the findings, then accuracies and engines."""
    console.print(f"[{STYLES[diagnosis.severity]}]{escape(diagnosis.verdict)}[/]", soft_wrap=True, highlight=False)
    findings = _table("findings", "", "what", "detail")
    for finding in diagnosis.findings:
        fix = f"\n[italic]-> {escape(finding.how_to_fix)}[/]" if finding.how_to_fix else ""
        mark = f"[{STYLES[finding.severity]}]{finding.severity}[/]"
        findings.add_row(mark, escape(finding.what), escape(finding.detail) + fix)
    console.print(findings)
    if measured:
        rows = measured["conventions"]
        depths = [f"depth {depth}" for depth in range(len(rows[0]["num_labels"]))]
        title = f"teacher-forced accuracy, {rows[0]['num_labels'][-1]:,} labels at the last depth"
        accuracies = _table(title, "convention", "", *depths)
        for row in rows:
            name = ", ".join(f"{field} {value}" for field, value in row["conventions"].items())
            shares = [f"{share:.1%}" for share in row["teacher_forced_accuracy"]]
            accuracies.add_row(name, "declared" if row["is_declared"] else "", *shares)
        console.print(accuracies)
    if diagnosis.is_healthy:
        _print_services(console, services(diagnosis))


def _print_services(console: Console, found: Sequence[Service]) -> None:
    """Which engines run the modules; then the commands, unbroken, so that they can be copied."""
    if not found:
        return
    engines = _table("engines", "engine", "runs MTP", "why not")
    for service in found:
        answer = {True: "yes", False: "no", None: "unknown"}[service.runs_mtp]
        engines.add_row(service.engine, answer, escape("; ".join(service.reasons)))
    console.print(engines)
    for service in found:
        if service.launch_line:
            console.print(f"[bold]{service.engine}[/]", highlight=False)
            lines = "\n".join(filter(None, (service.export, service.launch_line)))
            console.print(lines, soft_wrap=True, markup=False, highlight=False)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
