"""Which drafted tokens stay and which token follows them. Probabilities only: no model, no cache, no text.

A cycle drafts N tokens; one trunk forward gives the target distribution at each of them and one further. A verifier
accepts a prefix of the draft and adds one token from the target: a correction after a rejection, a bonus when all
drafts stay. Rows may have drafted fewer than N tokens (`num_drafted`); what stands beyond is ignored.

Two verifiers are lossless: `Exact` emits token for token what greedy decoding emits, `Rejection` emits tokens whose
distribution is that of plain sampling from the target. Two are not, and say so (`is_lossless`): `Threshold` and
`Typical` keep the drafts that the target finds likely enough. `Verification.num_changed` counts those that a lossless
rule would refuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from nextn.decoding.sampling import choose
from nextn.errors import GenerationError


@dataclass(frozen=True)
class Verification:
    """The outcome of one cycle.

    Attributes:
        num_accepted: length of the accepted prefix of the draft, int64 [B], 0..num_drafted.
        next_ids: the token after that prefix, int64 [B]: a correction, or the bonus when every draft was accepted.
        num_changed: accepted drafts that the lossless rule (exact when greedy, rejection when sampling), given the same
            random numbers, would have refused at their position, int64 [B], 0..num_accepted; 0 for lossless verifiers.
            A greedy cycle with 0 emits what greedy decoding emits. A sampled one may still follow another distribution,
            because a lossy rule also refuses drafts that rejection keeps.
    """

    num_accepted: Tensor
    next_ids: Tensor
    num_changed: Tensor


class Verifier(Protocol):
    """A rule that accepts a prefix of the draft and chooses the token after it."""

    def __hash__(self) -> int:
        """Compiled steps are kept by verifier."""
        ...

    @property
    def name(self) -> str:
        """The name a user gives, a key of `VERIFIERS`."""
        ...

    @property
    def is_lossless(self) -> bool:
        """True iff the output (greedy) or its distribution (sampling) is that of plain decoding."""
        ...

    def __call__(
        self,
        draft_ids: Tensor,
        draft_probs: Tensor | None,
        target_probs: Tensor,
        num_drafted: Tensor,
        uniforms: Tensor | None,
    ) -> Verification:
        """Verify one cycle.

        Args:
            draft_ids: drafted tokens, int64 [B, N].
            draft_probs: the distributions they were drawn from, float32 [B, N, V]. None: each draft was certain,
                probability 1 at its token.
            target_probs: the target's distributions at the same positions and one further, float32 [B, N+1, V].
            num_drafted: how many drafts each row has, int64 [B], 0..N.
            uniforms: numbers in [0, 1), float64 [B, N+1]: column j < N decides draft j, the last one chooses the next
                token. None when greedy.
        """
        ...


@dataclass(frozen=True)
class Exact:
    """Accept while the draft is the target's most likely token; the next token is the most likely one. Greedy decoding.

    Shapes as in `Verifier`. Of `target_probs` only the argmax is read, so logits do as well; `draft_probs` and
    `uniforms` are not read.

    The target prefers 2, 0, 1 in turn; the draft is right once. The second row drafted one token only, so the match in
    its second position does not count:

    >>> target_probs = torch.eye(3)[torch.tensor([[2, 0, 1], [2, 0, 1]])]
    >>> result = Exact()(torch.tensor([[2, 1], [2, 0]]), None, target_probs, torch.tensor([2, 1]))
    >>> result.num_accepted.tolist(), result.next_ids.tolist()
    ([1, 1], [0, 0])
    """

    name: ClassVar[str] = "exact"
    is_lossless: ClassVar[bool] = True

    def __call__(
        self,
        draft_ids: Tensor,
        draft_probs: Tensor | None,
        target_probs: Tensor,
        num_drafted: Tensor,
        uniforms: Tensor | None = None,
    ) -> Verification:
        """Verify one cycle; see the class."""
        best_ids = target_probs.argmax(-1)
        num_accepted = _accepted_prefix(draft_ids == best_ids[:, :-1], num_drafted)
        next_ids = best_ids.gather(1, num_accepted[:, None]).squeeze(1)
        return Verification(num_accepted, next_ids, torch.zeros_like(num_accepted))


@dataclass(frozen=True)
class Rejection:
    """Speculative sampling, arXiv 2211.17192, algorithm 1: the emitted tokens follow the target distribution exactly.

    Shapes as in `Verifier`; `uniforms` is required.

    Raises:
        ValueError: `uniforms` is None.

    The draft is certain of 0; the target says 0 or 1 with probability 1/2 each. u = 0.4 accepts (0.4 < 0.5 / 1) and the
    bonus follows; u = 0.6 rejects and the residual max(target - draft, 0) leaves only token 1:

    >>> target_probs = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    >>> for u in (0.4, 0.6):
    ...     numbers = torch.tensor([[u, 0.1]], dtype=torch.float64)
    ...     result = Rejection()(torch.tensor([[0]]), None, target_probs, torch.tensor([1]), numbers)
    ...     print(result.num_accepted.item(), result.next_ids.item())
    1 1
    0 1
    """

    name: ClassVar[str] = "rejection"
    is_lossless: ClassVar[bool] = True

    def __call__(
        self,
        draft_ids: Tensor,
        draft_probs: Tensor | None,
        target_probs: Tensor,
        num_drafted: Tensor,
        uniforms: Tensor | None,
    ) -> Verification:
        """Verify one cycle; see the class."""
        if uniforms is None:
            raise ValueError("rejection sampling needs uniforms [B, N+1], got None")
        accepted = _rejection_accepts(draft_ids, draft_probs, target_probs, uniforms)
        num_accepted = _accepted_prefix(accepted, num_drafted)
        weights = _weights_after(num_accepted, draft_ids, draft_probs, target_probs, num_drafted)
        return Verification(num_accepted, choose(weights, uniforms[:, -1]), torch.zeros_like(num_accepted))


@dataclass(frozen=True)
class Threshold:
    """Accept while the target gives the draft a probability above a threshold. Lossy: emits drafts as they come.

    Shapes as in `Verifier`. The next token is chosen from the target itself. When greedy (`uniforms` None) give
    `target_probs` at temperature 1: one-hot ones let only the most likely token pass. From a threshold of 0.5 on
    nothing else can pass anyway, and greedy text is that of `Exact`.

    Attributes:
        threshold: what the target's probability of a draft must exceed, 0..1.

    Raises:
        GenerationError: the threshold is out of its range.

    Both drafts pass 0.3; the first is not what greedy decoding would have said:

    >>> target_probs = torch.tensor([[[0.6, 0.4], [0.2, 0.8], [0.9, 0.1]]])
    >>> result = Threshold(0.3)(torch.tensor([[1, 1]]), None, target_probs, torch.tensor([2]))
    >>> result.num_accepted.item(), result.next_ids.item(), result.num_changed.item()
    (2, 0, 1)
    """

    threshold: float = 0.3

    name: ClassVar[str] = "threshold"
    is_lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise GenerationError(f"threshold must lie in [0, 1], got {self.threshold}")

    def __call__(
        self,
        draft_ids: Tensor,
        draft_probs: Tensor | None,
        target_probs: Tensor,
        num_drafted: Tensor,
        uniforms: Tensor | None = None,
    ) -> Verification:
        """Verify one cycle; see the class."""
        accepted = _prob_of_drafts(target_probs[:, :-1], draft_ids) > self.threshold
        return _lossy(accepted, draft_ids, draft_probs, target_probs, num_drafted, uniforms)


@dataclass(frozen=True)
class Typical:
    """Typical acceptance, arXiv 2401.10774, section 2.3.1. Lossy: emits drafts as they come.

    Accepts while target(x) > min(epsilon, delta * exp(-H(target))), H the entropy in nats: where the target is
    uncertain, a less likely draft will do. With delta below 1 the most likely token always passes, since exp(-H) never
    exceeds its probability. The next token and greedy use are as in `Threshold`, shapes as in `Verifier`.

    Attributes:
        epsilon: a probability above this passes at any entropy, 0..1.
        delta: of the part that depends on the entropy, 0..1.

    Raises:
        GenerationError: a value is out of its range.

    Over 20 equally likely tokens exp(-H) is 1/20, so 0.05 passes (0.05 > 0.3 / 20). Beside a token of probability 0.95
    exp(-H) is 0.82, so 0.05 does not pass (0.05 < 0.09):

    >>> uncertain, certain = torch.full((20,), 0.05), torch.tensor([0.95, 0.05] + [0.0] * 18)
    >>> target_probs = torch.stack((uncertain, certain, certain))[None]
    >>> Typical()(torch.tensor([[1, 1]]), None, target_probs, torch.tensor([2])).num_accepted.item()
    1
    """

    epsilon: float = 0.09
    delta: float = 0.3

    name: ClassVar[str] = "typical"
    is_lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in (("epsilon", self.epsilon), ("delta", self.delta)):
            if not 0 <= value <= 1:
                raise GenerationError(f"{name} must lie in [0, 1], got {value}")

    def __call__(
        self,
        draft_ids: Tensor,
        draft_probs: Tensor | None,
        target_probs: Tensor,
        num_drafted: Tensor,
        uniforms: Tensor | None = None,
    ) -> Verification:
        """Verify one cycle; see the class."""
        target = target_probs[:, :-1]
        entropy = torch.special.entr(target).sum(-1)
        threshold = (self.delta * torch.exp(-entropy)).clamp(max=self.epsilon)
        accepted = _prob_of_drafts(target, draft_ids) > threshold
        return _lossy(accepted, draft_ids, draft_probs, target_probs, num_drafted, uniforms)


def _prob_of_drafts(probs: Tensor, draft_ids: Tensor) -> Tensor:
    """Probability of each draft, [B, N], from [B, N, V]."""
    return probs.gather(-1, draft_ids[..., None]).squeeze(-1)


def _accepted_prefix(accepted: Tensor, num_drafted: Tensor) -> Tensor:
    """Accepted drafts before the first rejected or missing one, int64 [B], from bool [B, N]."""
    return (accepted & _is_within(num_drafted, accepted)).long().cumprod(1).sum(1)


def _is_within(length: Tensor, like: Tensor) -> Tensor:
    """Whether each position comes before `length` [B], bool [B, N], for a `like` [B, N]."""
    return torch.arange(like.shape[1], device=like.device) < length[:, None]


def _rejection_accepts(draft_ids: Tensor, draft_probs: Tensor | None, target_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Whether each draft x is accepted, which has probability min(1, target(x) / draft(x)); bool [B, N]."""
    draft_prob = 1.0 if draft_probs is None else _prob_of_drafts(draft_probs, draft_ids)
    return uniforms[:, :-1] * draft_prob < _prob_of_drafts(target_probs[:, :-1], draft_ids)


def _weights_after(
    num_accepted: Tensor, draft_ids: Tensor, draft_probs: Tensor | None, target_probs: Tensor, num_drafted: Tensor
) -> Tensor:
    """What the next token is drawn from in rejection sampling, not normalised, [B, V].

    After a rejection the residual max(target - draft, 0), past the last draft the target itself.
    """
    rows = torch.arange(draft_ids.shape[0], device=draft_ids.device)
    target = target_probs[rows, num_accepted]
    if draft_ids.shape[1] == 0:
        return target
    position = num_accepted.clamp(max=draft_ids.shape[1] - 1)
    if draft_probs is None:
        residual = target.scatter(1, draft_ids[rows, position][:, None], 0.0)
    else:
        residual = (target - draft_probs[rows, position]).clamp(min=0)
    # Two distributions equal up to rounding may reject with a probability of rounding size and leave no residual.
    is_residual = (num_accepted < num_drafted) & (residual.sum(-1) > 0)
    return torch.where(is_residual[:, None], residual, target)


def _lossy(
    accepted: Tensor,
    draft_ids: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    num_drafted: Tensor,
    uniforms: Tensor | None,
) -> Verification:
    """The outcome of accepting the prefix of `accepted`, bool [B, N], followed by a token from the target itself."""
    num_accepted = _accepted_prefix(accepted, num_drafted)
    if uniforms is None:
        unchanged = draft_ids == target_probs[:, :-1].argmax(-1)
    else:
        unchanged = _rejection_accepts(draft_ids, draft_probs, target_probs, uniforms)
    num_changed = (~unchanged & _is_within(num_accepted, unchanged)).sum(1)
    target = target_probs[torch.arange(draft_ids.shape[0], device=draft_ids.device), num_accepted]
    return Verification(num_accepted, choose(target, None if uniforms is None else uniforms[:, -1]), num_changed)


exact, rejection = Exact(), Rejection()

VERIFIERS: dict[str, Verifier] = {verifier.name: verifier for verifier in (exact, rejection, Threshold(), Typical())}
"""Verifiers with their default parameters, by the name a user gives."""
