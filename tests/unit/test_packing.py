"""Packing: nothing lost, every row once an epoch, resumed bit for bit, validation always the same."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextn.data.corpora import Corpus, Document
from nextn.data.packing import (
    Batch,
    PackedTokens,
    RowSampler,
    pack,
    validation_prompts,
    validation_rows,
)
from nextn.data.tokenizers import ByteTokenizer, build_tokenizer
from nextn.errors import DataError

BYTES = ByteTokenizer()
EOS = BYTES.eos_token_id


def pack_texts(*texts: str) -> PackedTokens:
    return pack([Document(str(index), text) for index, text in enumerate(texts)], BYTES)


def numbered(num_tokens: int) -> PackedTokens:
    """A stream in which every token is its own position, so that rows show where they come from."""
    return PackedTokens(np.arange(num_tokens, dtype=np.int32), np.zeros(num_tokens, dtype=np.int32), num_tokens)


def take_rows(sampler: RowSampler, num_batches: int) -> torch.Tensor:
    return torch.cat([sampler.next_batch().input_ids for _ in range(num_batches)])


# -------------------------------------------------------------------------------------------------------------- packing


def test_documents_are_joined_each_ended_by_the_end_of_text():
    packed = pack_texts("ab", "c")
    assert packed.token_ids.tolist() == [97, 98, EOS, 99, EOS]
    assert packed.document_ids.tolist() == [0, 0, 0, 1, 1]
    assert packed.token_ids.dtype == packed.document_ids.dtype == np.int32
    assert packed.num_bytes == 3
    assert len(packed) == 5


@given(st.lists(st.text(alphabet="aé\n", max_size=8), max_size=6))
def test_every_document_comes_back_from_its_ids(texts):
    packed = pack_texts(*texts)
    for index, text in enumerate(texts):
        tokens = packed.token_ids[packed.document_ids == index]
        assert tokens[-1] == EOS
        assert BYTES.decode(tokens[:-1]) == text
    assert packed.num_bytes == len("".join(texts).encode())
    assert len(packed) == packed.num_bytes + len(texts)


def test_the_tokens_that_end_a_line_are_known():
    assert pack_texts("a").line_end_ids.tolist() == [10]
    text = "if a:\n    b\n    c\n" * 50
    bpe = build_tokenizer("bpe:264", Corpus("here", (Document("a", text),), (), ()))
    line_ends = {bpe.token_bytes(int(i)) for i in pack([Document("a", text)], bpe).line_end_ids}
    assert b"\n" in line_ends
    assert b"\n   " in line_ends
    assert all(content.rstrip(b" ").endswith(b"\n") for content in line_ends)


# ----------------------------------------------------------------------------------------------------------------- rows


def is_one_epoch(rows: torch.Tensor, num_tokens: int) -> bool:
    """True iff rows of a `numbered` stream are contiguous, on one grid, each once, and as many as fit."""
    starts = rows[:, 0]
    length = rows.shape[1]
    contiguous = bool((rows == starts[:, None] + torch.arange(length)).all())
    offset = int(starts.min())
    grid = torch.arange(offset, num_tokens - length + 1, length)
    return contiguous and torch.equal(starts.sort().values, grid) and offset < length


@given(st.integers(1, 9), st.integers(0, 60), st.integers(0, 99))
def test_an_epoch_visits_every_row_once(sequence_length, more, seed):
    packed = numbered(sequence_length + more)
    sampler = RowSampler(packed, sequence_length, batch_size=1, seed=seed)
    rows = []
    while sampler.state_dict()["epoch"] == 0:
        rows.append(sampler.next_batch().input_ids)
    assert is_one_epoch(torch.cat(rows[:-1]), len(packed))  # the last row opened the next epoch


def test_the_law_above_catches_rows_drawn_with_replacement_and_rows_that_overlap():
    starts = torch.tensor([0, 4, 4, 8])
    assert not is_one_epoch(starts[:, None] + torch.arange(4), 16)
    assert not is_one_epoch(torch.tensor([0, 3, 6, 9])[:, None] + torch.arange(4), 16)
    assert is_one_epoch(torch.tensor([8, 0, 12, 4])[:, None] + torch.arange(4), 16)


def test_epochs_differ_in_offset_and_order_and_follow_each_other_in_a_batch():
    sampler = RowSampler(numbered(103), sequence_length=10, batch_size=4, seed=0)
    rows = take_rows(sampler, 50)
    assert rows.shape == (200, 10)
    assert len({int(start) % 10 for start in rows[:, 0]}) > 5
    assert sampler.state_dict()["epoch"] >= 19
    assert rows.min() < 5
    assert rows.max() > 97


def test_a_batch_larger_than_an_epoch_is_filled_from_several():
    batch = RowSampler(numbered(10), sequence_length=5, batch_size=7, seed=1).next_batch()
    assert batch.input_ids.shape == (7, 5)


def test_a_stream_of_exactly_one_row_gives_that_row():
    batch = RowSampler(numbered(6), sequence_length=6, batch_size=2, seed=3).next_batch()
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_seeds_decide_the_order():
    first, second, other = (take_rows(RowSampler(numbered(500), 5, 4, seed), 9) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@given(st.integers(0, 25), st.integers(1, 6), st.integers(1, 6))
def test_a_resumed_sampler_goes_on_bit_for_bit(num_batches, batch_size, resumed_batch_size):
    packed = numbered(57)
    sampler = RowSampler(packed, 5, batch_size, seed=7)
    for _ in range(num_batches):
        sampler.next_batch()
    resumed = RowSampler(packed, 5, resumed_batch_size, seed=99)
    resumed.load_state_dict(sampler.state_dict())
    assert torch.equal(take_rows(resumed, batch_size * 4), take_rows(sampler, resumed_batch_size * 4))


@pytest.mark.parametrize("lost", ["index", "epoch", "seed"])
def test_the_law_above_catches_a_state_that_loses_a_part(lost):
    sampler, resumed = (RowSampler(numbered(57), 5, 3, seed=7) for _ in range(2))
    take_rows(sampler, 10)
    resumed.load_state_dict(sampler.state_dict() | {lost: 0})
    assert not torch.equal(take_rows(resumed, 4), take_rows(sampler, 4))


def test_the_state_is_small_and_plain():
    state = RowSampler(numbered(57), 5, 3, seed=7).state_dict()
    assert state == {"seed": 7, "epoch": 0, "index": 0, "sequence_length": 5, "num_tokens": 57}


def test_a_batch_carries_the_document_of_every_token():
    packed = pack_texts(*("ab" * n for n in range(1, 30)))
    batch = RowSampler(packed, 16, 8, seed=0).next_batch()
    assert isinstance(batch, Batch)
    assert batch.input_ids.dtype == batch.document_ids.dtype == torch.int64
    for tokens, documents in zip(batch.input_ids, batch.document_ids, strict=True):
        steps = documents.diff()
        assert torch.equal(steps, (tokens[:-1] == EOS).long())  # the id changes after each end of text and only there


def test_a_corpus_shorter_than_a_row_is_refused_with_numbers():
    with pytest.raises(DataError, match=r"training part .* has 4 tokens.*sequence_length = 16"):
        RowSampler(pack_texts("abc"), 16, 1, seed=0)
    with pytest.raises(DataError, match=r"validation part .* has 0 tokens.*validation_share"):
        validation_rows(pack_texts(), 16, 1)


def test_resuming_on_other_data_is_refused():
    state = RowSampler(numbered(57), 5, 3, seed=7).state_dict()
    with pytest.raises(DataError, match="num_tokens = 57, and here num_tokens = 58"):
        RowSampler(numbered(58), 5, 3, seed=7).load_state_dict(state)
    with pytest.raises(DataError, match="sequence_length = 5, and here sequence_length = 6"):
        RowSampler(numbered(57), 6, 3, seed=7).load_state_dict(state)


@pytest.mark.parametrize("arguments", [(0, 1, 0), (4, 0, 0), (4, 1, -1)])
def test_senseless_sampler_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        RowSampler(numbered(50), *arguments)


# ----------------------------------------------------------------------------------------------------------- validation


@given(st.integers(1, 12), st.integers(0, 200), st.integers(1, 9), st.integers(0, 9))
def test_validation_rows_are_spread_evenly_without_overlap(sequence_length, more, num_rows, seed):
    packed = numbered(sequence_length + more)
    rows = validation_rows(packed, sequence_length, num_rows, seed).input_ids
    assert rows.shape == (min(num_rows, len(packed) // sequence_length), sequence_length)
    starts = rows[:, 0]
    assert torch.equal(rows, starts[:, None] + torch.arange(sequence_length))
    gaps = starts.diff()
    assert (gaps >= sequence_length).all()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_validation_rows_and_prompts_are_the_same_every_time():
    packed = pack_texts(*(f"line one of {n}\nline two\n" * 40 for n in range(9)))
    assert torch.equal(validation_rows(packed, 32, 5).input_ids, validation_rows(packed, 32, 5).input_ids)
    assert not torch.equal(validation_rows(packed, 32, 5).input_ids, validation_rows(packed, 32, 5, seed=1).input_ids)
    first, second = (np.stack(validation_prompts(packed, 16, 8, 5)) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, np.stack(validation_prompts(packed, 16, 8, 5, seed=1)))


def lined_text(document: int, num_lines: int) -> str:
    """Lines that name their document and number, all of 12 characters."""
    return "".join(f"doc{document:02d} l{line:04d}\n" for line in range(num_lines))


def test_prompts_come_from_different_documents_at_line_starts_with_what_follows_them():
    packed = pack_texts(*(lined_text(document, 100) for document in range(20)))
    texts = [BYTES.decode(span) for span in validation_prompts(packed, 30, 70, 8)]
    assert len(texts) == 8
    assert all(text.startswith("doc") and len(text) == 100 for text in texts)
    assert all(text in lined_text(int(text[3:5]), 100) for text in texts)
    documents = [int(text[3:5]) for text in texts]
    assert len(set(documents)) == 8
    assert documents == sorted(documents)
    assert np.diff(documents).max() <= 4  # spread over all twenty


def test_prompts_never_contain_an_end_of_text_even_in_short_documents():
    packed = pack_texts(*("abcdef\n" * n for n in range(1, 12)))
    for prompt in validation_prompts(packed, 12, 8, 12):
        assert prompt.dtype == np.int32
        assert len(prompt) == 20
        assert EOS not in prompt


def test_few_documents_give_several_prompts_each():
    packed = pack_texts(lined_text(1, 40), lined_text(2, 3))
    texts = [BYTES.decode(prompt) for prompt in validation_prompts(packed, 24, 0, 10)]
    assert len(set(texts)) == 10
    assert all(text.startswith("doc") for text in texts)
    assert {text[:5] for text in texts} == {"doc01", "doc02"}


def test_text_without_lines_gives_prompts_from_anywhere():
    packed = pack_texts("".join(chr(97 + n * n % 26) for n in range(900)))
    prompts = validation_prompts(packed, 50, 0, 6)
    assert len({prompt.tobytes() for prompt in prompts}) > 1


def test_too_few_tokens_for_the_prompts_are_refused_with_numbers():
    with pytest.raises(DataError, match=r"wanted: 2, of 50 tokens, .* by 9 more .* room for 0"):
        validation_prompts(pack_texts("short", "texts"), 50, 9, 2)
    with pytest.raises(DataError, match=r"wanted: 5, of 4 tokens, .* room for 3"):
        validation_prompts(pack_texts("abcdef"), 4, 0, 5)
    for arguments in ((0, 0, 5), (4, -1, 5), (4, 0, 0)):
        with pytest.raises(ValueError, match="at least"):
            validation_prompts(pack_texts("abcdef"), *arguments)


def test_a_document_of_just_the_prompt_and_its_continuation_is_enough():
    (span,) = validation_prompts(pack_texts("abcdefgh"), 5, 3, 1)
    assert BYTES.decode(span) == "abcdefgh"
    with pytest.raises(DataError, match="room for 0"):
        validation_prompts(pack_texts("abcdefgh"), 5, 4, 1)
