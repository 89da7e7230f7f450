"""How much of a text repeats itself: the warning light beside every acceptance figure.

An undertrained model decoding greedily falls into loops. A loop is easy to draft, so it raises acceptance without being
of use to anyone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def repeated_text_share(tokens: Sequence[Hashable], num_gram_tokens: int = 16) -> float:
    """Share of the tokens that lie in an n-gram which occurred before in the same sequence.

    An n-gram is n = `num_gram_tokens` consecutive tokens. It occurred before if an equal one starts at an earlier
    position; the two may overlap, so a single token repeated without end counts. The first occurrence is never counted.

    Args:
        tokens: the new tokens of one output, without its prompt; any hashable items: ids, bytes, characters.
        num_gram_tokens: n. Report it with the number: 16 bytes is two or three words, 16 larger tokens a line.

    Returns:
        A share in 0..1; 0.0 for a sequence too short to repeat an n-gram.

    Worked example, n = 3: in "abcabcx" the n-gram "abc" at position 3 occurred before at 0; it covers 3 of 7 items.

    >>> round(repeated_text_share("abcabcx", num_gram_tokens=3), 3)
    0.429
    >>> repeated_text_share("aaaaaaaaaa", num_gram_tokens=3)
    0.9
    >>> repeated_text_share("abcdefg", num_gram_tokens=3)
    0.0
    """
    if num_gram_tokens < 1:
        raise ValueError(f"num_gram_tokens must be at least 1, got {num_gram_tokens}")
    seen: set[tuple[Hashable, ...]] = set()
    num_repeated = 0
    covered_until = 0
    for start in range(len(tokens) - num_gram_tokens + 1):
        gram = tuple(tokens[start : start + num_gram_tokens])
        if gram in seen:
            end = start + num_gram_tokens
            num_repeated += end - max(start, covered_until)
            covered_until = end
        seen.add(gram)
    return num_repeated / len(tokens) if len(tokens) else 0.0


def mean_repeated_share(outputs: Sequence[Sequence[int]]) -> float:
    """`repeated_text_share` of several outputs together, weighted by their lengths."""
    lengths = [len(output) for output in outputs]
    return float(np.average([repeated_text_share(output) for output in outputs], weights=lengths))
