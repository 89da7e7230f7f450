"""Drafting with the MTP depths, exactly as they were trained: cached, and equal to the chain computed from scratch.

In training depth k reads, at every position j, the state h[k-1][j] and the token t[j+k]. A draft does the same. Let
tokens t[0..n] be known, t[n] just emitted, so that the trunk has states up to position n-1. Depths 1, 2, ... read
positions up to n-1 in turn; the logits of depth k at position n-1 give the draft of t[n+k]. There t[j+k] is known for
j + k <= n and one of this cycle's own drafts beyond: depth k reads k-1 drafted tokens.

Worked example, n = 4, N = 3 (a capital is a known token, a small letter a draft; each row ends at position n-1 = 3):

    position j           0   1   2   3
    depth 1 embeds       B   C   D   E   ->  f
    depth 2 embeds       C   D   E   f   ->  g
    depth 3 embeds       D   E   f   g   ->  h

If f is accepted and g is not, t[0..5] = A..F were read as they are: depth 2 keeps positions 0..3, depth 3 positions
0..2 (`alignment.num_final_positions`), and the next cycle reads on from there. Rolling back moves a number and copies
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextn.alignment import embedded_positions, num_final_positions
from nextn.decoding.drafters.drafter import PROMPT_CHUNK, BatchTokens, Drafts
from nextn.decoding.request import DraftSettings
from nextn.decoding.sampling import SamplingConfig, choose, penalise, seen_after, transform
from nextn.decoding.steps import Steps
from nextn.model import Trunk
from nextn.mtp.scheme import Scheme


class DraftHeads:
    """From a depth's last state to the token that it drafts.

    Args:
        trunk: the model whose head depths may share.
        scheme: the MTP depths.
        num_depths: how many have a head.
        settings: confidence stop and draft vocabulary.
    """

    def __init__(self, trunk: Trunk, scheme: Scheme, num_depths: int, settings: DraftSettings):
        self._settings = settings
        self._heads = [scheme.head(trunk, depth) for depth in range(1, num_depths + 1)]
        if settings.vocabulary is not None:
            reduced = {head: settings.vocabulary.reduced_head(head) for head in self._heads}
            self._heads = [reduced[head] for head in self._heads]

    def choose(
        self,
        depth: int,
        head_input: Tensor,
        seen: Tensor | None,
        sampling: SamplingConfig,
        uniforms: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Draft one token per row.

        Args:
            depth: k >= 1.
            head_input: normed states, [B, C].
            seen: what the repetition penalty falls on, bool [B, V] or None.
            sampling: how the token is chosen.
            uniforms: float64 [B]; None when greedy.

        Returns:
            Drafts int64 [B]; their distributions float32 [B, V], None when greedy; the drafts' probabilities [B], None
            unless a draft may stop for them.
        """
        vocabulary = self._settings.vocabulary
        if vocabulary is not None and seen is not None:
            seen = seen[:, vocabulary.ids]
        logits = self._heads[depth - 1](head_input)
        probs = None if sampling.is_greedy else transform(logits, sampling, seen)
        if probs is None:
            chosen = (logits if seen is None else penalise(logits, seen, sampling)).argmax(-1)
        else:
            chosen = choose(probs, uniforms)
        confidence = None
        if self._settings.min_confidence is not None:
            shares = logits.float().softmax(-1) if probs is None else probs
            confidence = shares.gather(1, chosen[:, None])[:, 0]
        if vocabulary is not None:
            chosen = vocabulary.to_full(chosen)
            probs = None if probs is None else vocabulary.spread(probs)
        return chosen, probs, confidence


class MTPDrafter:
    """The state of drafting for B rows: one cache layer and one buffer of carried states per depth.

    Rows may know different numbers of tokens. All rows read windows of one length that end at their own last position;
    a row that needs less reads some final positions again, which changes nothing. Compiled steps have windows of fixed
    length.

    Args:
        trunk: the model whose embedding, norm and head the scheme shares.
        scheme: the MTP depths.
        num_rows: B.
        capacity: most tokens a row may hold, drafts included.
        draft_length: N, most tokens drafted in a cycle, at most the scheme's `max_draft_length`.
        steps: eager, unless compiled ones are given.
        settings: confidence stop and draft vocabulary.
    """

    def __init__(
        self,
        trunk: Trunk,
        scheme: Scheme,
        num_rows: int,
        capacity: int,
        draft_length: int,
        steps: Steps | None = None,
        settings: DraftSettings | None = None,
    ):
        self._trunk, self._scheme, self._draft_length = trunk, scheme, draft_length
        self._steps = steps or Steps(trunk.device, compiled=False)
        self._settings = settings or DraftSettings()
        self._cache = scheme.new_cache(trunk, num_rows, capacity, draft_length)
        self._positions = torch.arange(capacity, device=trunk.device)
        dtype = trunk.embed(self._positions[:1]).dtype
        shape = (num_rows, capacity, trunk.hidden_size)
        # states[k][b, j] is h[k][j] of row b, which depth k+1 reads.
        self._states = [torch.zeros(shape, dtype=dtype, device=trunk.device) for _ in range(draft_length)]
        # num_read[k][b]: depth k has read positions 0..num_read-1 of row b, from tokens that are final.
        self._num_read = {depth: [0] * num_rows for depth in range(1, draft_length + 1)}
        self._heads = DraftHeads(trunk, scheme, draft_length, self._settings)

    def begin(self, slot: int, token_ids: Tensor, num_known: int) -> None:
        """See `Drafter`; every depth reads the row's final positions."""
        for num_read in self._num_read.values():
            num_read[slot] = 0
        self._catch_up(slot, token_ids, num_known)

    def observe(self, hidden: Tensor, normed: Tensor, positions: Tensor, first_slot: int = 0) -> None:
        """See `Drafter`."""
        self._store(0, first_slot, positions, self._scheme.trunk_state(hidden, normed))

    def draft(
        self, tokens: BatchTokens, num_draft_tokens: int, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Drafts:
        """See `Drafter`; drafts are written into `tokens.token_ids` behind the known ones."""
        # All depths read up to the position at which depth 1 embeds the last known token.
        ends = [num_final_positions(known, depth=1) for known in tokens.num_known]
        depths = range(1, num_draft_tokens + 1)
        window = self._longest_unread(ends, depths)
        most = num_draft_tokens + 1 if self._steps.compiled else self._draft_length + 1
        if window > most:  # a row begun without its prompt, or depths that were not asked for for some time
            for slot, known in enumerate(tokens.num_known):
                self._catch_up(slot, tokens.token_ids[slot], known)
            window = self._longest_unread(ends, depths)
        if self._steps.compiled:
            window = most
        key_positions = self._steps.key_positions(self._positions, max(ends))
        runs = [depths] if self._settings.min_confidence is None else [range(depth, depth + 1) for depth in depths]
        parts: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        confidence, counts = [1.0] * len(ends), [0] * len(ends)
        for run in runs:
            parts.append(
                self._steps.run(
                    self._draft_depths,
                    (run, window, len(ends), len(self._positions), sampling),
                    tokens.token_ids,
                    tokens.known_and_total,
                    key_positions,
                    tokens.seen,
                    None if uniforms is None else uniforms[:, run.start - 1 : run.stop - 1],
                    run,
                    window,
                    sampling,
                )
            )
            for depth in run:
                self._num_read[depth][: len(ends)] = ends
            if (least := self._settings.min_confidence) is not None:
                latest = parts[-1][2]
                assert latest is not None, "it was asked for"
                for slot, share in enumerate(latest.tolist()):
                    counts[slot] += confidence[slot] >= least
                    confidence[slot] *= share
                if max(confidence) < least:
                    break
        ids = torch.cat([part[0] for part in parts], dim=1)
        probs = [part[1] for part in parts if part[1] is not None]
        return Drafts(
            ids,
            torch.cat(probs, dim=1) if probs else None,
            None if self._settings.min_confidence is None else counts,
        )

    def roll_back(self, num_final: Sequence[int]) -> None:
        """See `Drafter`."""
        for depth, num_read in self._num_read.items():
            for slot, final in enumerate(num_final):
                num_read[slot] = min(num_read[slot], num_final_positions(final, depth))

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """See `Drafter`."""
        self._cache.copy_row(source, target, num_tokens)
        for states in self._states:
            states[target, :num_tokens] = states[source, :num_tokens]
        for num_read in self._num_read.values():
            num_read[target] = num_read[source]

    def _draft_depths(
        self,
        token_ids: Tensor,
        known_and_total: Tensor,
        key_positions: Tensor,
        seen: Tensor | None,
        uniforms: Tensor | None,
        depths: range,
        window: int,
        sampling: SamplingConfig,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Some depths in turn, a step of fixed shapes: drafts int64 [B, n], their distributions and confidence [B].

        Distributions are float32 [B, n, V], None when greedy; the confidence is the last draft's probability, None
        unless a draft may stop for it.
        """
        num_rows = token_ids.shape[0]
        known, last_position = known_and_total[0], known_and_total[1, :, None] - 1
        offsets = torch.arange(-window, 0, device=token_ids.device)
        positions = (num_final_positions(known, depth=1)[:, None] + offsets).clamp(min=0)
        context = self._trunk.cached_context(positions, key_positions.shape[0])
        cache = self._cache.rows(0, num_rows)
        ids: list[Tensor] = []
        all_probs: list[Tensor] = []
        confidence = None
        for depth in depths:
            embedded = torch.minimum(embedded_positions(positions, depth), last_position)
            carried = self._load(depth - 1, positions)
            state = self._scheme.step(self._trunk, depth, carried, token_ids.gather(1, embedded), context, cache)
            if depth < len(self._states):
                self._store(depth, 0, positions, state.carry)
            if seen is not None:
                drafted = known[:, None] + torch.arange(depth - 1, device=known.device)
                seen_now = seen_after(seen, token_ids.gather(1, torch.minimum(drafted, last_position)))[:, -1]
            else:
                seen_now = None
            drawn = None if uniforms is None else uniforms[:, depth - depths.start]
            chosen, probs, confidence = self._heads.choose(depth, state.head_input[:, -1], seen_now, sampling, drawn)
            token_ids.scatter_(1, torch.minimum(known[:, None] + (depth - 1), last_position), chosen[:, None])
            ids.append(chosen)
            if probs is not None:
                all_probs.append(probs)
        return torch.stack(ids, dim=1), torch.stack(all_probs, dim=1) if all_probs else None, confidence

    def _longest_unread(self, ends: Sequence[int], depths: range) -> int:
        """Positions before `ends` that some row has still to read at some depth; at least the last one."""
        return max(1, *(end - read for depth in depths for end, read in zip(ends, self._num_read[depth], strict=False)))

    def _catch_up(self, slot: int, token_ids: Tensor, num_known: int) -> None:
        """Every depth reads the final positions that it has not read, in one slot, from tokens int64 [capacity]."""
        cache = self._cache.rows(slot, slot + 1)
        for depth, num_read in self._num_read.items():
            end = num_final_positions(num_known, depth)
            for first in range(num_read[slot], end, PROMPT_CHUNK):
                positions = self._positions[None, first : min(first + PROMPT_CHUNK, end)]
                state = self._scheme.step(
                    self._trunk,
                    depth,
                    self._states[depth - 1][slot : slot + 1, positions[0]],
                    token_ids[embedded_positions(positions, depth)],
                    self._trunk.cached_context(positions, min(first + PROMPT_CHUNK, end)),
                    cache,
                )
                if depth < len(self._states):
                    self._store(depth, slot, positions, state.carry)
            num_read[slot] = max(num_read[slot], end)

    def _load(self, depth: int, positions: Tensor) -> Tensor:
        states = self._states[depth][: positions.shape[0]]
        return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))

    def _store(self, depth: int, first_slot: int, positions: Tensor, values: Tensor) -> None:
        states = self._states[depth][first_slot : first_slot + positions.shape[0]]
        states.scatter_(1, positions[..., None].expand_as(values), values)
