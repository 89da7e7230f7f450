"""The `nextn` command: all subcommands, and one place where a user's error becomes a message and an exit code."""

from __future__ import annotations

import io
import sys

import typer
from rich.console import Console
from rich.markup import escape

import nextn
from nextn.cli.lazy import LazyGroup
from nextn.errors import NextnError

app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(nextn.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Multi-token prediction for language models: train with it, measure it, decode losslessly with it."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 the user's error (message on standard error), 130 interrupted.

    A character that the output's encoding lacks is replaced by `?`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except NextnError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
