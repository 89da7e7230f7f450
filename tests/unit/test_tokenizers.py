"""Tokenizers: round trips, exact bytes, files that other tools read the same way."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from nextn.data import tokenizers as own
from nextn.data.corpora import Corpus, Document
from nextn.data.tokenizers import ByteTokenizer, SavedTokenizer, build_tokenizer, load_tokenizer
from nextn.errors import DataError

CODE = "".join(f"def function_{number}(self, value):\n    return self.value + {number}\n\n" for number in range(50))
TEXTS = [
    "",
    "hello world",
    "naïve 日本語 🙂",
    "a\n\n  b\tc\r\n",
    "\x00\x7f\x80",
    "<|endoftext|>",
    "x <|endoftext|> y",
    CODE,
]
ANY_TEXT = st.text(
    alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\tab")), max_size=60
)


def corpus_of(*texts: str, held_out: str = "held out") -> Corpus:
    documents = tuple(Document(f"{index}.txt", text) for index, text in enumerate(texts))
    return Corpus("here", documents, (Document("held_out.txt", held_out),), ())


BYTES = ByteTokenizer()
BPE = build_tokenizer("bpe:380", corpus_of(CODE, "naïve text\n" * 9))
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])


# ----------------------------------------------------------------------------------------------------------------- laws


@BOTH
@given(text=ANY_TEXT)
def test_decoding_what_was_encoded_gives_the_text(tokenizer, text):
    token_ids = tokenizer.encode(text)
    assert token_ids.dtype == np.int32
    assert tokenizer.decode(token_ids) == text


@BOTH
@given(text=ANY_TEXT)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer, text):
    assert b"".join(tokenizer.token_bytes(int(token_id)) for token_id in tokenizer.encode(text)) == text.encode("utf-8")


@BOTH
@pytest.mark.parametrize("text", TEXTS)
def test_text_never_becomes_the_end_of_text(tokenizer, text):
    assert tokenizer.eos_token_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_law_above_catches_the_library_left_to_itself(tmp_path):
    BPE.save(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert BPE.eos_token_id in plain.encode("x <|endoftext|> y").ids


@BOTH
def test_the_end_of_text_has_no_text(tokenizer):
    token_ids = [*tokenizer.encode("one"), tokenizer.eos_token_id, *tokenizer.encode("two")]
    assert tokenizer.decode(token_ids) == "onetwo"
    assert tokenizer.token_bytes(tokenizer.eos_token_id) == b""
    assert tokenizer.decode([]) == ""


@BOTH
def test_every_byte_is_a_token_so_that_any_text_can_be_written(tokenizer):
    contents = {tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= contents


@BOTH
def test_ids_beyond_the_vocabulary_show_as_replacement_and_negative_ones_are_refused(tokenizer):
    """Models with a padded embedding can emit the former."""
    known = tokenizer.encode("ab").tolist()
    assert tokenizer.decode([*known, tokenizer.vocab_size, *known]) == "ab\ufffdab"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 7) == "\ufffd".encode()
    with pytest.raises(ValueError, match="got -1"):
        tokenizer.decode([-1])
    with pytest.raises(ValueError, match="got -1"):
        tokenizer.token_bytes(-1)


@BOTH
def test_half_a_surrogate_pair_is_no_text(tokenizer):
    with pytest.raises(DataError, match="surrogate pair at character 2"):
        tokenizer.encode("ab\udc80")


# ---------------------------------------------------------------------------------------------------------------- bytes


@given(text=ANY_TEXT)
def test_byte_tokens_are_the_utf8_bytes(text):
    assert BYTES.encode(text).tolist() == list(text.encode("utf-8"))


def test_bytes_that_are_no_text_decode_to_the_replacement_character():
    assert BYTES.decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert (BYTES.vocab_size, BYTES.eos_token_id) == (257, 256)


def test_the_saved_byte_tokenizer_is_the_byte_tokenizer_again(tmp_path):
    BYTES.save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    assert isinstance(load_tokenizer(tmp_path / "tokenizer.json"), ByteTokenizer)
    assert isinstance(build_tokenizer(str(tmp_path), corpus_of()), ByteTokenizer)


@pytest.mark.parametrize("change", ["swap two bytes", "prefix space", "merge", "normalizer"])
def test_a_tokenizer_with_other_ids_is_not_taken_for_the_byte_tokenizer(tmp_path, change):
    BYTES.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    if change == "swap two bytes":
        description["model"]["vocab"] |= {"a": ord("b"), "b": ord("a")}
    elif change == "prefix space":
        description["pre_tokenizer"]["add_prefix_space"] = True
    elif change == "merge":
        description["model"]["vocab"]["ab"] = 257
        description["model"]["merges"] = [["a", "b"]]
    else:
        description["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(description), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, SavedTokenizer)
    assert loaded.encode("ABab").tolist() != BYTES.encode("ABab").tolist()


# -------------------------------------------------------------------------------------- the same ids in other libraries


@BOTH
def test_other_libraries_read_the_saved_files_and_give_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in [text for text in TEXTS if "<|endoftext|>" not in text]:
        token_ids = tokenizer.encode(text).tolist()
        assert library.encode(text).ids == token_ids
        assert auto(text)["input_ids"] == token_ids
        assert again.encode(text).tolist() == token_ids
        assert auto.decode(token_ids) == text
    assert auto.eos_token_id == again.eos_token_id == tokenizer.eos_token_id
    assert len(auto) == again.vocab_size == tokenizer.vocab_size


def test_the_test_above_catches_an_alphabet_in_another_order(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "_byte_alphabet", lambda: sorted(pre_tokenizers.ByteLevel.alphabet()))
    BYTES.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode("hello world").ids != BYTES.encode("hello world").tolist()


# ------------------------------------------------------------------------------------------------------------------ BPE


def test_training_bpe_twice_gives_the_same_tokenizer(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        build_tokenizer("bpe:350", corpus_of(CODE)).save(tmp_path / name)
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]


def test_bpe_has_the_size_asked_for_and_shortens_text():
    assert BPE.vocab_size == 380
    assert len(BPE.encode(CODE)) < len(CODE) / 2


def test_bpe_does_not_see_what_is_held_out(tmp_path):
    for name, held_out in (("first", "zzzzzz " * 500), ("second", "held out")):
        (tmp_path / name).mkdir()
        build_tokenizer("bpe:300", corpus_of(CODE, held_out=held_out)).save(tmp_path / name)
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]


@pytest.mark.parametrize("spec", ["bpe:", "bpe:256", "bpe:-5", "bpe:4k", "bpe:4096.0"])
def test_a_bad_bpe_size_is_refused(spec):
    with pytest.raises(DataError, match="whole number of at least 257"):
        build_tokenizer(spec, corpus_of(CODE))


def test_a_bpe_size_beyond_the_corpus_says_what_is_possible():
    with pytest.raises(DataError, match=r"yields only (\d+) tokens; set 'bpe:\1' or less"):
        build_tokenizer("bpe:5000", corpus_of("abc abc"))


# ---------------------------------------------------------------------------------------------------------------- saved


def save_library_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer, **companions: dict) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in companions.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def word_tokenizer(*specials: str) -> tokenizers.Tokenizer:
    """A SentencePiece-like tokenizer in the shape of Llama 2's: `▁` for spaces, lone bytes as `<0x..>`."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", *specials]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([tokenizers.AddedToken(special, special=True) for special in specials])
    return tokenizer


def test_a_sentencepiece_like_tokenizer_knows_its_bytes(tmp_path):
    tokenizer = load_tokenizer(save_library_tokenizer(tmp_path, word_tokenizer("</s>")))
    token_ids = tokenizer.encode("a b日\na")
    assert tokenizer.decode(token_ids) == "a b日\na"
    assert b"".join(tokenizer.token_bytes(int(token_id)) for token_id in token_ids) == " a b日\na".encode()
    assert tokenizer.token_bytes(tokenizer.eos_token_id) == b""


@pytest.mark.parametrize(
    "companions",
    [
        {"tokenizer_config": {"eos_token": "<end>"}},
        {"tokenizer_config": {"eos_token": {"content": "<end>", "lstrip": False}}},
        {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "<end>"}},
        {"special_tokens_map": {"eos_token": {"content": "<end>"}}},
    ],
)
def test_the_end_of_text_is_the_one_the_settings_name(tmp_path, companions):
    tokenizer = load_tokenizer(save_library_tokenizer(tmp_path, word_tokenizer("</s>", "<end>"), **companions))
    assert tokenizer.eos_token_id == word_tokenizer("</s>", "<end>").token_to_id("<end>")


def test_the_end_of_text_is_found_by_a_well_known_name(tmp_path):
    tokenizer = load_tokenizer(save_library_tokenizer(tmp_path, word_tokenizer("<s>", "</s>")))
    assert tokenizer.eos_token_id == word_tokenizer("<s>", "</s>").token_to_id("</s>")


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no end-of-text token.*name it as eos_token"):
        load_tokenizer(save_library_tokenizer(tmp_path, word_tokenizer("<pad>")))


def test_an_end_of_text_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(DataError, match="'<end>' is not in the vocabulary"):
        load_tokenizer(
            save_library_tokenizer(tmp_path, word_tokenizer("</s>"), tokenizer_config={"eos_token": "<end>"})
        )


def test_settings_beside_a_tokenizer_are_carried_along(tmp_path):
    settings = {"eos_token": "</s>", "chat_template": "{{ messages }}", "model_max_length": 77}
    save_library_tokenizer(tmp_path, word_tokenizer("</s>"), tokenizer_config=settings)
    (tmp_path / "copy").mkdir()
    load_tokenizer(tmp_path).save(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text(encoding="utf-8")) == settings


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    library = word_tokenizer("</s>")
    library.enable_truncation(2)
    library.enable_padding(length=8)
    tokenizer = load_tokenizer(save_library_tokenizer(tmp_path, library))
    assert len(tokenizer.encode("a a a a a")) == 5
    assert len(tokenizer.encode("a")) == 1


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    library = tokenizers.Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1, "##b": 2, "</s>": 3}, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece()
    with pytest.raises(DataError, match=r"'WordPiece'; nextn needs tokens that stand for definite bytes"):
        load_tokenizer(save_library_tokenizer(tmp_path, library))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "got a JSON list"),
        (b"{}", "tokenizers library can read"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_says_what_is_possible(tmp_path):
    with pytest.raises(DataError, match=r"no existing path; it may be 'bytes', 'bpe:SIZE'"):
        build_tokenizer("byte", corpus_of(CODE))
    with pytest.raises(DataError, match=r"tokenizer.json: cannot be read"):
        build_tokenizer(str(tmp_path), corpus_of(CODE))
