"""Drafting without a model: the tokens that followed the row's last n-gram when it occurred before.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): text that repeats itself, such as
code under edit, summaries and loops, is guessed from the row alone. The longest n-gram that occurred before decides;
of several occurrences the most recent one. Drafts of this kind were certain: they have no distribution.

Worked example, n-grams of 2 and 1 tokens, the row A B C A B D A B (its last 2-gram is A B):

    position      0  1  2  3  4  5  6  7
    token         A  B  C  A  B  D  A  B
    A B ends at      1        4        7     the last occurrence before the end ends at 4
    continuation                 D  A  B     what followed it, positions 5, 6, 7; the row ends there
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nextn.decoding.drafters.drafter import BatchTokens, Drafts
from nextn.decoding.sampling import SamplingConfig
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
        # For each size, longest first: the n-gram -> the position after its last occurrence. Appending a token enters
        # the n-grams that end right before it, so the one at the end of the row never finds itself.
        self._positions: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in range(longest, shortest - 1, -1)}

    def append(self, token_ids: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Add tokens to the end of the row; integers [M]."""
        start = len(self._token_ids)
        known = self._token_ids
        known += np.asarray(token_ids, dtype=np.int64).tolist()
        for size, positions in self._positions.items():
            for position in range(max(start, size), len(known)):
                positions[tuple(known[position - size : position])] = position

    def continuation(self, num_draft_tokens: int) -> npt.NDArray[np.int64]:
        """What followed the most recent earlier occurrence of the row's last n-gram, the longest n-gram first.

        Args:
            num_draft_tokens: N, most tokens to return.

        Returns:
            Token ids, int64 [M], M <= N: fewer where the row ends, none when even the shortest n-gram is new.
        """
        known = self._token_ids
        for size, positions in self._positions.items():
            position = positions.get(tuple(known[-size:]))
            if position is not None:
                return np.array(known[position : position + num_draft_tokens], dtype=np.int64)
        return np.empty(0, dtype=np.int64)


class PromptLookupDrafter:
    """Drafts what followed the last words where they stood before, in the row itself; costs next to nothing.

    Args:
        num_rows: B.
    """

    def __init__(self, num_rows: int):
        self._indices = [NgramIndex() for _ in range(num_rows)]
        self._num_indexed = [0] * num_rows

    def begin(self, slot: int, token_ids: Tensor, num_known: int) -> None:
        """See `Drafter`."""
        self._indices[slot], self._num_indexed[slot] = NgramIndex(), 0
        self._index(slot, token_ids, num_known)

    def observe(self, hidden: Tensor, normed: Tensor, positions: Tensor, first_slot: int = 0) -> None:
        """States of the trunk are not read."""

    def draft(
        self, tokens: BatchTokens, num_draft_tokens: int, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Drafts:
        """See `Drafter`; the drafts are certain, and a row without an earlier occurrence drafts nothing."""
        ids = torch.zeros(len(tokens.num_known), num_draft_tokens, dtype=torch.int64)
        counts = []
        for slot, known in enumerate(tokens.num_known):
            self._index(slot, tokens.token_ids[slot], known)
            found = self._indices[slot].continuation(num_draft_tokens)
            ids[slot, : len(found)] = torch.from_numpy(found)
            counts.append(len(found))
        return Drafts(ids.to(tokens.token_ids.device), None, counts)

    def roll_back(self, num_final: Sequence[int]) -> None:
        """Only known tokens are indexed, so there is nothing to take back."""

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """See `Drafter`."""
        self._indices[target], self._num_indexed[target] = self._indices[source], self._num_indexed[source]

    def _index(self, slot: int, token_ids: Tensor, num_known: int) -> None:
        if num_known > self._num_indexed[slot]:
            self._indices[slot].append(token_ids[self._num_indexed[slot] : num_known].cpu().numpy())
            self._num_indexed[slot] = num_known
