"""What the lossless suite verifies, and the outcome of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nextn.decoding import Decoder, GenerationResult
from nextn.decoding.request import PROMPT_LOOKUP
from nextn.decoding.resolve import longest_draft
from nextn.decoding.verify import Verifier
from nextn.mtp import MTPModel

DRAFT_LENGTHS = (1, 2, 3)
BATCH_SIZES = (1, 4)


@dataclass(frozen=True)
class Check:
    """One check and its outcome.

    Attributes:
        name: see the table of `nextn.lossless`.
        compared: what with what.
        num_compared: texts, rows or samples compared.
        passed: the verdict; None: measured only.
        finding: the outcome in a line.
        evidence: of a failure: first differing prompt, position, tokens, margins; or p-values.
    """

    name: str
    compared: str
    num_compared: int
    passed: bool | None
    finding: str
    evidence: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Subject:
    """What is verified.

    Attributes:
        model: in float32 and eval mode.
        prompts: token ids, at least one.
        max_new_tokens: tokens decoded after each, at least 2.
    """

    model: MTPModel
    prompts: tuple[list[int], ...]
    max_new_tokens: int

    @property
    def drafter(self) -> str:
        """ "mtp", or "prompt_lookup" for a model that has no MTP depths."""
        return PROMPT_LOOKUP if longest_draft(self.model) == 0 else "mtp"

    @property
    def draft_lengths(self) -> tuple[int, ...]:
        """Every N that is tried, ascending."""
        return DRAFT_LENGTHS[: longest_draft(self.model) or None]

    def decoder(self, draft_length: int, batch_size: int, verifier: str | Verifier = "auto") -> Decoder:
        """What decodes with the model's own drafts; N = 0 is plain decoding."""
        return Decoder(
            self.model, batch_size=batch_size, draft_length=draft_length, drafter=self.drafter, verifier=verifier
        )

    def greedy(self, draft_length: int, batch_size: int, eos_token_id: int | None = None) -> GenerationResult:
        """All prompts, continued greedily."""
        decoder = self.decoder(draft_length, batch_size)
        return decoder.generate(self.prompts, max_new_tokens=self.max_new_tokens, eos_token_id=eos_token_id)
