"""The commands are listed without being imported, and each has its help."""

from __future__ import annotations

import importlib
import inspect

import pytest
from typer.testing import CliRunner

from nextn.cli.lazy import COMMANDS, docstring
from nextn.cli.main import app


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_is_its_docstring_read_without_importing_it(name: str):
    command = getattr(importlib.import_module(f"nextn.cli.{name}"), name)
    assert docstring(name) == inspect.getdoc(command)
    own = CliRunner().invoke(app, [name, "--help"])
    assert own.exit_code == 0
    first_line = " ".join(docstring(name).partition("\n")[0].split()[:3])
    assert first_line in own.stdout
    assert first_line in CliRunner().invoke(app, ["--help"]).stdout
    assert f"nextn {name}" in own.stdout, "an example"


def test_an_unknown_command_is_answered_with_the_nearest():
    done = CliRunner().invoke(app, ["trian"])
    assert done.exit_code == 2
    assert "train" in done.stderr
