"""What decoding gave: texts, tokens, where they came from, acceptance, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nextn.decoding.loop import Costs
from nextn.decoding.row import FinishReason, Row
from nextn.decoding.statistics import AcceptanceStatistics
from nextn.mtp.model import MTPModel


@dataclass(frozen=True)
class GenerationResult:
    """What was generated, one entry per prompt, and what it took.

    Attributes:
        texts: the new text, without the prompt, a final EOS or a stop string; empty tuple if the model has no
            tokenizer.
        token_ids: the new tokens, a final EOS or the token that completes a stop string included.
        origins: where each new token came from: 0 = the trunk (first token, correction or bonus), k = the k-th draft of
            its cycle, accepted.
        finish_reasons: "eos", "stop" (a stop string), "length" (`max_new_tokens` were emitted) or "cancelled".
        stats: accepted lengths of all rows' cycles.
        num_changed_tokens: accepted drafts that the lossless verifier would have refused; 0 unless a lossy one ran.
        num_trunk_forwards: trunk forwards in all, of the whole batch each, prompts included.
        costs: seconds spent on what.
    """

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    origins: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[FinishReason, ...]
    stats: AcceptanceStatistics
    num_changed_tokens: int
    num_trunk_forwards: int
    costs: Costs

    @classmethod
    def of_rows(cls, rows: Sequence[Row], model: MTPModel, draft_length: int, costs: Costs) -> GenerationResult:
        """From rows that have ended, in the order of their prompts; `draft_length` is the longest draft, N."""
        return cls(
            texts=() if model.tokenizer is None else tuple(row_text(model, row) for row in rows),
            token_ids=tuple(tuple(row.token_ids) for row in rows),
            origins=tuple(tuple(row.origins) for row in rows),
            finish_reasons=tuple(row.finish_reason or "cancelled" for row in rows),
            stats=AcceptanceStatistics.of_cycles(draft_length, [cycle for row in rows for cycle in row.cycles]),
            num_changed_tokens=sum(row.num_changed for row in rows),
            num_trunk_forwards=costs.num_prefills + sum(costs.num_cycles.values()),
            costs=costs,
        )

    @property
    def prefill_s(self) -> float:
        """Seconds spent reading prompts with the trunk and choosing each first token."""
        return self.costs.prefill_s

    @property
    def decode_s(self) -> float:
        """Seconds for all further tokens; the drafter's reading of the prompts is part of it."""
        return self.costs.draft_s + self.costs.verify_s

    @property
    def decode_tok_per_s(self) -> float:
        """New tokens per second of decoding; each row's first token, which reading the prompt gives, is not counted."""
        num_tokens = sum(len(ids) - 1 for ids in self.token_ids if ids)
        return num_tokens / self.decode_s if num_tokens else 0.0

    @property
    def changed_share(self) -> float:
        """Share of the new tokens that a lossy verifier changed; 0 without one."""
        return self.num_changed_tokens / max(sum(map(len, self.token_ids)), 1)


def row_text(model: MTPModel, row: Row) -> str:
    """The text of a row so far, without a final EOS or a stop string. The model must have a tokenizer."""
    assert model.tokenizer is not None, "texts need a tokenizer"
    token_ids = row.token_ids[:-1] if row.finish_reason == "eos" else row.token_ids
    text = model.tokenizer.decode(token_ids)
    return text if row.num_chars is None else text[: row.num_chars]
