"""Drafting as the engines do changes acceptance and nothing else: text or distribution are those of plain decoding."""

from __future__ import annotations

import pytest

from nextn.decoding import generate, plain_reference
from nextn.decoding.drafters import single_cache
from nextn.decoding.drafters.engine_drafts import DRAFTING, SINGLE_CACHE
from nextn.decoding.sampling import SamplingConfig
from nextn.mtp import MTPModel

from .conftest import TEXT, memorising_model
from .test_rejection import CRITICAL, NUM_SAMPLES, SETTINGS, chi_square_score, plain_distribution_of_model

PROMPTS = [TEXT[0, :5].tolist(), TEXT[1, :1].tolist(), TEXT[2, :9].tolist(), [3, 3, 3]]
NUM_NEW = 30


@pytest.fixture(scope="module")
def half_trained() -> MTPModel:
    return memorising_model(50, share_weights=True)


@pytest.mark.parametrize("draft_length", [None, 1, 2, 4])
@pytest.mark.parametrize("drafting", DRAFTING)
def test_greedy_text_is_that_of_plain_decoding(half_trained: MTPModel, drafting: str, draft_length: int | None):
    if drafting == "transformers" and draft_length is not None:
        draft_length = 1  # it has no choice
    result = generate(half_trained, PROMPTS, max_new_tokens=NUM_NEW, draft_length=draft_length, drafting=drafting)
    assert list(result.token_ids) == [tuple(plain_reference(half_trained, prompt, NUM_NEW)) for prompt in PROMPTS]
    assert all(result.stats.histogram[:2]), "drafts are accepted and rejected"


def test_the_engines_drafts_are_not_those_of_training(half_trained: MTPModel):
    def histogram(drafting: str) -> tuple[int, ...]:
        result = generate(half_trained, PROMPTS, max_new_tokens=NUM_NEW, draft_length=3, drafting=drafting)
        return result.stats.histogram

    assert len({histogram(drafting) for drafting in ("as_trained", *SINGLE_CACHE)}) == 4


def distribution_score(model: MTPModel, drafting: str) -> float:
    prompt, num_new = TEXT[0, :6].tolist(), 4
    result = generate(
        model, [prompt] * NUM_SAMPLES, max_new_tokens=num_new, draft_length=2, drafting=drafting, **SETTINGS
    )
    assert all(result.stats.histogram), "every accepted length occurs"
    return chi_square_score(plain_distribution_of_model(model, prompt, num_new), list(result.token_ids))


@pytest.mark.parametrize("drafting", SINGLE_CACHE)
def test_sampled_text_has_the_distribution_of_plain_sampling(half_trained: MTPModel, drafting: str):
    assert distribution_score(half_trained, drafting) < CRITICAL


def test_a_greedy_draft_that_claims_to_be_sampled_is_caught(half_trained: MTPModel, monkeypatch: pytest.MonkeyPatch):
    """The distribution returned must be the one drafted from: one-hot, where the most likely token is drafted."""
    monkeypatch.setattr(single_cache, "GREEDY", SamplingConfig(**SETTINGS))
    assert distribution_score(half_trained, "vllm") > CRITICAL
