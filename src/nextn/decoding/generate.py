"""Text from a model: draft N tokens, verify them in one trunk forward, emit what stays plus one token.

The loop of one row. t[0..n] are known, and the trunk has read all of them but t[n]:

    draft     d1..dN = the MTP depths' guesses of t[n+1..n+N]
    verify    one trunk forward over [t[n], d1..dN] at positions n..n+N
    accept    a <= N drafts; the trunk's own next token follows: t[n+1..n+a+1] are new
    roll back caches go on from position n+a+1; nothing is copied

Draft length 0 is plain cached decoding through the same loop: the baseline that a speedup is measured against.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nextn.decoding.engine_drafts import AS_TRAINED, new_drafter
from nextn.decoding.request import Request, checked_request, prompt_token_ids
from nextn.decoding.sampling import SamplingConfig, choose, draw_uniforms, row_generators, transform
from nextn.decoding.statistics import AcceptanceStatistics
from nextn.decoding.verify import Verifier
from nextn.errors import GenerationError
from nextn.mtp.model import MTPModel

FinishReason = Literal["eos", "length"]


@dataclass(frozen=True)
class GenerationResult:
    """What was generated, one entry per prompt, and what it took.

    Attributes:
        texts: the new text, without the prompt and without a final EOS; empty tuple if the model has no tokenizer.
        token_ids: the new tokens, a final EOS included.
        origins: where each new token came from: 0 = the trunk (first token, correction or bonus), k = an accepted draft
            of depth k.
        finish_reasons: "eos", or "length" when `max_new_tokens` were emitted.
        stats: accepted lengths of all cycles.
        num_trunk_forwards: trunk forwards in all, prompts included.
        prefill_s: seconds spent reading prompts with the trunk and choosing each first token.
        decode_s: seconds for all further tokens; the MTP depths' reading of the prompt is part of it.
    """

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    origins: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason, ...]
    stats: AcceptanceStatistics
    num_trunk_forwards: int
    prefill_s: float
    decode_s: float

    @property
    def decode_tok_per_s(self) -> float:
        """New tokens per second of decoding; each row's first token, which reading the prompt gives, is not counted."""
        num_tokens = sum(len(ids) - 1 for ids in self.token_ids)
        return num_tokens / self.decode_s if num_tokens else 0.0


@dataclass(frozen=True)
class _Row:
    """One decoded prompt."""

    token_ids: list[int]
    origins: list[int]
    cycles: list[tuple[int, int]]
    num_trunk_forwards: int
    prefill_s: float
    decode_s: float
    finish_reason: FinishReason


def generate(
    model: MTPModel,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 128,
    draft_length: int | None = None,
    drafting: str = AS_TRAINED,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | Literal["auto"] | None = "auto",
    verifier: str | Verifier = "auto",
) -> GenerationResult:
    """Continue each prompt, losslessly: the output (or its law) does not depend on what is drafted.

    Prompts are decoded one after another. The random numbers of prompt number r depend on (seed, r) only. Arithmetic in
    bfloat16 rounds a forward of one token and one of several differently, which can tip a near tie; in float32 greedy
    outputs are equal token for token.

    Args:
        model: trunk and MTP depths; put in eval mode for the call.
        prompts: texts (need the model's tokenizer) or token ids; at least one token each.
        max_new_tokens: most tokens to add to each prompt.
        draft_length: N, tokens drafted per cycle; 0 is plain decoding. Beyond the trained depths the sequential scheme
            uses its last module again; the others cannot draft further. None: 3, or as many as the scheme can draft;
            0 for a model without MTP.
        drafting: which tokens are drafted: "as_trained", or as an engine would draft them (`engine_drafts`), to see
            what it loses or gains: "transformers", "vllm", "llamacpp". It changes acceptance, never the output's law.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens.
        top_p: keep the fewest tokens whose probabilities sum to this.
        min_p: keep tokens at least this many times as likely as the most likely one.
        seed: of the random numbers.
        eos_token_id: the token that ends a row; "auto": the tokenizer's, if there is one; None: never stop.
        verifier: "exact", "rejection", a `Verifier`, or "auto": exact at temperature 0, rejection otherwise.

    Returns:
        New tokens per prompt, their origins and the acceptance statistics.

    Raises:
        GenerationError: a prompt is empty, too long for the context or holds an unknown token; drafting is asked of a
            model without MTP, or more drafts than its scheme can make, or drafts that the engine does not make of this
            model; sampling settings are out of range or contradict the verifier.
        ValueError: `prompts` is a single string instead of a list.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is a list of prompts, got a single string; write [prompt]")
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, seed)
    if eos_token_id == "auto":
        eos_token_id = None if model.tokenizer is None else model.tokenizer.eos_token_id
    request = checked_request(
        model,
        max_new_tokens=max_new_tokens,
        draft_length=draft_length,
        drafting=drafting,
        sampling=sampling,
        eos_token_id=eos_token_id,
        verifier=verifier,
    )
    prompt_ids = [prompt_token_ids(model, prompt, number, max_new_tokens) for number, prompt in enumerate(prompts)]

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            rows = [_decode(model, ids, number, request) for number, ids in enumerate(prompt_ids)]
    finally:
        model.train(was_training)
    return GenerationResult(
        texts=() if model.tokenizer is None else tuple(_text(model, row) for row in rows),
        token_ids=tuple(tuple(row.token_ids) for row in rows),
        origins=tuple(tuple(row.origins) for row in rows),
        finish_reasons=tuple(row.finish_reason for row in rows),
        stats=AcceptanceStatistics.of_cycles(request.draft_length, [cycle for row in rows for cycle in row.cycles]),
        num_trunk_forwards=sum(row.num_trunk_forwards for row in rows),
        prefill_s=sum(row.prefill_s for row in rows),
        decode_s=sum(row.decode_s for row in rows),
    )


@torch.inference_mode()
def plain_reference(model: MTPModel, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding without any cache or draft: one whole forward per token. The slow reference; EOS is not special.

    Args:
        model: only its trunk is used; it should be in eval mode.
        prompt_ids: at least one token.
        max_new_tokens: tokens to add.

    Returns:
        The new tokens.
    """
    trunk, token_ids = model.trunk, list(prompt_ids)
    for _ in range(max_new_tokens):
        hidden = trunk.hidden_states(torch.tensor([token_ids], device=trunk.device))
        token_ids.append(int(trunk.output_head(trunk.final_norm(hidden[:, -1])).argmax()))
    return token_ids[len(prompt_ids) :]


def _decode(model: MTPModel, prompt_ids: list[int], number: int, request: Request) -> _Row:
    """The loop of the module's docstring for one prompt."""
    started = time.perf_counter()
    trunk, sampling, draft_length = model.trunk, request.sampling, request.draft_length
    num_known = len(prompt_ids)
    num_total = num_known + request.max_new_tokens
    generators = row_generators(sampling.seed, [number])
    token_ids = torch.zeros(1, num_total, dtype=torch.int64, device=trunk.device)
    token_ids[0, :num_known] = torch.tensor(prompt_ids)
    positions = torch.arange(num_total, device=trunk.device)[None]
    cache = trunk.new_cache(num_rows=1, capacity=num_total)
    drafter = None
    if draft_length and model.scheme is not None:
        drafter = new_drafter(trunk, model.scheme, 1, num_total, draft_length, request.drafting)

    def read(first: int, end: int) -> Tensor:
        """Normed trunk states at positions first..end-1, [1, end - first, C]; the drafter sees them too."""
        span = positions[:, first:end]
        hidden = trunk.hidden_states(token_ids[:, first:end], trunk.cached_context(span, num_keys=end), cache)
        normed = trunk.final_norm(hidden)
        if drafter is not None:
            drafter.observe(hidden, normed, span)
        return normed

    def target(normed: Tensor) -> Tensor:
        """The distributions after each state, [1, M, C] -> [1, M, V]."""
        return transform(trunk.output_head(normed), sampling)

    def randoms(count: int) -> Tensor | None:
        return None if sampling.is_greedy else draw_uniforms(generators, count).to(trunk.device)

    first_random = randoms(1)
    first_probs = target(read(0, num_known)[:, -1:])[:, 0]
    if not bool(first_probs.isfinite().all()):
        raise GenerationError("the model's logits are not finite: its weights are damaged, or overflow in this dtype")
    first_ids = choose(first_probs, None if first_random is None else first_random[:, 0])
    token_ids[:, num_known] = first_ids
    new_ids, origins, cycles = first_ids.tolist(), [0], []
    num_known += 1
    num_forwards = 1
    prefilled = time.perf_counter()

    while len(new_ids) < request.max_new_tokens and new_ids[-1] != request.eos_token_id:
        # The verifying forward adds a token of its own, so one draft fewer than what is left can still be emitted.
        num_draft_tokens = min(draft_length, num_total - num_known - 1)
        # The same amount of random numbers every cycle: for the drafts, for their acceptance, for the next token.
        random = randoms(2 * draft_length + 1)
        draft_probs = first_probs.new_zeros(1, 0, trunk.vocab_size)
        if drafter is not None and num_draft_tokens:
            draft_random = None if random is None else random[:, :num_draft_tokens]
            draft_probs = drafter.draft(token_ids, [num_known], num_draft_tokens, sampling, draft_random)

        target_probs = target(read(num_known - 1, num_known + num_draft_tokens))
        drafts = token_ids[:, num_known : num_known + num_draft_tokens]
        verified = request.verifier(
            drafts,
            draft_probs,
            target_probs,
            torch.tensor([num_draft_tokens], device=trunk.device),
            None if random is None else random[:, -(num_draft_tokens + 1) :],
        )
        num_accepted, next_id, *draft_ids = torch.cat((verified.num_accepted, verified.next_ids, drafts[0])).tolist()
        num_known += num_accepted
        if drafter is not None:
            drafter.roll_back([num_known])
        token_ids[0, num_known] = next_id
        num_known += 1
        num_forwards += 1
        cycles.append((num_draft_tokens, num_accepted))

        emitted = [*draft_ids[:num_accepted], next_id]
        if request.eos_token_id in emitted:
            emitted = emitted[: emitted.index(request.eos_token_id) + 1]
        new_ids += emitted
        origins += [*range(1, num_accepted + 1), 0][: len(emitted)]

    finish_reason: FinishReason = "eos" if new_ids[-1] == request.eos_token_id else "length"
    decode_s = time.perf_counter() - prefilled
    return _Row(new_ids, origins, cycles, num_forwards, prefilled - started, decode_s, finish_reason)


def _text(model: MTPModel, row: _Row) -> str:
    assert model.tokenizer is not None, "texts need a tokenizer"
    return model.tokenizer.decode(row.token_ids[:-1] if row.finish_reason == "eos" else row.token_ids)
