"""Drafting with one module and one cache layer, whose states are recycled: what engines do, and our own `recycled`.

Draft 1 reads the positions that are new since the last cycle, the trunk's states and known tokens, as depth 1 was
trained. Draft n >= 2 reads one position more: the state that draft n-1 came from, in place of a state of the trunk, and
the token that it drafted. The next cycle overwrites the entries of drafts. Worked example, tokens A..E known, N = 3
(small letters are drafts, h the trunk's states, r recycled ones):

    entry    0      1     2     3     4     5
    state    h0     h1    h2    h3    r     r'
    embeds   B      C     D     E     f     g    ->  f at entry 3, g at 4, the third draft at 5

Conventions differ at the beginning of a row and in how a token is chosen; `engine_drafts` has them by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nextn.alignment import embedded_positions, num_final_positions
from nextn.decoding.drafters.drafter import PROMPT_CHUNK, BatchTokens, Drafts
from nextn.decoding.drafters.mtp import DraftHeads
from nextn.decoding.request import DraftSettings
from nextn.decoding.sampling import SamplingConfig, seen_after
from nextn.decoding.steps import Steps
from nextn.model import Trunk
from nextn.mtp.scheme import Scheme

GREEDY = SamplingConfig()


@dataclass(frozen=True)
class SingleCacheConvention:
    """What drafters of one module and one cache layer differ in.

    Attributes:
        first_position: 0, or -1 where a pair of a zero state and t[0] comes first; it lies in cache entry 0.
        zeroes_first_embedding: the embedding read at position 0 is zeros.
        samples: drafts are drawn as the trunk's tokens are; otherwise they are the most likely ones always.
    """

    first_position: int
    zeroes_first_embedding: bool
    samples: bool = False


class SingleCacheDrafter:
    """Drafts of one module with one cache layer.

    Args:
        trunk: the model whose embedding, norm and head the module shares.
        scheme: a sequential one; its first module drafts.
        num_rows: B.
        capacity: most tokens a row may hold, drafts included.
        convention: what happens at the beginning of a row, and how a token is chosen.
        steps: eager, unless compiled ones are given.
        settings: draft vocabulary.
    """

    def __init__(
        self,
        trunk: Trunk,
        scheme: Scheme,
        num_rows: int,
        capacity: int,
        convention: SingleCacheConvention,
        steps: Steps | None = None,
        settings: DraftSettings | None = None,
    ):
        self._trunk, self._scheme, self._convention = trunk, scheme, convention
        self._steps = steps or Steps(trunk.device, compiled=False)
        self._heads = DraftHeads(trunk, scheme, 1, settings or DraftSettings())
        # Both by entry: the position, counted from the convention's first one. What precedes position 0 stays 0.
        num_entries = capacity - convention.first_position
        self._cache = scheme.new_cache(trunk, num_rows, num_entries, draft_length=1)
        self._all_entries = torch.arange(num_entries, device=trunk.device)
        dtype = trunk.embed(self._all_entries[:1]).dtype
        self._states = torch.zeros(num_rows, num_entries, trunk.hidden_size, dtype=dtype, device=trunk.device)
        # num_read[b]: row b's true pairs have been read at all positions below.
        self._num_read = [convention.first_position] * num_rows

    def begin(self, slot: int, token_ids: Tensor, num_known: int) -> None:
        """See `Drafter`; the pairs of the prompt are read."""
        self._num_read[slot] = self._convention.first_position
        self._catch_up(slot, token_ids, num_known)

    def observe(self, hidden: Tensor, normed: Tensor, positions: Tensor, first_slot: int = 0) -> None:
        """See `Drafter`."""
        state = self._scheme.trunk_state(hidden, normed)
        states = self._states[first_slot : first_slot + positions.shape[0]]
        states.scatter_(1, self._entries(positions)[..., None].expand_as(state), state)

    def draft(
        self, tokens: BatchTokens, num_draft_tokens: int, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Drafts:
        """See `Drafter`; drafts are written into `tokens.token_ids` behind the known ones.

        An engine's drafts are the most likely tokens always: `sampling` and `uniforms` are then not read, and the
        distributions are one-hot.
        """
        num_known = tokens.num_known
        window = self._longest_unread(num_known)
        if window > num_draft_tokens + 1:  # cycles without drafts
            for slot, known in enumerate(num_known):
                self._catch_up(slot, tokens.token_ids[slot], known - 1)
            window = self._longest_unread(num_known)
        if self._steps.compiled:
            window = num_draft_tokens + 1
        ends = [num_final_positions(known, depth=1) for known in num_known]
        if not self._convention.samples:
            sampling, uniforms = GREEDY, None
        ids, probs = self._steps.run(
            self._draft_tokens,
            (num_draft_tokens, window, len(ends), len(self._all_entries), sampling),
            tokens.token_ids,
            tokens.known_and_total,
            self._steps.key_positions(
                self._all_entries, max(ends) - self._convention.first_position + num_draft_tokens - 1
            ),
            tokens.seen if self._convention.samples else None,
            uniforms,
            num_draft_tokens,
            window,
            sampling,
        )
        self._num_read[: len(ends)] = ends
        return Drafts(ids, probs)

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """See `Drafter`."""
        num_entries = num_tokens + 1
        self._cache.copy_row(source, target, num_entries)
        self._states[target, :num_entries] = self._states[source, :num_entries]
        self._num_read[target] = self._num_read[source]

    def roll_back(self, num_final: Sequence[int]) -> None:
        """Nothing to do: only true pairs count as read, and the next cycle overwrites the drafts' entries."""

    def _draft_tokens(
        self,
        token_ids: Tensor,
        known_and_total: Tensor,
        key_positions: Tensor,
        seen: Tensor | None,
        uniforms: Tensor | None,
        num_draft_tokens: int,
        window: int,
        sampling: SamplingConfig,
    ) -> tuple[Tensor, Tensor | None]:
        """Drafts int64 [B, N] and their distributions float32 [B, N, V] (None when greedy), a step of fixed shapes."""
        num_rows = token_ids.shape[0]
        known, last_position = known_and_total[0, :, None], known_and_total[1, :, None] - 1
        cache = self._cache.rows(0, num_rows)
        offsets = torch.arange(-window, 0, device=token_ids.device)
        positions = (num_final_positions(known, depth=1) + offsets).clamp(min=self._convention.first_position)
        states = self._states[:num_rows].gather(
            1, self._entries(positions)[..., None].expand(-1, -1, self._states.shape[-1])
        )
        ids: list[Tensor] = []
        all_probs: list[Tensor] = []
        for step in range(num_draft_tokens):
            if step:  # one position more: the recycled state, and the token just drafted
                positions = torch.minimum(positions[:, -1:] + 1, last_position - 1)
            state = self._scheme.step(
                self._trunk_at(positions),
                1,
                states,
                token_ids.gather(1, embedded_positions(positions, depth=1)),
                self._trunk.cached_context(self._entries(positions), key_positions.shape[0]),
                cache,
            )
            states = state.carry[:, -1:]
            seen_now = seen_after(seen, torch.stack(ids, dim=1))[:, -1] if seen is not None and ids else seen
            drawn = None if uniforms is None else uniforms[:, step]
            chosen, probs, _ = self._heads.choose(1, state.head_input[:, -1], seen_now, sampling, drawn)
            token_ids.scatter_(1, torch.minimum(known + step, last_position), chosen[:, None])
            ids.append(chosen)
            if probs is not None:
                all_probs.append(probs)
        return torch.stack(ids, dim=1), torch.stack(all_probs, dim=1) if all_probs else None

    def _catch_up(self, slot: int, token_ids: Tensor, num_tokens: int) -> None:
        """Read the true pairs among the first `num_tokens` tokens, int64 [capacity], that are unread."""
        cache = self._cache.rows(slot, slot + 1)
        end = num_final_positions(num_tokens, depth=1)
        for first in range(self._num_read[slot], end, PROMPT_CHUNK):
            part = torch.arange(first, min(first + PROMPT_CHUNK, end), device=token_ids.device)[None]
            entries = self._entries(part)
            self._scheme.step(
                self._trunk_at(part),
                1,
                self._states[slot : slot + 1, entries[0]],
                token_ids[embedded_positions(part, depth=1)],
                self._trunk.cached_context(entries, int(entries[0, -1]) + 1),
                cache,
            )
        self._num_read[slot] = max(self._num_read[slot], end)

    def _longest_unread(self, num_known: Sequence[int]) -> int:
        """Positions that some row has still to read; at least the last, whose state counts."""
        unread = (num_final_positions(known, 1) - read for known, read in zip(num_known, self._num_read, strict=False))
        return max(1, *unread)

    def _entries(self, positions: Tensor) -> Tensor:
        return positions - self._convention.first_position

    def _trunk_at(self, positions: Tensor) -> Trunk:
        """The trunk as the module sees it at these positions."""
        if not self._convention.zeroes_first_embedding:
            return self._trunk
        return cast(Trunk, _ZeroFirstEmbedding(self._trunk, positions))


class _ZeroFirstEmbedding:
    """A trunk whose embedding is zeros at position 0."""

    def __init__(self, trunk: Trunk, positions: Tensor):
        self._trunk, self._is_first = trunk, (positions == 0)[..., None]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._trunk.embed(token_ids).masked_fill(self._is_first, 0)
