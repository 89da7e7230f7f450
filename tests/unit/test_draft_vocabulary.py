"""Draft vocabularies: which tokens are in, how their ids and probabilities map, the reduced head, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nextn.decoding.verify import rejection
from nextn.decoding.vocabulary import DraftVocabulary, most_frequent, token_counts
from nextn.errors import CheckpointError, GenerationError

VOCAB = 11

ids_in_any_order = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=VOCAB, unique=True)
counts_of_few_values = st.lists(st.integers(0, 3), min_size=1, max_size=20)  # ties are frequent


def vocabulary_of(ids: list[int], vocab_size: int = VOCAB) -> DraftVocabulary:
    return DraftVocabulary(torch.tensor(ids, dtype=torch.int64), vocab_size)


# ------------------------------------------------------------------------------------------------------------- counting


@given(st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=8), max_size=5))
def test_counts_are_those_of_all_streams_joined_whatever_holds_them(streams: list[list[int]]):
    joined = [token for stream in streams for token in stream]
    expected = [joined.count(token) for token in range(VOCAB)]
    assert token_counts(streams, VOCAB).tolist() == expected
    assert token_counts((torch.tensor(s, dtype=torch.int32) for s in streams), VOCAB).tolist() == expected
    assert token_counts((np.array(s, dtype=np.int32) for s in streams), VOCAB).tolist() == expected


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_that_the_vocabulary_lacks_is_not_counted_but_refused(token: int):
    with pytest.raises(GenerationError, match=rf"token id {token} is not in the vocabulary, which has ids 0..10"):
        token_counts([[0, token]], VOCAB)


def no_token_outside_is_more_frequent(chosen: Tensor, counts: Tensor) -> bool:
    inside = torch.zeros(len(counts), dtype=torch.bool).index_fill(0, chosen, True)
    ids = torch.arange(len(counts))
    better = (counts[:, None] > counts) | ((counts[:, None] == counts) & (ids[:, None] < ids))  # [a, b]: a before b
    return not better[~inside][:, inside].any()


@given(counts_of_few_values, st.data())
def test_the_most_frequent_tokens_are_chosen_and_ties_go_to_the_lower_ids(values: list[int], data: st.DataObject):
    counts, size = torch.tensor(values), data.draw(st.integers(1, len(values)))
    chosen = most_frequent(counts, size)
    assert (chosen.dtype, chosen.shape) == (torch.int64, (size,))
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert no_token_outside_is_more_frequent(chosen, counts)


def test_the_law_of_frequency_catches_a_choice_of_the_rarest_and_of_the_first():
    counts = torch.tensor([1, 5, 2, 5])
    assert not no_token_outside_is_more_frequent(counts.argsort()[:2], counts)
    assert not no_token_outside_is_more_frequent(torch.arange(2), counts)
    assert not no_token_outside_is_more_frequent(torch.tensor([3]), counts), "the tie belongs to the lower id"


@given(counts_of_few_values.filter(any))
def test_coverage_grows_with_size_up_to_all_tokens_and_no_other_choice_covers_more(values: list[int]):
    counts = torch.tensor(values)
    shares = [
        DraftVocabulary(most_frequent(counts, size), len(values)).coverage(counts) for size in range(1, len(values) + 1)
    ]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    best = sorted(values, reverse=True)
    assert shares == [sum(best[:size]) / sum(values) for size in range(1, len(values) + 1)]


@pytest.mark.parametrize("size", [0, -1, 5])
def test_a_size_that_the_vocabulary_does_not_have_is_refused(size: int):
    with pytest.raises(GenerationError, match=rf"of {size} tokens; the model has 4: take 1..4"):
        most_frequent(torch.ones(4, dtype=torch.int64), size)


# -------------------------------------------------------------------------------------------------------------- mapping


@given(ids_in_any_order, st.integers(0, 1000))
def test_spreading_keeps_each_tokens_probability_and_gives_the_others_none(ids: list[int], seed: int):
    vocabulary = vocabulary_of(ids)
    probs = torch.randn(2, 3, len(ids), generator=torch.Generator().manual_seed(seed)).softmax(-1)
    full = vocabulary.spread(probs)
    assert (full.shape, full.dtype) == ((2, 3, VOCAB), probs.dtype)
    assert torch.equal(full[..., ids], probs)
    assert full[..., [token for token in range(VOCAB) if token not in ids]].eq(0).all()


@given(ids_in_any_order, st.integers(0, 1000))
def test_drafting_with_the_reduced_head_is_drafting_with_the_full_head_and_the_others_left_out(ids: list[int], seed):
    generator = torch.Generator().manual_seed(seed)
    vocabulary, head = vocabulary_of(ids), nn.Linear(4, VOCAB)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(5, 4, generator=generator)
    outside = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, vocabulary.ids, False)
    expected = head(hidden).masked_fill(outside, -torch.inf)
    logits = vocabulary.reduced_head(head)(hidden)
    torch.testing.assert_close(vocabulary.spread(logits.softmax(-1)), expected.softmax(-1))
    torch.testing.assert_close(logits, expected[:, vocabulary.ids])
    assert torch.equal(vocabulary.to_full(logits.argmax(-1)), expected.argmax(-1))


@pytest.mark.parametrize("bias", [True, False])
def test_the_reduced_head_shares_nothing_and_leaves_random_numbers_and_the_head_alone(bias: bool):
    head = nn.Linear(4, VOCAB, bias=bias, dtype=torch.bfloat16)
    before, random_state = head.weight.detach().clone(), torch.get_rng_state()
    reduced = vocabulary_of(list(range(VOCAB))).reduced_head(head)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (reduced.out_features, reduced.bias is not None, reduced.weight.dtype) == (VOCAB, bias, torch.bfloat16)
    assert reduced.weight.requires_grad
    with torch.no_grad():
        for parameter in reduced.parameters():
            parameter.zero_()
    assert torch.equal(head.weight, before)


def emitted_law(vocabulary: DraftVocabulary, local_probs: Tensor, target: Tensor, spread: Tensor) -> Tensor:
    """Which token a cycle of one draft emits first, as frequencies [V] over a grid of random numbers."""
    grid = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    drafts, u, v = torch.meshgrid(torch.arange(len(vocabulary)).double(), grid, grid, indexing="ij")
    local, uniforms = drafts.flatten().long(), torch.stack((u.flatten(), v.flatten()), dim=1)
    num_rows, ids = len(local), vocabulary.to_full(local)
    result = rejection(
        ids[:, None],
        spread.expand(num_rows, 1, VOCAB),
        target.expand(num_rows, 2, VOCAB),
        torch.ones(num_rows, dtype=torch.int64),
        uniforms,
    )
    emitted = torch.where(result.num_accepted == 1, ids, result.next_ids)
    weights = local_probs.double()[local] / len(grid) ** 2
    return torch.zeros(VOCAB, dtype=torch.float64).index_add(0, emitted, weights)


def test_a_spread_draft_leaves_the_law_of_rejection_sampling_and_one_spread_to_other_places_does_not():
    generator = torch.Generator().manual_seed(3)
    vocabulary = vocabulary_of([1, 4, 6])
    local_probs = torch.randn(3, generator=generator).softmax(-1)
    target = torch.randn(VOCAB, generator=generator).softmax(-1)
    right = vocabulary.spread(local_probs)
    torch.testing.assert_close(emitted_law(vocabulary, local_probs, target, right), target.double(), atol=0.01, rtol=0)
    broken = torch.zeros(VOCAB).index_copy(0, torch.arange(3), local_probs)  # local ids taken for token ids
    assert (emitted_law(vocabulary, local_probs, target, broken) - target).abs().max() > 0.05


def test_a_head_of_another_vocabulary_is_refused():
    with pytest.raises(GenerationError, match="one of 11 tokens, and the output head has 12 rows"):
        vocabulary_of([1, 2]).reduced_head(nn.Linear(4, 12))


BAD_IDS = {
    "none": (torch.tensor([], dtype=torch.int64), "at least one token"),
    "twice": (torch.tensor([2, 1, 2]), "3 ids hold 2 tokens"),
    "negative": (torch.tensor([-1, 2]), "token id -1 is not in the vocabulary"),
    "beyond": (torch.tensor([2, 11]), r"token id 11 is not in the vocabulary, which has ids 0..10"),
    "floats": (torch.tensor([1.0, 2.0]), "int64"),
    "table": (torch.tensor([[1, 2]]), r"shape \(1, 2\)"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_ids_that_are_no_draft_vocabulary_are_refused(case: str):
    ids, message = BAD_IDS[case]
    with pytest.raises(GenerationError, match=message):
        DraftVocabulary(ids, VOCAB)


# ---------------------------------------------------------------------------------------------------------------- files


@given(ids=ids_in_any_order)
def test_what_was_saved_is_loaded_again_in_its_order(tmp_path_factory: pytest.TempPathFactory, ids: list[int]):
    path = tmp_path_factory.mktemp("vocabulary") / "draft_vocabulary.json"
    vocabulary_of(ids).save(path)
    loaded = DraftVocabulary.load(path)
    assert (loaded.ids.tolist(), loaded.ids.dtype, loaded.vocab_size) == (ids, torch.int64, VOCAB)


WRONG_FILES = {
    "no JSON": ("token_ids = [1]", "is not JSON"),
    "a list": ("[1, 2]", "holds no draft vocabulary"),
    "no ids": ('{"vocab_size": 5}', "holds no draft vocabulary"),
    "texts": ('{"vocab_size": 5, "token_ids": ["1"]}', "of whole numbers"),
    "true": ('{"vocab_size": 5, "token_ids": [true]}', "of whole numbers"),
    "a size that is none": ('{"vocab_size": "5", "token_ids": [1]}', "of whole numbers"),
    "an id too large": ('{"vocab_size": 5, "token_ids": [5]}', "token id 5 is not in the vocabulary"),
    "a number beyond 64 bits": (json.dumps({"vocab_size": 5, "token_ids": [2**70]}), "of whole numbers"),
    "no id": ('{"vocab_size": 5, "token_ids": []}', "at least one token"),
}


@pytest.mark.parametrize("case", WRONG_FILES, ids=lambda name: name.replace(" ", "_"))
def test_a_wrong_file_is_refused_by_name(case: str, tmp_path: Path):
    content, message = WRONG_FILES[case]
    (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as found:
        DraftVocabulary.load(tmp_path / "vocabulary.json")
    assert "vocabulary.json" in str(found.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"nowhere\.json does not exist"):
        DraftVocabulary.load(tmp_path / "nowhere.json")
