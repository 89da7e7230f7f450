"""Tasks of lm-evaluation-harness: the same log-likelihoods as its own adapter of transformers, and what a user sees."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import tokenizers
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import nextn
from nextn.cli.evaluate import evaluate
from nextn.config import ModelConfig, MTPConfig
from nextn.data.text_marks import TextMarks
from nextn.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from nextn.errors import ConfigError, DataError, GenerationError
from nextn.evaluation import harness
from nextn.evaluation.harness import HarnessModel
from nextn.evaluation.tasks import TaskSelection
from nextn.files import atomic_folder
from nextn.mtp import MTPModel, save_model

TASKS = Path(__file__).parent / "tasks"
CONTEXT = 64
TINY = ModelConfig(
    vocab_size=300,
    hidden_size=24,
    intermediate_size=32,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    max_position_embeddings=CONTEXT,
    initializer_range=0.3,
)
PAIRS = (
    ("the cat sat on", " the mat"),
    ("the cat sat on", " the mat"),  # the same again
    ("the cat sat on", " the hat"),
    ("the cat sat on the ", "mat"),  # the blank belongs to the continuation
    ("", "once upon a time"),  # no context
    ("wor", "ld"),  # one word in two parts
    ("a", "b"),
    ("x " * 60 + "so", " it ends here"),  # longer than the model's context
)
LEARNT = " ".join(f"{name} sat on the mat in the world, once upon a time; it ends." for name in "abcdefghijklmnopqrst")
TEXTS = ("a short text", "the cat sat on the mat, " * 9, "")
"""Whole texts: within the model's context, three times as long, and none."""


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, pair, index, metadata=("a_task", index, 1)) for index, pair in enumerate(arguments)]


def byte_pair_tokenizer(folder: Path) -> None:
    """Write a tokenizer with merges, a token that opens every text, and another that ends it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([LEARNT], trainer)
    opening = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[opening])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def checkpoint(folder: Path, tokenizer: Tokenizer) -> Path:
    """A model with two MTP modules that has half learnt a text, and nothing beside it: no recipe."""
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    model = MTPModel(config, MTPConfig(num_depths=2)).initialize(3).train()
    model.tokenizer = tokenizer
    rows = torch.from_numpy(tokenizer.encode(LEARNT)).long()[: 4 * 48].view(4, 48)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(rows).loss.backward()
        optimizer.step()
    with atomic_folder(folder) as written:
        save_model(model, written)
    return folder


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("tasks") / "bytes", ByteTokenizer())


@pytest.fixture(scope="module")
def merges_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    byte_pair_tokenizer(folder)
    return checkpoint(folder / "merges", load_tokenizer(folder))


@pytest.fixture(scope="module", params=["byte_folder", "merges_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def ours(folder: Path, kind: type[HarnessModel] = HarnessModel, **settings: Any) -> HarnessModel:
    model = nextn.load(folder)
    assert model.tokenizer is not None
    return kind(model, TextMarks.read(folder, model.tokenizer.eos_token_id), **settings)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> HFLM:
    return their_adapter(folder)


def their_adapter(folder: Path) -> HFLM:
    """The harness's own adapter over transformers' model of the same checkpoint, which knows nothing of MTP."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder)
    # Its cache for equal rows is off: it misplaces a shorter continuation of the same text (lm-eval 0.4.13).
    return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", logits_cache=False)


def scores(model: Any) -> list[tuple[float, bool]]:
    return model.loglikelihood(requests("loglikelihood", PAIRS))


def largest_difference(left: Sequence[tuple[float, bool]], right: Sequence[tuple[float, bool]]) -> float:
    return max(abs(a[0] - b[0]) for a, b in zip(left, right, strict=True))


# ------------------------------------------------------------------------------------------------------ log-likelihoods


class EncodesApart(HarnessModel):
    """Broken: encodes context and continuation each for itself."""

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)


class CutsAtTheRight(HarnessModel):
    """Broken: drops the end of what is too long."""

    def _row(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        return super()._row(context[: self.max_length + 1 - len(continuation)], continuation)


class OneLate(HarnessModel):
    """Broken: reads the state after each token, instead of the one before."""

    def _score(self, rows: Any, spans: Any) -> Any:
        return super()._score([(*row[1:], 0) for row in rows], spans)


def test_log_likelihoods_equal_those_of_the_harness_own_transformers_adapter(folder: Path, theirs: HFLM):
    expected = scores(theirs)
    assert largest_difference(scores(ours(folder)), expected) < 1e-4
    assert [greedy for _, greedy in scores(ours(folder))] == [greedy for _, greedy in expected]
    for broken in (CutsAtTheRight, OneLate):
        assert largest_difference(scores(ours(folder, broken)), expected) > 1e-2
    if folder.name == "merges":  # bytes are the same together and apart
        assert largest_difference(scores(ours(folder, EncodesApart)), expected) > 1e-2


def test_a_model_of_another_family_without_mtp_is_scored_the_same_way(tmp_path: Path):
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = LlamaConfig(vocab_size=257, max_position_embeddings=CONTEXT, initializer_range=0.3, **shape)
    LlamaForCausalLM(settings).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    model = ours(tmp_path)
    assert model.draft_length == 0
    assert largest_difference(scores(model), scores(their_adapter(tmp_path))) < 1e-4


def test_likelihoods_of_whole_texts_equal_theirs_in_windows_too(folder: Path, theirs: HFLM):
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert ours(folder).loglikelihood_rolling(asked) == pytest.approx(theirs.loglikelihood_rolling(asked), abs=1e-3)


def test_greedy_says_whether_decoding_would_write_the_continuation(folder: Path):
    model = ours(folder)
    written = generate(model, "the cat", max_gen_toks=3)[0]
    answers = model.loglikelihood(requests("loglikelihood", [("the cat", written), ("the cat", " zq")]))
    assert [greedy for _, greedy in answers] == [True, False]


@pytest.mark.parametrize(
    "settings", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": False}, {"bos_token": None}]
)
@pytest.mark.parametrize("has_template", [True, False])
def test_what_opens_a_text_is_what_transformers_puts_there(
    tmp_path: Path, settings: dict[str, Any], has_template: bool
):
    byte_pair_tokenizer(tmp_path)
    if not has_template:
        definition = json.loads((tmp_path / "tokenizer.json").read_text())
        (tmp_path / "tokenizer.json").write_text(json.dumps(definition | {"post_processor": None}))
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    plain = reference.encode("the cat", add_special_tokens=False)
    marks = TextMarks.read(tmp_path, reference.eos_token_id)
    assert [*marks.opening, *plain] == reference.encode("the cat")
    bos_token_id = reference.bos_token_id
    assert marks.prefix == (reference.eos_token_id if bos_token_id is None else bos_token_id)


class PadsWith(HarnessModel):
    """Fills the places after the shorter rows with token 77, of which nothing may come."""

    def _score(self, rows: Any, spans: Any) -> Any:
        longest = max(map(len, rows))
        return super()._score([(*row, *[77] * (longest - len(row))) for row in rows], spans)


class PadsAtTheLeft(HarnessModel):
    """Broken: fills before the rows, where every later position looks."""

    def _score(self, rows: Any, spans: Any) -> Any:
        longest = max(map(len, rows))
        filled = [(*[77] * (longest - len(row)), *row) for row in rows]
        return super()._score(filled, [(index, longest, ids) for index, _, ids in spans])


def test_scores_in_a_batch_are_those_one_by_one_whatever_fills_the_shorter_rows(folder: Path):
    alone = scores(ours(folder, batch_size=1))
    for kind in (HarnessModel, PadsWith):
        assert largest_difference(scores(ours(folder, kind, batch_size=8)), alone) < 1e-4
    assert largest_difference(scores(ours(folder, PadsAtTheLeft, batch_size=8)), alone) > 1e-2


def test_log_likelihoods_never_compute_an_mtp_depth(folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = ours(folder)
    expected = scores(model)

    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("an MTP depth was computed")

    assert model.model.scheme is not None
    monkeypatch.setattr(type(model.model.scheme), "forward", computed)
    monkeypatch.setattr(type(model.model.scheme), "step", computed)
    assert scores(model) == expected
    assert model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in TEXTS]))
    with pytest.raises(AssertionError, match="an MTP depth was computed"):
        model.model(torch.zeros(1, 4, dtype=torch.int64))  # what would do so is noticed


def test_what_is_cut_at_the_left_is_counted(folder: Path):
    model = ours(folder)
    scores(model)
    model.generate_until(requests("generate_until", [("x " * 60, {"max_gen_toks": 8}), ("x", {"max_gen_toks": 8})]))
    assert model.num_truncated == {"loglikelihood": 1, "generate_until": 1}


# ----------------------------------------------------------------------------------------------------------- generation


def generate(model: HarnessModel, *contexts: str, **settings: Any) -> list[str]:
    asked = {"until": ["Q:"], "max_gen_toks": 40, **settings}
    return model.generate_until(requests("generate_until", [(context, asked) for context in contexts]))


def test_greedy_texts_do_not_depend_on_drafting_nor_on_when_stop_strings_are_looked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = generate(ours(folder, draft_length=0), "the cat", "once upon")
    assert all(plain)
    for draft_length in (1, 3):
        assert generate(ours(folder, draft_length=draft_length), "the cat", "once upon") == plain
    monkeypatch.setattr(harness, "FIRST_STAGE", 5)
    assert generate(ours(folder, draft_length=3), "the cat", "once upon") == plain


def test_greedy_texts_equal_theirs(folder: Path, theirs: HFLM):
    asked = requests("generate_until", [("the cat", {"until": ["Q:"], "max_gen_toks": 24, "do_sample": False})])
    assert ours(folder).generate_until(asked) == theirs.generate_until(asked)


def test_text_ends_before_the_first_stop_string(folder: Path):
    model = ours(folder)
    whole = generate(model, "the cat")[0]
    late, early = whole[9], whole[4]
    cut = generate(model, "the cat", until=[late, early])[0]
    assert cut == whole[: min(whole.index(late), whole.index(early))]


def test_text_ends_before_a_special_token_that_is_a_stop_string(folder: Path):
    model = ours(folder)
    whole = generate(model, "the cat")[0]
    comma = model.text.encode(",").tolist()[0]
    assert "," in whole  # let the comma be called <stop>
    model.marks = dataclasses.replace(model.marks, special={"<stop>": comma})
    assert generate(model, "the cat", until=["<stop>"])[0] == whole.partition(",")[0]


def test_sampled_texts_are_repeatable_and_differ_between_requests(folder: Path):
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.9}
    first = generate(ours(folder), "the cat", "the cat", **sampling)
    assert first == generate(ours(folder), "the cat", "the cat", **sampling)
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gen_toks": CONTEXT}, "asks for 64 new tokens"),
        ({"repetition_penalty": 1.3}, "repetition_penalty, which nextn's decoding does not do"),
        ({"num_beams": 4}, "num_beams"),
    ],
)
def test_decoding_that_cannot_be_done_is_an_error(folder: Path, settings: dict[str, Any], message: str):
    with pytest.raises(GenerationError, match=message):
        generate(ours(folder), "the cat", **settings)


def test_settings_of_other_decoders_that_ask_for_nothing_are_accepted(folder: Path):
    assert generate(ours(folder), "the cat", num_beams=1) == generate(ours(folder), "the cat")


@pytest.mark.parametrize(
    ("pair", "message"), [(("the", ""), "is empty"), (("the", "x" * 99), "has 99 tokens, and the model reads 64")]
)
def test_a_continuation_that_cannot_be_scored_is_an_error(folder: Path, pair: tuple[str, str], message: str):
    with pytest.raises(DataError, match=message):
        ours(folder).loglikelihood(requests("loglikelihood", [pair]))


# ------------------------------------------------------------------------------------------------------------- command


def command(*arguments: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    """`nextn evaluate` from the folder of the test's tasks, with no network to be had."""
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": ""}
    offline |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    line = [sys.executable, "-m", "nextn", "evaluate", *map(str, arguments)]
    environment = os.environ | offline
    return subprocess.run(line, capture_output=True, text=True, cwd=TASKS, timeout=120, env=environment, check=False)


def expected_accuracy(folder: Path) -> float:
    """Share of questions whose right answer has the highest log-probability, from whole logits, a pair at a time."""
    model = ours(folder)
    num_right = 0
    rows = [json.loads(line) for line in (TASKS / "which_fits.jsonl").read_text().splitlines()]
    for row in rows:
        context = model.tok_encode(f"{row['question']} ->")
        likelihoods = []
        for choice in row["choices"]:
            ids = model.tok_encode(f"{row['question']} -> {choice}")
            log_probs = model.model.trunk(torch.tensor([ids]))[0].log_softmax(-1)
            likelihoods.append(sum(log_probs[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
        num_right += likelihoods.index(max(likelihoods)) == row["label"]
    return num_right / len(rows)


def test_the_command_prints_scores_and_writes_them_with_their_provenance(byte_folder: Path, tmp_path: Path):
    figures = tmp_path / "figures.json"
    names = "which_fits,whole_text,continue_it"
    done = command(byte_folder, "--tasks", names, "--include-path", ".", "--json", figures, home=tmp_path)
    assert done.returncode == 0, done.stderr
    for heading in ("which_fits", "continue_it", "bits_per_byte", "n-shot", "+-"):
        assert heading in done.stdout
    assert "lost the left end" in done.stderr  # some whole texts and prompts exceed 64 tokens
    table = json.loads(figures.read_text())
    by_task = {score["task"]: score for score in table["tasks"]["scores"]}
    accuracy = by_task["which_fits"]
    assert accuracy["value"] == pytest.approx(expected_accuracy(byte_folder))
    assert accuracy["stderr"] == pytest.approx(math.sqrt(accuracy["value"] * (1 - accuracy["value"]) / 7))
    assert (accuracy["version"], accuracy["num_fewshot"], accuracy["num_documents"]) == ("1.0", 0, 8)
    assert by_task["continue_it"]["version"] == "2.0"
    assert by_task["whole_text"]["value"] > 0
    assert by_task["whole_text"]["higher_is_better"] is False
    assert table["tasks"]["libraries"]["lm-eval"] == table["provenance"]["libraries"]["lm-eval"] == "0.4.13"
    assert table["tasks"]["draft_length"] == 3
    assert table["settings"]["tasks"] == ["which_fits", "whole_text", "continue_it"]
    assert str(tmp_path) not in figures.read_text()


def test_limit_examples_and_groups_reach_the_harness(byte_folder: Path, tmp_path: Path):
    figures = tmp_path / "figures.json"
    asked = ("--limit", "3", "--num-fewshot", "1", "--batch-size", "2")
    done = command(
        byte_folder, "--tasks", "which_fits", "--include-path", ".", *asked, "--json", figures, home=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (score,) = json.loads(figures.read_text())["tasks"]["scores"]
    assert (score["num_documents"], score["num_fewshot"]) == (3, 1)
    assert "for trying out" in done.stderr


def test_an_unknown_task_is_an_error_that_names_near_ones():
    with pytest.raises(DataError, match="unknown task 'hellaswagg'; did you mean 'hellaswag'"):
        TaskSelection.find(["which_fits", "hellaswagg"], TASKS)


def test_patterns_are_searched_and_nothing_is_found_twice(monkeypatch: pytest.MonkeyPatch):
    without_its_own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", without_its_own)
    assert TaskSelection.find(["*_fits", "which_fits"], TASKS).names == ("which_fits",)


def test_other_wrong_selections_are_errors(tmp_path: Path):
    with pytest.raises(ConfigError, match="names no task"):
        TaskSelection.find([])
    with pytest.raises(DataError, match="is no folder"):
        TaskSelection.find(["which_fits"], tmp_path / "nowhere")


def test_options_that_would_have_no_effect_are_errors(tmp_path: Path):
    with pytest.raises(ConfigError, match="--num-rows is about held-out text"):
        evaluate(tmp_path, tasks="which_fits", num_rows=3)
    with pytest.raises(ConfigError, match="--limit is about --tasks, which is not given"):
        evaluate(tmp_path, limit=3)


def test_without_the_harness_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [
        name for name in sys.modules if name.split(".")[0] == "lm_eval" or name.startswith("nextn.evaluation.")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # which makes `import lm_eval` fail
    with pytest.raises(ConfigError, match=r"pip install lm-eval"):
        evaluate(tmp_path, tasks="which_fits")


def test_the_command_line_does_not_import_the_harness_unless_asked():
    code = (
        "import sys, importlib, nextn.cli.lazy\n"
        "for name in nextn.cli.lazy.COMMANDS: importlib.import_module(f'nextn.cli.{name}')\n"
        "print([m for m in ('lm_eval', 'datasets', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
