"""Commands whose modules are imported when they run, so that `nextn --help` answers without importing torch."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

COMMANDS = ("demo", "train", "settings", "evaluate", "generate", "export", "bench", "verify", "doctor", "study")
"""In the order of the help. Command NAME is the function NAME of the module `nextn.cli.NAME`."""


def docstring(name: str) -> str:
    """The docstring of a command, read from its source: importing the module could take seconds."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    return ast.get_docstring(functions[name]) or ""


def load(name: str) -> Any:
    """The command itself. Imports its module."""
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.command(name)(getattr(importlib.import_module(f"nextn.cli.{name}"), name))
    return typer.main.get_command(app)


class LazyCommand(TyperCommand):
    """A command's name and help; the command itself once there are arguments to parse."""

    def make_context(self, info_name: str | None, *args: Any, **kwargs: Any) -> Any:
        """The context of the command itself, which is therefore what runs."""
        assert self.name is not None, "commands are made with their names"
        return load(self.name).make_context(info_name, *args, **kwargs)


class LazyGroup(TyperGroup):
    """The commands of `COMMANDS`. None of them is imported until it runs."""

    def __init__(self, **attributes: Any):
        super().__init__(**attributes)
        self.commands = {name: LazyCommand(name) for name in COMMANDS}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name with its help, None if there is none."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.help is None:
            command.help = docstring(cmd_name)
        return command
