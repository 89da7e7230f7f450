"""Greedy texts with drafts beside plain decoding: with and without a cache, ended at EOS, and in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

from nextn.decoding import GenerationResult, plain_reference
from nextn.lossless.differences import Difference, differences, text_check
from nextn.lossless.scripted import Script
from nextn.lossless.subject import BATCH_SIZES, Check, Subject

NUM_UNCACHED, UNCACHED_TOKENS = 2, 32
"""Prompts decoded without a cache, and new tokens of each."""

Results = dict[tuple[int, int], GenerationResult]
"""Greedy results by (N, batch size)."""


def _setting(draft_length: int, batch_size: int) -> str:
    return f"N = {draft_length}, batch {batch_size}"


def check_no_cache(subject: Subject, plain: Sequence[list[int]], results: Results) -> Check:
    """Beginnings of a few texts beside the slow reference; `plain` is cached plain decoding of all prompts."""
    prompts, num_new = subject.prompts[:NUM_UNCACHED], min(UNCACHED_TOKENS, subject.max_new_tokens)
    expected = [plain_reference(subject.model, prompt, num_new) for prompt in prompts]
    found: list[Difference] = []
    num_compared = 0
    for setting, texts in [("plain", plain), *((_setting(*key), one.token_ids) for key, one in results.items())]:
        found += differences(subject, expected, [ids[:num_new] for ids in texts[: len(prompts)]], setting)
        num_compared += len(prompts)
    return text_check("no cache", f"{num_new} tokens with one whole forward per token", num_compared, found)


def check_greedy(subject: Subject, plain: Sequence[list[int]], results: Results) -> Check:
    """All texts for every N and batch size beside plain decoding."""
    found = []
    for key, result in results.items():
        found += differences(subject, plain, result.token_ids, _setting(*key))
    lengths, sizes = ", ".join(map(str, subject.draft_lengths)), ", ".join(map(str, BATCH_SIZES))
    compared = f"{subject.max_new_tokens} tokens at N = {lengths}, batch {sizes}, with plain decoding"
    return text_check("greedy", compared, len(results) * len(plain), found)


def check_eos(subject: Subject, plain: Sequence[list[int]], results: Results) -> Check:
    """Every text cut by an EOS that stands inside an accepted draft, beside the plain text up to there.

    For each N the EOS is a token that was drafted and accepted; where none was, and to be sure, one that drafts which
    are all right contain.
    """
    found, num_compared, in_drafts = [], 0, []
    for (draft_length, batch_size), result in results.items():
        eos = _accepted_token(results[draft_length, BATCH_SIZES[0]])
        if eos is None:
            continue
        in_drafts.append(eos)
        expected = [_up_to(ids, eos) for ids in plain]
        setting = f"{_setting(draft_length, batch_size)}, EOS {eos}"
        found += differences(subject, expected, subject.greedy(draft_length, batch_size, eos).token_ids, setting)
        num_compared += len(result.token_ids)
    eos = plain[0][min(2, len(plain[0]) - 1)]
    expected = [_up_to(ids, eos) for ids in plain]
    for batch_size in BATCH_SIZES:
        script = Script(subject, plain, num_right=lambda: max(subject.draft_lengths))
        ended = [row.token_ids for row in script.decode(batch_size, eos)]
        setting = f"right drafts, batch {batch_size}, EOS {eos}"
        found += differences(subject, expected, ended, setting)
        num_compared += len(plain)
    compared = f"texts up to an EOS among accepted drafts (tokens {', '.join(map(str, sorted({*in_drafts, eos})))})"
    return text_check("eos", compared, num_compared, found)


def _accepted_token(result: GenerationResult) -> int | None:
    """The accepted draft that first occurs latest in its text, so that most of the text comes before it."""
    places = {
        (ids.index(token_id), token_id)
        for ids, origins in zip(result.token_ids, result.origins, strict=True)
        for token_id, origin in zip(ids, origins, strict=True)
        if origin and origins[ids.index(token_id)]
    }
    return max(places)[1] if places else None


def _up_to(token_ids: list[int], eos: int) -> list[int]:
    return token_ids[: token_ids.index(eos) + 1] if eos in token_ids else token_ids


def bfloat16_divergence(subject: Subject) -> Check:
    """How often a text with drafts differs from plain decoding in bfloat16, where, and how near the tie was.

    Args:
        subject: with a bfloat16 model.
    """
    draft_length = max(subject.draft_lengths)
    plain = subject.greedy(0, 1).token_ids
    result = subject.greedy(draft_length, 1)
    found = differences(subject, plain, result.token_ids, _setting(draft_length, 1))
    finding = f"{len(found) / len(plain):.0%} of texts differ"
    if found:
        margins = sorted(difference.top_two_margin for difference in found)
        positions = sorted(difference.position for difference in found)
        finding += (
            f"; first at new token {', '.join(map(str, positions))}; top-two margins there "
            f"{margins[0]:.2g} to {margins[-1]:.2g}"
        )
    compared = f"{subject.max_new_tokens} tokens at N = {draft_length} with plain decoding"
    return Check("bfloat16", compared, len(plain), None, finding, tuple(vars(one) for one in found))
