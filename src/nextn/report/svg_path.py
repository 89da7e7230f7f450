"""Rounds the coordinates of SVG paths and leaves out what SVG does not need."""

from __future__ import annotations

import re


def rounded(text: str, num_decimals: int) -> str:
    """Round a number.

    >>> rounded("70.400001", 1), rounded("3.04", 1), rounded("-0", 1), rounded("-0.728", 2)
    ('70.4', '3', '0', '-.73')
    """
    value = f"{float(text):.{num_decimals}f}".rstrip("0").rstrip(".") if num_decimals else f"{float(text):.0f}"
    value = "0" if value in ("-0", "") else value
    return re.sub(r"^(-?)0\.", r"\1.", value)


def rounded_path(path: str, num_decimals: int) -> str:
    """Round a path's absolute coordinates and leave out what SVG does not need.

    A line after a move needs no letter, nor does a command that repeats the one before. A line along an axis is H or V.

    >>> rounded_path("M 41.584927 257.995764 \\nL 406.99976 257.995764 \\nL -406.96 -3.04 \\nz\\n", 1)
    'M41.6 258H407L-407-3z'
    """
    commands: list[tuple[str, list[str]]] = []
    for token in path.split():
        if token.isalpha():
            commands.append((token, []))
        else:
            commands[-1][1].append(rounded(token, num_decimals))
    text, before, at = "", "", ["", ""]
    for letter, numbers in commands:
        if letter == "L" and numbers[0] == at[0]:
            written, used = "V", numbers[1:]
        elif letter == "L" and numbers[1] == at[1]:
            written, used = "H", numbers[:1]
        else:
            written, used = letter, numbers
        is_implied = written == before != "M" or (written == "L" and before == "M")
        text += (" " if is_implied else written) + " ".join(used)
        before, at = written, numbers[-2:] or at
    return text.replace(" -", "-")


def moved_down(path: str, distance: float) -> str:
    """Add a distance to every y of a path of lines.

    >>> moved_down("M 1 2 L 3 -4 z", 10)
    'M 1 12.0 L 3 6.0 z'
    """
    tokens = path.split()
    numbers = [place for place, token in enumerate(tokens) if not token.isalpha()]
    for place in numbers[1::2]:
        tokens[place] = str(float(tokens[place]) + distance)
    return " ".join(tokens)
