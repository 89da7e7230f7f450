"""Stop strings: found wherever they begin, however the text is cut into tokens and cycles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from nextn.data.corpora import Corpus, Document
from nextn.data.tokenizers import ByteTokenizer, SavedTokenizer, Tokenizer, build_tokenizer
from nextn.decoding.stopping import StopMatch, StopRow, StopStrings
from nextn.errors import GenerationError

BYTES = ByteTokenizer()
EOS = BYTES.eos_token_id


class PieceTokenizer(ByteTokenizer):
    """The given pieces of bytes as tokens 0, 1, ..."""

    def __init__(self, pieces: Sequence[bytes]):
        self.pieces = pieces

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def fed_in(row: StopRow, cycles: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """Tokens of the row, and characters of its text, when the cycles stop; None if they do not."""
    num_tokens = 0
    for cycle in cycles:
        match = row.feed(cycle)
        if match is not None:
            return num_tokens + match.num_tokens, match.num_chars
        num_tokens += len(cycle)
    return None


def naive(stop: Sequence[str], pieces: Sequence[bytes]) -> tuple[int, int] | None:
    """The same by looking at the whole text after every byte, and at all beginnings of it after every token."""
    text = b"".join(pieces)
    for end in range(1, len(text) + 1):
        endings = [len(string.encode()) for string in stop if text[:end].endswith(string.encode())]
        if endings:
            num_tokens = next(count for count in range(len(pieces) + 1) if len(b"".join(pieces[:count])) >= end)
            return num_tokens, len(text[: end - max(endings)].decode("utf-8", errors="replace"))
    return None


def cut(items: Sequence, places: Sequence[int]) -> list:
    """The sequence in parts, cut at these places (repeated ones give empty parts)."""
    bounds = [0, *sorted(place % (len(items) + 1) for place in places), len(items)]
    return [items[first:end] for first, end in pairwise(bounds)]


FEW_LETTERS = st.text(alphabet="ab\u00e9\u20ac\U0001f642", max_size=24)
STOP = st.lists(st.text(alphabet="ab\u00e9\u20ac\U0001f642", min_size=1, max_size=4), max_size=3)
PLACES = st.lists(st.integers(0, 1000), max_size=12)


@given(text=FEW_LETTERS, stop=STOP, token_ends=PLACES, cycle_ends=PLACES)
def test_tokens_and_text_are_those_of_a_naive_search(text, stop, token_ends, cycle_ends):
    pieces = cut(text.encode(), token_ends)
    row = StopStrings(stop, PieceTokenizer(pieces)).new_row()
    found = fed_in(row, cut(range(len(pieces)), cycle_ends))
    assert found == naive(stop, pieces)


@given(text=st.binary(max_size=16), stop=STOP, token_ends=PLACES, cycle_ends=PLACES)
def test_bytes_that_are_no_text_do_not_hide_a_stop_string(text, stop, token_ends, cycle_ends):
    pieces = cut(text + "".join(stop).encode(), token_ends)
    row = StopStrings(stop, PieceTokenizer(pieces)).new_row()
    assert fed_in(row, cut(range(len(pieces)), cycle_ends)) == naive(stop, pieces)


@given(text=FEW_LETTERS, stop=STOP, token_ends=PLACES, cycle_ends=PLACES)
def test_the_text_does_not_depend_on_how_it_is_cut(text, stop, token_ends, cycle_ends):
    pieces = cut(text.encode(), token_ends)
    row = StopStrings(stop, PieceTokenizer(pieces)).new_row()
    in_pieces = fed_in(row, cut(range(len(pieces)), cycle_ends))
    at_once = StopStrings(stop, BYTES).new_row().feed(list(text.encode()))
    assert (in_pieces and in_pieces[1]) == (at_once and at_once.num_chars)


class WithinCycles(StopRow):
    """Broken: forgets the text of earlier cycles."""

    def feed(self, token_ids):
        self._text.clear()
        return super().feed(token_ids)


class FromTheOldEnd(StopRow):
    """Broken: begins to search where the new bytes begin."""

    def feed(self, token_ids):
        pieces = b"".join(map(self._tokenizer.token_bytes, token_ids))
        return super().feed(token_ids) if any(pattern in pieces for pattern in self._stop.values()) else None


@pytest.mark.parametrize("row_type", [StopRow, WithinCycles, FromTheOldEnd])
def test_a_string_that_spans_cycles_is_found(row_type: type[StopRow]):
    row = row_type({"\u20ac!": "\u20ac!".encode()}, BYTES)
    cycles = cut("10 \u20ac! and".encode(), [2, 4, 6])
    found = fed_in(row, [list(cycle) for cycle in cycles])
    assert (found == (7, 3)) == (row_type is StopRow)


def test_the_string_that_is_complete_first_wins_and_of_two_the_longer():
    def num_chars(*stop: str) -> int:
        return StopStrings(stop, BYTES).new_row().feed(list(b"abcdefg")).num_chars

    assert num_chars("bcde", "cd") == num_chars("cd", "bcde") == 2
    assert num_chars("cd", "bcd") == num_chars("bcd", "cd") == 1


def test_the_token_that_completes_the_string_is_the_last_one_and_empty_tokens_before_it_count():
    row = StopStrings(["cd"], PieceTokenizer([b"ab", b"c", b"", b"def", b"", b"g"])).new_row()
    assert row.feed([0]) is None
    assert row.feed([1, 2, 3, 4, 5]) == StopMatch(num_tokens=3, num_chars=2)


def test_special_tokens_are_passed_over():
    row = StopStrings(["cd"], BYTES).new_row()
    assert row.feed([*b"abc", EOS, *b"d", EOS]) == StopMatch(num_tokens=5, num_chars=2)


def test_without_stop_strings_or_tokens_nothing_stops():
    assert StopStrings([], BYTES).new_row().feed(list(b"text")) is None
    assert StopStrings(["a"], BYTES).new_row().feed([]) is None


def test_rows_know_nothing_of_each_other():
    strings = StopStrings(["ab"], BYTES)
    first, second = strings.new_row(), strings.new_row()
    assert first.feed(list(b"a")) is None
    assert second.feed(list(b"b")) is None
    assert first.feed(list(b"b")) == StopMatch(num_tokens=1, num_chars=0)


def corpus_of(*texts: str) -> Corpus:
    return Corpus("here", tuple(Document(f"{number}.txt", text) for number, text in enumerate(texts)), (), ())


BPE = build_tokenizer("bpe:280", corpus_of("the na\u00efve caf\u00e9 sold 10 \u20ac menus\n\n" * 20))


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@given(text=st.text(alphabet=list("the na\u00efv\u20ac\n"), max_size=30), stop=STOP.filter(bool))
def test_the_text_is_what_the_tokenizer_shows_before_the_first_stop_string(tokenizer: Tokenizer, text, stop):
    token_ids = tokenizer.encode(text + stop[0] + text).tolist()
    match = StopStrings(stop[:1], tokenizer).new_row().feed(token_ids)
    shown = tokenizer.decode(token_ids[: match.num_tokens])
    assert shown[: match.num_chars] == (text + stop[0] + text).partition(stop[0])[0]
    assert stop[0] not in tokenizer.decode(token_ids[: match.num_tokens - 1])


def sentence_piece() -> SavedTokenizer:
    vocabulary = {"\u2581the": 0, "\u2581end": 1, ".": 2, "</s>": 3}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["</s>"])
    return SavedTokenizer(tokenizer, "</s>", {})


@pytest.mark.parametrize(
    ("stop", "token_ids", "expected"),
    [("end", [0, 1, 2], "the "), (" end", [0, 1, 2], "the"), (" the", [0, 1], ""), ("e.", [0, 2], "th")],
)
def test_a_leading_space_that_the_tokenizer_does_not_show_is_not_counted(stop, token_ids, expected):
    tokenizer = sentence_piece()
    match = StopStrings([stop], tokenizer).new_row().feed(token_ids)
    assert tokenizer.decode(token_ids[: match.num_tokens])[: match.num_chars] == expected


def test_a_feed_searches_what_is_new_and_not_the_whole_text():
    class Counted(bytearray):
        num_searched = 0

        def find(self, pattern: bytes, start: int) -> int:
            self.num_searched += len(self) - start
            return super().find(pattern, start)

    row = StopStrings(["stop!"], BYTES).new_row()
    row._text = Counted()
    for _ in range(1000):
        assert row.feed(list(b"sto")) is None
    assert row._text.num_searched <= 1000 * (3 + len("stop!"))


@pytest.mark.parametrize(
    ("stop", "tokenizer", "message"),
    [
        (["a", ""], BYTES, "a stop string is empty"),
        ("END", BYTES, r"single string 'END'; write \['END'\]"),
        (["\ud800"], BYTES, "half of a surrogate pair at character 0"),
        (["a"], None, "need a tokenizer"),
    ],
)
def test_what_cannot_be_looked_for_is_refused(stop, tokenizer, message: str):
    with pytest.raises(GenerationError, match=message):
        StopStrings(stop, tokenizer)
