"""From logits to the distribution that is sampled, and from that distribution to tokens.

Draft and target logits go through the same `transform`, so that verification compares like with like: speculative
decoding is lossless with respect to the transformed target distribution. The repetition penalty makes that distribution
depend on the tokens before it, drafts included: `seen_after` says which count at each verified position.

Randomness is explicit: a uniform number per decision, drawn from a generator that belongs to one row alone, so that
what a row emits does not depend on the batch it is decoded in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nextn.errors import GenerationError


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token (greedy).
        top_k: keep the k most likely tokens (ties with the k-th are kept too); None keeps all.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least this; None keeps all.
        min_p: keep tokens at least this many times as likely as the most likely one; None keeps all.
        repetition_penalty: makes tokens seen before less likely (above 1) or more likely (below 1); 1 changes nothing;
            see `penalise`.

    Raises:
        GenerationError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise GenerationError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top_k must be at least 1, got {self.top_k}; leave it out to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p must lie in (0, 1], got {self.top_p}; leave it out to keep all tokens")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise GenerationError(f"min_p must lie in [0, 1], got {self.min_p}; leave it out to keep all tokens")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise GenerationError(
                f"repetition_penalty must be a positive number, got {self.repetition_penalty}; 1 changes nothing"
            )

    @property
    def is_greedy(self) -> bool:
        """True iff the distribution is one-hot, so that no random number is needed."""
        return self.temperature == 0


def penalise(logits: Tensor, seen: Tensor, config: SamplingConfig) -> Tensor:
    """Logits after the repetition penalty: of seen tokens, divided by it if positive, multiplied by it if negative.

    Source: CTRL, arXiv 1909.05858, section 4.1, which divides whatever the sign; a penalty above 1 would then favour
    seen tokens of negative logit, so transformers and vLLM multiply these.

    Args:
        logits: [..., V], any float dtype.
        seen: the tokens of prompt and output so far, bool, broadcastable to [..., V].
        config: only `repetition_penalty` is read.

    Returns:
        float32 [..., V]; at penalty 1 `logits` itself, in its own dtype.

    Tokens 0 and 1 were seen; a penalty of 2 halves the first logit and doubles the second:

    >>> config = SamplingConfig(repetition_penalty=2.0)
    >>> penalise(torch.tensor([3.0, -1.0, 2.0]), torch.tensor([True, True, False]), config).tolist()
    [1.5, -2.0, 2.0]
    """
    if config.repetition_penalty == 1:
        return logits
    logits = logits.float()
    penalised = torch.where(logits > 0, logits / config.repetition_penalty, logits * config.repetition_penalty)
    return torch.where(seen, penalised, logits)


def seen_after(seen: Tensor, draft_ids: Tensor) -> Tensor:
    """Which tokens have been seen at each position of a verified draft.

    The target distribution at position j follows drafts 0..j-1, so these count as seen there, and draft j does not.

    Args:
        seen: tokens of prompt and output before the draft, bool [B, V].
        draft_ids: drafted tokens, int64 [B, N], all in 0..V-1, also where a row drafted fewer.

    Returns:
        bool [B, N+1, V].

    Token 3 was seen before; 0 and 2 are drafted:

    >>> seen_after(torch.tensor([[False, False, False, True]]), torch.tensor([[0, 2]])).int().tolist()
    [[[0, 0, 0, 1], [1, 0, 0, 1], [1, 0, 1, 1]]]
    """
    at_positions = [seen]
    for position in range(draft_ids.shape[1]):
        at_positions.append(at_positions[-1].scatter(1, draft_ids[:, position : position + 1], True))
    return torch.stack(at_positions, dim=1)


def transform(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """Probabilities after the repetition penalty, then temperature, then top-k, then top-p, then min-p.

    Args:
        logits: [..., V], any float dtype.
        config: with temperature 0 the result is one-hot at the (first) largest logit after the penalty; the filters
            then change nothing.
        seen: the tokens that the penalty falls on, bool, broadcastable to [..., V]; may be None at penalty 1.

    Returns:
        Probabilities, float32 [..., V]; they sum to 1 over the kept tokens and are exactly 0 elsewhere.

    Raises:
        ValueError: there is a repetition penalty, but `seen` is None.

    >>> logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    >>> transform(logits, SamplingConfig(temperature=1.0, top_p=0.6)).tolist()
    [0.6666666865348816, 0.3333333432674408, 0.0, 0.0]
    >>> transform(logits, SamplingConfig(temperature=0.0)).tolist()
    [1.0, 0.0, 0.0, 0.0]
    """
    if seen is not None:
        logits = penalise(logits, seen, config)
    elif config.repetition_penalty != 1:
        raise ValueError(f"repetition_penalty = {config.repetition_penalty} needs seen [..., V], got None")
    if config.is_greedy:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros(logits.shape, device=logits.device).scatter_(-1, best, 1.0)
    logits = logits.float()
    # The largest logit becomes 0 first: a tiny temperature then gives -inf at worst, never inf - inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(config.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    probs = logits.softmax(-1)
    if config.top_p is not None:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        mass_before = ordered.cumsum(-1) - ordered
        kept = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, order, mass_before < config.top_p)
        probs = probs.masked_fill(~kept, 0.0)
    if config.min_p is not None:
        probs = probs.masked_fill(probs < config.min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs / probs.sum(-1, keepdim=True)


def choose(probs: Tensor, uniforms: Tensor | None) -> Tensor:
    """Tokens sampled by inverting the cumulative distribution: the first token whose cumulative sum exceeds u * total.

    A token of probability 0 is never chosen. `probs` need not be normalised.

    Args:
        probs: non-negative weights, [B, V].
        uniforms: a number in [0, 1) per row, float64 [B]; None takes the most likely token.

    Returns:
        Token ids, int64 [B].

    >>> probs = torch.tensor([[0.25, 0.0, 0.75]])
    >>> [choose(probs, torch.tensor([u], dtype=torch.float64)).item() for u in (0.0, 0.2, 0.25, 0.9)]
    [0, 0, 2, 2]
    """
    if uniforms is None:
        return probs.argmax(-1)
    cumulative = probs.double().cumsum(-1)
    return torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(-1)


def row_generators(seed: int, rows: Sequence[int]) -> list[torch.Generator]:
    """One generator per row, a function of (seed, number of the row) only.

    >>> together, alone = row_generators(0, [3, 7]), row_generators(0, [7])
    >>> torch.equal(draw_uniforms(together, 2)[1], draw_uniforms(alone, 2)[0])
    True
    """
    states = [np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0] for row in rows]
    # A torch seed is a signed 64-bit number.
    return [torch.Generator().manual_seed(int(state >> np.uint64(1))) for state in states]


def draw_uniforms(generators: Sequence[torch.Generator], count: int) -> Tensor:
    """`count` numbers in [0, 1) from each row's own generator, float64 [B, count], on the CPU."""
    return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for generator in generators])
