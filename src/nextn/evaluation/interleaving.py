"""The order in which things to be compared take turns while they are timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def rotated(items: Sequence[T], repeat: int) -> list[T]:
    """The items in the order of a repeat: each repeat begins one item further on, so that none always comes first.

    >>> [rotated("abc", repeat) for repeat in range(3)]
    [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'a', 'b']]
    """
    first = repeat % len(items)
    return [*items[first:], *items[:first]]
