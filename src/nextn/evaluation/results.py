"""The results of decoding held-out prompts: arms with their speedup, and samples with the depth each piece came from.

>>> Speedup.of_repeats(plain_tok_per_s=(100.0, 110.0, 90.0), speculative_tok_per_s=(150.0, 154.0, 144.0))
Speedup(median=1.5, lowest=1.4, highest=1.6)
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nextn.decoding.statistics import AcceptanceStatistics


@dataclass(frozen=True)
class Speedup:
    """Wall clock of plain decoding over that of speculative decoding, repeat by repeat; above 1 is faster."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of_repeats(cls, plain_tok_per_s: Sequence[float], speculative_tok_per_s: Sequence[float]) -> Speedup:
        """Pair repeat i of one arm with repeat i of the other, which ran next to it, and take the ratios.

        Args:
            plain_tok_per_s: new tokens per second of plain decoding, one entry per repeat, at least one.
            speculative_tok_per_s: the same of speculative decoding, as many.

        Raises:
            ValueError: no repeats, or not as many in one arm as in the other.
        """
        if not plain_tok_per_s or len(plain_tok_per_s) != len(speculative_tok_per_s):
            raise ValueError(
                f"speedup pairs repeats one by one, got {len(plain_tok_per_s)} plain and "
                f"{len(speculative_tok_per_s)} speculative"
            )
        ratios = [fast / plain for fast, plain in zip(speculative_tok_per_s, plain_tok_per_s, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True)
class DecodingArm:
    """One way of decoding the held-out prompts, speculative and plain in turn on the same weights and device."""

    name: str  # "greedy", "sampled"
    temperature: float
    draft_length: int  # N
    num_prompts: int
    num_new_tokens: int  # of one repeat of the speculative runs, all prompts together
    histogram: tuple[int, ...]  # [N+1], index a: verify cycles that accepted a drafted tokens
    mean_acceptance_length: float  # AL, bonus or correction token included
    acceptance_rate: float | None  # accepted / drafted; None: nothing was drafted
    acceptance_unconditional: tuple[float | None, ...]  # [N], index 0 is drafted token 1; None: never drafted
    acceptance_conditional: tuple[float | None, ...]  # [N]; None: never reached
    plain_tok_per_s: tuple[float, ...]  # one entry per repeat
    speculative_tok_per_s: tuple[float, ...]
    speedup: Speedup
    num_identical_outputs: int | None  # greedy: outputs equal to plain decoding token for token; None: not comparable
    num_compared_outputs: int | None
    repeated_text_share_plain: float
    repeated_text_share_speculative: float

    def __post_init__(self) -> None:
        if self.draft_length < 1:
            raise ValueError(f"a speculative arm drafts at least 1 token, got draft_length = {self.draft_length}")
        _check_length("histogram", self.histogram, self.draft_length + 1)
        _check_length("acceptance_unconditional", self.acceptance_unconditional, self.draft_length)
        _check_length("acceptance_conditional", self.acceptance_conditional, self.draft_length)
        if (self.num_identical_outputs is None) != (self.num_compared_outputs is None):
            raise ValueError("num_identical_outputs and num_compared_outputs are given together or not at all")
        if self.speedup != Speedup.of_repeats(self.plain_tok_per_s, self.speculative_tok_per_s):
            raise ValueError(f"{self.speedup} is not the speedup of the repeats given")

    @classmethod
    def of_statistics(
        cls,
        name: str,
        temperature: float,
        statistics: AcceptanceStatistics,
        *,
        plain_tok_per_s: Sequence[float],
        speculative_tok_per_s: Sequence[float],
        **counted: Any,
    ) -> DecodingArm:
        """An arm with its ratios taken from the statistics of decoding; `counted` are the other fields, by name."""
        table = statistics.to_table()  # there a ratio without cases is None, not nan
        return cls(
            name=name,
            temperature=temperature,
            draft_length=statistics.draft_length,
            histogram=statistics.histogram,
            mean_acceptance_length=statistics.mean_acceptance_length,
            acceptance_rate=table["acceptance_rate"],
            acceptance_unconditional=tuple(table["acceptance_unconditional"]),
            acceptance_conditional=tuple(table["acceptance_conditional"]),
            plain_tok_per_s=tuple(plain_tok_per_s),
            speculative_tok_per_s=tuple(speculative_tok_per_s),
            speedup=Speedup.of_repeats(plain_tok_per_s, speculative_tok_per_s),
            **counted,
        )


@dataclass(frozen=True)
class TokenText:
    """The text of one generated token and the depth it came from: 0 is the trunk, k an accepted draft of depth k."""

    text: str
    depth: int


@dataclass(frozen=True)
class Sample:
    """One generated text; `arm` names the `DecodingArm` that made it."""

    arm: str
    prompt: str
    pieces: tuple[TokenText, ...]


def token_texts(tokens: Iterable[bytes], depths: Iterable[int]) -> tuple[TokenText, ...]:
    """Text pieces of generated tokens, given as bytes, with the depth each came from.

    A character that spans several tokens is shown whole in the piece of the token that completes it; bytes that are not
    UTF-8 show as U+FFFD.

    >>> [(piece.text, piece.depth) for piece in token_texts([b"a", b"\\xc3", b"\\xa9"], [0, 1, 2])]
    [('a', 0), ('é', 2)]
    """
    pieces: list[TokenText] = []
    pending = b""
    depth = 0
    for token, depth in zip(tokens, depths, strict=True):
        pending += token
        try:
            text = pending.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":  # the next token may complete the character
                continue
            text = pending.decode("utf-8", errors="replace")
        pending = b""
        pieces.append(TokenText(text, depth))
    if pending:
        pieces.append(TokenText(pending.decode("utf-8", errors="replace"), depth))
    return tuple(pieces)


def _check_length(name: str, values: Sequence[object], wanted: int) -> None:
    if len(values) != wanted:
        raise ValueError(f"{name} has {len(values)} entries, expected {wanted}")
