"""Which drafted tokens stay and which token follows them. Probabilities only: no model, no cache, no text.

A cycle drafts N tokens; one trunk forward gives the target distribution at each of them and one further. A verifier
accepts a prefix of the draft and adds one token from the target: a correction after a rejection, a bonus when all
drafts stay. Rows may have drafted fewer than N tokens (`num_drafted`); what stands in the places beyond is ignored.

Both verifiers here are lossless: `exact` emits token for token what greedy decoding emits, `rejection` emits tokens
whose law is that of plain sampling from the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nextn.decoding.sampling import choose


@dataclass(frozen=True)
class Verification:
    """The outcome of one cycle.

    Attributes:
        num_accepted: length of the accepted prefix of the draft, int64 [B], 0..num_drafted.
        next_ids: the token after that prefix, int64 [B]: a correction, or the bonus when every draft was accepted.
    """

    num_accepted: Tensor
    next_ids: Tensor


class Verifier(Protocol):
    """A rule that accepts a prefix of the draft and chooses the token after it."""

    def __call__(
        self,
        draft_ids: Tensor,
        draft_probs: Tensor,
        target_probs: Tensor,
        num_drafted: Tensor,
        uniforms: Tensor | None,
    ) -> Verification:
        """Verify one cycle.

        Args:
            draft_ids: drafted tokens, int64 [B, N].
            draft_probs: the distributions they were drawn from, float32 [B, N, V].
            target_probs: the target's distributions at the same places and one further, float32 [B, N+1, V].
            num_drafted: how many drafts each row has, int64 [B], 0..N.
            uniforms: numbers in [0, 1), float64 [B, N+1]: column j < N decides draft j, the last one chooses the next
                token. None where the rule needs none.
        """
        ...


def exact(
    draft_ids: Tensor, draft_probs: Tensor, target_probs: Tensor, num_drafted: Tensor, uniforms: Tensor | None = None
) -> Verification:
    """Accept while the draft is the target's most likely token; the next token is the most likely one. Greedy decoding.

    Shapes as in `Verifier`; `draft_probs` and `uniforms` are not read.

    The target prefers 2, 0, 1 in turn; the draft is right once. The second row drafted one token only, so the match in
    its second place does not count:

    >>> target_probs = torch.eye(3)[torch.tensor([[2, 0, 1], [2, 0, 1]])]
    >>> result = exact(torch.tensor([[2, 1], [2, 0]]), torch.zeros(2, 2, 3), target_probs, torch.tensor([2, 1]))
    >>> result.num_accepted.tolist(), result.next_ids.tolist()
    ([1, 1], [0, 0])
    """
    best_ids = target_probs.argmax(-1)
    num_accepted = _accepted_prefix(draft_ids == best_ids[:, :-1], num_drafted)
    return Verification(num_accepted, best_ids.gather(1, num_accepted[:, None]).squeeze(1))


def rejection(
    draft_ids: Tensor, draft_probs: Tensor, target_probs: Tensor, num_drafted: Tensor, uniforms: Tensor | None
) -> Verification:
    """Speculative sampling, arXiv 2211.17192, algorithm 1: the emitted tokens follow the target's law exactly.

    Shapes as in `Verifier`; `uniforms` is required.

    Raises:
        ValueError: `uniforms` is None.

    The draft always says 0; the target says 0 or 1 with probability 1/2 each. u = 0.4 accepts (0.4 < 0.5 / 1) and the
    bonus follows; u = 0.6 rejects and the residual max(target - draft, 0) leaves only token 1:

    >>> draft_probs, target_probs = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    >>> for u in (0.4, 0.6):
    ...     numbers = torch.tensor([[u, 0.1]], dtype=torch.float64)
    ...     result = rejection(torch.tensor([[0]]), draft_probs, target_probs, torch.tensor([1]), numbers)
    ...     print(result.num_accepted.item(), result.next_ids.item())
    1 1
    0 1
    """
    if uniforms is None:
        raise ValueError("rejection sampling needs uniforms [B, N+1], got None")
    num_rows, draft_length = draft_ids.shape
    # Accept x with probability min(1, target(x) / draft(x)).
    draft_prob_of_id = draft_probs.gather(-1, draft_ids[..., None]).squeeze(-1)
    target_prob_of_id = target_probs[:, :-1].gather(-1, draft_ids[..., None]).squeeze(-1)
    num_accepted = _accepted_prefix(uniforms[:, :-1] * draft_prob_of_id < target_prob_of_id, num_drafted)

    # On rejection sample from max(target - draft, 0), normalised. Past the last draft nothing was drafted, which is a
    # draft probability of 0: the same formula then is the target itself, the bonus.
    rows = torch.arange(num_rows, device=draft_ids.device)
    target = target_probs[rows, num_accepted]
    if draft_length == 0:
        return Verification(num_accepted, choose(target, uniforms[:, -1]))
    was_drafted = (num_accepted < num_drafted)[:, None]
    draft = draft_probs[rows, num_accepted.clamp(max=draft_length - 1)] * was_drafted
    residual = (target - draft).clamp(min=0)
    # Two distributions equal up to rounding may reject with a probability of rounding size and leave no residual.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, target)
    return Verification(num_accepted, choose(residual, uniforms[:, -1]))


def _accepted_prefix(accepted: Tensor, num_drafted: Tensor) -> Tensor:
    """Accepted drafts before the first rejected or missing one, int64 [B], from bool [B, N]."""
    places = torch.arange(accepted.shape[1], device=accepted.device)
    return (accepted & (places < num_drafted[:, None])).long().cumprod(1).sum(1)


VERIFIERS: dict[str, Verifier] = {"exact": exact, "rejection": rejection}
"""Verifiers by the name a user gives."""
