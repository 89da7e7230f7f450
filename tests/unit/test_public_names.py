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
        "DraftSettings",
        "GenerationResult",
        "MTPConfig",
        "MTPModel",
        "MTPOutput",
        "ModelConfig",
        "NextnError",
        "Recipe",
        "Request",
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


HEAVY = ("torch._dynamo", "matplotlib", "transformers", "jinja2", "sympy")
"""Modules that take long to import, and that only some uses need."""


def imported_after(code: str, *names: str) -> list[str]:
    """Which of the modules are imported after the code has run in a process of its own."""
    code = f"{code}\nimport sys; print('imported:', *[name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.rpartition("imported:")[2].split()


def test_importing_nextn_imports_nothing_that_is_not_used():
    assert imported_after("import nextn", "torch", "numpy", *HEAVY) == []


def test_using_every_public_name_imports_neither_the_compiler_nor_plotting_nor_transformers():
    code = "import nextn\nfor name in nextn.__all__: getattr(nextn, name)"
    assert imported_after(code, "torch", *HEAVY) == ["torch"]


def test_an_eager_forward_does_not_import_the_compiler():
    code = (
        "import torch, nextn\n"
        "config = nextn.ModelConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2)\n"
        "model = nextn.MTPModel(config, nextn.MTPConfig())\n"
        "model(torch.zeros(1, 8, dtype=torch.long), labels=torch.zeros(1, 8, dtype=torch.long)).loss.backward()\n"
        "nextn.generate(model.eval(), [[1, 2, 3]], max_new_tokens=4)"
    )
    assert imported_after(code, "torch._dynamo") == []
    assert imported_after(f"{code}\ntorch.compiler.disable(print)", "torch._dynamo") == ["torch._dynamo"]


def test_help_is_printed_without_torch():
    code = (
        "import sys\nfrom nextn.cli.main import main\nsys.argv = ['nextn', *{arguments}]\n"
        "try: main()\nexcept SystemExit: pass"
    )
    for arguments in (["--help"], [], ["--version"], ["settings"], ["settings", "--help"]):
        assert imported_after(code.format(arguments=arguments), "torch", "numpy", *HEAVY) == []
    assert imported_after(code.format(arguments=["train", "--help"]), "torch") == ["torch"]  # as all once did


def test_packages_are_there_without_being_imported_by_name():
    assert imported_after("import nextn; nextn.mtp.save_model; nextn.data.tokenizers.load_tokenizer") == []
    assert set(nextn.__all__) <= set(dir(nextn))
    assert not hasattr(nextn, "no_such_name")
    assert nextn._MODULES.keys() == set(nextn.__all__) - {"NextnError"}
