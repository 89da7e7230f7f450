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
from nextn.errors import NextnError

from .test_commands import RECIPE

BENCH = ["bench", "run", "--repeats", "2", "--eager"]
QUICK = ["bench", "run", "--eager", "--peers", "none", "--draft-lengths", "2"]


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


def names(found: dict, scenario: int = 0) -> list[str]:
    return [arm["name"] for arm in found["scenarios"][scenario]["arms"]]


def test_held_out_prompts_are_decoded_greedily_and_sampled_by_every_arm_and_a_verdict_follows():
    done = invoke(*BENCH, "--json", "figures.json", "--html", "page.html")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(Path("figures.json").read_text())
    assert [own["scenario"]["temperature"] for own in found["scenarios"]] == [0, 1]
    assert names(found) == ["plain, eager", *(f"MTP N = {n}" for n in (1, 2, 3)), "MTP adaptive", "prompt lookup N = 3"]
    for arm in found["scenarios"][0]["arms"]:
        assert arm["num_identical_outputs"] == arm["num_compared_outputs"] == 2
        assert len(arm["decode_tok_per_s"]) == len(arm["end_to_end_tok_per_s"]) == 2
    assert found["options"]["drafting"] == "as_trained"
    assert found["provenance"]["corpus"]["prompt_sets"][0]["prompt_length"] == 8
    assert [(peer["engine"], peer["draft_length"]) for peer in found["peers"]][2:] == [
        ("transformers", 0), ("transformers", 2),
    ]  # fmt: skip
    assert all(peer["num_identical_outputs"] == 2 for peer in found["peers"])
    assert f"verdict: {found['summary']}" in done.stdout
    assert "</html>" in Path("page.html").read_text()


def test_a_scenario_is_measured_for_every_batch_size_prompt_set_length_and_temperature():
    wanted = ["--batch-sizes", "1,3", "--temperature", "0", "--context", "4,700", "--prompts", "held-out"]
    found = figures(*QUICK, *wanted, "--prompts", "good.jsonl", "--repeats", "1", "-n", "8")
    scenarios = [tuple(own["scenario"].values()) for own in found["scenarios"]]
    assert scenarios == [
        (name, length, size, 0.0)
        for size in (1, 3)
        for name, length in (("held-out", 4), ("held-out", 64 - 8), ("good.jsonl", None))
    ]
    assert {own["num_prompts"] for own in found["scenarios"][3:]} == {3}, "whole batches"
    assert len(found["verdicts"]) == 6
    assert "; at batch 3 " in found["summary"]


def test_prompts_of_a_file_are_decoded_and_named_in_the_provenance():
    found = figures(*QUICK, "--prompts", "good.jsonl", "-n", "6", "--temperature", "1", "--repeats", "1")
    assert names(found) == ["plain, eager", "MTP N = 2", "prompt lookup N = 2"]
    assert found["scenarios"][0]["num_prompts"] == 2
    assert found["scenarios"][0]["arms"][1]["num_compared_outputs"] is None, "sampled texts are not compared"
    assert found["provenance"]["corpus"]["prompt_sets"][0]["file"] == "good.jsonl"
    one = figures(*QUICK, "--prompts", "good.jsonl", "-n", "6", "--num-prompts", "1", "--temperature", "0")
    assert one["scenarios"][0]["num_prompts"] == 1


@pytest.mark.parametrize(("engine", "lengths"), [("vllm", [1, 2]), ("transformers", [2])])
def test_an_engines_drafts_are_measured_under_its_name(engine: str, lengths: list[int]):
    wanted = [] if engine == "transformers" else ["--draft-lengths", "1,2"]
    arguments = ["bench", "run", "--repeats", "1", "--temperature", "0", "--peers", "none", "--as", engine, *wanted]
    done = invoke(*arguments, "--json", "figures.json")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(Path("figures.json").read_text())
    assert (found["options"]["drafting"], found["options"]["compiled"]) == (engine, False)
    drafting = [arm["draft_length"] for arm in found["scenarios"][0]["arms"] if arm["drafter"] == "mtp"]
    assert drafting == lengths
    assert f"tokens per second are nextn's, not {engine}'s" in done.output


def test_a_model_without_mtp_is_measured_with_prompt_lookup():
    found = figures("bench", "plain", "--eager", "--repeats", "1", "--temperature", "0", "--peers", "none")
    assert names(found) == ["plain, eager", "prompt lookup N = 3"]


def test_a_lossy_verifier_is_an_arm_that_says_what_it_changed_and_decides_nothing():
    found = figures(*QUICK, "--verifier", "typical:0.2", "--temperature", "0", "--repeats", "1")
    lossy = next(arm for arm in found["scenarios"][0]["arms"] if not arm["is_lossless"])
    assert lossy["name"] == "MTP N = 2, typical:0.2 (lossy)"
    assert 0 <= lossy["changed_share"] <= 1
    assert "lossy" not in found["summary"]


def test_the_four_approaches_are_one_table_and_a_missing_one_says_what_to_train():
    found = figures(*QUICK, "--temperature", "0", "--repeats", "1", "--standard", "plain", "--draft-model", "plain")
    rows = found["approaches"]
    assert [row["name"] for row in rows] == [
        "standard decoding", "MTP", "speculative decoding, draft model", "parallel decoding",
    ]  # fmt: skip
    standard, mtp, drafting, parallel = rows
    assert standard["speedup"] == 1.0
    assert standard["num_extra_parameters"] == 0 < mtp["num_extra_parameters"]
    assert drafting["num_training_tokens"] == 2 * standard["num_training_tokens"]
    assert drafting["arm"] == "standard: draft model N = 2"
    assert drafting["bits_per_byte"] == standard["bits_per_byte"] > 0
    assert "mtp.scheme" in parallel["arm"]
    assert "standard: plain" in names(found)


def test_without_a_recipe_code_is_continued(folder: Path):
    found = figures("bench", "bare", *QUICK[2:], "--temperature", "0", "--repeats", "1", "-n", "4", "--context", "8")
    assert found["scenarios"][0]["scenario"]["prompts"] == "code"


@pytest.mark.slow
def test_compiled_arms_give_the_same_outputs():
    arguments = ["bench", "run", "--repeats", "1", "--temperature", "0", "--peers", "none", "--draft-lengths", "1"]
    found = figures(*arguments)
    assert names(found) == ["plain, eager", "plain, compiled", "MTP N = 1", "prompt lookup N = 1"]
    for arm in found["scenarios"][0]["arms"]:
        assert arm["num_identical_outputs"] == arm["num_compared_outputs"]


BAD_INPUTS = {
    "missing file": (["--prompts", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    "no prompts": (["--prompts", "blank.jsonl"], "blank.jsonl holds no prompts"),
    "not JSON": (["--prompts", "text.jsonl"], "text.jsonl, line 2 is not JSON"),
    "no prompt in a line": (["--prompts", "keyless.jsonl"], "keyless.jsonl, line 1 has no text under 'prompt'"),
    "empty prompt": (["--prompts", "empty.jsonl"], "empty.jsonl, line 2: the prompt is empty"),
    "prompt too long": (["--prompts", "long.jsonl", "-n", "9"], "exceeds the context of 64"),
    "not UTF-8": (["--prompts", "latin.jsonl"], "latin.jsonl is not UTF-8"),
    "no list of lengths": (["--draft-lengths", "1,two"], "separated by commas, such as 1,2,3,adaptive; got '1,two'"),
    "negative length": (["--draft-lengths", "-1"], "draft_length must be 0"),
    "unknown engine": (["--as", "tgi"], "unknown drafting 'tgi'"),
    "length the engine cannot do": (["--as", "transformers", "--draft-lengths", "1"], "one token per stored module"),
    "negative temperature": (["--temperature", "-1"], "temperature must be 0"),
    "no list of temperatures": (["--temperature", "0,warm"], "--temperatures takes numbers separated by commas"),
    "no rows": (["--batch-sizes", "0"], "take numbers above 0"),
    "unknown peer": (["--peers", "tgi"], "--peers knows transformers, vllm, llamacpp, or none; got 'tgi'"),
    "peer that is not installed": (["--peers", "vllm", "--engines", "nowhere"], "run make engines"),
    "verifier without such parameters": (["--verifier", "threshold:0.1,0.2"], "verifier 'threshold' takes"),
    "lossless verifier": (["--verifier", "exact"], "--verifier adds a lossy arm: "),
    "parallel model without depths": (["--parallel", "plain"], "has no MTP depths"),
    "no room for prompts": (["-n", "64", "--context", "8"], "leave no room for a prompt in the context of 64"),
}


@pytest.mark.parametrize("case", BAD_INPUTS, ids=lambda name: name.replace(" ", "_"))
def test_bad_input_gives_a_clear_error(case: str):
    arguments, message = BAD_INPUTS[case]
    found = invoke(*BENCH, *arguments).exception
    assert isinstance(found, NextnError)
    assert message in str(found)


def test_a_checkpoint_without_a_recipe_is_evaluated_on_a_text_that_is_named(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("the cat sat on the mat. " * 400)
    with pytest.raises(NextnError, match="name a text with --corpus"):
        raise invoke("evaluate", "bare").exception
    done = invoke("evaluate", "bare", "--corpus", "text", "--num-rows", "2", "--num-prompts", "0")
    assert done.exit_code == 0, done.output
    assert "teacher-forced" in done.stdout
