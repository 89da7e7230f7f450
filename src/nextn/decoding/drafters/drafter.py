"""What drafting is, whoever does it: rows of known tokens in, guesses of the next ones out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from nextn.decoding.sampling import SamplingConfig

PROMPT_CHUNK = 512
"""Most positions of a prompt read at once."""


@dataclass
class BatchTokens:
    """The tokens of B rows, known on the host and on the device.

    Attributes:
        token_ids: int64 [B, capacity]; row b holds `num_known[b]` tokens, the last of which the trunk has not read yet.
        num_known: known tokens per row, at least 2.
        num_total: most tokens each row may ever hold; None: the capacity. What is drafted beyond is never emitted; it
            piles up in the last position, which nobody reads.
        seen: tokens in the row so far, bool [B, V], where a repetition penalty asks for them.
    """

    token_ids: Tensor
    num_known: Sequence[int]
    num_total: Sequence[int] | None = None
    seen: Tensor | None = None

    @cached_property
    def known_and_total(self) -> Tensor:
        """`num_known` and `num_total` on the device, int64 [2, B]."""
        total = self.num_total or [self.token_ids.shape[1]] * len(self.num_known)
        return torch.tensor([list(self.num_known), list(total)], device=self.token_ids.device)


@dataclass(frozen=True)
class Drafts:
    """What was drafted for B rows.

    Attributes:
        token_ids: int64 [B, N].
        probs: the distributions they were drawn from, float32 [B, N, V]; None: the drafts were certain.
        num_drafted: how many of the N each row means, 0..N; None: all of them.
    """

    token_ids: Tensor
    probs: Tensor | None = None
    num_drafted: list[int] | None = None

    @staticmethod
    def none(num_rows: int, device: torch.device) -> Drafts:
        """No drafts: a plain step."""
        return Drafts(torch.zeros(num_rows, 0, dtype=torch.int64, device=device))


class Drafter(Protocol):
    """Guesses the next tokens of B rows. Slots (rows of the batch) are taken, moved and given to others."""

    def begin(self, slot: int, token_ids: Tensor, num_known: int) -> None:
        """A new row of `num_known` tokens, int64 [capacity], is in this slot; the trunk has read it."""
        ...

    def observe(self, hidden: Tensor, normed: Tensor, positions: Tensor, first_slot: int = 0) -> None:
        """Take over trunk states before and after the final norm, [b, M, C] each, at `positions`, int64 [b, M].

        They belong to slots first_slot..first_slot+b-1. States of drafts that are then rejected may be among them:
        they are overwritten before they are read.
        """
        ...

    def draft(
        self, tokens: BatchTokens, num_draft_tokens: int, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Drafts:
        """Draft at most `num_draft_tokens` >= 1 tokens for every row.

        Args:
            tokens: of all rows; drafts may be written behind the known ones.
            num_draft_tokens: how many to draft now.
            sampling: how a drafted token is chosen.
            uniforms: numbers in [0, 1), float64 [B, num_draft_tokens]; None when greedy.
        """
        ...

    def roll_back(self, num_final: Sequence[int]) -> None:
        """Keep of each row what was read from its first `num_final[b]` tokens; the rest will be read again.

        After verification these are the tokens known before the cycle and the accepted drafts, but not the correction
        or bonus, which no drafter has read.
        """
        ...

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """The row in slot `source`, of `num_tokens` tokens, goes on in slot `target`."""
        ...
