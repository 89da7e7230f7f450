"""Read text from its source: Python sources on this machine, files, folders, JSONL, Hugging Face data sets.

Every source yields `SourceText` in an order that depends on names only, never on the file system. Text is taken as it
stands (line ends included); only a leading byte-order mark is removed. Compressed files (`.gz`) are read as what they
contain. A file that a user named is read whole or refused with an error; of a folder and of the Python sources, whose
files nobody picked one by one, a file that cannot be read or is not UTF-8 is left out and reported.
"""

from __future__ import annotations

import difflib
import gzip
import importlib
import importlib.metadata
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nextn.errors import DataError

PYTHON_STDLIB = "python-stdlib"
PYTHON_INSTALLED = "python-installed"
HUB_PREFIX = "hf:"

TEXT_SUFFIXES = frozenset(
    {".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".htm", ".xml"}  # prose
    | {".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".ini", ".cfg"}  # data
    | {".py", ".pyi", ".ipynb", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala"}  # code
    | {".js", ".jsx", ".ts", ".tsx", ".css", ".go", ".rs", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs"}
    | {".ml", ".swift", ".sh", ".bash", ".sql"}
)
"""Suffixes (compared in lower case, a trailing `.gz` set aside) of the files that a folder contributes."""


@dataclass(frozen=True)
class SourceText:
    """One text as found.

    Attributes:
        file: the file (or data set) it was read from, relative to the corpus; what provenance lists.
        name: the document's own name, unique in the corpus; equal to `file` when the file is one document.
        text: the text.
    """

    file: str
    name: str
    text: str


@dataclass(frozen=True)
class DroppedFile:
    """A file that was found and left out (or left off), with the reason in words; `num_bytes` is its size."""

    name: str
    num_bytes: int
    reason: str


class UnreadableFileError(DataError):
    """One file cannot be read as text; `reason` says why without naming the path, for provenance."""

    def __init__(self, path: Path, reason: str, advice: str = "") -> None:
        super().__init__(f"{path}: {reason}{advice}")
        self.reason = reason


def is_path(corpus: str) -> bool:
    """True iff a corpus of that name is looked for in the file system."""
    return corpus not in (PYTHON_STDLIB, PYTHON_INSTALLED) and not corpus.startswith(HUB_PREFIX)


def read_source(corpus: str, text_field: str, dropped: list[DroppedFile]) -> Iterator[SourceText]:
    """The texts of a corpus by name (see `nextn.data.corpora.load_corpus`); files left out are appended to `dropped`.

    Raises:
        DataError: nothing has that name, or a single file that it names cannot be read as text.
    """
    if corpus == PYTHON_STDLIB:
        return _stdlib_sources(dropped)
    if corpus == PYTHON_INSTALLED:
        return _installed_sources(dropped)
    if corpus.startswith(HUB_PREFIX):
        return _hub_rows(corpus.removeprefix(HUB_PREFIX), text_field)
    path = Path(corpus).expanduser()
    if corpus and path.is_dir():
        return _folder_texts(path, text_field, dropped)
    if path.is_file():
        return _file_texts(path, path.name, text_field)
    message = (
        f"data.corpus = {corpus!r} is neither a known corpus nor an existing path"
        f"{'' if path.is_absolute() else f' below {Path.cwd()}'}. It may be {PYTHON_STDLIB}, {PYTHON_INSTALLED}, "
        "hf:NAME[:SPLIT], or the path of a text file, folder or .jsonl file"
    )
    nearest = difflib.get_close_matches(corpus, [PYTHON_STDLIB, PYTHON_INSTALLED], n=1)
    raise DataError(message + (f"; did you mean {nearest[0]!r}?" if nearest else ""))


# ------------------------------------------------------------------------------------------------------ Python sources


def is_test_code(relative_path: str) -> bool:
    """True iff a Python file is test code, by its path: a folder `test*`, `*_test` or `*_tests`, or a file `test_*.py`,
    `*_test.py` or `conftest.py`.

    >>> is_test_code("idlelib/idle_test/test_run.py"), is_test_code("unittest/case.py")
    (True, False)
    """
    *folders, file = relative_path.split("/")
    in_test_folder = any(name.startswith("test") or name.endswith(("_test", "_tests")) for name in folders)
    return in_test_folder or file.startswith("test_") or file.endswith("_test.py") or file == "conftest.py"


def _stdlib_sources(dropped: list[DroppedFile]) -> Iterator[SourceText]:
    # `_sysconfigdata*` and `config-*` describe how this interpreter was built; without them the corpus is the same for
    # everyone who runs the same version of Python.
    root = Path(sysconfig.get_path("stdlib"))
    left_out = ("site-packages", "dist-packages", "__pycache__", "config-", "_sysconfigdata", "sitecustomize")
    names = [
        name
        for name in _files_below(root, skip=lambda part: part.startswith(left_out))
        if name.endswith(".py") and not is_test_code(name)
    ]
    return _python_texts(root, names, dropped)


def _installed_sources(dropped: list[DroppedFile]) -> Iterator[SourceText]:
    """The standard library, then nextn's dependencies in order of their names."""
    yield from _stdlib_sources(dropped)
    for distribution in _dependencies("nextn"):
        if distribution.files is None:
            dropped.append(DroppedFile(distribution.name, 0, "package without a list of its files"))
            continue
        names = sorted({file.as_posix() for file in distribution.files if file.suffix == ".py"})
        names = [name for name in names if not name.startswith("../") and not is_test_code(name)]
        yield from _python_texts(Path(str(distribution.locate_file(""))), names, dropped)


def _dependencies(project: str) -> list[importlib.metadata.Distribution]:
    """Installed packages that `project` needs, directly or not, sorted by name; optional extras are not followed."""
    try:
        waiting = list(importlib.metadata.distribution(project).requires or ())
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            f"data.corpus = {PYTHON_INSTALLED!r} reads the packages {project} depends on, and {project} is not "
            "installed as a package here; install it with pip"
        ) from None
    found: dict[str, importlib.metadata.Distribution] = {}
    while waiting:
        requirement, _, marker = waiting.pop().partition(";")
        name = re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0]
        name = re.sub(r"[-_.]+", "-", name).lower()
        if "extra" in marker or name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # needed on another platform or Python version only
            continue
        waiting.extend(found[name].requires or ())
    return [found[name] for name in sorted(found)]


def _python_texts(root: Path, names: Iterable[str], dropped: list[DroppedFile]) -> Iterator[SourceText]:
    for name in names:
        path = root / name
        if not path.is_file():  # listed by its package, removed since
            continue
        yield from _text_or_dropped(path, name, "", dropped)


# --------------------------------------------------------------------------------------------------- files and folders


def _folder_texts(root: Path, text_field: str, dropped: list[DroppedFile]) -> Iterator[SourceText]:
    """Every file below `root` with a suffix of `TEXT_SUFFIXES`; hidden files and folders are not entered."""
    names = [
        name for name in _files_below(root, skip=lambda part: part.startswith(".")) if _suffix(name) in TEXT_SUFFIXES
    ]
    if not names:
        raise DataError(
            f"{root}: the folder has no text file. Files are taken by their suffix: {' '.join(sorted(TEXT_SUFFIXES))} "
            "(also with .gz added)"
        )
    for name in names:
        yield from _text_or_dropped(root / name, name, text_field, dropped)


def _text_or_dropped(path: Path, name: str, text_field: str, dropped: list[DroppedFile]) -> Iterator[SourceText]:
    """The texts of one file among many; one that cannot be read is dropped, a JSONL file from the bad line on."""
    try:
        yield from _file_texts(path, name, text_field)
    except UnreadableFileError as error:
        try:
            num_bytes = path.stat().st_size
        except OSError:
            num_bytes = 0
        dropped.append(DroppedFile(name, num_bytes, error.reason))


def _file_texts(path: Path, name: str, text_field: str) -> Iterator[SourceText]:
    if _suffix(name) == ".jsonl":
        yield from _jsonl_records(path, name, text_field)
        return
    content = _read_bytes(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error.start, content[error.start]) from None
    yield SourceText(file=name, name=name, text=text.removeprefix("\ufeff"))


def _jsonl_records(path: Path, name: str, text_field: str) -> Iterator[SourceText]:
    offset = 0
    for number, line in enumerate(_read_lines(path), start=1):
        where = f"{path}, line {number}"
        try:
            line_text = line.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset + error.start, line[error.start], f" (line {number})") from None
        offset += len(line)
        if not line_text.strip():
            continue
        try:
            record = json.loads(line_text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not valid JSON ({error.msg} at column {error.colno}). Every line must be one JSON object"
            ) from None
        yield SourceText(file=name, name=f"{name}:{number}", text=_field(record, text_field, where))


def _field(record: Any, text_field: str, where: str) -> str:
    """The text of one JSONL record or data set row."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: got a {type(record).__name__}, wanted an object with the field {text_field!r}")
    if text_field not in record:
        raise DataError(
            f"{where}: no field {text_field!r}; it has {', '.join(map(repr, record)) or 'no fields'}. "
            "Set data.text_field to the one that holds the text"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} holds a {type(text).__name__}, wanted text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {text_field!r} holds half of a surrogate pair at character {error.start}; this is no text"
        ) from None
    return text


# ---------------------------------------------------------------------------------------------------------- data sets


def _hub_rows(name_and_split: str, text_field: str) -> Iterator[SourceText]:
    """Rows of a Hugging Face data set, streamed; `NAME[:SPLIT]`, split `train` unless given."""
    name, _, split = name_and_split.partition(":")
    split = split or "train"
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise DataError(
            f"data.corpus = 'hf:{name_and_split}' needs the datasets library: pip install datasets"
        ) from None
    file = f"{HUB_PREFIX}{name}:{split}"
    try:
        for index, row in enumerate(datasets.load_dataset(name, split=split, streaming=True)):
            yield SourceText(file=file, name=f"{file}:{index}", text=_field(row, text_field, f"{file}, row {index}"))
    except (OSError, ValueError) as error:  # unknown name, split or configuration; no network
        raise DataError(f"data.corpus = 'hf:{name_and_split}' cannot be read: {error}") from error


# ------------------------------------------------------------------------------------------------------------- reading


def _files_below(root: Path, skip: Callable[[str], bool]) -> list[str]:
    """Relative names of the files below `root`, sorted, with forward slashes; without files and folders to `skip`."""
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not skip(name)]
        relative = Path(folder).relative_to(root)
        names.extend((relative / name).as_posix() for name in files if not skip(name))
    return sorted(names)


def _suffix(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


def _open(path: Path) -> gzip.GzipFile | BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _read_lines(path: Path) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            yield from file
    except (EOFError, zlib.error, OSError) as error:  # EOFError, zlib.error: truncated or damaged .gz
        raise UnreadableFileError(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _read_bytes(path: Path) -> bytes:
    return b"".join(_read_lines(path))


def _not_utf8(path: Path, offset: int, byte: int, detail: str = "") -> UnreadableFileError:
    return UnreadableFileError(
        path,
        f"byte 0x{byte:02x} at offset {offset}{detail} is not UTF-8",
        ". Convert the file, for example with iconv -f LATIN1 -t UTF-8, or leave it out of the corpus",
    )
