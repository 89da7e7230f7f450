"""`nextn verify` as a user calls it: its verdict, its exit code, what it writes, and what each wrong input gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from nextn.cli.main import app
from nextn.decoding import verify
from nextn.decoding.drafters.mtp import MTPDrafter
from nextn.errors import NextnError
from nextn.lossless import sampling
from nextn.model.cache import LayerCache

from ..unit.test_lossless_suite import accept_everything, claim_another_distribution, no_residual, write_once
from .test_commands import RECIPE

VERIFY = ["verify", "run", "--num-prompts", "2", "-n", "12"]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, one without MTP, and a checkpoint that has lost its recipe."""
    folder = tmp_path_factory.mktemp("verify")
    lines = "\n\n".join(f"def function_{i}(x):\n    return x + {i * 7 % 13}" for i in range(400))
    (folder / "corpus.txt").write_text(lines)
    recipe = RECIPE.replace("CORPUS", str(folder / "corpus.txt")).replace("num_steps = 4", "num_steps = 40")
    (folder / "recipe.toml").write_text(recipe)
    torch.set_num_threads(1)
    for name, changes in (("run", []), ("plain", ["--set", "mtp.num_depths=0", "--set", "evaluation.draft_length=0"])):
        done = invoke("train", str(folder / "recipe.toml"), "--out", str(folder / name), *changes)
        assert done.exit_code == 0, done.output
    (folder / "prompts.jsonl").write_text('{"prompt": "def f"}\n{"prompt": "return x + return x + "}\n')
    shutil.copytree(sorted((folder / "run" / "checkpoints").iterdir())[-1], folder / "bare")
    (folder / "bare" / "recipe.json").unlink()
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sampling, "NUM_SAMPLES", (300,))


def test_a_lossless_checkpoint_gives_exit_code_0_a_table_and_a_file():
    done = invoke(*VERIFY, "--json", "lossless.json")
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.stdout.rstrip().endswith("\nlossless")
    found = json.loads(Path("lossless.json").read_text())
    assert found["is_lossless"]
    names = [check["name"] for check in found["checks"]]
    assert names == ["no cache", "greedy", "eos", "full accept", "zero accept", "rollback", "sampling", "control",
                     "bfloat16"]  # fmt: skip
    assert [check["passed"] for check in found["checks"]] == [True] * 8 + [None]
    assert found["settings"] == {
        "drafter": "mtp", "draft_lengths": [1, 2, 3], "num_prompts": 2, "max_new_tokens": 12
    }  # fmt: skip
    assert found["provenance"]["corpus"]["name"] == "held-out"


DEFECTS: dict[str, tuple[type, str, Callable, str]] = {
    "verifier": (verify.Exact, "__call__", accept_everything, "greedy"),
    "sampling": (verify.Rejection, "__call__", no_residual, "sampling"),
    "drafter": (MTPDrafter, "_draft_depths", claim_another_distribution, "sampling"),
    "cache": (LayerCache, "write", write_once, "rollback"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_gives_exit_code_1_and_is_named(monkeypatch: pytest.MonkeyPatch, defect: str):
    owner, name, broken, check = DEFECTS[defect]
    monkeypatch.setattr(owner, name, broken)
    done = invoke(*VERIFY)
    assert done.exit_code == 1, done.output
    verdict = done.stdout.rstrip().splitlines()[-1]
    assert verdict.startswith("NOT lossless: ")
    assert check in verdict
    assert f"{check}: {{" in done.stdout, "the evidence is printed"


def test_a_model_without_mtp_is_verified_with_prompt_lookup_and_says_so():
    done = invoke("verify", "plain", "--prompts", "prompts.jsonl", "--num-prompts", "2", "-n", "8")
    assert "no MTP depths; its drafts come from prompt lookup" in done.output
    assert "greedy: ok" in done.output


def test_without_a_recipe_the_prompts_are_code(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def recorded(name: str, *_: object, **__: object) -> SimpleNamespace:
        asked.append(name)
        raise NextnError("enough")

    monkeypatch.setattr("nextn.cli.verify.prompt_set", recorded)
    invoke("verify", "bare")
    invoke("verify", "run")
    assert asked == ["code", "held-out"]


BAD_INPUTS = {
    "missing path": (["verify", "nowhere"], "nowhere does not exist"),
    "unknown prompts": (["verify", "run", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    "too long": (["verify", "run", "-n", "200"], "exceeds the context of 64"),
    "absent device": (["verify", "run", "--device", "cuda:7"], "cuda:7"),
}


@pytest.mark.parametrize("case", BAD_INPUTS, ids=lambda name: name.replace(" ", "_"))
def test_bad_input_gives_a_clear_error(case: str):
    arguments, message = BAD_INPUTS[case]
    found = invoke(*arguments).exception
    assert isinstance(found, NextnError)
    assert message in str(found)
