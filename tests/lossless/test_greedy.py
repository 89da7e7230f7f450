"""At temperature 0, speculative decoding emits token for token what plain decoding emits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextn.config import MTPConfig
from nextn.decoding import generate, plain_reference
from nextn.decoding.verify import Verification, exact
from nextn.errors import GenerationError
from nextn.mtp import MTPModel

from .conftest import TEXT, TINY, bigram_model, contrary_model, memorising_model, random_model

PROMPTS = [TEXT[0, :5].tolist(), TEXT[1, :1].tolist(), TEXT[2, :9].tolist(), [3, 3, 3]]
NUM_NEW = 38


def plain_texts(model: MTPModel, num_new: int = NUM_NEW) -> list[tuple[int, ...]]:
    return [tuple(plain_reference(model, prompt, num_new)) for prompt in PROMPTS]


@pytest.mark.parametrize("draft_length", [0, 1, 2, 3, 5])
def test_greedy_speculative_decoding_equals_plain_greedy(memorising: MTPModel, draft_length: int):
    result = generate(memorising, PROMPTS, max_new_tokens=NUM_NEW, draft_length=draft_length)
    assert list(result.token_ids) == plain_texts(memorising)
    assert result.stats.draft_length == draft_length


def test_the_half_trained_models_exercise_every_accepted_length(memorising: MTPModel):
    result = generate(memorising, PROMPTS, max_new_tokens=NUM_NEW, draft_length=2)
    assert all(result.stats.histogram), result.stats.histogram
    assert len(set(result.token_ids[0])) > 10, "the text does not loop"


@given(
    seed=st.integers(0, 1000),
    prompt=st.lists(st.integers(0, TINY.vocab_size - 1), min_size=1, max_size=12),
    draft_length=st.integers(1, 5),
    num_new=st.integers(1, 12),
    num_depths=st.integers(1, 3),
    share_weights=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_greedy_speculative_decoding_equals_plain_greedy_on_random_models(
    seed: int, prompt: list[int], draft_length: int, num_new: int, num_depths: int, share_weights: bool
):
    model = random_model(seed, num_depths=num_depths, share_weights=share_weights)
    speculative = generate(model, [prompt], max_new_tokens=num_new, draft_length=draft_length).token_ids[0]
    plain = generate(model, [prompt], max_new_tokens=num_new, draft_length=0).token_ids[0]
    assert list(speculative) == list(plain) == plain_reference(model, prompt, num_new)


def accept_everything(draft_ids, draft_probs, target_probs, num_drafted, uniforms=None) -> Verification:
    """Broken: keeps every draft, right or wrong."""
    rows = torch.arange(draft_ids.shape[0])
    return Verification(num_drafted, target_probs[rows, num_drafted].argmax(-1), torch.zeros_like(num_drafted))


def compare_one_place_late(draft_ids, draft_probs, target_probs, num_drafted, uniforms=None) -> Verification:
    """Broken: holds draft j against the target of place j + 1."""
    return exact(draft_ids, draft_probs, target_probs.roll(-1, dims=1), num_drafted)


@pytest.mark.parametrize("broken", [accept_everything, compare_one_place_late])
def test_a_broken_verifier_changes_the_text(broken: Callable[..., Verification]):
    model = memorising_model(30)
    assert list(generate(model, PROMPTS, max_new_tokens=NUM_NEW, verifier=broken).token_ids) != plain_texts(model)


@pytest.mark.parametrize("draft_length", [1, 2, 4])
def test_perfect_drafts_are_all_accepted(draft_length: int):
    model = bigram_model(3)
    num_new = 1 + 3 * (draft_length + 1)  # the prompt's own token, then three whole cycles
    result = generate(model, PROMPTS, max_new_tokens=num_new, draft_length=draft_length)
    assert list(result.token_ids) == plain_texts(model, num_new)
    assert result.stats.mean_acceptance_length == draft_length + 1
    assert result.num_trunk_forwards == len(PROMPTS) * (1 + 3)
    assert result.origins[0] == (0, *(3 * [*range(1, draft_length + 1), 0]))


def test_useless_drafts_are_all_rejected_and_the_text_stays_the_same():
    model = contrary_model(3)
    result = generate(model, PROMPTS, max_new_tokens=NUM_NEW, draft_length=3)
    assert list(result.token_ids) == plain_texts(model)
    assert result.stats.mean_acceptance_length == 1
    assert set(result.origins[0]) == {0}


def test_eos_inside_an_accepted_draft_ends_the_row_there(memorising: MTPModel):
    for plain, prompt in zip(plain_texts(memorising), PROMPTS, strict=True):
        origins = generate(memorising, [prompt], max_new_tokens=NUM_NEW).origins[0]
        for eos, origin in dict(zip(plain, origins, strict=True)).items():
            result = generate(memorising, [prompt], max_new_tokens=NUM_NEW, eos_token_id=eos)
            end = plain.index(eos) + 1
            assert result.token_ids[0] == plain[:end], f"EOS {eos} came from depth {origin}"
            assert result.origins[0] == origins[:end]
            assert result.finish_reasons == ("eos",)


def test_a_cycle_cut_by_eos_counts_what_verification_accepted():
    model = bigram_model(3)
    plain = plain_reference(model, [1], 2)
    assert plain[0] != plain[1]
    result = generate(model, [[1]], max_new_tokens=9, draft_length=3, eos_token_id=plain[1])
    assert (result.token_ids, result.finish_reasons) == ((tuple(plain),), ("eos",))
    assert result.stats.histograms == {3: (0, 0, 0, 1)}


def test_drafts_stop_short_of_what_is_left():
    model = bigram_model(3)
    for num_new in range(1, 8):
        result = generate(model, [[1]], max_new_tokens=num_new, draft_length=10)
        assert list(result.token_ids[0]) == plain_reference(model, [1], num_new)
        assert result.finish_reasons == ("length",)
        # The verifying forward adds a token by itself, so the last two tokens take one forward and at most one draft.
        assert result.stats.num_draft_tokens == max(num_new - 2, 0)


def test_the_whole_context_can_be_filled():
    model = memorising_model(30)
    prompt = TEXT[0, :5].tolist()
    num_new = TINY.max_position_embeddings - len(prompt)
    result = generate(model, [prompt], max_new_tokens=num_new, draft_length=4)
    assert list(result.token_ids[0]) == plain_reference(model, prompt, num_new)


class LetterTokenizer:
    """Letters a..p as tokens 0..15, and EOS 16."""

    vocab_size, eos_token_id = 17, 16

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(letter) - ord("a") for letter in text], dtype=np.int32)

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + token_id) for token_id in ids)


def test_texts_are_the_new_tokens_without_prompt_and_final_eos():
    model = bigram_model(3)
    model.tokenizer = LetterTokenizer()
    by_text = generate(model, ["bb"], max_new_tokens=6, eos_token_id=None)
    by_ids = generate(model, [[1, 1]], max_new_tokens=6, eos_token_id=None)
    assert by_text.token_ids == by_ids.token_ids
    letters = LetterTokenizer().decode(list(by_text.token_ids[0]))
    assert by_text.texts == (letters,)
    stopped = generate(model, ["bb"], max_new_tokens=6, eos_token_id=by_text.token_ids[0][1])
    assert (stopped.texts, len(stopped.token_ids[0])) == ((letters[0],), 2)


def test_generate_leaves_the_model_in_the_mode_it_was_in():
    model = random_model(0).train()
    generate(model, [[1]], max_new_tokens=3)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 17]]}, r"token id 17; the vocabulary has ids 0\.\.16"),
        ({"prompts": [[-1]]}, "token id -1"),
        ({"prompts": ["text"]}, "no tokenizer"),
        ({"prompts": [[1] * 60], "max_new_tokens": 5}, "60 tokens.*max_new_tokens = 5.*context of 64"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"draft_length": -1}, "draft_length must be 0"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": 1.0, "verifier": "exact"}, "'exact' is greedy, but temperature = 1.0"),
        ({"verifier": "rejection"}, "'rejection' samples, but temperature = 0"),
        ({"verifier": "greedy"}, "unknown verifier 'greedy'; there are: auto, exact, rejection, threshold, typical"),
    ],
)
def test_a_request_that_cannot_be_served_says_why(arguments: dict, message: str):
    with pytest.raises(GenerationError, match=message):
        generate(random_model(0), **{"prompts": [[1]], "max_new_tokens": 4, **arguments})


def test_a_model_without_mtp_decodes_plainly_and_refuses_to_draft():
    model = MTPModel(TINY, MTPConfig(num_depths=0)).initialize(0).eval()
    plain = generate(model, [[1, 2]], max_new_tokens=5, draft_length=0)
    assert list(plain.token_ids[0]) == plain_reference(model, [1, 2], 5)
    assert plain.num_trunk_forwards == 5
    with pytest.raises(GenerationError, match="no MTP depths; use draft_length = 0"):
        generate(model, [[1, 2]], max_new_tokens=5, draft_length=2)


def test_a_single_string_is_not_a_list_of_prompts():
    with pytest.raises(ValueError, match="write \\[prompt\\]"):
        generate(random_model(0), "text")


def test_filters_without_effect_are_pointed_out():
    with pytest.warns(UserWarning, match="no effect at temperature 0"):
        generate(random_model(0), [[1]], max_new_tokens=2, top_k=3)
