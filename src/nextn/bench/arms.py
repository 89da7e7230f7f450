"""The arms of a comparison: ways to decode, with the measured model's weights and with those of other models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nextn.decoding.decoder import Decoder
from nextn.decoding.request import PROMPT_LOOKUP
from nextn.decoding.resolve import USUAL_DRAFT_LENGTH, longest_draft, resolve_verifier
from nextn.decoding.sampling import SamplingConfig
from nextn.model.prepared import prepared
from nextn.mtp import MTPModel

CHECKPOINT, STANDARD, PARALLEL = "checkpoint", "standard", "parallel"
"""Whose weights an arm decodes with: the measured model, one trained without MTP, one that drafts in parallel."""

DRAFTERS = ("mtp", PROMPT_LOOKUP, "draft_model")

ADAPTIVE: Literal["adaptive"] = "adaptive"

DraftLength = int | Literal["adaptive"]


@dataclass(frozen=True)
class Arm:
    """A way to decode.

    Attributes:
        name: for people, its own among all arms.
        weights: CHECKPOINT, STANDARD or PARALLEL.
        model: the weights, prepared for decoding.
        draft_length: N; 0 is plain decoding.
        compiled: whether the steps are compiled.
        options: the decoder's further options.
    """

    name: str
    weights: str
    model: MTPModel
    draft_length: DraftLength
    compiled: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def drafter(self) -> str | None:
        """What drafts: one of `DRAFTERS`; None: nothing does."""
        if self.draft_length == 0:
            return None
        drafter = self.options.get("drafter", "mtp")
        return drafter if isinstance(drafter, str) else "draft_model"

    @property
    def is_lossless(self) -> bool:
        """Whether the output, or its distribution, is that of plain decoding."""
        return resolve_verifier(self.options.get("verifier", "auto"), SamplingConfig()).is_lossless

    def decoder(self, batch_size: int, say: Callable[[str], None]) -> Decoder:
        """A decoder of this arm."""
        return Decoder(
            self.model,
            batch_size=batch_size,
            draft_length=self.draft_length,
            compiled=self.compiled,
            weights="as_stored",
            say=say,
            **self.options,
        )


def arms_of(
    model: MTPModel,
    draft_lengths: Sequence[DraftLength],
    *,
    compiled: bool,
    drafting: str,
    verifier: str | None = None,
    draft_model: MTPModel | None = None,
    standard: MTPModel | None = None,
    parallel: MTPModel | None = None,
) -> list[Arm]:
    """The arms to compare, plain ones first.

    Args:
        model: the checkpoint.
        draft_lengths: of its MTP depths, 0 left out or not.
        compiled: compile the steps of all arms but one eager plain one, which outputs are compared with.
        drafting: how MTP depths draft (`engine_drafts`).
        verifier: a lossy one, by name, which adds an arm at the longest fixed draft length.
        draft_model: drafts for the checkpoint, and for `standard` if there is one.
        standard: the same recipe without MTP.
        parallel: a model whose depths draft independently of each other.
    """
    ours, draft = prepared(model, "packed"), None if draft_model is None else prepared(draft_model, "packed")
    fixed = [length for length in draft_lengths if isinstance(length, int) and length]
    longest = max(fixed, default=USUAL_DRAFT_LENGTH)
    arms = [Arm("plain, eager", CHECKPOINT, ours, 0, compiled=False)]
    if compiled:
        arms.append(Arm("plain, compiled", CHECKPOINT, ours, 0, compiled))
    for length in draft_lengths:
        if length:
            name = f"MTP N = {length}" if isinstance(length, int) else f"MTP {length}"
            arms.append(Arm(name, CHECKPOINT, ours, length, compiled, {"drafting": drafting}))
    if verifier is not None and fixed:
        options = {"drafting": drafting, "verifier": verifier}
        arms.append(Arm(f"MTP N = {longest}, {verifier} (lossy)", CHECKPOINT, ours, longest, compiled, options))
    lookup = {"drafter": PROMPT_LOOKUP}
    arms.append(Arm(f"prompt lookup N = {longest}", CHECKPOINT, ours, longest, compiled, lookup))
    if draft is not None:
        arms.append(Arm(f"draft model N = {longest}", CHECKPOINT, ours, longest, compiled, {"drafter": draft}))
    if standard is not None:
        theirs = prepared(standard, "packed")
        arms.append(Arm("standard: plain", STANDARD, theirs, 0, compiled))
        if draft is not None:
            name = f"standard: draft model N = {longest}"
            arms.append(Arm(name, STANDARD, theirs, longest, compiled, {"drafter": draft}))
    if parallel is not None:
        theirs, most = prepared(parallel, "packed"), longest_draft(parallel)
        length = longest if most is None else min(longest, most)
        arms.append(Arm("parallel: plain", PARALLEL, theirs, 0, compiled))
        arms.append(Arm(f"parallel: N = {length}", PARALLEL, theirs, length, compiled))
    return sorted(arms, key=lambda arm: arm.draft_length != 0)
