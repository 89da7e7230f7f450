"""One row of a batch: what is asked, what has been emitted, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from nextn.decoding.sampling import row_generators
from nextn.decoding.stopping import StopRow

FinishReason = Literal["eos", "length", "stop", "cancelled"]

CYCLES_DRAWN_AT_ONCE = 32


@dataclass(frozen=True)
class RowRequest:
    """A prompt to continue: what is asked of one row.

    Attributes:
        number: which of the caller's prompts it is.
        prompt_ids: at least one token.
        max_new_tokens: most tokens to add.
        seed: of its random numbers.
        eos_token_id: ends the row; None: nothing does.
        stop: looks for stop strings in what is emitted; None: there are none.
    """

    number: int
    prompt_ids: Sequence[int]
    max_new_tokens: int
    seed: int = 0
    eos_token_id: int | None = None
    stop: StopRow | None = None

    @property
    def num_total(self) -> int:
        """Tokens of prompt and continuation."""
        return len(self.prompt_ids) + self.max_new_tokens


@dataclass
class Row:
    """A row under way.

    Attributes:
        request: what is asked.
        token_ids: emitted so far, a final EOS included.
        origins: where each token came from: 0 = the trunk, k = an accepted draft of depth k.
        cycles: (drafted, accepted) of each cycle.
        num_changed: accepted drafts that the lossless verifier would have refused.
        finish_reason: why it ended; None while it goes on.
        num_chars: length of its text if a stop string ended it.
        is_cancelled: set from anywhere, it ends the row before the next cycle.
    """

    request: RowRequest
    token_ids: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    cycles: list[tuple[int, int]] = field(default_factory=list)
    num_changed: int = 0
    finish_reason: FinishReason | None = None
    num_chars: int | None = None
    is_cancelled: bool = False

    @property
    def num_known(self) -> int:
        """Tokens of the row, prompt included."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def num_left(self) -> int:
        """Tokens that may still be emitted."""
        return self.request.max_new_tokens - len(self.token_ids)

    def emit(self, token_ids: Sequence[int], origins: Sequence[int]) -> None:
        """Take over new tokens as far as the row goes: up to EOS, a stop string, `max_new_tokens`."""
        kept, eos_token_id = list(token_ids), self.request.eos_token_id
        if eos_token_id in kept:
            kept = kept[: kept.index(eos_token_id) + 1]
        text_ids = kept[:-1] if kept[-1] == eos_token_id else kept
        match = None if self.request.stop is None else self.request.stop.feed(text_ids)
        if match is not None:
            kept, self.num_chars = kept[: match.num_tokens], match.num_chars
            self.finish_reason = "stop"
        elif kept[-1] == eos_token_id:
            self.finish_reason = "eos"
        self.token_ids += kept
        self.origins += origins[: len(kept)]
        if self.finish_reason is None and self.num_left == 0:
            self.finish_reason = "length"


class RowRandom:
    """The random numbers of one row, a function of (seed, number of the row) alone; the same count every cycle."""

    def __init__(self, request: RowRequest):
        (self._generator,) = row_generators(request.seed, [request.number])
        self._drawn = torch.empty(0, 0, dtype=torch.float64)
        self._num_used = 0

    def first(self) -> Tensor:
        """One number for the token after the prompt, float64 [1]."""
        return torch.rand(1, generator=self._generator, dtype=torch.float64)

    def next(self, count: int) -> Tensor:
        """Numbers in [0, 1) for one cycle, float64 [count]; drawn for several cycles at once."""
        if self._num_used == len(self._drawn):
            shape = (CYCLES_DRAWN_AT_ONCE, count)
            self._drawn, self._num_used = torch.rand(shape, generator=self._generator, dtype=torch.float64), 0
        self._num_used += 1
        return self._drawn[self._num_used - 1]
