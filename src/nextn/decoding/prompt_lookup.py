"""Drafting without a model: the tokens that followed the row's last n-gram when it occurred before.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): text that repeats itself, such as
code under edit, summaries and loops, is guessed from the row alone. The longest n-gram that occurred before decides;
of several occurrences the most recent one. Drafts of this kind were certain: they have no distribution.

Worked example, n-grams of 2 and 1 tokens, the row A B C A B D A B (its last 2-gram is A B):

    place         0  1  2  3  4  5  6  7
    token         A  B  C  A  B  D  A  B
    A B ends at      1        4        7     the last occurrence before the end ends at 4
    continuation                 D  A  B     what followed it, places 5, 6, 7; the row ends there
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nextn.errors import GenerationError


class NgramIndex:
    """The known tokens of one row, and where each of their n-grams last occurred.

    Appending M tokens takes time proportional to M, looking up N tokens time proportional to N, whatever the length of
    the row. Only tokens that are final are appended: there is no way back.

    Args:
        longest: tokens of the longest n-gram looked up.
        shortest: tokens of the shortest one.

    Raises:
        GenerationError: not 1 <= shortest <= longest.

    The row of the module's example, A B C D = 0 1 2 3. At first nothing has occurred twice:

    >>> index = NgramIndex(longest=2, shortest=1)
    >>> index.append([0, 1, 2])
    >>> index.continuation(3)
    array([], dtype=int64)
    >>> index.append([0, 1, 3, 0, 1])
    >>> index.continuation(2), index.continuation(5)
    (array([3, 0]), array([3, 0, 1]))
    """

    def __init__(self, longest: int = 3, shortest: int = 1):
        if not 1 <= shortest <= longest:
            raise GenerationError(
                f"prompt lookup compares n-grams of shortest..longest tokens with 1 <= shortest <= longest; got "
                f"shortest = {shortest}, longest = {longest}"
            )
        self._token_ids: list[int] = []
        # For each size, longest first: the n-gram -> the place after its last occurrence. Appending a token enters the
        # n-grams that end right before it, so the one at the end of the row never finds itself.
        self._places: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in range(longest, shortest - 1, -1)}

    def append(self, token_ids: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Add tokens to the end of the row; integers [M]."""
        start = len(self._token_ids)
        known = self._token_ids
        known += np.asarray(token_ids, dtype=np.int64).tolist()
        for size, places in self._places.items():
            for place in range(max(start, size), len(known)):
                places[tuple(known[place - size : place])] = place

    def continuation(self, num_draft_tokens: int) -> npt.NDArray[np.int64]:
        """What followed the most recent earlier occurrence of the row's last n-gram, the longest n-gram first.

        Args:
            num_draft_tokens: N, most tokens to return.

        Returns:
            Token ids, int64 [M], M <= N: fewer where the row ends, none when even the shortest n-gram is new.
        """
        known = self._token_ids
        for size, places in self._places.items():
            place = places.get(tuple(known[-size:]))
            if place is not None:
                return np.array(known[place : place + num_draft_tokens], dtype=np.int64)
        return np.empty(0, dtype=np.int64)
