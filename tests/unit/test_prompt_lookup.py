"""Prompt lookup against a search in words: the longest n-gram, its most recent occurrence, what followed."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextn.decoding.drafters.prompt_lookup import NgramIndex
from nextn.errors import GenerationError

ROWS = st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=6)
"""Rows that grow by a few tokens at a time; three different tokens, so that n-grams repeat."""


def search(row: list[int], num_draft_tokens: int, longest: int, shortest: int) -> list[int]:
    """The continuation found by comparing the row's end with every earlier place, latest first."""
    for size in range(longest, shortest - 1, -1):
        for place in range(len(row) - 1, size - 1, -1):
            if row[place - size : place] == row[-size:]:
                return row[place : place + num_draft_tokens]
    return []


def indexed(chunks: list[list[int]], longest: int = 3, shortest: int = 1) -> NgramIndex:
    index = NgramIndex(longest, shortest)
    for chunk in chunks:
        index.append(chunk)
    return index


@given(ROWS, st.integers(0, 5), st.integers(1, 4), st.integers(1, 4))
def test_the_continuation_is_what_a_search_through_the_whole_row_finds(chunks, num_draft_tokens, one_size, other_size):
    longest, shortest = max(one_size, other_size), min(one_size, other_size)
    found = indexed(chunks, longest, shortest).continuation(num_draft_tokens)
    assert found.dtype == np.int64
    assert found.tolist() == search(list(chain.from_iterable(chunks)), num_draft_tokens, longest, shortest)


@given(ROWS)
def test_an_index_that_grew_equals_one_built_at_once(chunks):
    row = list(chain.from_iterable(chunks))
    assert indexed(chunks).continuation(4).tolist() == indexed([row]).continuation(4).tolist()
    assert indexed([np.array(row)]).continuation(4).tolist() == indexed([row]).continuation(4).tolist()


def test_the_longest_ngram_decides_even_where_a_shorter_one_occurred_later():
    row = [1, 2, 3, 9, 8, 3, 7, 1, 2, 3]
    assert indexed([row]).continuation(2).tolist() == [9, 8]
    assert indexed([row], longest=1).continuation(2).tolist() == [7, 1]


def test_of_several_occurrences_the_most_recent_one_decides():
    assert indexed([[1, 5, 1, 6, 1]]).continuation(1).tolist() == [6]


def test_the_end_of_the_row_does_not_find_itself():
    assert indexed([[1, 2, 3]]).continuation(3).tolist() == []
    assert indexed([[4, 4]]).continuation(3).tolist() == [4]  # the place before the last one, not the last


class FirstOccurrence(NgramIndex):
    """Broken: the first occurrence of an n-gram stays, where the most recent one should replace it."""

    def append(self, token_ids):
        before = {size: dict(places) for size, places in self._positions.items()}
        super().append(token_ids)
        for size, places in before.items():
            self._positions[size].update(places)


class FindsItself(NgramIndex):
    """Broken: the n-gram at the end of the row counts as an earlier occurrence."""

    def append(self, token_ids):
        super().append(token_ids)
        for size, places in self._positions.items():
            places[tuple(self._token_ids[-size:])] = len(self._token_ids)


class ShortestFirst(NgramIndex):
    """Broken: a short n-gram decides before a longer one is looked up."""

    def __init__(self):
        super().__init__()
        self._positions = dict(reversed(self._positions.items()))


class ForgetsTheBorder(NgramIndex):
    """Broken: n-grams that reach across two calls of `append` are not entered."""

    def append(self, token_ids):
        alone = NgramIndex()
        alone.append(token_ids)
        for size, places in alone._positions.items():
            shifted = {ngram: place + len(self._token_ids) for ngram, place in places.items()}
            self._positions[size].update(shifted)
        self._token_ids += token_ids


@pytest.mark.parametrize("variant", [NgramIndex, FirstOccurrence, FindsItself, ShortestFirst, ForgetsTheBorder])
def test_broken_variants_differ_from_the_search(variant: type[NgramIndex]):
    numbers = np.random.default_rng(0)
    agrees = []
    for _ in range(200):
        index, row = variant(), []
        for _ in range(5):
            chunk = numbers.integers(0, 3, numbers.integers(1, 5)).tolist()
            index.append(chunk)
            row += chunk
        agrees.append(index.continuation(3).tolist() == search(row, 3, longest=3, shortest=1))
    assert all(agrees) == (variant is NgramIndex)


@pytest.mark.parametrize("row", [[], [7]])
def test_a_row_without_anything_to_repeat_drafts_nothing(row: list[int]):
    assert indexed([row]).continuation(3).shape == (0,)


def test_the_work_of_a_call_does_not_grow_with_the_row():
    index = indexed([np.random.default_rng(0).integers(0, 50, 8192).tolist()])

    class Counted(list):
        read = 0

        def __getitem__(self, places):
            found = super().__getitem__(places)
            Counted.read += len(found) if isinstance(places, slice) else 1
            return found

    index._token_ids = Counted(index._token_ids)
    index.continuation(5)
    assert Counted.read <= 3 + 2 + 1 + 5
    index.append([1, 2])
    assert Counted.read <= 11 + 2 * (3 + 2 + 1)


@pytest.mark.parametrize(("longest", "shortest"), [(3, 0), (1, 2)])
def test_sizes_that_name_no_ngram_are_refused(longest: int, shortest: int):
    with pytest.raises(GenerationError, match="shortest <= longest"):
        NgramIndex(longest, shortest)
