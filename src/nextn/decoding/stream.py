"""Text as it is decoded: pieces per cycle, and cancelling."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass

from nextn.data.tokenizers import REPLACEMENT
from nextn.decoding.result import row_text
from nextn.decoding.row import FinishReason, Row
from nextn.mtp.model import MTPModel


@dataclass(frozen=True)
class Piece:
    """What one cycle added to one prompt.

    Attributes:
        number: which prompt.
        text: new text; a character or possible stop string that is not complete yet comes with a later piece.
        token_ids: new tokens.
        origins: as in `GenerationResult`.
        finish_reason: why the row ended; None while it goes on.
    """

    number: int
    text: str
    token_ids: tuple[int, ...]
    origins: tuple[int, ...]
    finish_reason: FinishReason | None


class TokenStream:
    """Pieces of text as they are decoded; `for piece in stream`, or `async for`, which leaves the event loop free.

    `cancel` may be called from any thread or task: the rows end before the next cycle, and their slots go to others.
    """

    def __init__(self, cycles: Generator[list[Row], None, None], model: MTPModel, hold_back: int):
        self._cycles, self._model, self._hold_back = cycles, model, hold_back
        self._rows: dict[int, Row] = {}
        self._texts: dict[int, _GrowingText] = {}
        self._cancelled: set[int] = set()
        self._all_cancelled = False
        self._waiting: list[Piece] = []

    def cancel(self, number: int | None = None) -> None:
        """End prompt `number`, or all of them (None), those included that have not begun."""
        if number is None:
            self._all_cancelled = True
        else:
            self._cancelled.add(number)
        for row in list(self._rows.values()):
            row.is_cancelled |= self._all_cancelled or row.request.number in self._cancelled

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        """Raises StopIteration when all rows have ended or all were cancelled."""
        while not self._waiting:
            if self._all_cancelled:
                self._cycles.close()
                raise StopIteration
            for row in next(self._cycles):
                self._take(row)
        return self._waiting.pop(0)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Each cycle runs in a worker thread."""
        while True:
            piece = await asyncio.to_thread(next, self, None)
            if piece is None:
                return
            yield piece

    def _take(self, row: Row) -> None:
        number = row.request.number
        if number not in self._texts:
            self._rows[number] = row
            self._texts[number] = _GrowingText(self._model, self._hold_back)
            row.is_cancelled |= self._all_cancelled or number in self._cancelled
        text = self._texts[number]
        if text.is_finished or (len(row.token_ids) == text.num_tokens and row.finish_reason is None):
            return
        first = text.num_tokens
        new_text = text.grow(row)
        if row.finish_reason is not None:
            del self._rows[number]
        self._waiting.append(
            Piece(number, new_text, tuple(row.token_ids[first:]), tuple(row.origins[first:]), row.finish_reason)
        )


class _GrowingText:
    """The text of a row so far, cut where no character is torn and no stop string may be under way.

    All of the row is decoded anew each time: what a token's text is can depend on the tokens before it.
    """

    def __init__(self, model: MTPModel, hold_back: int):
        self._model, self._hold_back = model, hold_back
        self._num_shown = 0
        self.num_tokens = 0
        self.is_finished = False

    def grow(self, row: Row) -> str:
        """Text that can be shown since the last call."""
        self.num_tokens, self.is_finished = len(row.token_ids), row.finish_reason is not None
        if self._model.tokenizer is None:
            return ""
        text = row_text(self._model, row)
        if not self.is_finished:
            text = text.rstrip(REPLACEMENT)  # of a torn character
            text = text[: max(len(text) - self._hold_back, self._num_shown)]
        new_text = text[self._num_shown :]
        self._num_shown += len(new_text)
        return new_text
