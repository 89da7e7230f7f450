"""Findings of an examination, one line each. The worst of them decides the verdict."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Severity = Literal["ok", "info", "warning", "problem"]

SEVERITIES: tuple[Severity, ...] = ("ok", "info", "warning", "problem")
"""From good to bad."""


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        severity: ok, info (worth knowing), warning (works, but look at it) or problem (MTP is lost or wrong).
        what: a short name that stays the same from file to file, such as "MTP lost".
        detail: what was found in this checkpoint, with names and counts.
        how_to_fix: what to do about it; empty where there is nothing to do.
    """

    severity: Severity
    what: str
    detail: str
    how_to_fix: str = ""


def some(names: Collection[str], at_most: int = 3) -> str:
    """The first names in order, and how many more there are.

    >>> some(["d", "b", "a", "c"])
    'a, b, c and 1 more'
    """
    shown = sorted(names)[:at_most]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def counted(count: int, noun: str) -> str:
    """A number and its noun.

    >>> counted(1, "module"), counted(2, "module")
    ('1 module', '2 modules')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
