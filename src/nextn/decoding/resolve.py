"""What is asked, checked against itself and against the model before anything is computed.

The one place that refuses a contradiction: `resolve_draft` for a decoder, `resolve_request` for a call. Values out of
range of their own are refused by what holds them (`SamplingConfig`, the verifiers, `StopStrings`), drafts that an
engine does not make by `drafters.engine_drafts`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from nextn.decoding.drafters.engine_drafts import (
    AS_TRAINED,
    ENGINES,
    RECYCLED,
    SINGLE_CACHE,
    check_drafting,
    fixed_draft_length,
    usual_drafting,
)
from nextn.decoding.policy import AdaptiveLength, DraftPolicy, FixedLength
from nextn.decoding.request import ADAPTIVE, MTP, PROMPT_LOOKUP, DraftSettings, Request
from nextn.decoding.row import RowRequest
from nextn.decoding.sampling import SamplingConfig
from nextn.decoding.stopping import StopStrings
from nextn.decoding.verify import VERIFIERS, Verifier
from nextn.errors import GenerationError
from nextn.mtp.model import MTPModel
from nextn.mtp.scheme import Scheme

Asked = TypeVar("Asked", Request, DraftSettings)

USUAL_DRAFT_LENGTH = 3

ADAPTIVE_LONGEST = 5
"""The most tokens that an adaptive policy may draft where the scheme itself sets no limit."""


def given_once(given: Asked | None, named: Asked) -> Asked:
    """The object that was given, or what keyword arguments describe; a keyword at its default describes nothing.

    Raises:
        GenerationError: both are given.
    """
    if given is not None and named != type(named)():
        raise GenerationError(
            f"a {type(given).__name__} is given, and keyword arguments of the same kind as well; give one of the two"
        )
    return named if given is None else given


def resolve_draft(draft: DraftSettings, model: MTPModel, compiled: bool = False) -> tuple[DraftSettings, DraftPolicy]:
    """Fill in what was left out, for one model.

    Args:
        draft: what is asked for.
        model: the model that verifies, and drafts unless another drafter is named.
        compiled: whether steps are to be compiled.

    Returns:
        The settings with a convention and a length, and the policy of that length.

    Raises:
        GenerationError: the settings contradict each other, or this model cannot draft in this way.
    """
    drafter, convention, min_confidence = draft.drafter, draft.convention, draft.min_confidence
    is_named = isinstance(drafter, str)
    if is_named and drafter not in (MTP, PROMPT_LOOKUP):
        raise GenerationError(f"unknown drafter {drafter!r}; there are: {MTP}, {PROMPT_LOOKUP}, or a model")
    drafts_with_mtp = is_named and drafter == MTP
    if not drafts_with_mtp and (min_confidence, draft.vocabulary, convention) != (None, None, None):
        raise GenerationError(
            f"min_confidence, draft_vocabulary and drafting are about MTP drafts; the drafter is "
            f"{drafter if is_named else 'another model'}"
        )
    if convention is None:
        convention = usual_drafting(model.scheme) if min_confidence is None else AS_TRAINED
    if convention == RECYCLED and min_confidence is not None:
        raise GenerationError("min_confidence needs drafting = 'as_trained'")
    emulated = convention in SINGLE_CACHE and convention != RECYCLED
    if emulated and (compiled, min_confidence, draft.vocabulary) != (False, None, None):
        raise GenerationError(
            f"drafting = {convention!r} emulates an engine eagerly and as it drafts: without compiled steps, "
            "min_confidence and draft_vocabulary"
        )
    length = draft.length
    if length is None or isinstance(length, int):
        length = resolve_draft_length(model if drafts_with_mtp else None, length, convention)
    policy = policy_of(length, longest_draft(model) if drafts_with_mtp else None, min_confidence)
    if drafts_with_mtp and length == ADAPTIVE:
        if convention in ENGINES:
            raise GenerationError(
                f"drafting = {convention!r}: that engine drafts a fixed number of tokens, and draft_length = "
                "'adaptive' chooses it anew in each cycle; give a number"
            )
        check_drafting(model.scheme, convention, policy.longest)
    return replace(draft, convention=convention, length=length), policy


def resolve_request(
    request: Request, verifier: str | Verifier, model: MTPModel, prompts: Sequence[str | Sequence[int]]
) -> tuple[list[RowRequest], Verifier]:
    """Check one call and fill in what was left out.

    Args:
        request: what is asked for.
        verifier: of the `DraftSettings`.
        model: the model that verifies.
        prompts: texts or token ids.

    Returns:
        One request per row, in the order of the prompts, and the verifier.

    Raises:
        GenerationError: the request contradicts itself, the verifier or the model.
        ValueError: `prompts` is a single string instead of a list.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is a list of prompts, got a single string; write [prompt]")
    sampling, eos_token_id = request.sampling, request.eos_token_id
    if sampling.is_greedy and (sampling.top_k, sampling.top_p, sampling.min_p) != (None, None, None):
        warnings.warn("top_k, top_p and min_p have no effect at temperature 0 (greedy)", stacklevel=5)
    if eos_token_id == "auto":
        eos_token_id = None if model.tokenizer is None else model.tokenizer.eos_token_id
    rule = resolve_verifier(verifier, sampling)
    seeds = _seeds(len(prompts), request.max_new_tokens, request.seed)
    strings = StopStrings(request.stop, model.tokenizer) if request.stop else None
    rows = [
        RowRequest(
            number,
            _prompt_token_ids(model, prompt, number, request.max_new_tokens),
            request.max_new_tokens,
            seeds[number],
            eos_token_id,
            None if strings is None else strings.new_row(),
        )
        for number, prompt in enumerate(prompts)
    ]
    return rows, rule


def longest_draft(model: MTPModel) -> int | None:
    """Most tokens that the model's MTP depths can draft in a cycle: 0 without MTP; None: any number."""
    return 0 if model.scheme is None else model.scheme.max_draft_length(model.num_depths)


def resolve_draft_length(model: MTPModel | None, draft_length: int | None, drafting: str = AS_TRAINED) -> int:
    """N to draft with.

    Args:
        model: trunk and MTP depths; None: something else drafts, any number of tokens.
        draft_length: what is asked for; None: 3, or as many as the scheme (or the engine) can draft, or 0 without MTP.
        drafting: one of `engine_drafts.DRAFTING`.

    Raises:
        GenerationError: it is negative, or this model cannot draft so many tokens in this way.
    """
    if model is None:
        return USUAL_DRAFT_LENGTH if draft_length is None else draft_length
    scheme = model.scheme
    longest = None if scheme is None else scheme.max_draft_length(model.num_depths)
    if draft_length is None:
        draft_length = _usual_draft_length(scheme, longest, drafting)
    if draft_length < 0:
        raise GenerationError(f"draft_length must be 0 (plain decoding) or more, got {draft_length}")
    if scheme is None and draft_length > 0:
        raise GenerationError(
            f"draft_length = {draft_length}, but this model has no MTP depths; use draft_length = 0 (plain decoding)"
        )
    if longest is not None and draft_length > longest:
        raise GenerationError(
            f"draft_length = {draft_length}, but the {model.mtp_config.scheme} scheme drafts one token per trained "
            f"depth: at most {longest} with this model"
        )
    check_drafting(scheme, drafting, draft_length)
    return draft_length


def _usual_draft_length(scheme: Scheme | None, longest: int | None, drafting: str) -> int:
    if scheme is None:
        return 0
    usual = USUAL_DRAFT_LENGTH if longest is None else min(USUAL_DRAFT_LENGTH, longest)
    return fixed_draft_length(scheme, drafting) or usual


def resolve_verifier(verifier: str | Verifier, sampling: SamplingConfig) -> Verifier:
    """The verifier of that name; a lossy one's parameters may follow it, in the order of its attributes.

    Raises:
        GenerationError: it is unknown, contradicts the sampling, or has no such parameters.

    >>> resolve_verifier("auto", SamplingConfig(temperature=0.8)).name
    'rejection'
    >>> resolve_verifier("typical:0.2", SamplingConfig())
    Typical(epsilon=0.2, delta=0.3)
    """
    if not isinstance(verifier, str):
        return verifier
    if verifier == "auto":
        verifier = "exact" if sampling.is_greedy else "rejection"
    name, colon, values = verifier.partition(":")
    if name not in VERIFIERS:
        raise GenerationError(f"unknown verifier {name!r}; there are: auto, {', '.join(VERIFIERS)}")
    if name == "exact" and not sampling.is_greedy:
        raise GenerationError(
            f"verifier 'exact' is greedy, but temperature = {sampling.temperature}; use 'rejection' or temperature 0"
        )
    if name == "rejection" and sampling.is_greedy:
        raise GenerationError("verifier 'rejection' samples, but temperature = 0; use 'exact' or a temperature above 0")
    return _with_parameters(VERIFIERS[name], values) if colon else VERIFIERS[name]


def _with_parameters(verifier: Verifier, values: str) -> Verifier:
    """A verifier of the same kind with other parameters, numbers separated by commas."""
    kind: Any = type(verifier)
    names = [field.name for field in fields(kind)]
    if not names:
        raise GenerationError(f"verifier {verifier.name!r} takes no parameters, got {values!r}")
    try:
        numbers = [float(value) for value in values.split(",")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= len(names):
        defaults = ",".join(str(getattr(verifier, name)) for name in names)
        raise GenerationError(
            f"verifier {verifier.name!r} takes {', '.join(names)}, as in {verifier.name}:{defaults}; got {values!r}"
        )
    return kind(*numbers)


def policy_of(draft_length: int | str, longest_allowed: int | None, min_confidence: float | None = None) -> DraftPolicy:
    """The policy that a user's settings name.

    Args:
        draft_length: N, 0 is plain decoding; or "adaptive".
        longest_allowed: the most tokens that can be drafted, 0 where nothing can draft ("adaptive" then is plain
            decoding); None: any number.
        min_confidence: end a draft of at most N tokens when it is doubtful; None: never.

    Raises:
        GenerationError: the length is negative, too long or an unknown word; `min_confidence` is out of range, or given
            where there is no draft of fixed length to end.

    >>> policy_of(3, longest_allowed=None)
    FixedLength(longest=3)
    >>> policy_of("adaptive", longest_allowed=2).longest
    2
    """
    if isinstance(draft_length, str):
        if draft_length != ADAPTIVE:
            raise GenerationError(f"draft_length must be a number or 'adaptive', got {draft_length!r}")
        if min_confidence is not None:
            raise GenerationError(
                f"min_confidence = {min_confidence} ends drafts of a fixed length, but draft_length = 'adaptive' "
                "chooses the length itself; leave one of them out"
            )
        return AdaptiveLength(ADAPTIVE_LONGEST if longest_allowed is None else min(ADAPTIVE_LONGEST, longest_allowed))
    if draft_length < 0:
        raise GenerationError(f"draft_length must be 0 (plain decoding) or more, got {draft_length}")
    if longest_allowed is not None and draft_length > longest_allowed:
        raise GenerationError(
            f"draft_length = {draft_length}, but at most {longest_allowed} tokens can be drafted here; ask for "
            f"{longest_allowed} or fewer"
        )
    if min_confidence is not None:
        if draft_length == 0:
            raise GenerationError(
                f"min_confidence = {min_confidence} ends drafts, but draft_length = 0 drafts nothing; leave one of "
                "them out"
            )
        if not 0 < min_confidence < 1:
            raise GenerationError(
                f"min_confidence must lie between 0 and 1, both excluded, got {min_confidence}; leave it out to "
                "draft the same number of tokens always"
            )
    return FixedLength(draft_length)


def _seeds(num_prompts: int, max_new_tokens: int, seed: int | Sequence[int]) -> Sequence[int]:
    """The seed of each prompt. Raises GenerationError: no new tokens are asked for, a seed is negative or missing."""
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    seeds = [seed] * num_prompts if isinstance(seed, int) else list(seed)
    if len(seeds) != num_prompts:
        raise GenerationError(f"there are {num_prompts} prompts and {len(seeds)} seeds; give one for all, or one each")
    if min(seeds, default=0) < 0:
        raise GenerationError(f"seed must be 0 or more, got {min(seeds)}")
    return seeds


def _prompt_token_ids(model: MTPModel, prompt: str | Sequence[int], number: int, max_new_tokens: int) -> list[int]:
    """Prompt number `number` as token ids. Raises GenerationError: no tokenizer, empty, unknown token, too long."""
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise GenerationError(f"prompt {number} is text, but the model has no tokenizer; pass token ids")
        prompt = model.tokenizer.encode(prompt).tolist()
    token_ids = [int(token_id) for token_id in prompt]
    if not token_ids:
        raise GenerationError(f"prompt {number} is empty; a prompt needs at least one token")
    vocab_size, context = model.trunk.vocab_size, model.trunk.max_position_embeddings
    unknown = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
    if unknown is not None:
        raise GenerationError(f"prompt {number} holds token id {unknown}; the vocabulary has ids 0..{vocab_size - 1}")
    if len(token_ids) + max_new_tokens > context:
        raise GenerationError(
            f"prompt {number} has {len(token_ids)} tokens; with max_new_tokens = {max_new_tokens} that exceeds the "
            f"context of {context} (max_position_embeddings); shorten one of them"
        )
    return token_ids
