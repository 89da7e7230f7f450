"""Drafting with another, smaller language model of the same vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextn.decoding.drafters.drafter import PROMPT_CHUNK, BatchTokens, Drafts
from nextn.decoding.sampling import SamplingConfig, choose, penalise, seen_after, transform
from nextn.decoding.steps import Steps
from nextn.errors import GenerationError
from nextn.model import Trunk


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
        self._positions = torch.arange(capacity, device=trunk.device)
        self._num_read = [0] * num_rows

    def begin(self, slot: int, token_ids: Tensor, num_known: int) -> None:
        """See `Drafter`; the draft model reads the prompt."""
        self._num_read[slot] = 0
        self._catch_up(slot, token_ids, num_known)

    def observe(self, hidden: Tensor, normed: Tensor, positions: Tensor, first_slot: int = 0) -> None:
        """States of the trunk are not read."""

    def draft(
        self, tokens: BatchTokens, num_draft_tokens: int, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Drafts:
        """See `Drafter`: `num_draft_tokens` steps of the draft model."""
        for slot, known in enumerate(tokens.num_known):
            if known - self._num_read[slot] > 2:  # cycles without drafts
                self._catch_up(slot, tokens.token_ids[slot], known - 1)
        token_ids, probs = self._steps.run(
            self._draft_tokens,
            (num_draft_tokens, len(tokens.num_known), len(self._positions), sampling),
            tokens.token_ids,
            tokens.known_and_total,
            self._steps.key_positions(self._positions, max(tokens.num_known) + num_draft_tokens),
            tokens.seen,
            uniforms,
            num_draft_tokens,
            sampling,
        )
        for slot, known in enumerate(tokens.num_known):
            self._num_read[slot] = known + num_draft_tokens - 1
        return Drafts(token_ids, probs)

    def roll_back(self, num_final: Sequence[int]) -> None:
        """See `Drafter`."""
        for slot, final in enumerate(num_final):
            self._num_read[slot] = min(self._num_read[slot], final)

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """See `Drafter`."""
        self._cache.copy_row(source, target, num_tokens)
        self._num_read[target] = self._num_read[source]

    def _draft_tokens(
        self,
        token_ids: Tensor,
        known_and_total: Tensor,
        key_positions: Tensor,
        seen: Tensor | None,
        uniforms: Tensor | None,
        num_draft_tokens: int,
        sampling: SamplingConfig,
    ) -> tuple[Tensor, Tensor | None]:
        """Drafts int64 [B, N] and their distributions float32 [B, N, V] (None when greedy), a step of fixed shapes."""
        trunk, cache = self._trunk, self._cache.rows(0, token_ids.shape[0])
        known, last_position = known_and_total[0, :, None], known_and_total[1, :, None] - 1
        wanted = (known + torch.arange(-2, 0, device=known.device)).clamp(min=0)  # the two last known tokens
        read = token_ids.gather(1, wanted)
        ids: list[Tensor] = []
        all_probs: list[Tensor] = []
        for step in range(num_draft_tokens):
            positions = torch.minimum(wanted, last_position)
            hidden = trunk.hidden_states(read, trunk.cached_context(positions, key_positions.shape[0]), cache)
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
            wanted, read = known + step, chosen[:, None]
        return torch.stack(ids, dim=1), torch.stack(all_probs, dim=1) if all_probs else None

    def _catch_up(self, slot: int, token_ids: Tensor, num_tokens: int) -> None:
        """Read what is unread of the row's first `num_tokens` tokens, int64 [capacity]."""
        cache = self._cache.rows(slot, slot + 1)
        for first in range(self._num_read[slot], num_tokens, PROMPT_CHUNK):
            end = min(first + PROMPT_CHUNK, num_tokens)
            positions = self._positions[None, first:end]
            self._trunk.hidden_states(token_ids[None, first:end], self._trunk.cached_context(positions, end), cache)
        self._num_read[slot] = max(self._num_read[slot], num_tokens)
