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
from nextn.decoding.sampling import SamplingConfig, choose, transform
from nextn.model import Trunk
from nextn.mtp.scheme import Scheme


class Drafter:
    """The state of drafting for B rows: one cache layer and one buffer of carried states per depth.

    Rows may know different numbers of tokens. All rows read windows of one length that end at their own last position;
    a row that needs less reads some final positions again, which changes nothing.

    Args:
        trunk: the model whose embedding, norm and head the scheme shares.
        scheme: the MTP depths.
        num_rows: B.
        capacity: most tokens a row may hold, drafts included.
        draft_length: N, most tokens drafted in a cycle, at most the scheme's `max_draft_length`.
    """

    def __init__(self, trunk: Trunk, scheme: Scheme, num_rows: int, capacity: int, draft_length: int):
        self._trunk, self._scheme = trunk, scheme
        self._cache = scheme.new_cache(trunk, num_rows, capacity, draft_length)
        self._rows = torch.arange(num_rows, device=trunk.device)
        dtype = trunk.embed(self._rows[:1]).dtype
        shape = (num_rows, capacity, trunk.hidden_size)
        # states[k][b, j] is h[k][j] of row b, which depth k+1 reads.
        self._states = [torch.zeros(shape, dtype=dtype, device=trunk.device) for _ in range(draft_length)]
        # num_read[k][b]: depth k has read positions 0..num_read-1 of row b, from tokens that are final.
        self._num_read = {depth: [0] * num_rows for depth in range(1, draft_length + 1)}

    def observe(self, hidden: Tensor, normed: Tensor, positions: Tensor) -> None:
        """Take over trunk states before and after the final norm, [B, M, C] each, at `positions`, int64 [B, M].

        States of drafts that are then rejected may be among them: they are overwritten before they are read.
        """
        self._store(0, positions, self._scheme.trunk_state(hidden, normed))

    def draft(
        self,
        token_ids: Tensor,
        num_known: Sequence[int],
        num_draft_tokens: int,
        sampling: SamplingConfig,
        uniforms: Tensor | None,
    ) -> Tensor:
        """Draft tokens and write them into `token_ids` behind the known ones.

        Args:
            token_ids: int64 [B, capacity]; row b holds `num_known[b]` >= 2 tokens, the last of which the trunk has not
                read yet. Written at the `num_draft_tokens` places after them.
            num_known: known tokens per row.
            num_draft_tokens: how many tokens to draft now, 1..N.
            sampling: how a drafted token is chosen.
            uniforms: numbers in [0, 1), float64 [B, num_draft_tokens]; None when greedy.

        Returns:
            The distributions the drafts were chosen from, float32 [B, num_draft_tokens, V].
        """
        # All depths read up to the position at which depth 1 embeds the last known token.
        ends = [num_final_positions(known, depth=1) for known in num_known]
        num_keys = max(ends)
        next_places = torch.tensor(num_known, device=token_ids.device)
        draft_probs = []
        for depth in range(1, num_draft_tokens + 1):
            positions = self._window(ends, self._num_read[depth])
            state = self._scheme.step(
                self._trunk,
                depth,
                self._load(depth - 1, positions),
                token_ids.gather(1, embedded_positions(positions, depth)),
                self._trunk.cached_context(positions, num_keys),
                self._cache,
            )
            if depth < len(self._states):
                self._store(depth, positions, state.carry)
            self._num_read[depth] = ends
            logits = self._scheme.head(self._trunk, depth)(state.head_input[:, -1])
            probs = transform(logits, sampling)
            token_ids[self._rows, next_places] = choose(probs, None if uniforms is None else uniforms[:, depth - 1])
            next_places = next_places + 1
            draft_probs.append(probs)
        return torch.stack(draft_probs, dim=1)

    def roll_back(self, num_final: Sequence[int]) -> None:
        """Keep of each row what was read from its first `num_final[b]` tokens; the rest will be read again.

        After verification these are the tokens known before the cycle and the accepted drafts, but not the correction
        or bonus, which no depth has read.
        """
        for depth, num_read in self._num_read.items():
            self._num_read[depth] = [
                min(read, num_final_positions(final, depth)) for read, final in zip(num_read, num_final, strict=True)
            ]

    def _window(self, ends: Sequence[int], num_read: Sequence[int]) -> Tensor:
        """Positions still to read, int64 [B, M]: each row's last M before `ends`, 0 repeated where a row is shorter."""
        length = max(end - read for end, read in zip(ends, num_read, strict=True))
        offsets = torch.arange(-length, 0, device=self._rows.device)
        return (torch.tensor(ends, device=self._rows.device)[:, None] + offsets).clamp_(min=0)

    def _load(self, depth: int, positions: Tensor) -> Tensor:
        states = self._states[depth]
        return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))

    def _store(self, depth: int, positions: Tensor, values: Tensor) -> None:
        self._states[depth].scatter_(1, positions[..., None].expand_as(values), values)
