"""Prompt lookup and a draft model decode losslessly: greedily the trunk's text, sampled its distribution."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from nextn.config import MTPConfig
from nextn.decoding import Decoder, GenerationResult, generate, plain_reference
from nextn.decoding.drafters.draft_model import DraftModelDrafter
from nextn.decoding.drafters.drafter import Drafts
from nextn.decoding.drafters.prompt_lookup import PromptLookupDrafter
from nextn.decoding.policy import AdaptiveLength
from nextn.errors import GenerationError
from nextn.mtp import MTPModel

from .conftest import TEXT, TINY, memorising_model
from .test_batches import PROMPTS, ends_of, transformers_model
from .test_rejection import CRITICAL, SETTINGS, chi_square_score, plain_distribution_of_model, without_residual

REPEATING = [2 * TEXT[row, :12].tolist() for row in range(4)] + PROMPTS
NUM_NEW = 20


@cache
def target() -> MTPModel:
    return memorising_model(60, num_depths=0)


@cache
def draft_model() -> MTPModel:
    """Has learnt less of the same text, so that it is often right and often wrong."""
    return memorising_model(40, num_depths=0)


@cache
def uncertain_target() -> MTPModel:
    """Stopped early: lookups are right about half the time, so that what a refusal draws from can be seen."""
    return memorising_model(14, num_depths=0)


@cache
def uncertain_draft_model() -> MTPModel:
    """Stopped earlier still."""
    return memorising_model(10, num_depths=0)


def drafter_of(name: str) -> str | MTPModel:
    return draft_model() if name == "model" else name


def decoded(name: str, **arguments: Any) -> GenerationResult:
    return generate(target(), REPEATING, max_new_tokens=NUM_NEW, drafter=drafter_of(name), **arguments)


@cache
def plain_texts() -> list[tuple[int, ...]]:
    return [tuple(plain_reference(target(), prompt, NUM_NEW)) for prompt in REPEATING]


DRAFTERS = ["prompt_lookup", "model"]


@pytest.mark.parametrize("draft_length", [1, 2, 5, "adaptive"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_text_is_that_of_plain_decoding(name: str, batch_size: int, draft_length: int | str):
    result = decoded(name, batch_size=batch_size, draft_length=draft_length, eos_token_id=5)
    assert list(result.token_ids) == [ends_of(text, 5) for text in plain_texts()]


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafts_are_accepted_and_refused_and_the_same_in_a_batch(name: str):
    alone = decoded(name, draft_length=3, eos_token_id=5)
    assert sum(sum(histogram[1:]) for histogram in alone.stats.histograms.values()) > 5
    assert sum(histogram[0] for histogram in alone.stats.histograms.values()) > 5
    together = decoded(name, draft_length=3, eos_token_id=5, batch_size=3)
    assert (together.origins, together.stats) == (alone.origins, alone.stats)


@pytest.mark.parametrize("name", DRAFTERS)
def test_sampled_rows_do_not_depend_on_the_rows_beside_them(name: str):
    alone = decoded(name, draft_length=3, temperature=1.2, seed=4)
    assert decoded(name, draft_length=3, temperature=1.2, seed=4, batch_size=4).token_ids == alone.token_ids


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_repetition_penalty_changes_plain_and_drafted_text_alike(name: str):
    plain = generate(target(), REPEATING, max_new_tokens=NUM_NEW, draft_length=0, repetition_penalty=3.0)
    assert decoded(name, draft_length=3, repetition_penalty=3.0, batch_size=3).token_ids == plain.token_ids


def distribution_score(name: str, **arguments: Any) -> float:
    prompt, num_new = 2 * TEXT[0, 4:16].tolist(), 4
    result = generate(
        uncertain_target(),
        [prompt] * 400,
        max_new_tokens=num_new,
        draft_length=2,
        drafter=uncertain_draft_model() if name == "model" else name,
        batch_size=32,
        **SETTINGS,
        **arguments,
    )
    assert result.stats.num_accepted_tokens
    return chi_square_score(plain_distribution_of_model(uncertain_target(), prompt, num_new), list(result.token_ids))


@pytest.mark.parametrize("name", DRAFTERS)
def test_sampled_text_has_the_distribution_of_plain_sampling(name: str):
    assert distribution_score(name) < CRITICAL
    assert distribution_score(name, verifier=without_residual) > CRITICAL


# ------------------------------------------------------------------------------------------------------ broken variants


@pytest.mark.parametrize(
    ("name", "drafter"), [("prompt_lookup", PromptLookupDrafter), ("model", DraftModelDrafter)], ids=DRAFTERS
)
def test_drafts_that_follow_another_distribution_than_they_say_are_caught(
    name: str, drafter: type[PromptLookupDrafter | DraftModelDrafter], monkeypatch: pytest.MonkeyPatch
):
    """Broken: the drafts are what they are, and are said to be drawn from all tokens alike."""
    draft = drafter.draft

    def claimed(self: PromptLookupDrafter | DraftModelDrafter, *args: Any) -> Drafts:
        drafts = draft(self, *args)
        probs = torch.full((*drafts.token_ids.shape, TINY.vocab_size), 1 / TINY.vocab_size)
        return Drafts(drafts.token_ids, probs, drafts.num_drafted)

    monkeypatch.setattr(drafter, "draft", claimed)
    assert distribution_score(name) > CRITICAL


def test_a_sampled_draft_may_be_called_certain(monkeypatch: pytest.MonkeyPatch):
    """Whatever is drafted, verified as certain, leaves the target's distribution: only the acceptance is lower."""
    draft = DraftModelDrafter.draft
    monkeypatch.setattr(DraftModelDrafter, "draft", lambda self, *args: Drafts(draft(self, *args).token_ids))
    assert distribution_score("model") < CRITICAL


class NeverRollsBack(DraftModelDrafter):
    def roll_back(self, num_final: Sequence[int]) -> None:
        pass


class ForgetsToReset(DraftModelDrafter):
    def begin(self, slot: int, token_ids: Tensor, num_known: int) -> None:
        pass


class StaysBehind(DraftModelDrafter):
    def move(self, source: int, target: int, num_tokens: int) -> None:
        pass


@pytest.mark.parametrize("broken", [NeverRollsBack, ForgetsToReset, StaysBehind])
def test_a_draft_models_stale_cache_is_caught_by_its_drafts(
    broken: type[DraftModelDrafter], monkeypatch: pytest.MonkeyPatch
):
    """Lengths alternate, so that plain steps go on where rejected drafts lie."""
    num_cycles = itertools.count()
    monkeypatch.setattr(AdaptiveLength, "next_length", lambda self: (4, 0, 0)[next(num_cycles) % 3])
    arguments: dict[str, Any] = {"draft_length": "adaptive", "eos_token_id": 5, "batch_size": 2}
    expected = decoded("model", **arguments)
    assert list(expected.token_ids) == [ends_of(text, 5) for text in plain_texts()]
    num_cycles = itertools.count()
    monkeypatch.setattr("nextn.decoding.drafters.factory.DraftModelDrafter", broken)
    wrong = decoded("model", **arguments)
    assert wrong.token_ids == expected.token_ids, "the text stays what it is"
    assert wrong.origins != expected.origins


class IndexesTheRowBefore(PromptLookupDrafter):
    def begin(self, slot: int, token_ids: Tensor, num_known: int) -> None:
        self._num_indexed[slot] = 0
        self._index(slot, token_ids, num_known)


def test_prompt_lookup_that_remembers_the_row_before_is_caught(monkeypatch: pytest.MonkeyPatch):
    arguments: dict[str, Any] = {"draft_length": 3, "eos_token_id": 5, "batch_size": 2}
    expected = decoded("prompt_lookup", **arguments)
    monkeypatch.setattr("nextn.decoding.drafters.factory.PromptLookupDrafter", IndexesTheRowBefore)
    wrong = decoded("prompt_lookup", **arguments)
    assert wrong.token_ids == expected.token_ids
    assert wrong.origins != expected.origins


# --------------------------------------------------------------------------------------------------------- draft models


def test_a_model_that_drafts_for_itself_is_always_right():
    result = generate(target(), REPEATING, max_new_tokens=13, draft_length=3, drafter=target(), batch_size=2)
    assert result.stats.mean_acceptance_length == 4
    assert list(result.token_ids) == [text[:13] for text in plain_texts()]


def test_a_draft_model_may_have_another_kind_of_trunk_and_a_context_of_no_round_length():
    """Its context is 100: rows are rounded up to a multiple of 64 tokens, but no further than that."""
    wrapped = transformers_model()
    result = generate(target(), PROMPTS, max_new_tokens=30, draft_length=3, drafter=wrapped, batch_size=2)
    assert list(result.token_ids) == [tuple(plain_reference(target(), prompt, 30)) for prompt in PROMPTS]
    assert Decoder(wrapped, drafter=target()).generate([[1] * 10], max_new_tokens=50).token_ids
    with pytest.raises(GenerationError, match="the draft model's context is 64"):
        Decoder(wrapped, drafter=target()).generate([[1] * 10], max_new_tokens=80)
    other = MTPModel(replace(TINY, vocab_size=18), MTPConfig(num_depths=0)).initialize(0)
    with pytest.raises(GenerationError, match="same vocabulary"):
        generate(target(), PROMPTS, max_new_tokens=4, drafter=other)


def test_a_draft_model_keeps_the_mode_it_was_in():
    drafting = memorising_model(1, num_depths=0).train()
    generate(target(), PROMPTS[:1], max_new_tokens=4, drafter=drafting)
    assert drafting.training


def test_a_draft_model_of_a_model_with_mtp_replaces_its_depths():
    both = memorising_model(30)
    result = generate(both, PROMPTS, max_new_tokens=NUM_NEW, drafter=draft_model(), draft_length=6)
    assert list(result.token_ids) == [tuple(plain_reference(both, prompt, NUM_NEW)) for prompt in PROMPTS]
    assert result.stats.draft_length == 6


def test_text_is_not_looked_up_beyond_the_row():
    """A prompt without any repetition drafts nothing, and every cycle is a plain step."""
    result = generate(target(), [TEXT[0, :1].tolist()], max_new_tokens=2, drafter="prompt_lookup")
    assert result.stats.num_draft_tokens == 0
