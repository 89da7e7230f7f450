"""`nextn settings`: every setting of a recipe, with its default and meaning."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterable
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from nextn.cli.console import results
from nextn.config.listing import SettingInfo, list_settings, meaning_of_table


def settings(
    table: Annotated[
        str | None, typer.Argument(help="A table such as optimizer or objective.mtp_lambda, or one setting.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List every setting of a recipe: default, values allowed and meaning, unit included.

    A recipe writes them as TOML tables, `--set` as TABLE.KEY=VALUE.

    Examples:

        nextn settings

        nextn settings optimizer

        nextn settings objective.mtp_lambda --json
    """
    found = list_settings(table or "")
    if json:
        print(json_format.dumps([asdict(info) for info in found], indent=2))
        return
    console = results()
    tables: dict[str, list[SettingInfo]] = {}
    for info in found:
        tables.setdefault(info.name.partition(".")[0] if "." in info.name else "", []).append(info)
    for name, own in tables.items():
        title = f"[bold]{escape(f'[{name}]')}[/] {escape(meaning_of_table(name))}" if name else "outside of all tables"
        console.print(title, highlight=False)
        console.print(_rows(own))


def _rows(found: Iterable[SettingInfo]) -> Table:
    """A row per setting, named inside its table."""
    table = Table("setting", "default", "values", "meaning", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = True
    for info in found:
        table.add_row(
            *map(escape, (info.name.partition(".")[2] or info.name, _toml(info.default), info.kind, info.meaning))
        )
    return table


def _toml(value: Any) -> str:
    """A value as a recipe has it; None is none."""
    if value is None or isinstance(value, str):
        return value or "none"
    return json_format.dumps(value)
