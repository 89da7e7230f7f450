"""What is asked of `generate`, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from nextn.decoding.engine_drafts import AS_TRAINED, check_drafting, fixed_draft_length
from nextn.decoding.sampling import SamplingConfig
from nextn.decoding.verify import VERIFIERS, Verifier
from nextn.errors import GenerationError
from nextn.mtp.model import MTPModel
from nextn.mtp.scheme import Scheme

USUAL_DRAFT_LENGTH = 3


def check_counts(num_prompts: int, max_new_tokens: int, seed: int | Sequence[int]) -> Sequence[int]:
    """The seed of each prompt. Raises GenerationError: no new tokens are asked for, a seed is negative or missing."""
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    seeds = [seed] * num_prompts if isinstance(seed, int) else list(seed)
    if len(seeds) != num_prompts:
        raise GenerationError(f"there are {num_prompts} prompts and {len(seeds)} seeds; give one for all, or one each")
    if min(seeds, default=0) < 0:
        raise GenerationError(f"seed must be 0 or more, got {min(seeds)}")
    return seeds


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


def prompt_token_ids(model: MTPModel, prompt: str | Sequence[int], number: int, max_new_tokens: int) -> list[int]:
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
