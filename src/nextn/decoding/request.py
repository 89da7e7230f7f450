"""What a user asks for: `Request`, of one call, and `DraftSettings`, of a decoder. `resolve` refuses contradictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, TypedDict, Unpack

from nextn.decoding.sampling import SamplingConfig
from nextn.decoding.verify import Verifier
from nextn.decoding.vocabulary import DraftVocabulary
from nextn.mtp.model import MTPModel

MTP, PROMPT_LOOKUP = "mtp", "prompt_lookup"
"""Drafters that have a name; any other drafter is a model."""

ADAPTIVE: Literal["adaptive"] = "adaptive"

GREEDY = SamplingConfig()

DraftLength = int | Literal["adaptive"] | None


class RequestOptions(TypedDict, total=False):
    """The fields of `Request`, those of its sampling among them, as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int | Sequence[int]
    eos_token_id: int | Literal["auto"] | None
    stop: Sequence[str]


@dataclass(frozen=True)
class Request:
    """What one call asks for, beside its prompts.

    Attributes:
        max_new_tokens: most tokens to add to each prompt.
        sampling: how a token is chosen from the model's logits.
        seed: of the random numbers; one for all prompts, or one each.
        eos_token_id: the token that ends a row; "auto": the tokenizer's, if there is one; None: ignore it.
        stop: strings that end a row; its text ends before them.

    >>> Request.of(max_new_tokens=8, temperature=0.5).sampling.temperature
    0.5
    """

    max_new_tokens: int = 128
    sampling: SamplingConfig = GREEDY
    seed: int | Sequence[int] = 0
    eos_token_id: int | Literal["auto"] | None = "auto"
    stop: Sequence[str] = ()

    @classmethod
    def of(cls, **options: Unpack[RequestOptions]) -> Request:
        """The request that keyword arguments describe."""
        names = {field.name for field in fields(SamplingConfig)}
        sampling = {name: value for name, value in options.items() if name in names}
        others = {name: value for name, value in options.items() if name not in names}
        return cls(sampling=SamplingConfig(**sampling), **others)  # type: ignore[arg-type]


@dataclass(frozen=True)
class DraftSettings:
    """How a decoder drafts and verifies.

    Attributes:
        drafter: "mtp", "prompt_lookup", or another model of the same vocabulary that drafts.
        convention: how the MTP depths draft: "as_trained", "recycled", or as an engine would
            (`drafters.engine_drafts`); None: recycled where one module serves all depths, which is cheaper, else as
            trained. It changes acceptance, never the distribution of the output.
        length: N, tokens drafted per cycle; 0 is plain decoding; "adaptive" takes the N with the most tokens per
            second, down to 0; None: 3, or as many as can be drafted.
        min_confidence: a row's draft ends when the product of its probabilities falls below; None: never before N.
        vocabulary: the only tokens that are drafted; verification keeps all.
        verifier: "auto" (lossless), "exact", "rejection", or a lossy one, "threshold" or "typical"; or a `Verifier`.
    """

    drafter: str | MTPModel = MTP
    convention: str | None = None
    length: DraftLength = None
    min_confidence: float | None = None
    vocabulary: DraftVocabulary | None = field(default=None, repr=False)
    verifier: str | Verifier = "auto"
