"""Tokenizers: bytes, byte-level BPE trained on the corpus, and any saved `tokenizer.json`.

All of them turn text into token ids and back, know the exact bytes of every token, and have one end-of-text token,
which packing puts after each document. Text never becomes a special token: a document that contains the characters
`<|endoftext|>` is encoded as these characters. `save` writes the files that the `tokenizers` library and transformers'
`AutoTokenizer` read; both, as is their custom, do read these characters as the special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nextn.data.corpora import Corpus
from nextn.errors import DataError

END_OF_TEXT = "<|endoftext|>"
"""The end-of-text token of the tokenizers built here."""

NUM_BYTES = 256

REPLACEMENT = "\ufffd"
"""Stands for what is no text."""

WELL_KNOWN_EOS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>", "<|im_end|>")  # noqa: RUF001
"""Looked for, in this order, in a saved tokenizer whose settings name no end-of-text token."""

COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files beside `tokenizer.json` that are carried along unchanged; the first two may name the end-of-text token."""


class Tokenizer(Protocol):
    """The interface of a tokenizer: text to token ids and back, and the bytes of every token."""

    @property
    def vocab_size(self) -> int:
        """V: token ids are 0..V-1, the end of text included."""
        ...

    @property
    def eos_token_id(self) -> int:
        """Id of the end-of-text token."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32 [n]; nothing is put before or after it. `DataError` if it is not valid Unicode."""
        ...

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD.

        So do ids beyond the vocabulary, which models with a padded embedding can emit.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; b"" for the end of text and other special tokens."""
        ...

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into an existing folder."""
        ...


def build_tokenizer(spec: str, corpus: Corpus) -> Tokenizer:
    """The tokenizer that a setting names: `bytes`, `bpe:SIZE`, or the path of a folder or `tokenizer.json`.

    `bpe:SIZE` trains byte-level BPE of SIZE tokens (256 bytes, SIZE - 257 merges, the end of text) on `corpus.train`;
    the same documents give the same tokenizer.

    Raises:
        DataError: SIZE is no number above 256 or more than the corpus yields; the path does not exist; or as
            `load_tokenizer`.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("bpe:"):
        return _train_bpe(spec, corpus)
    if Path(spec).expanduser().exists():
        return load_tokenizer(Path(spec).expanduser())
    raise DataError(
        f"data.tokenizer = {spec!r} is no existing path; it may be 'bytes', 'bpe:SIZE' (for example 'bpe:4096'), or "
        "the path of a saved tokenizer (a folder with tokenizer.json, or that file)"
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read a saved tokenizer: a folder with `tokenizer.json`, or the path of such a file.

    The end-of-text token is the `eos_token` of `tokenizer_config.json` or `special_tokens_map.json` beside it, else the
    first of `WELL_KNOWN_EOS` in the vocabulary. Truncation and padding stored in the file are switched off.

    Raises:
        DataError: the file is missing or no tokenizer; it has no end-of-text token; or its tokens do not stand for
            definite bytes (neither byte-level nor SentencePiece-like).
    """
    path = folder / "tokenizer.json" if folder.is_dir() else folder
    definition = _read_text(path)
    description = _parse_json(path, definition)
    if _is_byte_tokenizer(description):
        return ByteTokenizer()
    try:
        tokenizer = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises exactly this class
        raise DataError(f"{path} is not a tokenizer that the tokenizers library can read: {error}") from None
    beside = {name: path.parent / name for name in COMPANIONS}
    companions = {name: _read_text(companion) for name, companion in beside.items() if companion.is_file()}
    return SavedTokenizer(tokenizer, _find_eos(path, tokenizer, companions), companions)


# --------------------------------------------------------------------------------------------------------------- bytes


class ByteTokenizer:
    """Ids 0..255 are the bytes of the UTF-8 text, 256 is the end of text.

    >>> ByteTokenizer().encode("né").tolist()
    [110, 195, 169]
    """

    vocab_size = NUM_BYTES + 1
    eos_token_id = NUM_BYTES

    def encode(self, text: str) -> np.ndarray:
        """UTF-8 bytes of the text, int32 [n]."""
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int32)

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The text of the bytes, the end of text left out, ids above 256 as U+FFFD; `ValueError` below 0."""
        return b"".join(self.token_bytes(int(token_id)) for token_id in token_ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The byte itself, b"" for the end of text, U+FFFD above; `ValueError` below 0."""
        if token_id < 0:
            raise ValueError(f"token ids are 0 or more, got {token_id}")
        if token_id > NUM_BYTES:
            return REPLACEMENT.encode()
        return b"" if token_id == NUM_BYTES else bytes([token_id])

    def save(self, folder: Path) -> None:
        """Write it as byte-level BPE without merges, which gives the same ids in every tool that reads such files."""
        alphabet = _byte_alphabet()
        tokenizer = _byte_level_bpe(models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[]))
        # Without merges, splitting the text into words first would change nothing but the time it takes.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.add_special_tokens([_special(END_OF_TEXT)])
        _write_tokenizer(folder, tokenizer, {"tokenizer_config.json": _own_settings()})


def _is_byte_tokenizer(description: Mapping[str, Any]) -> bool:
    """True iff a parsed `tokenizer.json` gives the ids of `ByteTokenizer` (it need not have been written by it)."""
    model = description.get("model") or {}
    splitter = description.get("pre_tokenizer") or {}
    added = [(token["id"], token["content"]) for token in description.get("added_tokens", ())]
    vocabulary = {char: byte for byte, char in enumerate(_byte_alphabet())}
    return (
        model.get("type") == "BPE"
        and model.get("merges") == []
        and model.get("vocab") in (vocabulary, vocabulary | {END_OF_TEXT: NUM_BYTES})
        and added == [(NUM_BYTES, END_OF_TEXT)]
        and description.get("normalizer") is None
        and splitter.get("type") == "ByteLevel"
        and not splitter.get("add_prefix_space")
    )


# ------------------------------------------------------------------------------------------------- trained and saved


class SavedTokenizer:
    """A tokenizer of the `tokenizers` library, with the end-of-text token known."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos_token: str, companions: Mapping[str, str]) -> None:
        eos_token_id = tokenizer.token_to_id(eos_token)
        if eos_token_id is None:
            raise ValueError(f"the end-of-text token {eos_token!r} is not in the vocabulary")
        tokenizer.encode_special_tokens = True  # text that looks like a special token stays text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._companions = dict(companions)
        self._eos_token = eos_token
        self.eos_token_id = eos_token_id
        self.vocab_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self._added = tokenizer.get_added_tokens_decoder()
        self._convert = _token_conversion(json.loads(tokenizer.to_str()))

    def encode(self, text: str) -> np.ndarray:
        """Token ids of the text, int32 [n], without the tokens a post-processor would add."""
        _utf8(text)
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """The text of the tokens, special ones left out, ids from V on as U+FFFD; `ValueError` below 0."""
        runs: list[list[int]] = [[]]
        for token_id in map(int, token_ids):
            if self._is_known(token_id):
                runs[-1].append(token_id)
            else:
                runs.append([])
        return REPLACEMENT.join(self._tokenizer.decode(run, skip_special_tokens=True) for run in runs)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, U+FFFD's for an id from V on; `ValueError` below 0.

        The space that SentencePiece-like tokenizers put before a text belongs to its first token.
        """
        return self._all_token_bytes[token_id] if self._is_known(token_id) else REPLACEMENT.encode()

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and the companion files it was read with, or settings that name the end of text."""
        settings = {"tokenizer_config.json": _own_settings(self._eos_token)}
        _write_tokenizer(folder, self._tokenizer, settings | self._companions)

    def _is_known(self, token_id: int) -> bool:
        if token_id < 0:
            raise ValueError(f"token ids are 0 or more, got {token_id}")
        return token_id < self.vocab_size

    @cached_property
    def _all_token_bytes(self) -> list[bytes]:
        contents = [b""] * self.vocab_size  # an id without a token stands for nothing
        for token, token_id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            added = self._added.get(token_id)
            if added is None:
                contents[token_id] = self._convert(token)
            elif not added.special:
                contents[token_id] = added.content.encode("utf-8")
        return contents


def _train_bpe(spec: str, corpus: Corpus) -> SavedTokenizer:
    size_text = spec.removeprefix("bpe:")
    if not size_text.isdecimal() or int(size_text) <= NUM_BYTES:
        raise DataError(
            f"data.tokenizer = {spec!r}: SIZE must be a whole number of at least {NUM_BYTES + 1} (the bytes and the "
            "end of text), for example 'bpe:4096'"
        )
    size = int(size_text)
    tokenizer = _byte_level_bpe(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=_byte_alphabet(), special_tokens=[_special(END_OF_TEXT)], show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in corpus.train), trainer)
    if tokenizer.get_vocab_size() < size:
        raise DataError(
            f"data.tokenizer = {spec!r}: the corpus yields only {tokenizer.get_vocab_size()} tokens; "
            f"set 'bpe:{tokenizer.get_vocab_size()}' or less, or train on more text"
        )
    return SavedTokenizer(tokenizer, END_OF_TEXT, {})


def _byte_level_bpe(model: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _special(token: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, special=True, normalized=False)


def _find_eos(path: Path, tokenizer: tokenizers.Tokenizer, companions: Mapping[str, str]) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        eos = _parse_json(path.parent / name, companions.get(name, "{}")).get("eos_token")
        token = eos.get("content") if isinstance(eos, dict) else eos
        if token is None:
            continue
        if tokenizer.token_to_id(token) is None:
            raise DataError(f"{path.parent / name}: eos_token = {token!r} is not in the vocabulary of {path}")
        return token
    for token in WELL_KNOWN_EOS:
        if tokenizer.token_to_id(token) is not None:
            return token
    raise DataError(
        f"{path}: no end-of-text token. nextn ends every document with one: name it as eos_token in a "
        f"tokenizer_config.json beside the file, or add one of {', '.join(WELL_KNOWN_EOS)}"
    )


# ------------------------------------------------------------------------------------------------------ bytes of tokens


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte 0..255 in byte-level vocabularies.

    Bytes that Latin-1 prints stand for themselves; the others, in order, for U+0100, U+0101, ... (GPT-2's convention).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x100 + NUM_BYTES))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(NUM_BYTES)]


class _ByteLevel:
    """Tokens written in the byte alphabet; one with other characters stands for itself, as in the library's decoder."""

    def __init__(self) -> None:
        self._bytes = {char: byte for byte, char in enumerate(_byte_alphabet())}

    def __call__(self, token: str) -> bytes:
        if any(char not in self._bytes for char in token):
            return token.encode("utf-8")
        return bytes(self._bytes[char] for char in token)


def _sentence_piece(token: str) -> bytes:
    """Tokens written as text with U+2581 for a space, and `<0x0A>` for a lone byte."""
    lone_byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(lone_byte[1]) if lone_byte else token.replace("\u2581", " ").encode("utf-8")


def _token_conversion(description: Mapping[str, Any]) -> Callable[[str], bytes]:
    """How the tokens of a parsed `tokenizer.json` turn into bytes, by its decoder."""
    decoder = description.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    if any(step.get("type") == "ByteLevel" for step in steps):
        return _ByteLevel()
    if any(step.get("type") == "Metaspace" or step.get("pattern") == {"String": "\u2581"} for step in steps):
        return _sentence_piece
    raise DataError(
        f"the tokenizer's decoder is {decoder.get('type')!r}; nextn needs tokens that stand for definite bytes: "
        "byte-level BPE, or SentencePiece-like (decoder ByteLevel, Metaspace, or Replace of U+2581)"
    )


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half of a surrogate pair at character {error.start}, which is not valid Unicode"
        ) from None


# --------------------------------------------------------------------------------------------------------------- files


def _own_settings(eos_token: str = END_OF_TEXT) -> str:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(settings, indent=2) + "\n"


def _write_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer, companions: Mapping[str, str]) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    for name, content in companions.items():
        (folder / name).write_text(content, encoding="utf-8")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); a saved tokenizer is a folder with tokenizer.json, or that file"
        ) from None


def _parse_json(path: Path, content: str) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise DataError(f"{path}: got a JSON {type(parsed).__name__}, wanted an object")
    return parsed
