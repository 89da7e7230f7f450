"""Where commands print: messages, tables of results, progress in a line, and what Ctrl-C gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 120


def messages() -> Console:
    """Where progress and hints go: standard error, text as it is, so that standard output holds results only."""
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def results() -> Console:
    """Where tables of results go: standard output, `WIDTH` columns wide where that is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


@contextmanager
def status(console: Console) -> Iterator[Callable[[str], None]]:
    """A function that tells what is being done now: a line that moves on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        yield console.print
        return
    with console.status("") as shown:
        yield lambda text: shown.update(Text(text))


@contextmanager
def interruptible(console: Console, hint: str) -> Iterator[None]:
    """Ctrl-C inside the block prints `hint` and exits with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"interrupted; {hint}")
        raise typer.Exit(130) from None


def figures_table(title: str, headings: Sequence[str]) -> Table:
    """An empty table of figures, every column to the right."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
