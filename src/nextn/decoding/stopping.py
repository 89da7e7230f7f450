"""Stop strings: text that ends generation when it appears in what a row has generated.

A stop string may begin in the middle of a token and span several, and a character may be split between tokens, so the
search is over bytes (`Tokenizer.token_bytes`). UTF-8 makes that exact: the bytes of a string are found in valid text
only where the string is.

The match that is complete first wins, as if the text grew byte by byte; of two that end at the same byte, the longer
one. So the outcome depends on the text alone, not on how it is cut into tokens or into cycles.

Worked example, stop strings "cd" and "bcde", tokens "ab", "cdef", "g":

    bytes        a b c d e f g
    "cd"             [ ]             complete at byte 4: wins; the row's text is "ab", its tokens "ab", "cdef"
    "bcde"         [     ]           complete at byte 5
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from nextn.data.tokenizers import Tokenizer
from nextn.errors import GenerationError


@dataclass(frozen=True)
class StopMatch:
    """Where a row stops.

    Attributes:
        num_tokens: how many of the tokens just fed belong to the row; the last of them completes the stop string.
        num_chars: characters of the row's text before the stop string. The row's text is
            `tokenizer.decode(its tokens)[:num_chars]`.
    """

    num_tokens: int
    num_chars: int


class StopStrings:
    """Stop strings, checked; `new_row` gives what looks for them in one row.

    Args:
        stop: strings of at least one character; none: never stop.
        tokenizer: of the model; None if it has none.

    Raises:
        GenerationError: a stop string is empty or not valid Unicode; `stop` is a single string; there is no tokenizer.
    """

    def __init__(self, stop: Sequence[str], tokenizer: Tokenizer | None) -> None:
        if isinstance(stop, str):
            raise GenerationError(f"stop is a list of strings, got the single string {stop!r}; write [{stop!r}]")
        if tokenizer is None:
            raise GenerationError("stop strings need a tokenizer, and the model has none; use eos_token_id")
        if "" in stop:
            raise GenerationError("a stop string is empty; it needs at least one character")
        self._tokenizer = tokenizer
        self._stop = {text: _utf8(text) for text in stop}

    def new_row(self) -> StopRow:
        """A row that has generated nothing yet."""
        return StopRow(self._stop, self._tokenizer)


class StopRow:
    """Looks for stop strings in the text of one row; made by `StopStrings.new_row`.

    >>> from nextn.data.tokenizers import ByteTokenizer
    >>> row = StopStrings(["END"], ByteTokenizer()).new_row()
    >>> row.feed(list(b"the E")), row.feed(list(b"ND of"))
    (None, StopMatch(num_tokens=2, num_chars=4))
    """

    def __init__(self, stop: dict[str, bytes], tokenizer: Tokenizer) -> None:
        self._stop, self._tokenizer = stop, tokenizer
        self._token_ids: list[int] = []
        self._text = bytearray()

    def feed(self, token_ids: Sequence[int]) -> StopMatch | None:
        """Take over the next tokens of the row and say whether it stops in them; after a match, feed no more.

        Each call searches the new bytes and as many before them as a stop string may have begun in.

        Args:
            token_ids: one or several; tokens without bytes (end of text, special ones) are passed over.

        Returns:
            The match that is complete first, or None.
        """
        num_old = len(self._text)
        parts = [self._tokenizer.token_bytes(token_id) for token_id in token_ids]
        self._text += b"".join(parts)
        matches = []
        for text, pattern in self._stop.items():
            start = self._text.find(pattern, max(0, num_old - len(pattern) + 1))
            if start >= 0:
                matches.append((start + len(pattern), start, text))
        if not matches:
            self._token_ids += token_ids
            return None
        end, start, text = min(matches)
        ends = list(accumulate(map(len, parts), initial=num_old))  # ends[i]: bytes after i of the new tokens
        num_tokens = bisect_left(ends, end)
        self._token_ids += token_ids[:num_tokens]
        return StopMatch(num_tokens, self._num_chars(text, start))

    def _num_chars(self, text: str, start: int) -> int:
        """Characters before the stop string `text` that begins at byte `start`."""
        shown = self._tokenizer.decode(self._token_ids).find(text)
        # A SentencePiece-like tokenizer does not show the space before its first token, which `text` may begin with.
        return shown if shown >= 0 else len(self._text[:start].decode("utf-8", errors="replace"))


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GenerationError(
            f"the stop string {text!r} holds half of a surrogate pair at character {error.start}, "
            "which is not valid Unicode"
        ) from None
