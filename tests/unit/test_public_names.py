"""What users may rely on is listed here; a change to it is a change users must be told about."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys

import nextn


def test_public_names_are_these():
    assert nextn.__all__ == [
        "Decoder",
        "GenerationResult",
        "MTPConfig",
        "MTPModel",
        "MTPOutput",
        "ModelConfig",
        "NextnError",
        "Recipe",
        "generate",
        "load",
        "load_recipe",
    ]


def test_every_public_name_is_documented():
    for name in nextn.__all__:
        assert inspect.getdoc(getattr(nextn, name)), f"nextn.{name} has no docstring"


def test_version_is_that_of_the_distribution():
    assert nextn.__version__ == importlib.metadata.version("nextn")


def test_importing_nextn_does_not_import_transformers_or_plotting():
    code = "import sys, nextn; print([m for m in ('transformers', 'matplotlib', 'typer') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
