"""Corpora: what is read, what is held out, what is refused."""

import gzip
import hashlib
import json
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextn.config import DataConfig
from nextn.data import sources
from nextn.data.corpora import (
    LARGEST_REPEATED_SHARE,
    SHORTEST_COUNTED_LINE,
    Corpus,
    _up_to,
    cut,
    drop_repetitions,
    hold_out_all,
    load_corpus,
)
from nextn.data.sources import DroppedFile, SourceText, is_test_code
from nextn.errors import DataError

PROSE = "".join(f"Sentence number {number} of a text.\n\n" for number in range(200))


def load(path: Path | str, **settings) -> Corpus:
    return load_corpus(DataConfig(corpus=str(path), **settings))


def write_folder(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))
    return folder


def documents_of(corpus: Corpus) -> dict[str, str]:
    return {document.name: document.text for document in corpus.train + corpus.validation}


# ------------------------------------------------------------------------------------------------------ Python sources


def test_python_stdlib_has_the_sources_without_tests_and_site_packages():
    corpus = load("python-stdlib")
    names = list(documents_of(corpus))
    assert len(names) > 500
    assert {"json/decoder.py", "argparse.py", "asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if is_test_code(name) or "site-packages" in name or "_sysconfigdata" in name]
    assert not [name for name in names if Path(name).is_absolute()]
    assert len(set(names)) == len(names)


def test_python_stdlib_is_the_same_corpus_every_time():
    first, second = load("python-stdlib"), load("python-stdlib")
    assert first == second
    assert first.sha256 == second.sha256


def test_python_stdlib_holds_out_about_the_share_asked_for():
    corpus = load("python-stdlib", validation_share=0.2)
    share = len(corpus.validation) / (len(corpus.validation) + len(corpus.train))
    assert 0.14 < share < 0.26
    assert not {document.name for document in corpus.train} & {document.name for document in corpus.validation}


@pytest.mark.parametrize(
    ("path", "test_code"),
    [
        ("test/test_json.py", True),
        ("tkinter/test/widget_tests.py", True),
        ("idlelib/idle_test/htest.py", True),
        ("sympy/core/tests/test_expr.py", True),
        ("torch/testing/_internal/common_device_type.py", True),
        ("package/test_it.py", True),
        ("package/it_test.py", True),
        ("conftest.py", True),
        ("doctest.py", False),
        ("unittest/mock.py", False),
        ("contest/latest.py", False),
        ("jinja2/tests.py", False),
    ],
)
def test_test_code_is_known_by_its_path(path, test_code):
    assert is_test_code(path) == test_code


def test_python_sources_that_are_not_utf8_are_left_out_and_reported(tmp_path, monkeypatch):
    write_folder(
        tmp_path, {"a.py": "first = 1\n", "b/c.py": "second = 2\n", "b/test_c.py": "", "site-packages/d.py": "x"}
    )
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\nname = '\xe9'\n")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    corpus = load("python-stdlib")
    assert documents_of(corpus).keys() == {"a.py", "b/c.py"}
    assert corpus.dropped == (DroppedFile("latin.py", 29, "byte 0xe9 at offset 26 is not UTF-8"),)


def test_python_installed_reads_the_dependencies_and_not_the_development_tools():
    names = {distribution.name.lower() for distribution in sources._dependencies("nextn")}
    assert {"torch", "numpy", "sympy", "networkx"} <= names
    assert not {"nextn", "pytest", "hypothesis", "tensorboard"} & names


def test_python_installed_continues_the_standard_library_with_packages(monkeypatch):
    monkeypatch.setattr(
        sources, "_stdlib_sources", lambda dropped: iter([SourceText("json.py", "json.py", "import re\n")])
    )
    corpus = load("python-installed", max_bytes=300_000)
    names = list(documents_of(corpus))
    assert "json.py" in names
    assert len(names) > 10
    assert sum(file.num_bytes for file in corpus.files) == 300_000


def test_python_installed_says_when_the_project_is_not_installed():
    with pytest.raises(DataError, match="not installed as a package"):
        sources._dependencies("no-such-project-as-this")


# ------------------------------------------------------------------------------------------------------- the two sides


def test_a_document_stays_on_its_side_when_others_go(tmp_path):
    folder = write_folder(tmp_path, {f"{number:02d}.txt": f"text {number}" for number in range(60)})
    before = {document.name for document in load(folder, validation_share=0.3).validation}
    for number in range(0, 60, 3):
        (folder / f"{number:02d}.txt").unlink()
    after = load(folder, validation_share=0.3)
    assert {document.name for document in after.validation} == before & documents_of(after).keys()


def test_the_law_above_catches_a_split_by_index():
    names = [f"{number:02d}.txt" for number in range(60)]
    left = [name for index, name in enumerate(names) if index % 3]
    before, after = set(names[::4]), set(left[::4])
    assert after != before & set(left)


@pytest.mark.parametrize("share", [0.0001, 0.02, 0.5, 0.9999])
def test_two_documents_are_enough_for_both_sides(tmp_path, share):
    corpus = load(write_folder(tmp_path, {"a.txt": "one", "b.txt": "two"}), validation_share=share)
    assert len(corpus.train) == len(corpus.validation) == 1


def test_a_larger_share_holds_out_the_same_documents_and_more(tmp_path):
    folder = write_folder(tmp_path, {f"{number}.txt": f"text {number}" for number in range(100)})
    small, large = (load(folder, validation_share=share).validation for share in (0.1, 0.4))
    assert set(small) < set(large)


# --------------------------------------------------------------------------------------------------- files and folders


def test_a_single_text_is_cut_so_that_some_is_held_out(tmp_path):
    (tmp_path / "novel.txt").write_text(PROSE, encoding="utf-8")
    corpus = load(tmp_path / "novel.txt", validation_share=0.1)
    assert corpus.train
    assert corpus.validation
    assert "".join(text for _, text in sorted(documents_of(corpus).items())) == PROSE
    assert all(text.endswith("\n\n") for text in documents_of(corpus).values())
    assert corpus.name == "novel.txt"
    assert {file.name for file in corpus.files} == {"novel.txt"}


def test_a_folder_with_one_text_is_cut_like_the_text(tmp_path):
    folder = write_folder(tmp_path / "folder", {"novel.txt": PROSE})
    assert load(folder).files == load(folder / "novel.txt").files


def test_a_folder_gives_its_text_files_sorted_by_name(tmp_path):
    texts = {"b.txt": "two", "a/z.py": "one", "c.MD": "three", ".hidden/d.txt": "no", "e.bin": "no", "f.png": "no"}
    folder = write_folder(tmp_path, texts)
    (folder / "g.txt.gz").write_bytes(gzip.compress(b"four"))
    corpus = load(folder)
    assert documents_of(corpus) == {"a/z.py": "one", "b.txt": "two", "c.MD": "three", "g.txt.gz": "four"}
    assert [file.name for file in corpus.files] == ["a/z.py", "b.txt", "c.MD", "g.txt.gz"]


def test_a_file_record_holds_the_hash_and_size_of_the_file(tmp_path):
    corpus = load(write_folder(tmp_path, {"a.txt": "naïve", "b.txt": "two"}))
    record = next(file for file in corpus.files if file.name == "a.txt")
    assert record.sha256 == hashlib.sha256((tmp_path / "a.txt").read_bytes()).hexdigest()
    assert record.num_bytes == 6


@pytest.mark.parametrize("change", [{"a.txt": "one!"}, {"c.txt": "three"}])
def test_the_corpus_hash_changes_with_any_text(tmp_path, change):
    folder = write_folder(tmp_path, {"a.txt": "one", "b.txt": "two"})
    before = load(folder).sha256
    assert load(folder).sha256 == before
    assert load(write_folder(folder, change)).sha256 != before


def test_the_corpus_hash_changes_with_the_split(tmp_path):
    folder = write_folder(tmp_path, {f"{number}.txt": "text" for number in range(50)})
    assert load(folder, validation_share=0.1).sha256 != load(folder, validation_share=0.5).sha256


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    corpus = load(write_folder(tmp_path, {"a.txt": "\ufeffone", "b.txt": "two"}))
    assert documents_of(corpus)["a.txt"] == "one"


# --------------------------------------------------------------------------------------------------------------- JSONL


def test_a_jsonl_file_gives_one_document_a_line(tmp_path):
    lines = [json.dumps({"content": f"text {number}", "id": number}) for number in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines[:10]) + "\n\n" + "\n".join(lines[10:]), encoding="utf-8")
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress((tmp_path / "data.jsonl").read_bytes()))
    for name in ("data.jsonl", "data.jsonl.gz"):
        corpus = load(tmp_path / name, text_field="content", validation_share=0.2)
        assert sorted(documents_of(corpus).values()) == sorted(f"text {number}" for number in range(20))
        assert f"{name}:12" in documents_of(corpus)  # line numbers count the blank line
        assert {(file.name, file.split) for file in corpus.files} == {(name, "train"), (name, "validation")}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "unfinished', r"data.jsonl, line 2: not valid JSON"),
        (b'{"body": "x", "id": 1}', r"line 2: no field 'text'; it has 'body', 'id'. Set data.text_field"),
        (b'{"text": 5}', r"line 2: field 'text' holds a int, wanted text"),
        (b'["text"]', r"line 2: got a list"),
        (b'{"text": "\\ud800"}', r"line 2: .* surrogate"),
        (b'{"text": "\xff"}', r"byte 0xff at offset 26 \(line 2\) is not UTF-8"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, message):
    (tmp_path / "data.jsonl").write_bytes(b'{"text": "one"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        load(tmp_path / "data.jsonl")


# ------------------------------------------------------------------------------------------------------------ max_bytes


@given(st.lists(st.text(alphabet="aé日🙂", min_size=1), min_size=1, max_size=5), st.integers(1, 40))
def test_max_bytes_keeps_the_first_bytes_up_to_a_whole_character(texts, max_bytes):
    kept = "".join(text.text for text in _up_to((SourceText("f", "f", text) for text in texts), max_bytes))
    assert kept == "".join(texts).encode()[:max_bytes].decode(errors="ignore")


def test_max_bytes_counts_bytes_not_characters(tmp_path):
    folder = write_folder(tmp_path, {"a.txt": "é" * 10, "b.txt": "é" * 10, "c.txt": "é" * 10})
    corpus = load(folder, max_bytes=31)
    assert sorted(documents_of(corpus).values(), key=len) == ["é" * 5, "é" * 10]


# ------------------------------------------------------------------------------------------------- cutting and dropping


@given(st.text(alphabet="ab \n", max_size=400))
def test_pieces_join_to_the_text_and_none_is_empty(text):
    pieces = cut(text)
    assert "".join(pieces) == text
    assert all(pieces)


def test_the_law_above_catches_a_cut_that_loses_separators():
    text = "one\n\ntwo\n\nthree"
    assert "".join(text.split("\n\n")) != text


def test_pieces_of_a_long_line_are_cut_anywhere():
    assert {len(piece) for piece in cut("a" * 1000)} == {50}


def repeats_too_much(texts: list[SourceText]) -> bool:
    """True iff some text breaks the promise of `drop_repetitions`."""
    seen: set[str] = set()
    for text in texts:
        lines = {line.strip() for line in text.text.splitlines() if len(line.strip()) >= SHORTEST_COUNTED_LINE}
        if len(lines & seen) > LARGEST_REPEATED_SHARE * len(lines):
            return True
        seen |= lines
    return len({text.text for text in texts}) < len(texts)


LINES = st.lists(st.integers(0, 12).map(lambda n: f"    this is line number {n}\n" if n < 10 else "pass\n"), max_size=8)


@given(st.lists(LINES.map("".join), max_size=8))
def test_what_is_kept_repeats_little_and_the_rest_is_reported(contents):
    texts = [SourceText(f"{index}.py", f"{index}.py", text) for index, text in enumerate(contents)]
    dropped: list[DroppedFile] = []
    kept = list(drop_repetitions(texts, dropped))
    assert not repeats_too_much(kept)
    assert sorted([text.name for text in kept] + [file.name for file in dropped]) == sorted(text.name for text in texts)
    assert kept[:1] == texts[:1]


def test_the_law_above_catches_keeping_everything_and_dropping_exact_copies_only():
    body = "".join(f"this line is number {number}\n" for number in range(10))
    texts = [SourceText(name, name, text) for name, text in [("a", body), ("b", body), ("c", body + "changed\n")]]
    assert repeats_too_much(texts)
    assert repeats_too_much([texts[0], texts[2]])
    dropped: list[DroppedFile] = []
    assert [text.name for text in drop_repetitions(texts, dropped)] == ["a"]
    assert [file.reason.split()[0] for file in dropped] == ["exact", "more"]


# ------------------------------------------------------------------------------------------------------------ data sets


def fake_datasets(load_dataset) -> types.ModuleType:
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    return module


def test_a_data_set_is_streamed_and_reading_stops_at_max_bytes(monkeypatch):
    read = []

    def load_dataset(name, split, streaming):
        assert (name, split, streaming) == ("someone/texts", "test", True)
        for index in range(10**9):
            read.append(index)
            yield {"text": f"document {index:06d}"}

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load_dataset))
    corpus = load("hf:someone/texts:test", max_bytes=15 * 40)
    assert len(documents_of(corpus)) == 40
    assert len(read) <= 41
    assert corpus.name == "hf:someone/texts:test"


def test_a_data_set_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets"):
        load("hf:someone/texts")


def test_a_data_set_that_cannot_be_read_is_an_error_of_the_user(monkeypatch):
    def load_dataset(name, split, streaming):
        raise ValueError("Bad split: tset")

    monkeypatch.setitem(sys.modules, "datasets", fake_datasets(load_dataset))
    with pytest.raises(DataError, match=r"hf:someone/texts:tset.* cannot be read: Bad split"):
        load("hf:someone/texts:tset")


# --------------------------------------------------------------------------------------------------------------- errors


def test_an_unknown_corpus_names_the_known_ones_and_the_nearest():
    with pytest.raises(DataError, match=r"python-installed, hf:NAME.*did you mean 'python-stdlib'\?"):
        load("python-stdlb")


def test_text_that_is_not_utf8_names_file_and_offset(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 100)
    with pytest.raises(DataError, match=r"latin.txt: byte 0xe9 at offset 3 is not UTF-8.*iconv"):
        load(tmp_path / "latin.txt")


@pytest.mark.parametrize("content", ["", " \n\n\t "])
def test_an_empty_corpus_is_refused(tmp_path, content):
    with pytest.raises(DataError, match=r"is empty: no text"):
        load(write_folder(tmp_path, {"a.txt": content, "b.txt": content}))


def test_a_folder_without_text_files_names_the_suffixes(tmp_path):
    with pytest.raises(DataError, match=r"no text file.* \.txt"):
        load(write_folder(tmp_path, {"a.bin": "x"}))


def test_a_corpus_of_one_character_cannot_be_split(tmp_path):
    with pytest.raises(DataError, match="at least 2 are needed"):
        load(write_folder(tmp_path, {"a.txt": "x"}))


def test_the_empty_name_is_no_corpus_and_a_relative_path_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, {"a.txt": PROSE, "b.txt": PROSE})
    with pytest.raises(DataError, match="'' is neither a known corpus"):
        load("")
    with pytest.raises(DataError, match=f"'c.txt' is neither .* existing path below {tmp_path}"):
        load("c.txt")


def test_bad_files_of_a_folder_are_left_out_and_listed(tmp_path):
    write_folder(tmp_path, {"a.txt": PROSE, "b.txt": PROSE})
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 100)
    (tmp_path / "short.txt.gz").write_bytes(gzip.compress(PROSE.encode())[:-20])
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a row"}\n{"text": "caf\xe9"}\n{"text": "another"}\n')
    corpus = load(tmp_path)
    assert documents_of(corpus).keys() == {"a.txt", "b.txt", "rows.jsonl:1"}
    assert [file.name for file in corpus.dropped] == ["dangling.txt", "latin.txt", "rows.jsonl", "short.txt.gz"]
    assert corpus.dropped[1] == DroppedFile("latin.txt", 500, "byte 0xe9 at offset 3 is not UTF-8")
    assert "(line 2)" in corpus.dropped[2].reason
    assert not any(str(tmp_path) in file.reason for file in corpus.dropped)  # reasons go into provenance


def test_a_folder_of_bad_files_alone_is_an_error_that_names_one(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 100)
    with pytest.raises(DataError, match=r"is empty.*left out: 1, the first latin.txt: byte 0xe9"):
        load(tmp_path)


def test_a_foreign_corpus_is_held_out_whole_but_for_what_was_trained_on(tmp_path):
    texts = {f"{n}.txt": f"text {n}\n{PROSE}" for n in range(20)}
    corpus = load(write_folder(tmp_path, texts))
    trained = {file.sha256 for file in corpus.files[:3]}
    foreign = hold_out_all(corpus, trained)
    assert foreign.train == ()
    kept = texts.keys() - {file.name for file in corpus.files[:3]}
    assert {document.name for document in foreign.validation} == kept == {file.name for file in foreign.files}
    assert {file.split for file in foreign.files} == {"validation"}
    assert [file.reason for file in foreign.dropped] == ["the model was trained on it"] * 3
    with pytest.raises(DataError, match="trained on every text"):
        hold_out_all(corpus, {file.sha256 for file in corpus.files})


def test_a_truncated_gzip_file_is_an_error_of_the_user(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(PROSE.encode())[:-20])
    (tmp_path / "b.txt.gz").write_bytes(b"no gzip")
    for name in ("a.txt.gz", "b.txt.gz"):
        with pytest.raises(DataError, match=f"{name}: cannot be read"):
            load(tmp_path / name)
