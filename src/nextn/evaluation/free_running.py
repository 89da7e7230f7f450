"""Acceptance by decoding held-out prompts, free-running: while a model trains, and beside plain decoding afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nextn.config import EvaluationConfig
from nextn.data import PackedTokens, validation_prompts
from nextn.decoding import GenerationResult, generate
from nextn.evaluation.interleaving import rotated
from nextn.evaluation.repetition import mean_repeated_share
from nextn.evaluation.results import DecodingArm, Sample, token_texts
from nextn.mtp import MTPModel

ARM_TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}
"""Temperature of each arm, by name. Greedy text that loops flatters acceptance, so every model is also sampled."""


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
            for name, temperature in ARM_TEMPERATURES.items()
        }

    return probe


def measure_arm(
    model: MTPModel,
    held_out: HeldOutPrompts,
    config: EvaluationConfig,
    name: str,
    num_repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> tuple[DecodingArm, tuple[Sample, ...]]:
    """One speculative arm beside plain decoding, with its texts.

    All prompts are decoded plainly and speculatively in turn, eagerly, one at a time, after a warm-up. Rates are new
    tokens per second of decoding; reading the prompt with the trunk is left out.

    Args:
        model: with MTP depths and a tokenizer, in evaluation mode.
        held_out: what to decode.
        config: draft_length (N) and max_new_tokens.
        name: a key of `ARM_TEMPERATURES`.
        num_repeats: timed pairs.
        progress: called after each decoding of all prompts (2 * num_repeats times).

    Returns:
        The arm, and the speculative texts of the first repeat with the origin of each token.
    """
    temperature, lengths = ARM_TEMPERATURES[name], (0, config.draft_length)
    results: dict[int, list[GenerationResult]] = {length: [] for length in lengths}
    for length in lengths:  # warm-up
        _decode(model, held_out.prompts[:1], config.max_new_tokens, length, temperature)
    for repeat in range(num_repeats):
        for length in rotated(lengths, repeat):
            results[length].append(_decode(model, held_out.prompts, config.max_new_tokens, length, temperature))
            progress()
    plain, speculative = results[0], results[config.draft_length]
    outputs, drafted = plain[0].token_ids, speculative[0].token_ids
    is_greedy = temperature == 0.0
    arm = DecodingArm.of_statistics(
        name,
        temperature,
        speculative[0].stats,
        plain_tok_per_s=[result.decode_tok_per_s for result in plain],
        speculative_tok_per_s=[result.decode_tok_per_s for result in speculative],
        num_prompts=len(outputs),
        num_new_tokens=sum(map(len, drafted)),
        num_identical_outputs=sum(a == b for a, b in zip(outputs, drafted, strict=True)) if is_greedy else None,
        num_compared_outputs=len(outputs) if is_greedy else None,
        repeated_text_share_plain=mean_repeated_share(outputs),
        repeated_text_share_speculative=mean_repeated_share(drafted),
    )
    return arm, _samples(model, name, held_out, speculative[0])


def _decode(
    model: MTPModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    draft_length: int,
    temperature: float,
) -> GenerationResult:
    """All prompts to the same length: text is not ended at EOS, so that all arms do equal work."""
    return generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        draft_length=draft_length,
        temperature=temperature,
        eos_token_id=None,
    )


def _samples(model: MTPModel, arm: str, held_out: HeldOutPrompts, result: GenerationResult) -> tuple[Sample, ...]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return ()
    rows = zip(held_out.prompts, result.token_ids, result.origins, strict=True)
    return tuple(
        Sample(arm, tokenizer.decode(prompt), token_texts((tokenizer.token_bytes(i) for i in ids), origins))
        for prompt, ids, origins in rows
    )
