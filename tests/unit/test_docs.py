"""Pages that stay true: their lines, links, imports, names and commands."""

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
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
_HEADING = re.compile(r"^#+ (.*)$", flags=re.MULTILINE)
_INLINE_IMPORT = re.compile(r"`((?:from nextn|import nextn)[^`]*)`")
_INLINE_NAME = re.compile(r"`(nextn(?:\.\w+)+)[`(]")
PAGES_OF_OLD_NAMES = {"CHANGELOG.md"}  # they say what a name was before
_COMMAND = re.compile(r"^(?:\S+/)?nextn ([a-z]+)\b", flags=re.MULTILINE)


def prose(text: str) -> str:
    """The page without its blocks of code."""
    return _BLOCK.sub("", text)


def long_lines(text: str) -> list[str]:
    """Lines of prose that are too long; rows of tables may be."""
    return [line for line in prose(text).splitlines() if len(line) > MAX_WIDTH and not line.startswith(("|", "    "))]


def anchor_of(heading: str) -> str:
    """The anchor under which a page's heading is linked to, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def dead_links(text: str, folder: Path) -> list[str]:
    """Links to files that are not there, and to sections that no page has."""
    dead = []
    for link, anchor in _LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        if not (folder / link).exists():
            dead.append(link)
        elif anchor:
            linked = (folder / link).read_text(encoding="utf-8") if link else text
            if anchor not in [anchor_of(heading) for heading in _HEADING.findall(prose(linked))]:
                dead.append(f"{link}#{anchor}")
    return dead


def broken_promises(text: str) -> list[str]:
    """Imports of nextn that do not work, or of names that nextn does not promise; in blocks of Python and inline."""
    broken = []
    for code in [code for kind, code in _BLOCK.findall(text) if kind == "python"] + _INLINE_IMPORT.findall(prose(text)):
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


def unknown_names(text: str) -> list[str]:
    """Names between backticks, such as `nextn.mtp.cost`, that are no module of nextn and nothing in one."""
    return [name for name in _INLINE_NAME.findall(prose(text)) if not is_name(name)]


def is_name(name: str) -> bool:
    """The dotted name is a module, or an attribute (of an attribute) of one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


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
    assert page.name in PAGES_OF_OLD_NAMES or unknown_names(text) == []


def test_a_page_that_is_not_would_be_noticed(tmp_path: Path):
    assert long_lines(f"{'word ' * 30}\n| {'cell ' * 30} |\n```\n{'code ' * 30}\n```\n") == ["word " * 30]
    assert dead_links("[a](nowhere.md) and [b](https://example.org)", tmp_path) == ["nowhere.md"]
    (tmp_path / "other.md").write_text("# Its title\n\n## What it costs\n", encoding="utf-8")
    links = "# Here\n\n[a](#here), [b](#there), [c](other.md#what-it-costs), [d](other.md#what-it-is)"
    assert dead_links(links, tmp_path) == ["#there", "other.md#what-it-is"]
    code = "```python\nfrom nextn import generate, generous\nimport nextn\n\nnextn.load('a')\nnextn.lead('a')\n```\n"
    assert broken_promises(code) == ["from nextn import generous", "nextn.lead"]
    assert broken_promises("`from nextn import load`, `from nextn import lead`") == ["from nextn import lead"]
    assert unknown_names("`nextn.mtp.cost`, `nextn.mtp.store.save_model(model)`, `nextn.mtp.storage`") == [
        "nextn.mtp.storage"
    ]
    assert unknown_commands("`nextn train`, `nextn trian`\n\n```\nnextn bench x\nnextn bunch y\n```\n") == [
        "bunch",
        "trian",
    ]
