"""Lossy verifiers say what they change, and change more the looser they are."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from nextn.decoding import GenerationResult, generate, plain_reference
from nextn.decoding.verify import Threshold, Typical, Verification, Verifier
from nextn.mtp import MTPModel

from .conftest import TEXT, memorising_model
from .test_batches import PROMPTS

NUM_NEW = 30


@cache
def model() -> MTPModel:
    return memorising_model(30)


def decoded(verifier: Verifier | str, **arguments: Any) -> GenerationResult:
    arguments = {"max_new_tokens": NUM_NEW, "draft_length": 3, "batch_size": 3, **arguments}
    return generate(model(), PROMPTS, verifier=verifier, **arguments)


@cache
def plain_texts() -> list[tuple[int, ...]]:
    return [tuple(plain_reference(model(), prompt, NUM_NEW)) for prompt in PROMPTS]


@pytest.mark.parametrize("verifier", ["auto", "exact", Threshold(0.5), Threshold(0.99), Threshold(1.0)])
def test_a_threshold_of_a_half_or_more_changes_no_greedy_text(verifier: Verifier | str):
    result = decoded(verifier)
    assert (result.num_changed_tokens, result.changed_share) == (0, 0)
    assert list(result.token_ids) == plain_texts()


def test_the_changed_share_grows_as_the_threshold_falls():
    shares = [decoded(Threshold(threshold)).changed_share for threshold in (0.5, 0.2, 0.1, 0.05, 0.02, 0.0)]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert shares[-1] > 0.2
    lengths = [decoded(Threshold(threshold)).stats.mean_acceptance_length for threshold in (0.5, 0.1, 0.0)]
    assert lengths == sorted(lengths), "what is given up in the text is gained in speed"


def test_the_changed_share_grows_as_typical_acceptance_loosens():
    strict, loose = decoded(Typical(epsilon=0.09, delta=0.3)), decoded(Typical(epsilon=0.02, delta=0.05))
    assert strict.changed_share < loose.changed_share


@pytest.mark.parametrize("verifier", [Threshold(0.05), Typical(epsilon=0.05, delta=0.1)], ids=lambda v: v.name)
def test_changed_tokens_are_those_that_greedy_decoding_would_not_have_said(verifier: Verifier):
    """Counted by hand: an accepted draft that is not the trunk's first choice after everything before it."""
    result = decoded(verifier, max_new_tokens=NUM_NEW, batch_size=1)
    count = 0
    for prompt, ids, origins in zip(PROMPTS, result.token_ids, result.origins, strict=True):
        with torch.inference_mode():
            best = model().trunk(torch.tensor([[*prompt, *ids]]))[0].argmax(-1).tolist()
        choices = best[len(prompt) - 1 : -1]
        changed = [token != choice for token, choice in zip(ids, choices, strict=True)]
        assert not any(was and origin == 0 for was, origin in zip(changed, origins, strict=True))
        count += sum(changed)
    assert result.num_changed_tokens == count > 0
    assert result.changed_share == count / (NUM_NEW * len(PROMPTS))


def test_a_count_of_accepted_instead_of_changed_drafts_is_caught():
    class CountsAll(Threshold):
        """Broken: every accepted draft counts as changed."""

        def __call__(self, *args: Any) -> Verification:
            verified = super().__call__(*args)
            return Verification(verified.num_accepted, verified.next_ids, verified.num_accepted)

    assert decoded(CountsAll(0.05)).num_changed_tokens > decoded(Threshold(0.05)).num_changed_tokens
    assert decoded(CountsAll(0.9)).num_changed_tokens > 0


def test_sampled_text_counts_what_rejection_would_have_refused():
    shares = [
        generate(
            model(), [TEXT[0, :6].tolist()] * 40, max_new_tokens=12, temperature=1.0, verifier=verifier, batch_size=8
        ).changed_share
        for verifier in ("rejection", Threshold(0.3), Threshold(0.05), Threshold(0.0))
    ]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert shares[-1] > 0.2


def test_tokens_cut_off_by_eos_or_length_are_rows_ends_as_in_lossless_decoding():
    whole, cut = decoded(Threshold(0.05), batch_size=1), decoded(Threshold(0.05), batch_size=3, eos_token_id=5)
    for text, ended in zip(whole.token_ids, cut.token_ids, strict=True):
        assert ended == (text[: text.index(5) + 1] if 5 in text else text)
