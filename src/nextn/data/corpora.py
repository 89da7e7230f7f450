"""Corpora by name: documents in a fixed order, part of them held out for validation.

The same name on the same files gives the same documents, the same split and the same `sha256`, which goes into a run's
provenance. What is held out is decided by a hash of each document's name, so a document stays on its side when others
are added or removed, and the seed of a run has no say in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from nextn.config import DataConfig
from nextn.data.sources import PYTHON_INSTALLED, PYTHON_STDLIB, DroppedFile, SourceText, is_path, read_source
from nextn.errors import DataError

Split = Literal["train", "validation"]

LONGEST_PIECE = 65536
"""Characters in a piece of a corpus that is a single text (see `cut`)."""

SHORTEST_COUNTED_LINE = 16
"""Characters (white space around the line not counted) below which a line is too ordinary to mark a repetition."""

LARGEST_REPEATED_SHARE = 1 / 3
"""Share of a file's counted lines that may occur in files before it. Hand-written Python repeats about a tenth."""


@dataclass(frozen=True)
class Document:
    """One text that is packed as a whole: a file, a piece of a file, or a record. `name` is unique in its corpus."""

    name: str
    text: str


@dataclass(frozen=True)
class FileRecord:
    """One file's contribution to one split: `sha256` and `num_bytes` of that text in UTF-8.

    A file that is one document has one record; a file of many documents (JSONL, a cut text) has one for each split.
    """

    name: str
    sha256: str
    num_bytes: int
    split: Split


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out.

    Attributes:
        name: the corpus's name; for a path, its last part.
        train, validation: the two splits, both non-empty (but for `hold_out_all`), in the order of the source.
        files: what was read, by file and split.
        dropped: files found and left out, with the reason.
    """

    name: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    files: tuple[FileRecord, ...]
    dropped: tuple[DroppedFile, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of the list of files: equal iff the same names gave the same text to the same splits."""
        lines = (f"{file.sha256} {file.num_bytes} {file.split} {file.name}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def load_corpus(config: DataConfig) -> Corpus:
    """Read the corpus that `config.corpus` names.

    | name | documents |
    |---|---|
    | `python-stdlib` | each source file of the running interpreter's standard library, tests left out |
    | `python-installed` | the same, then those of the installed packages nextn depends on; repetitions dropped |
    | path of a folder | each file with a text suffix (`nextn.data.sources.TEXT_SUFFIXES`), also compressed as `.gz` |
    | path of a `.jsonl` or `.jsonl.gz` file | the field `config.text_field` of each line |
    | path of any other file | the text, cut into pieces (see `cut`) |
    | `hf:NAME[:SPLIT]` | rows of a Hugging Face data set, streamed; limit it with `max_bytes` |

    Texts of white space alone are left out. With `max_bytes` reading stops after that many UTF-8 bytes of text; the
    document that goes over the limit is shortened to it. If all that was read is one text, it is cut into pieces so
    that some can be held out; otherwise documents are held out whole (see `is_held_out`). If that rule leaves one side
    empty, which happens with few documents, the document with the lowest hash is held out, or the one with the highest
    hash is trained on.

    A folder's files that are not readable as UTF-8 text are left out and listed in `Corpus.dropped`.

    Raises:
        DataError: the corpus is missing, empty, too small to hold something out of, or a single file that is not
            readable as UTF-8 text.
    """
    dropped: list[DroppedFile] = []
    texts: Iterable[SourceText] = read_source(config.corpus, config.text_field, dropped)
    texts = (text for text in texts if text.text and not text.text.isspace())
    if config.corpus in (PYTHON_STDLIB, PYTHON_INSTALLED):
        texts = drop_repetitions(texts, dropped)
    if config.max_bytes is not None:
        texts = _up_to(texts, config.max_bytes)
    found = list(texts)
    if not found:
        limit = "" if config.max_bytes is None else f" in its first data.max_bytes = {config.max_bytes} bytes"
        raise DataError(
            f"data.corpus = {config.corpus!r} is empty: no text{limit}{_left_out(dropped)}; name a corpus that has some"
        )
    if len(found) == 1:
        whole = found[0]
        pieces = cut(whole.text)
        found = [SourceText(whole.file, f"{whole.name}#{index:05d}", piece) for index, piece in enumerate(pieces)]
    held_out = _held_out_names([text.name for text in found], config)
    return Corpus(
        name=_short_name(config.corpus),
        train=tuple(Document(text.name, text.text) for text in found if text.name not in held_out),
        validation=tuple(Document(text.name, text.text) for text in found if text.name in held_out),
        files=_file_records(found, held_out),
        dropped=tuple(dropped),
    )


def hold_out_all(corpus: Corpus, trained_sha256: Collection[str]) -> Corpus:
    """The corpus for a model that was not trained on it: all documents are for validation, none to train on.

    Documents whose text the model was trained on all the same (the standard library inside `python-installed`, say) are
    dropped, with that as the reason.

    Args:
        corpus: both splits of it.
        trained_sha256: hashes of the texts trained on, as in `FileRecord.sha256`.

    Raises:
        DataError: nothing is left.
    """
    sizes = {}  # of the documents to drop; only a file that is one document can be recognised
    for document in corpus.train + corpus.validation:
        content = document.text.encode("utf-8")
        if hashlib.sha256(content).hexdigest() in trained_sha256:
            sizes[document.name] = len(content)
    validation = tuple(document for document in corpus.train + corpus.validation if document.name not in sizes)
    if not validation:
        raise DataError(f"the model was trained on every text of the corpus {corpus.name}; name another corpus")
    return replace(
        corpus,
        train=(),
        validation=validation,
        files=tuple(replace(file, split="validation") for file in corpus.files if file.name not in sizes),
        dropped=(
            *corpus.dropped,
            *(DroppedFile(name, size, "the model was trained on it") for name, size in sizes.items()),
        ),
    )


def _left_out(dropped: list[DroppedFile]) -> str:
    if not dropped:
        return ""
    first = dropped[0]
    return f" (files left out: {len(dropped)}, the first {first.name}: {first.reason})"


# ------------------------------------------------------------------------------------------------------- the two sides


def hash_position(name: str) -> float:
    """Position of a name in [0, 1): the first 53 bits of its SHA-256 (as many as a float64 holds exactly).

    >>> round(hash_position("json/decoder.py"), 4)
    0.2312
    """
    return (int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big") >> 11) / 2**53


def is_held_out(name: str, validation_share: float) -> bool:
    """True iff the document of that name is for validation: its hash falls below `validation_share`.

    >>> is_held_out("json/decoder.py", 0.25), is_held_out("json/decoder.py", 0.02)
    (True, False)
    """
    return hash_position(name) < validation_share


def _held_out_names(names: list[str], config: DataConfig) -> frozenset[str]:
    if len(names) < 2:
        raise DataError(
            f"data.corpus = {config.corpus!r} has {len(names)} document, and at least 2 are needed to train on one "
            "part and hold out another; give a longer text or more files"
        )
    held_out = {name for name in names if is_held_out(name, config.validation_share)}
    by_hash = sorted(names, key=hash_position)
    if not held_out:
        held_out.add(by_hash[0])
    elif len(held_out) == len(names):
        held_out.remove(by_hash[-1])
    return frozenset(held_out)


def _file_records(texts: list[SourceText], held_out: frozenset[str]) -> tuple[FileRecord, ...]:
    hashes: dict[tuple[str, Split], tuple[hashlib._Hash, int]] = {}
    for text in texts:
        key: tuple[str, Split] = (text.file, "validation" if text.name in held_out else "train")
        content = text.text.encode("utf-8")
        digest, num_bytes = hashes.get(key, (hashlib.sha256(), 0))
        digest.update(content)
        hashes[key] = (digest, num_bytes + len(content))
    return tuple(
        FileRecord(name=file, sha256=digest.hexdigest(), num_bytes=num_bytes, split=split)
        for (file, split), (digest, num_bytes) in hashes.items()
    )


def _short_name(corpus: str) -> str:
    """The name without the folders a path lies in, which say nothing about the text."""
    if not is_path(corpus):
        return corpus
    return corpus.rstrip("/").rpartition("/")[2] or corpus


# ------------------------------------------------------------------------------------------------- cutting and dropping


def cut(text: str) -> list[str]:
    """Cut one text into pieces that join to it again, so that part of it can be held out.

    A piece has at least `LONGEST_PIECE` characters, or a twentieth of the text if that is less, and ends at the next
    blank line, or else the next line end, if there is one within as many characters again. A rest shorter than half
    a piece stays with the piece before it.

    >>> pieces = cut("a line\\n\\n" * 100)
    >>> len(pieces), pieces[0]
    (20, 'a line\\n\\na line\\n\\na line\\n\\na line\\n\\na line\\n\\n')
    """
    length = min(LONGEST_PIECE, max(1, len(text) // 20))
    pieces = []
    start = 0
    while start < len(text):
        end = _end_of_piece(text, start + length, length)
        if 2 * (len(text) - end) < length:
            end = len(text)
        pieces.append(text[start:end])
        start = end
    return pieces


def _end_of_piece(text: str, earliest: int, window: int) -> int:
    for separator in ("\n\n", "\n"):
        # A separator that straddles `earliest` counts: the piece may end right there.
        at = text.find(separator, max(0, earliest - len(separator)), earliest + window)
        if at >= 0:
            return at + len(separator)
    return earliest


def drop_repetitions(texts: Iterable[SourceText], dropped: list[DroppedFile]) -> Iterator[SourceText]:
    """Leave out files that repeat files before them: generated and copied sources flatter every measure of prediction.

    Of a file's distinct lines, white space around them removed, those of `SHORTEST_COUNTED_LINE` characters or more are
    counted. The file is dropped if more than `LARGEST_REPEATED_SHARE` of them occur in the files kept so far, or if its
    text is exactly that of one of them. What is dropped is appended to `dropped`. The order of lines plays no part; a
    file without any counted line is dropped as an exact copy only.
    """
    seen_lines: set[str] = set()
    seen_texts: set[bytes] = set()
    for text in texts:
        content = text.text.encode("utf-8")
        digest = hashlib.sha256(content).digest()
        stripped = {line.strip() for line in text.text.splitlines()}
        lines = {line for line in stripped if len(line) >= SHORTEST_COUNTED_LINE}
        if digest in seen_texts:
            dropped.append(DroppedFile(text.name, len(content), "exact copy of an earlier file"))
        elif len(lines & seen_lines) > LARGEST_REPEATED_SHARE * len(lines):
            dropped.append(
                DroppedFile(text.name, len(content), "more than a third of its lines occur in earlier files")
            )
        else:
            seen_texts.add(digest)
            seen_lines |= lines
            yield text


def _up_to(texts: Iterable[SourceText], max_bytes: int) -> Iterator[SourceText]:
    """The first `max_bytes` bytes of text; the last document is shortened, to a whole character."""
    left = max_bytes
    for text in texts:
        content = text.text.encode("utf-8")
        if len(content) > left:
            shortened = content[:left].decode("utf-8", errors="ignore")
            if shortened and not shortened.isspace():
                yield SourceText(text.file, text.name, shortened)
            return
        left -= len(content)
        yield text
