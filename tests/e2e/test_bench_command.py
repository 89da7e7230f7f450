"""`nextn bench` as a user calls it: what it measures, what it writes, and what each wrong input gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from nextn.cli.main import app
from nextn.decoding import generate
from nextn.errors import NextnError
from nextn.mtp import MTPModel
from nextn.report.measurement import time_decodings

from ..lossless.conftest import TEXT, memorising_model
from .test_commands import RECIPE

BENCH = ["bench", "run", "--repeats", "2"]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, one without MTP, and files of prompts."""
    folder = tmp_path_factory.mktemp("bench")
    lines = "\n\n".join(f"def function_{i}(x):\n    return x + {i * 7 % 13}" for i in range(400))
    (folder / "corpus.txt").write_text(lines)
    (folder / "recipe.toml").write_text(RECIPE.replace("CORPUS", str(folder / "corpus.txt")))
    torch.set_num_threads(1)
    for name, changes in (("run", []), ("plain", ["--set", "mtp.num_depths=0", "--set", "evaluation.draft_length=0"])):
        done = invoke("train", str(folder / "recipe.toml"), "--out", str(folder / name), *changes)
        assert done.exit_code == 0, done.output
    (folder / "good.jsonl").write_text('{"prompt": "def f"}\n\n{"prompt": "return x", "id": 7}\n')
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "text.jsonl").write_text('{"prompt": "def f"}\ndef g\n')
    (folder / "keyless.jsonl").write_text('{"text": "def f"}\n')
    (folder / "empty.jsonl").write_text('{"prompt": "x"}\n{"prompt": ""}\n')
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "x" * 60}))
    (folder / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    bare = folder / "bare"
    shutil.copytree(sorted((folder / "run" / "checkpoints").iterdir())[-1], bare)
    (bare / "recipe.json").unlink()
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)


def figures(*arguments: str) -> dict:
    done = invoke(*arguments, "--json", "figures.json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(Path("figures.json").read_text())


def test_held_out_prompts_are_decoded_with_every_draft_length():
    found = figures(*BENCH)
    assert [arm["draft_length"] for arm in found["arms"]] == [1, 2, 3]
    assert len(found["plain_tok_per_s"]) == 2
    for arm in found["arms"]:
        assert arm["num_identical_outputs"] == arm["num_compared_outputs"] == 2
        assert len(arm["speculative_tok_per_s"]) == 2
        assert len(arm["acceptance_unconditional"]) == arm["draft_length"]
    assert found["settings"]["drafting"] == "as_trained"
    assert found["provenance"]["corpus"]["prompt_length"] == 8


def test_prompts_of_a_file_are_decoded_and_named_in_the_provenance():
    found = figures(*BENCH, "--prompts", "good.jsonl", "-n", "6", "--draft-lengths", "2", "--temperature", "1")
    assert found["settings"]["num_prompts"] == 2
    assert [arm["name"] for arm in found["arms"]] == ["sampled"]
    assert found["arms"][0]["num_new_tokens"] == 12
    assert found["arms"][0]["num_compared_outputs"] is None, "sampled texts are not compared"
    assert found["provenance"]["corpus"]["file"] == "good.jsonl"


@pytest.mark.parametrize(("engine", "lengths"), [("vllm", [1, 2]), ("transformers", [2])])
def test_an_engines_drafts_are_measured_under_its_name(engine: str, lengths: list[int]):
    wanted = [] if engine == "transformers" else ["--draft-lengths", "1,2"]
    done = invoke(*BENCH, "--as", engine, *wanted, "--json", "figures.json")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(Path("figures.json").read_text())
    assert found["settings"]["drafting"] == engine
    assert [arm["draft_length"] for arm in found["arms"]] == lengths
    assert f"tokens per second are nextn's, not {engine}'s" in done.output


def test_a_model_without_mtp_is_measured_plainly():
    assert figures("bench", "plain", "--repeats", "1")["arms"] == []


BAD_INPUTS = {
    "missing file": (["--prompts", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    "no prompts": (["--prompts", "blank.jsonl"], "blank.jsonl holds no prompts"),
    "not JSON": (["--prompts", "text.jsonl"], "text.jsonl, line 2 is not JSON"),
    "no prompt in a line": (["--prompts", "keyless.jsonl"], "keyless.jsonl, line 1 has no text under 'prompt'"),
    "empty prompt": (["--prompts", "empty.jsonl"], "empty.jsonl, line 2: the prompt is empty"),
    "prompt too long": (["--prompts", "long.jsonl", "-n", "9"], "exceeds the context of 64"),
    "held-out prompts counted in a file": (
        ["--prompts", "long.jsonl", "--num-prompts", "1"],
        "--num-prompts is about held-out prompts",
    ),
    "not UTF-8": (["--prompts", "latin.jsonl"], "latin.jsonl is not UTF-8"),
    "no list of lengths": (["--draft-lengths", "1,two"], "separated by commas, such as 0,1,2,3; got '1,two'"),
    "negative length": (["--draft-lengths", "-1"], "draft_length must be 0"),
    "unknown engine": (["--as", "tgi"], "unknown drafting 'tgi'"),
    "length the engine cannot do": (["--as", "transformers", "--draft-lengths", "1"], "one token per stored module"),
    "negative temperature": (["--temperature", "-1"], "temperature must be 0"),
}


@pytest.mark.parametrize("case", BAD_INPUTS, ids=lambda name: name.replace(" ", "_"))
def test_bad_input_gives_a_clear_error(case: str):
    arguments, message = BAD_INPUTS[case]
    found = invoke(*BENCH, *arguments).exception
    assert isinstance(found, NextnError)
    assert message in str(found)


def test_without_a_recipe_prompts_must_be_given():
    found = invoke("bench", "bare", "--repeats", "1").exception
    assert isinstance(found, NextnError)
    assert "has no recipe.json" in str(found)
    assert "--prompts FILE.jsonl" in str(found)


# -------------------------------------------------------------------------------------------------------- the measuring

PROMPTS = [TEXT[0, :5].tolist(), TEXT[2, :9].tolist()]


def test_arms_are_interleaved_and_none_always_runs_first(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def recorded(model: MTPModel, prompts: list[list[int]], **settings):
        calls.append((len(prompts), settings["draft_length"]))
        return generate(model, prompts, **settings)

    monkeypatch.setattr("nextn.report.measurement.generate", recorded)
    model = memorising_model(30)
    timed = time_decodings(model, PROMPTS, (0, 1, 3), max_new_tokens=8, temperature=0.0, num_repeats=2)
    assert calls == [(1, 0), (1, 1), (1, 3), *((2, n) for n in (0, 1, 3, 3, 1, 0))]
    assert {length: len(rates) for length, rates in timed.tok_per_s.items()} == {0: 2, 1: 2, 3: 2}


def test_an_output_that_differs_from_plain_decoding_is_counted(monkeypatch: pytest.MonkeyPatch):
    def lossy(model: MTPModel, prompts: list[list[int]], **settings):
        """Broken: with drafts, the second prompt is another one."""
        changed = [*prompts[:1], [1, 2, 3]] if settings["draft_length"] and len(prompts) > 1 else prompts
        return generate(model, changed, **settings)

    model, settings = memorising_model(30), {"max_new_tokens": 8, "temperature": 0.0, "num_repeats": 1}
    assert time_decodings(model, PROMPTS, (0, 2), **settings).arm("greedy", 2).num_identical_outputs == 2
    monkeypatch.setattr("nextn.report.measurement.generate", lossy)
    assert time_decodings(model, PROMPTS, (0, 2), **settings).arm("greedy", 2).num_identical_outputs == 1


def test_a_checkpoint_without_a_recipe_is_evaluated_on_a_text_that_is_named(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("the cat sat on the mat. " * 400)
    with pytest.raises(NextnError, match="name a text with --corpus"):
        raise invoke("evaluate", "bare").exception
    done = invoke("evaluate", "bare", "--corpus", "text", "--num-rows", "2", "--num-prompts", "0")
    assert done.exit_code == 0, done.output
    assert "teacher-forced" in done.stdout
