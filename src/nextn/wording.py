"""Format numbers, counts, durations and text for people, in the same way on every page and in every table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

TIMES, NOT_MEASURED = "\u00d7", "\u2013"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def visible(text: str) -> str:
    """Text whose control characters, which HTML forbids, are replaced by their pictures; tabs and line ends stay.

    >>> visible("a\\x00b")
    'a␀b'
    """
    text = text.encode("utf-8", errors="replace").decode("utf-8")  # lone surrogates cannot be written
    return _CONTROL.sub(lambda match: "␡" if match.group() == "\x7f" else chr(0x2400 + ord(match.group())), text)


def percent(share: float | None, digits: int = 0) -> str:
    """`0.123` as `12%`; a dash for what was not measured."""
    return NOT_MEASURED if share is None else f"{share:.{digits}%}"


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with a fixed number of decimals; a dash for what was not measured."""
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def count(number: int) -> str:
    """A count with three digits: `4 310 000` as `4.31M`."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def plural(number: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "prompt"), plural(2, "prompt")
    ('1 prompt', '2 prompts')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """`251.0` as `4 min 11 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def plain(value: Any) -> str:
    """A setting or fact as text: lists without brackets, None as `none`, booleans in lower case."""
    if isinstance(value, list | tuple):
        return " ".join(plain(item) for item in value) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return "none" if isinstance(value, Mapping) else visible(str(value))
