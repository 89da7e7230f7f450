"""Pages that stay true: their lines, links, imports and commands."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

import nextn
from nextn.cli.lazy import COMMANDS

REPOSITORY = Path(__file__).parents[2]
PAGES = [*(REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"))]
PAGES += sorted((REPOSITORY / "docs").glob("*.md")) + sorted((REPOSITORY / "docs/studies").glob("*.md"))
MAX_WIDTH = 120
PROMISED = (*nextn.__all__, "errors", "mtp", "config", "data")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_COMMAND = re.compile(r"^(?:\S+/)?nextn ([a-z]+)\b", flags=re.MULTILINE)


def prose(text: str) -> str:
    """The page without its blocks of code."""
    return _BLOCK.sub("", text)


def long_lines(text: str) -> list[str]:
    """Lines of prose that are too long; rows of tables may be."""
    return [line for line in prose(text).splitlines() if len(line) > MAX_WIDTH and not line.startswith(("|", "    "))]


def dead_links(text: str, folder: Path) -> list[str]:
    """Links to files that are not there."""
    links = [link for link in _LINK.findall(prose(text)) if not re.match(r"[a-z]+:", link)]
    return [link for link in links if not (folder / link).exists()]


def broken_promises(text: str) -> list[str]:
    """Imports of nextn that do not work, or of names that nextn does not promise."""
    broken = []
    for kind, code in _BLOCK.findall(text):
        if kind != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nextn":
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    promised = nextn.__all__ if node.module == "nextn" else dir(module)
                    if alias.name not in promised:
                        broken.append(f"from {node.module} import {alias.name}")
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nextn":
                broken += [f"nextn.{node.attr}"] if node.attr not in PROMISED else []
    return broken


def unknown_commands(text: str) -> list[str]:
    """Commands of nextn that there are not, in blocks of code and between backticks."""
    code = [block for kind, block in _BLOCK.findall(text) if kind != "python"]
    code += re.findall(r"`([^`]+)`", prose(text))
    return sorted({name for part in code for name in _COMMAND.findall(part)} - set(COMMANDS))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_a_page_is_readable_and_true(page: Path):
    text = page.read_text(encoding="utf-8")
    assert long_lines(text) == []
    assert dead_links(text, page.parent) == []
    assert broken_promises(text) == []
    assert unknown_commands(text) == []


def test_a_page_that_is_not_would_be_noticed(tmp_path: Path):
    assert long_lines(f"{'word ' * 30}\n| {'cell ' * 30} |\n```\n{'code ' * 30}\n```\n") == ["word " * 30]
    assert dead_links("[a](nowhere.md) and [b](https://example.org)", tmp_path) == ["nowhere.md"]
    code = "```python\nfrom nextn import generate, generous\nimport nextn\n\nnextn.load('a')\nnextn.lead('a')\n```\n"
    assert broken_promises(code) == ["from nextn import generous", "nextn.lead"]
    assert unknown_commands("`nextn train`, `nextn trian`\n\n```\nnextn bench x\nnextn bunch y\n```\n") == [
        "bunch",
        "trian",
    ]
