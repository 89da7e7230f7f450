"""Where greedy texts differ, and whether the place is a near tie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextn.lossless.subject import Check, Subject
from nextn.model import Trunk

NEAR_TIE = 2e-5
"""Two logits are tied in float32 when they differ by at most this share of the largest absolute logit."""


@dataclass(frozen=True)
class Difference:
    """The first place where a text differs from the expected one.

    Attributes:
        setting: how it was decoded.
        prompt: which, 0-based.
        position: of the new token, 0-based.
        expected, got: token ids there; None: the text has ended.
        top_two_margin: by how much the model's largest logit exceeds the second, there.
        is_near_tie: both tokens are the most likely one up to rounding in float32.
    """

    setting: str
    prompt: int
    position: int
    expected: int | None
    got: int | None
    top_two_margin: float
    is_near_tie: bool


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """The first place where two texts differ, 0-based; None if they are equal.

    >>> first_difference([5, 6, 7], [5, 6, 8]), first_difference([5, 6], [5]), first_difference([5], [5])
    (2, 1, None)
    """
    for position, (one, other) in enumerate(zip(expected, got, strict=False)):
        if one != other:
            return position
    return None if len(expected) == len(got) else min(len(expected), len(got))


def differences(
    subject: Subject, expected: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], setting: str
) -> list[Difference]:
    """Of each text that differs from the expected one, the first place; of as many prompts as are expected."""
    found = []
    for number, (wanted, text) in enumerate(zip(expected, texts, strict=True)):
        if (position := first_difference(wanted, text)) is not None:
            found.append(_difference(subject, number, wanted, text, position, setting))
    return found


@torch.inference_mode()
def _difference(
    subject: Subject, number: int, expected: Sequence[int], text: Sequence[int], position: int, setting: str
) -> Difference:
    wanted, got = (ids[position] if position < len(ids) else None for ids in (expected, text))
    logits = logits_after(subject.model.trunk, [[*subject.prompts[number], *expected[:position]]])[0].float()
    best, second = logits.topk(2).values.tolist()
    lowest = best - NEAR_TIE * float(logits.abs().max())
    is_near_tie = all(token is not None and float(logits[token]) >= lowest for token in (wanted, got))
    return Difference(setting, number, position, wanted, got, best - second, is_near_tie)


def logits_after(trunk: Trunk, rows: list[list[int]]) -> Tensor:
    """Logits of the token after each row, without a cache; rows of one length, float [B, V]."""
    hidden = trunk.hidden_states(torch.tensor(rows, device=trunk.device))
    return trunk.output_head(trunk.final_norm(hidden[:, -1]))


def text_check(name: str, compared: str, num_compared: int, found: Sequence[Difference]) -> Check:
    """The check that no text differs but at a near tie; its attributes are those of `Check`."""
    wrong = [difference for difference in found if not difference.is_near_tie]
    if wrong:
        first = wrong[0]
        finding = (
            f"{len(wrong)} texts differ; first: {first.setting}, prompt {first.prompt}, new token {first.position}: "
            f"{first.got} in place of {first.expected}"
        )
    elif found:
        margin = max(difference.top_two_margin for difference in found)
        finding = f"equal up to {len(found)} near ties (margins up to {margin:.1e})"
    else:
        finding = "all equal"
    return Check(name, compared, num_compared, not wrong, finding, tuple(vars(one) for one in wrong or found))
