"""The shift is exact at every depth, and labels never cross documents, padding or masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextn.alignment import (
    IGNORED,
    PADDING_DOCUMENT,
    align,
    count_labels,
    embedded_positions,
    num_final_positions,
)


@st.composite
def packed_rows(draw):
    """Input ids, labels with holes, and document ids of rows made of short documents and some padding at the end."""
    num_rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    ids = torch.arange(num_rows * length).view(num_rows, length)
    documents = torch.full((num_rows, length), PADDING_DOCUMENT)
    for row in range(num_rows):
        start = 0
        for document in range(draw(st.integers(0, 4))):
            end = min(start + draw(st.integers(1, 5)), length)
            documents[row, start:end] = document
            start = end
    holes = torch.tensor(draw(st.lists(st.booleans(), min_size=num_rows * length, max_size=num_rows * length)))
    labels = ids.masked_fill(holes.view_as(ids), IGNORED)
    return ids, labels, documents


def brute_force_label(ids, labels, documents, row, i, k):
    """The definition of DESIGN section 2, written as it is read."""
    last = i + k + 1
    if last >= ids.shape[1] or labels[row, last] == IGNORED:
        return IGNORED
    inside = documents[row, i : last + 1]
    if (inside == PADDING_DOCUMENT).any() or len(set(inside.tolist())) != 1:
        return IGNORED
    return int(labels[row, last])


@given(packed_rows(), st.integers(0, 13))
def test_labels_are_those_of_the_definition(rows, depth: int):
    ids, labels, documents = rows
    aligned = align(ids, depth, labels, documents)
    assert aligned.labels.shape == aligned.embedded_ids.shape == (ids.shape[0], max(ids.shape[1] - depth, 0))
    for row in range(ids.shape[0]):
        for i in range(aligned.num_positions):
            assert aligned.labels[row, i] == brute_force_label(ids, labels, documents, row, i, depth)


@pytest.mark.parametrize("mistake", ["off by one", "crosses documents", "ignores masks"])
def test_the_definition_tells_right_labels_from_wrong_ones(mistake: str):
    ids, depth = torch.arange(10)[None], 1
    documents, labels = torch.tensor([[0] * 6 + [1] * 4]), ids.clone()
    labels[0, 8] = IGNORED
    wrong = {
        "off by one": align(ids, depth + 1, labels, documents),
        "crosses documents": align(ids, depth, labels),
        "ignores masks": align(ids, depth, None, documents),
    }[mistake]
    expected = [brute_force_label(ids, labels, documents, 0, i, depth) for i in range(9)]
    assert align(ids, depth, labels, documents).labels[0].tolist() == expected
    assert wrong.labels[0].tolist() != expected


@pytest.mark.parametrize("depth", range(5))
def test_with_tokens_equal_to_their_position_the_shift_can_be_read_off(depth: int):
    tokens = torch.arange(10)[None]
    aligned = align(tokens, depth)
    positions = torch.arange(aligned.num_positions)
    assert torch.equal(aligned.embedded_ids[0], positions + depth)
    assert torch.equal(aligned.labels[0, :-1], positions[:-1] + depth + 1)
    assert aligned.labels[0, -1] == IGNORED


@given(st.integers(0, 20), st.integers(0, 5))
def test_final_positions_are_those_whose_embedded_token_is_known(num_tokens: int, depth: int):
    readable = embedded_positions(torch.arange(num_tokens), depth) < num_tokens
    assert readable.sum() == num_final_positions(num_tokens, depth)


def test_a_depth_that_reaches_past_the_row_is_empty_and_counts_nothing():
    ids = torch.tensor([[1, 2]])
    assert align(ids, 2).num_positions == 0
    assert align(ids, 9).num_positions == 0
    assert count_labels(ids, 3).tolist() == [1, 0, 0, 0]


def test_counts_add_over_micro_batches():
    ids = torch.arange(24).view(4, 6)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0] * 6, [0, 1, 2, 3, 4, 5], [0, 0, -1, -1, -1, -1]])
    whole = count_labels(ids, 2, document_ids=documents)
    parts = sum(count_labels(ids[i : i + 1], 2, document_ids=documents[i : i + 1]) for i in range(4))
    assert torch.equal(whole, parts)
    assert whole.tolist() == [3 + 5 + 0 + 1, 1 + 4 + 0 + 0, 0 + 3 + 0 + 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.int64), "depth": 1}, r"must be \[B, T\]"),
        ({"input_ids": torch.zeros(1, 3, dtype=torch.int64), "depth": -1}, "0 or more"),
        (
            {"input_ids": torch.zeros(1, 3, dtype=torch.int64), "depth": 1, "labels": torch.zeros(1, 2)},
            "labels has shape",
        ),
    ],
)
def test_misuse_is_refused_with_the_shapes(arguments, message: str):
    with pytest.raises(ValueError, match=message):
        align(**arguments)
