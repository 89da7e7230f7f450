"""Token importance: rare tokens and content words weigh more, by laws that a shifted or unscaled weight breaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextn.config import ObjectiveConfig, Recipe
from nextn.data import ByteTokenizer, Corpus, Document, PackedTokens, build_tokenizer, pack, token_importance
from nextn.data.importance import ENGLISH_FUNCTION_WORDS, FUNCTION_WORDS, in_content_word, inverse_frequency_weights
from nextn.errors import ConfigError, DataError
from nextn.tables import from_table

BYTES = ByteTokenizer()
EOT = BYTES.eos_token_id
TEXT = "if the parser fails, the parser of the failing files fails\n" * 20
BPE = build_tokenizer("bpe:268", Corpus("here", (Document("a.txt", TEXT),), (Document("b.txt", TEXT),), ()))
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
CONTENT_WORDS = ObjectiveConfig(importance="content_words")


class Pieces:
    """A tokenizer whose token i has the i-th bytes; enough of one for importance."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.vocab_size = len(pieces)

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def stream(token_ids: Sequence[int]) -> PackedTokens:
    return PackedTokens(np.array(token_ids, dtype=np.int32), np.zeros(len(token_ids), dtype=np.int32), len(token_ids))


def weights_of(tokenizer, *rows: Sequence[int], config: ObjectiveConfig = CONTENT_WORDS) -> list[list[float]]:
    weigh = token_importance(config, tokenizer, stream([]))
    weights = weigh(torch.tensor([list(row) for row in rows]))
    assert weights.dtype == torch.float32
    return weights.tolist()


def test_uniform_importance_is_no_weights_at_all():
    assert token_importance(ObjectiveConfig(), BYTES, stream([])) is None


# --------------------------------------------------------------------------------------------------- inverse frequency

COUNTS = st.lists(st.integers(0, 10**9), min_size=1, max_size=30).filter(any).map(np.array)
POWERS = st.floats(0, 3)
UNCAPPED = 1e38


def unscaled(counts: np.ndarray, power: float, maximum: float) -> np.ndarray:
    """Broken: not scaled to a mean of 1."""
    with np.errstate(divide="ignore"):
        return np.minimum((counts.sum() / counts) ** power, maximum).astype(np.float32)


def scaled_over_the_vocabulary(counts: np.ndarray, power: float, maximum: float) -> np.ndarray:
    """Broken: the mean over the vocabulary is 1, not the mean over the training tokens."""
    weights = unscaled(counts, power, maximum).astype(np.float64)
    return (weights / weights[counts > 0].mean()).astype(np.float32)


def has_mean_one_over_training_tokens(weights: np.ndarray, counts: np.ndarray) -> bool:
    return bool(np.isclose((weights.astype(np.float64) * counts).sum() / counts.sum(), 1, rtol=1e-6))


@given(counts=COUNTS, power=POWERS)
def test_the_mean_weight_of_the_training_tokens_is_one_when_nothing_is_capped(counts, power):
    assert has_mean_one_over_training_tokens(inverse_frequency_weights(counts, power, UNCAPPED), counts)


@pytest.mark.parametrize("broken", [unscaled, scaled_over_the_vocabulary])
def test_the_law_of_the_mean_catches_weights_scaled_in_another_way(broken):
    counts = np.array([90, 9, 1])
    assert not has_mean_one_over_training_tokens(broken(counts, 1.0, UNCAPPED), counts)


@given(counts=COUNTS, power=POWERS)
def test_weights_are_the_power_of_the_inverse_share_up_to_one_factor(counts, power):
    seen = counts > 0
    ratio = inverse_frequency_weights(counts, power, UNCAPPED)[seen] / (counts.sum() / counts[seen]) ** power
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


@given(count=st.integers(1, 10**9), num_tokens=st.integers(1, 50), power=POWERS, maximum=st.floats(1, 100))
def test_equal_counts_weigh_exactly_one(count, num_tokens, power, maximum):
    assert (inverse_frequency_weights(np.full(num_tokens, count), power, maximum) == 1.0).all()


@given(counts=COUNTS, maximum=st.floats(1, 100))
def test_power_zero_weighs_every_token_exactly_one(counts, maximum):
    assert (inverse_frequency_weights(counts, 0.0, maximum) == 1.0).all()


@given(counts=COUNTS, power=st.floats(0, 1000), maximum=st.floats(1, 100))
def test_a_rarer_token_never_weighs_less_and_none_more_than_the_cap(counts, power, maximum):
    weights = inverse_frequency_weights(counts, power, maximum)
    assert (np.diff(weights[np.argsort(-counts)]) >= 0).all()
    assert (weights <= np.float32(maximum)).all()
    assert np.isfinite(weights).all()


def test_the_weight_of_a_batch_is_that_of_each_token():
    config = ObjectiveConfig(importance="inverse_frequency", importance_max=7.0)
    weigh = token_importance(config, BYTES, stream([97, 97, 97, 98]))
    weights = weigh(torch.tensor([[97, 98], [98, 99]]))  # shares 3/4, 1/4 and 0: 4/3 and 4 over their mean of 2
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([[2 / 3, 2.0], [2.0, 7.0]]))


def test_the_cap_and_the_power_are_those_of_the_settings():
    batch = torch.tensor([[97, 98]])
    train = stream([97] * 16 + [98])

    def weigh(**settings: float) -> list[float]:
        return token_importance(ObjectiveConfig(importance="inverse_frequency", **settings), BYTES, train)(batch)[0]

    assert weigh(importance_max=2.5)[1] == 2.5
    assert weigh(importance_power=0.5)[1] / weigh(importance_power=0.5)[0] == pytest.approx(4.0)


def test_no_training_tokens_are_an_error():
    with pytest.raises(DataError, match="counts the training tokens, and there are none"):
        token_importance(ObjectiveConfig(importance="inverse_frequency"), BYTES, stream([]))


# ------------------------------------------------------------------------------------------------------- content words


@BOTH
def test_the_pieces_of_a_content_word_weigh_more_than_function_words_and_spaces(tokenizer):
    text = "if the parser fails"
    ids = tokenizer.encode(text).tolist()
    (weights,) = weights_of(tokenizer, ids)
    weight_of_word = {"if": 1.0, "the": 1.0, "parser": 2.0, "fails": 2.0}
    pieces = [tokenizer.token_bytes(token_id).decode() for token_id in ids]
    assert len(pieces) > 4, "some word is in several pieces"
    words = [text[: len("".join(pieces[: index + 1]))].split(" ")[-1] for index in range(len(pieces))]
    for piece, word, weight in zip(pieces, words, weights, strict=True):
        (expected,) = {weight_of_word[whole] for whole in weight_of_word if word and whole.startswith(word)} or {1.0}
        assert weight == expected, f"{piece!r} of {word!r}"


def test_bytes_of_the_worked_example():
    (weights,) = weights_of(BYTES, b"if the parser fails")
    assert weights == [1.0] * 7 + [2.0] * 6 + [1.0] + [2.0] * 5


def plain_reference(text: bytes) -> list[bool]:
    """Byte by byte: extend to the left and to the right while it is a word, and judge that word."""

    def is_letter(byte: int) -> bool:
        return byte >= 0x80 or chr(byte).isalpha()

    def is_word(byte: int) -> bool:
        return is_letter(byte) or byte in b"0123456789_"

    judged = []
    for place, byte in enumerate(text):
        if not is_word(byte):
            judged.append(False)
            continue
        start, end = place, place
        while start > 0 and is_word(text[start - 1]):
            start -= 1
        while end < len(text) and is_word(text[end]):
            end += 1
        word = text[start:end]
        judged.append(any(map(is_letter, word)) and word.lower() not in FUNCTION_WORDS)
    return judged


def agrees_with_the_reference(find: Callable[[bytes], np.ndarray], text: bytes) -> bool:
    return find(text).tolist() == plain_reference(text)


ROWS = st.lists(
    st.sampled_from([b"if", b"The", b"x", b"parser", b" ", b"\n", b"_", b"7", b".", "é".encode(), b"\xff", b"\x00"]),
    max_size=30,
).map(b"".join)


@given(text=ROWS | st.binary(max_size=40))
def test_content_words_are_those_that_a_search_byte_by_byte_finds(text):
    assert agrees_with_the_reference(in_content_word, text)


@pytest.mark.parametrize(
    "broken",
    [
        lambda text: np.roll(in_content_word(text), 1),
        lambda text: np.roll(in_content_word(text), -1),
        lambda text: in_content_word(text.replace(b"_", b" ")),
        lambda text: in_content_word(bytes(byte if byte < 0x80 else 0x20 for byte in text)),
    ],
    ids=["one byte late", "one byte early", "underscores split", "letters beyond ASCII split"],
)
def test_the_law_above_catches_a_broken_search(broken):
    text = "the name is_ok in Zoë's 7 files ".encode()
    assert agrees_with_the_reference(in_content_word, text)
    assert not agrees_with_the_reference(broken, text)


@BOTH
@given(text=st.text(alphabet="if the parsé_7.\n", max_size=40).filter(bool))
def test_a_token_weighs_as_its_heaviest_byte(tokenizer, text):
    ids = tokenizer.encode(text).tolist()
    pieces = [tokenizer.token_bytes(token_id) for token_id in ids]
    inside = plain_reference(b"".join(pieces))
    ends = np.cumsum([len(piece) for piece in pieces])
    expected = [2.0 if any(inside[end - len(piece) : end]) else 1.0 for piece, end in zip(pieces, ends, strict=True)]
    assert weights_of(tokenizer, ids) == [expected]


@given(text=ROWS.filter(bool))
def test_case_does_not_matter(text):
    assert weights_of(BYTES, text) == weights_of(BYTES, text.lower()) == weights_of(BYTES, text.upper())


@given(row=st.lists(st.integers(0, 256), min_size=8, max_size=8), other=st.binary(min_size=8, max_size=8))
def test_weights_do_not_depend_on_other_rows_of_the_batch(row, other):
    alone = weights_of(BYTES, row)[0]
    assert weights_of(BYTES, other, row, other)[1] == alone


def test_end_of_text_ends_a_word_and_weighs_one():
    assert weights_of(BYTES, [*b"a", EOT, *b"b"]) == [[1.0, 1.0, 2.0]]
    assert weights_of(BYTES, b"ab") == [[2.0, 2.0]], "joined without the end of text, the article would become a word"
    assert weights_of(BYTES, [EOT, *b"the", EOT, EOT]) == [[1.0] * 6]


def test_a_letter_of_several_bytes_is_one_word_with_its_neighbours():
    assert weights_of(BYTES, "if né à".encode()) == [[1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 1.0, 2.0, 2.0]]
    assert weights_of(BYTES, "thé".encode()) == [[2.0] * 4]


@pytest.mark.parametrize("text", ["12 3_4 __ 0", "+-*/ ([{", " \t\n", "if NONE True lambda", "You and I would not"])
def test_numbers_punctuation_spaces_keywords_and_function_words_weigh_one(text):
    assert set(weights_of(BYTES, text.encode())[0]) == {1.0}


@pytest.mark.parametrize("text", ["x", "x1", "1e5", "_private", "if_true", "then2"])
def test_a_word_with_a_letter_that_is_no_function_word_weighs_more_throughout(text):
    assert set(weights_of(BYTES, text.encode())[0]) == {2.0}


def test_a_word_cut_by_the_end_of_a_row_is_judged_by_what_is_in_the_row():
    assert weights_of(BYTES, b" therefore") == [[1.0] + [2.0] * 9]
    assert weights_of(BYTES, b" the", b"refo") == [[1.0] * 4, [2.0] * 4]


def test_a_token_that_touches_two_words_weighs_as_the_content_word():
    tokenizer = Pieces(b"", b"of the par", b"ser", b" in ")
    for weight in (3.0, 0.5):
        config = ObjectiveConfig(importance="content_words", content_weight=weight)
        assert weights_of(tokenizer, [1, 2, 3, 0], config=config) == [[weight, weight, 1.0, 1.0]]


def test_function_words_are_listed_once_in_lower_case():
    words = [word for kind in ENGLISH_FUNCTION_WORDS.values() for word in kind.split()]
    assert len(set(words)) == len(words)
    assert all(word == word.lower() for word in words)
    assert {b"the", b"none", b"true", b"lambda"} <= FUNCTION_WORDS


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"importance": "rare"}, "objective.importance must be one of uniform, inverse_frequency, content_words"),
        ({"importance_power": -0.5}, "objective.importance_power must be at least 0, got -0.5"),
        ({"importance_max": 0.9}, "objective.importance_max must be at least 1, got 0.9"),
        ({"content_weight": 0}, "objective.content_weight must be above 0, got 0"),
        ({"content_weight": float("nan")}, "finite"),
    ],
)
def test_bad_settings_are_errors_that_name_them(settings, message):
    with pytest.raises(ConfigError, match=message):
        from_table(Recipe, {"objective": settings})


def test_a_training_stream_of_documents_is_what_is_counted():
    train = pack([Document("a.txt", "aab")], BYTES)
    weigh = token_importance(ObjectiveConfig(importance="inverse_frequency"), BYTES, train)
    weights = weigh(torch.tensor([[97, 98, EOT]]))[0]
    assert weights.tolist() == pytest.approx([2 / 3, 4 / 3, 4 / 3])
