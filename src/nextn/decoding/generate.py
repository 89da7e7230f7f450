"""`nextn.generate`: a `Decoder` for one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from nextn.decoding.decoder import Decoder
from nextn.decoding.request import DraftLength, DraftSettings, Request
from nextn.decoding.result import GenerationResult
from nextn.decoding.sampling import SamplingConfig
from nextn.decoding.verify import Verifier
from nextn.decoding.vocabulary import DraftVocabulary
from nextn.mtp.model import MTPModel


def generate(
    model: MTPModel,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 128,
    draft_length: DraftLength = None,
    batch_size: int = 1,
    drafter: str | MTPModel = "mtp",
    drafting: str | None = None,
    min_confidence: float | None = None,
    draft_vocabulary: DraftVocabulary | None = None,
    verifier: str | Verifier = "auto",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    eos_token_id: int | Literal["auto"] | None = "auto",
    stop: Sequence[str] = (),
) -> GenerationResult:
    """Continue each prompt, losslessly: the output (or its distribution) does not depend on what is drafted.

    The random numbers of prompt number r depend on (its seed, r) only, whatever else is in the batch. Arithmetic rounds
    a forward of one token and one of several differently: in float32 greedy outputs are equal token for token, in
    bfloat16 that can tip a near tie. To decode again and again, or compiled, keep a `Decoder`.

    Args:
        model: trunk and MTP depths; put in eval mode for the call.
        prompts: texts (need the model's tokenizer) or token ids; at least one token each.
        max_new_tokens: most tokens to add to each prompt.
        draft_length: N, tokens drafted per cycle; 0 is plain decoding. Beyond the trained depths the sequential scheme
            uses its last module again; the others cannot draft further. "adaptive": the N with the most tokens per
            second, down to 0. None: 3, or as many as the scheme can draft; 0 for a model without MTP.
        batch_size: prompts decoded at a time.
        drafter: "mtp", "prompt_lookup", or another model with the same vocabulary.
        drafting: which tokens are drafted: "as_trained"; "recycled", one cache for a module that serves all depths; or
            as an engine would draft them (`engine_drafts`), to see what it loses or gains: "transformers", "vllm",
            "llamacpp". It changes acceptance, never the output's distribution. None: recycled where one module
            serves all depths, else as trained.
        min_confidence: end a draft when the product of its probabilities falls below this; None: draft N always.
        draft_vocabulary: the only tokens that are drafted; None: all.
        verifier: "exact", "rejection", a `Verifier`, or "auto": exact at temperature 0, rejection otherwise. These are
            lossless; "threshold" and "typical" are not, and `num_changed_tokens` counts what they changed.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens.
        top_p: keep the fewest tokens whose probabilities sum to this.
        min_p: keep tokens at least this many times as likely as the most likely one.
        repetition_penalty: logits of tokens seen in prompt or output are divided by it, or multiplied if negative.
        seed: of the random numbers; one for all prompts, or one each.
        eos_token_id: the token that ends a row; "auto": the tokenizer's, if there is one; None: ignore it.
        stop: strings that end a row; its text ends before them.

    Returns:
        New tokens per prompt, their origins and the acceptance statistics.

    Raises:
        GenerationError: a prompt is empty, too long for the context or holds an unknown token; drafting is asked of a
            model without MTP, or more drafts than its scheme can make, or drafts that the engine does not make of this
            model; sampling settings are out of range or contradict the verifier.
        ValueError: `prompts` is a single string instead of a list.
    """
    draft = DraftSettings(drafter, drafting, draft_length, min_confidence, draft_vocabulary, verifier)
    sampling = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty)
    decoder = Decoder(model, draft=draft, batch_size=batch_size, weights="as_stored")
    return decoder.generate(prompts, Request(max_new_tokens, sampling, seed, eos_token_id, stop))
