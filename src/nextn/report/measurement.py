"""Measuring a trained model: free-running acceptance while training, and decoding arms side by side afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nextn.config import EvaluationConfig
from nextn.data import PackedTokens, validation_prompts
from nextn.decoding import GenerationResult, generate
from nextn.decoding.engine_drafts import AS_TRAINED
from nextn.mtp import MTPModel
from nextn.report.repetition import repeated_text_share
from nextn.report.schema import DecodingArm, Sample, pieces_of

ARMS = {"greedy": 0.0, "sampled": 1.0}
"""Every model is measured greedily and sampled at temperature 1: greedy text that loops flatters acceptance."""


@dataclass(frozen=True)
class HeldOutPrompts:
    """Prompts cut from held-out documents, and how their documents go on, both as token ids."""

    prompts: tuple[list[int], ...]
    continuations: tuple[list[int], ...]


def held_out_prompts(validation: PackedTokens, config: EvaluationConfig) -> HeldOutPrompts:
    """`num_prompts` prompts of `prompt_length` tokens, each with the `max_new_tokens` that follow in its document."""
    spans = validation_prompts(validation, config.prompt_length, config.max_new_tokens, config.num_prompts)
    return HeldOutPrompts(
        prompts=tuple(span[: config.prompt_length].tolist() for span in spans),
        continuations=tuple(span[config.prompt_length :].tolist() for span in spans),
    )


def acceptance_probe(validation: PackedTokens, config: EvaluationConfig) -> Callable[[MTPModel], dict[str, Any]] | None:
    """A function for the trainer: free-running acceptance by decoding, greedy and sampled; None if none is wanted."""
    if config.num_prompts == 0 or config.draft_length == 0:
        return None
    prompts = held_out_prompts(validation, config).prompts

    def probe(model: MTPModel) -> dict[str, Any]:
        if model.scheme is None:
            return {}
        return {
            name: _decode(model, prompts, config.max_new_tokens, config.draft_length, temperature).stats.to_table()
            for name, temperature in ARMS.items()
        }

    return probe


@dataclass(frozen=True)
class TimedDecodings:
    """The same prompts decoded with several draft lengths N, 0 (plain) among them, in turn.

    Attributes:
        temperature: 0 is greedy.
        tok_per_s: by N, one rate per repeat; repeat i of one N ran next to repeat i of the others.
        results: by N, what the first repeat gave.
    """

    temperature: float
    tok_per_s: dict[int, tuple[float, ...]]
    results: dict[int, GenerationResult]

    def arm(self, name: str, draft_length: int) -> DecodingArm:
        """Drafting N >= 1 tokens beside plain decoding."""
        plain, speculative = self.results[0], self.results[draft_length]
        is_greedy = self.temperature == 0.0
        num_prompts = len(plain.token_ids)
        identical = sum(a == b for a, b in zip(plain.token_ids, speculative.token_ids, strict=True))
        return DecodingArm.of_statistics(
            name,
            self.temperature,
            speculative.stats,
            plain_tok_per_s=self.tok_per_s[0],
            speculative_tok_per_s=self.tok_per_s[draft_length],
            num_prompts=num_prompts,
            num_new_tokens=sum(len(ids) for ids in speculative.token_ids),
            num_identical_outputs=identical if is_greedy else None,
            num_compared_outputs=num_prompts if is_greedy else None,
            repeated_text_share_plain=mean_repeated_share(plain.token_ids),
            repeated_text_share_speculative=mean_repeated_share(speculative.token_ids),
        )


def time_decodings(
    model: MTPModel,
    prompts: Sequence[str | Sequence[int]],
    draft_lengths: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    num_repeats: int,
    drafting: str = AS_TRAINED,
    progress: Callable[[], None] = lambda: None,
) -> TimedDecodings:
    """Decode all prompts with each draft length in turn, `num_repeats` times after a warm-up.

    Rates are new tokens per second of decoding, reading the prompt with the trunk left out; all arms run the same loop,
    weights, threads and sampler. A repeat's order alternates, so that no arm always runs first.

    Args:
        model: in evaluation mode.
        prompts: texts or token ids.
        draft_lengths: each N once, 0 among them.
        max_new_tokens: at least 2, since a prompt's first token is not decoded but read off the prompt.
        temperature: 0 is greedy.
        num_repeats: how often each arm is timed, at least 1.
        drafting: as for `generate`.
        progress: called after each decoding of all prompts (len(draft_lengths) * num_repeats times).

    Raises:
        GenerationError: a prompt or a draft length cannot be decoded with this model.
    """

    def decode(chosen: Sequence[str | Sequence[int]], draft_length: int) -> GenerationResult:
        return _decode(model, chosen, max_new_tokens, draft_length, temperature, drafting)

    rates: dict[int, list[float]] = {draft_length: [] for draft_length in draft_lengths}
    results: dict[int, GenerationResult] = {}
    for draft_length in rates:  # warm-up
        decode(prompts[:1], draft_length)
    for repeat in range(num_repeats):
        for draft_length in sorted(rates, reverse=repeat % 2 == 1):
            result = decode(prompts, draft_length)
            results.setdefault(draft_length, result)
            rates[draft_length].append(result.decode_tok_per_s)
            progress()
    return TimedDecodings(temperature, {length: tuple(repeats) for length, repeats in rates.items()}, results)


def measure_arm(
    model: MTPModel,
    held_out: HeldOutPrompts,
    config: EvaluationConfig,
    name: str,
    num_repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> tuple[DecodingArm, tuple[Sample, ...]]:
    """One speculative arm beside plain decoding, with its texts (see `time_decodings`).

    Args:
        model: with MTP depths and a tokenizer, in evaluation mode.
        held_out: what to decode.
        config: draft_length (N) and max_new_tokens.
        name: a key of `ARMS`.
        num_repeats: timed pairs.
        progress: called after each decoding of all prompts (2 * num_repeats times).

    Returns:
        The arm, and the speculative texts of the first repeat with the origin of each token.
    """
    timed = time_decodings(
        model,
        held_out.prompts,
        (0, config.draft_length),
        max_new_tokens=config.max_new_tokens,
        temperature=ARMS[name],
        num_repeats=num_repeats,
        progress=progress,
    )
    return timed.arm(name, config.draft_length), _samples(model, name, held_out, timed.results[config.draft_length])


def mean_repeated_share(outputs: Sequence[Sequence[int]]) -> float:
    """`repeated_text_share` of several outputs together, weighted by their lengths."""
    lengths = [len(output) for output in outputs]
    return float(np.average([repeated_text_share(output) for output in outputs], weights=lengths))


def _decode(
    model: MTPModel,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    draft_length: int,
    temperature: float,
    drafting: str = AS_TRAINED,
) -> GenerationResult:
    """All prompts to the same length: text is not ended at EOS, so that all arms do equal work."""
    return generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        draft_length=draft_length,
        drafting=drafting,
        temperature=temperature,
        eos_token_id=None,
    )


def _samples(model: MTPModel, arm: str, held_out: HeldOutPrompts, result: GenerationResult) -> tuple[Sample, ...]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return ()
    rows = zip(held_out.prompts, result.token_ids, result.origins, strict=True)
    return tuple(
        Sample(arm, tokenizer.decode(prompt), pieces_of((tokenizer.token_bytes(i) for i in ids), origins))
        for prompt, ids, origins in rows
    )
