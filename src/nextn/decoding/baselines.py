"""Drafters without MTP depths, to compare with: prompt lookup and a separate draft model.

Parallel decoding needs no drafter of its own: it is MTP with a scheme whose drafts are independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextn.decoding.draft import PROMPT_CHUNK, BatchTokens, Drafts
from nextn.decoding.prompt_lookup import NgramIndex
from nextn.decoding.sampling import SamplingConfig, choose, penalise, seen_after, transform
from nextn.decoding.steps import Steps
from nextn.errors import GenerationError
from nextn.model import Trunk


class PromptLookupDrafter:
    """Drafts what followed the last words where they stood before, in the row itself; costs next to nothing.

    Args:
        num_rows: B.
    """

    def __init__(self, num_rows: int):
        self._indices = [NgramIndex() for _ in range(num_rows)]
        self._num_indexed = [0] * num_rows

    def begin(self, place: int, token_ids: Tensor, num_known: int) -> None:
        """See `Drafter`."""
        self._indices[place], self._num_indexed[place] = NgramIndex(), 0
        self._index(place, token_ids, num_known)

    def observe(self, hidden: Tensor, normed: Tensor, positions: Tensor, first_place: int = 0) -> None:
        """States of the trunk are not read."""

    def draft(
        self, tokens: BatchTokens, num_draft_tokens: int, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Drafts:
        """See `Drafter`; the drafts are certain, and a row without an earlier occurrence drafts nothing."""
        ids = torch.zeros(len(tokens.num_known), num_draft_tokens, dtype=torch.int64)
        counts = []
        for place, known in enumerate(tokens.num_known):
            self._index(place, tokens.token_ids[place], known)
            found = self._indices[place].continuation(num_draft_tokens)
            ids[place, : len(found)] = torch.from_numpy(found)
            counts.append(len(found))
        return Drafts(ids.to(tokens.token_ids.device), None, counts)

    def roll_back(self, num_final: Sequence[int]) -> None:
        """Only known tokens are indexed, so there is nothing to take back."""

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """See `Drafter`."""
        self._indices[target], self._num_indexed[target] = self._indices[source], self._num_indexed[source]

    def _index(self, place: int, token_ids: Tensor, num_known: int) -> None:
        if num_known > self._num_indexed[place]:
            self._indices[place].append(token_ids[self._num_indexed[place] : num_known].cpu().numpy())
            self._num_indexed[place] = num_known


class DraftModelDrafter:
    """Drafts with another, smaller language model of the same vocabulary: speculative decoding proper (2211.17192).

    After a cycle the draft model has read all accepted drafts but possibly the last, and not the trunk's own token:
    two tokens at most are unread when the next cycle begins.

    Args:
        trunk: the draft model's.
        vocab_size: of the model that verifies.
        num_rows: B.
        capacity: most tokens a row may hold.
        steps: eager, unless compiled ones are given.

    Raises:
        GenerationError: the vocabularies differ in size, or rows may be longer than the draft model's context.
    """

    def __init__(self, trunk: Trunk, vocab_size: int, num_rows: int, capacity: int, steps: Steps | None = None):
        if trunk.vocab_size != vocab_size:
            raise GenerationError(
                f"the draft model has {trunk.vocab_size} tokens, the model that verifies has {vocab_size}; "
                "they need the same vocabulary"
            )
        if capacity > trunk.max_position_embeddings:
            raise GenerationError(
                f"rows may hold {capacity} tokens, and the draft model's context is {trunk.max_position_embeddings} "
                "(max_position_embeddings); shorten prompts or max_new_tokens"
            )
        self._trunk, self._steps = trunk, steps or Steps(trunk.device, compiled=False)
        self._cache = trunk.new_cache(num_rows, capacity)
        self._slots = torch.arange(capacity, device=trunk.device)
        self._num_read = [0] * num_rows

    def begin(self, place: int, token_ids: Tensor, num_known: int) -> None:
        """See `Drafter`; the draft model reads the prompt."""
        self._num_read[place] = 0
        self._catch_up(place, token_ids, num_known)

    def observe(self, hidden: Tensor, normed: Tensor, positions: Tensor, first_place: int = 0) -> None:
        """States of the trunk are not read."""

    def draft(
        self, tokens: BatchTokens, num_draft_tokens: int, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Drafts:
        """See `Drafter`: `num_draft_tokens` steps of the draft model."""
        for place, known in enumerate(tokens.num_known):
            if known - self._num_read[place] > 2:  # cycles without drafts
                self._catch_up(place, tokens.token_ids[place], known - 1)
        token_ids, probs = self._steps.run(
            self._draft_tokens,
            (num_draft_tokens, len(tokens.num_known), len(self._slots), sampling),
            tokens.token_ids,
            tokens.known_and_total,
            self._steps.slots(self._slots, max(tokens.num_known) + num_draft_tokens),
            tokens.seen,
            uniforms,
            num_draft_tokens,
            sampling,
        )
        for place, known in enumerate(tokens.num_known):
            self._num_read[place] = known + num_draft_tokens - 1
        return Drafts(token_ids, probs)

    def roll_back(self, num_final: Sequence[int]) -> None:
        """See `Drafter`."""
        for place, final in enumerate(num_final):
            self._num_read[place] = min(self._num_read[place], final)

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """See `Drafter`."""
        self._cache.copy_row(source, target, num_tokens)
        self._num_read[target] = self._num_read[source]

    def _draft_tokens(
        self,
        token_ids: Tensor,
        known_and_total: Tensor,
        slots: Tensor,
        seen: Tensor | None,
        uniforms: Tensor | None,
        num_draft_tokens: int,
        sampling: SamplingConfig,
    ) -> tuple[Tensor, Tensor | None]:
        """Drafts int64 [B, N] and their distributions float32 [B, N, V] (None when greedy), a step of fixed shapes."""
        trunk, cache = self._trunk, self._cache.rows(0, token_ids.shape[0])
        known, last_place = known_and_total[0, :, None], known_and_total[1, :, None] - 1
        places = (known + torch.arange(-2, 0, device=known.device)).clamp(min=0)  # the two last known tokens
        read = token_ids.gather(1, places)
        ids: list[Tensor] = []
        all_probs: list[Tensor] = []
        for step in range(num_draft_tokens):
            positions = torch.minimum(places, last_place)
            hidden = trunk.hidden_states(read, trunk.cached_context(positions, slots.shape[0]), cache)
            logits = trunk.output_head(trunk.final_norm(hidden[:, -1]))
            seen_now = seen
            if seen is not None and ids:
                seen_now = seen_after(seen, torch.stack(ids, dim=1))[:, -1]
            if sampling.is_greedy:
                chosen = penalise(logits, seen_now, sampling).argmax(-1) if seen_now is not None else logits.argmax(-1)
            else:
                all_probs.append(transform(logits, sampling, seen_now))
                chosen = choose(all_probs[-1], None if uniforms is None else uniforms[:, step])
            ids.append(chosen)
            places, read = known + step, chosen[:, None]
        return torch.stack(ids, dim=1), torch.stack(all_probs, dim=1) if all_probs else None

    def _catch_up(self, place: int, token_ids: Tensor, num_tokens: int) -> None:
        """Read what is unread of the row's first `num_tokens` tokens, int64 [capacity]."""
        cache = self._cache.rows(place, place + 1)
        for first in range(self._num_read[place], num_tokens, PROMPT_CHUNK):
            end = min(first + PROMPT_CHUNK, num_tokens)
            positions = self._slots[None, first:end]
            self._trunk.hidden_states(token_ids[None, first:end], self._trunk.cached_context(positions, end), cache)
        self._num_read[place] = max(self._num_read[place], num_tokens)
