"""The commands as a user types them, on a tiny recipe; and what each wrong input gives."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TINY_MODEL = """
[model]
hidden_size = 16
intermediate_size = 24
moe_intermediate_size = 8
num_hidden_layers = 2
num_attention_heads = 2
n_routed_experts = 4
kv_lora_rank = 8
qk_nope_head_dim = 4
qk_rope_head_dim = 4
v_head_dim = 4
"""
RECIPE = f"""{TINY_MODEL}
max_position_embeddings = 64
[mtp]
num_depths = 2
[data]
corpus = "CORPUS"
sequence_length = 32
[optimizer]
num_warmup_steps = 1
[training]
num_steps = 4
batch_size = 2
precision = "float32"
evaluate_every = 2
checkpoint_every = 2
[evaluation]
num_rows = 2
num_prompts = 2
prompt_length = 8
max_new_tokens = 8
draft_length = 2
"""


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nextn", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a recipe and a finished run."""
    folder = tmp_path_factory.mktemp("commands")
    lines = "\n\n".join(f"def function_{i}(x):\n    return x + {i * 7 % 13}" for i in range(400))
    (folder / "corpus.txt").write_text(lines)
    (folder / "recipe.toml").write_text(RECIPE.replace("CORPUS", "corpus.txt"))
    done = run("train", "recipe.toml", "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_train_writes_a_run_and_prints_its_evaluation(folder: Path):
    names = {path.name for path in (folder / "run").iterdir()}
    assert {"recipe.json", "provenance.json", "metrics.jsonl", "checkpoints"} <= names
    provenance = json.loads((folder / "run" / "provenance.json").read_text())
    assert provenance["corpus"]["files"][0]["sha256"]
    assert str(folder) not in json.dumps(provenance)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "evaluation"] == [2, 4]
    assert records[-1]["decoding"]["greedy"]["draft_length"] == 2


def test_a_finished_run_can_be_resumed_and_evaluated(folder: Path):
    assert run("train", "recipe.toml", "--out", "run", "--resume", cwd=folder).returncode == 0
    done = run("evaluate", "run", "--json", "figures.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "teacher-forced" in done.stdout
    figures = json.loads((folder / "figures.json").read_text())
    assert len(figures["evaluation"]["loss_per_depth"]) == 3


def test_generate_gives_the_same_text_whatever_the_draft_length(folder: Path):
    texts = [
        run("generate", "run", "-p", "def f", "-n", "20", "--draft-length", n, cwd=folder).stdout
        for n in ("0", "1", "4")
    ]
    assert texts[0].startswith("def f")
    assert len(set(texts)) == 1
    shown = run("generate", "run", "-p", "def f", "-n", "20", "--show-drafts", cwd=folder)
    assert "mean acceptance length" in shown.stderr


def test_the_example_and_the_code_of_the_decoding_page_run(folder: Path):
    root = Path(__file__).parents[2]
    example = (root / "examples" / "decoder.py").read_text()
    code = re.findall(r"```python\n(.+?)```", (root / "docs" / "decoding.md").read_text(), flags=re.DOTALL)
    assert len(code) >= 4
    (folder / "runs").mkdir()
    (folder / "runs" / "demo").symlink_to(folder / "run")
    (folder / "code.py").write_text(example + "\n".join(code).replace("max_new_tokens=64", "max_new_tokens=32"))
    command = [sys.executable, "code.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "ended by cancelled" in done.stdout
    assert (folder / "frequent.json").exists()


def test_demo_trains_measures_and_reports_and_is_quick_the_second_time(folder: Path):
    tiny = [f"--set={name}={value}" for name, value in (
        ("data.corpus", "corpus.txt"), ("model.num_hidden_layers", 2), ("model.hidden_size", 16),
        ("training.batch_size", 2), ("data.sequence_length", 32), ("evaluation.prompt_length", 8),
        ("evaluation.max_new_tokens", 8), ("evaluation.num_prompts", 2), ("evaluation.num_rows", 2),
        ("model.max_position_embeddings", 64), ("optimizer.num_warmup_steps", 2),
    )]  # fmt: skip
    done = run("demo", "--out", "demo", "--minutes", "0.01", "--repeats", "1", *tiny, cwd=folder)
    assert done.returncode == 0, done.stderr
    page = (folder / "demo" / "report.html").read_text()
    report = json.loads((folder / "demo" / "report.json").read_text())
    greedy = report["arms"][0]
    assert greedy["num_identical_outputs"] == greedy["num_compared_outputs"] == 2
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    again = run("demo", "--out", "demo", "--repeats", "1", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "40 of 40 steps done" in again.stderr


def make_bad_inputs(folder: Path) -> None:
    (folder / "unknown.toml").write_text("[trainin]\n")
    (folder / "empty.txt").write_text("  \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    (folder / "pickled").mkdir(exist_ok=True)
    torch.save({}, folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / "config.json").write_text("{}")
    checkpoint = sorted((folder / "run" / "checkpoints").iterdir())[-1]
    for name in ("truncated", "foreign"):
        shutil.copytree(checkpoint, folder / name, dirs_exist_ok=True)
    (folder / "truncated" / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:999])
    (folder / "foreign" / "config.json").write_text('{"model_type": "llama"}')


BAD_INPUTS = {
    "missing recipe": (["train", "nowhere.toml"], "recipe not found: nowhere.toml"),
    "unknown key": (["train", "unknown.toml"], "did you mean 'training'"),
    "unknown key by --set": (["train", "recipe.toml", "--set", "mtp.depth=1"], "did you mean 'num_depths'"),
    "contradicting settings": (["train", "recipe.toml", "--set", "model.n_group=3"], "does not divide into n_group"),
    "unknown device": (["train", "recipe.toml", "--out", "x", "--set", "training.device=tpu"], "tpu"),
    "absent device": (["train", "recipe.toml", "--out", "x", "--set", "training.device=cuda:7"], "cuda"),
    "empty corpus": (["train", "recipe.toml", "--out", "x", "--set", "data.corpus=empty.txt"], "is empty"),
    "missing corpus": (
        ["train", "recipe.toml", "--out", "x", "--set", "data.corpus=no/such"],
        "neither a known corpus",
    ),
    "short corpus": (
        ["train", "recipe.toml", "--out", "x", "--set", "data.max_bytes=40", "--set", "data.corpus=corpus.txt"],
        "fewer than one row",
    ),
    "non-UTF-8 text": (["train", "recipe.toml", "--out", "x", "--set", "data.corpus=latin.txt"], "latin.txt"),
    "folder holds a run": (["train", "recipe.toml", "--out", "run"], "already holds a run"),
    "resume with other settings": (
        ["train", "recipe.toml", "--out", "run", "--resume", "--set", "training.num_steps=9"],
        "num_steps",
    ),
    "nothing to resume": (["train", "recipe.toml", "--out", "y", "--resume"], "nothing to resume"),
    "missing path": (["evaluate", "nowhere"], "nowhere does not exist"),
    "no checkpoint": (["evaluate", "run/checkpoints"], "neither a checkpoint"),
    "pickle": (["generate", "pickled", "-p", "x"], "refused"),
    "truncated checkpoint": (["generate", "truncated", "-p", "x"], "truncated"),
    "foreign checkpoint": (["generate", "foreign", "-p", "x"], "(model_type 'llama') means a trunk of"),
    "no prompt": (["generate", "run"], "no prompt"),
    "empty prompt": (["generate", "run", "-p", ""], "empty"),
    "too long": (["generate", "run", "-p", "x", "-n", "500"], "exceeds the context of 64"),
    "negative temperature": (["generate", "run", "-p", "x", "--temperature", "-1"], "temperature"),
    "unknown dtype": (["generate", "run", "-p", "x", "--dtype", "int3"], "unknown dtype"),
    "no repeats": (["demo", "--repeats", "0"], "greater than or equal to 1"),
    "--fresh on something else": (["demo", "--out", ".", "--fresh"], "does not look like"),
}


@pytest.mark.parametrize("case", BAD_INPUTS, ids=lambda name: name.replace(" ", "_"))
def test_bad_input_gives_a_clear_error_and_exit_code_2(folder: Path, case: str):
    make_bad_inputs(folder)
    arguments, message = BAD_INPUTS[case]
    done = run(*arguments, cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
