"""What a new user types: mistakes end in one line and exit code 2, long work says what it does, own files stay."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nextn.checkpoint import list_checkpoints
from nextn.cli.main import main

from .test_commands import RECIPE

torch.set_num_threads(1)

TINY_DEMO = [f"--set={name}={value}" for name, value in (
    ("data.corpus", "corpus.txt"), ("model.num_hidden_layers", 2), ("model.hidden_size", 16),
    ("model.intermediate_size", 16), ("model.moe_intermediate_size", 8), ("model.n_routed_experts", 2),
    ("training.batch_size", 2), ("data.sequence_length", 32), ("evaluation.prompt_length", 8),
    ("evaluation.max_new_tokens", 8), ("evaluation.num_prompts", 2), ("evaluation.num_rows", 2),
    ("model.max_position_embeddings", 64), ("optimizer.num_warmup_steps", 2),
)]  # fmt: skip


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    code: int
    out: str
    err: str


def nextn(*arguments: str | Path, cwd: Path, stdin: bytes = b"", encoding: str = "utf-8") -> Done:
    """Run the command line in this process, standard streams in `encoding`."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="") for _ in range(2))
    code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd):
        patch.setattr(sys, "argv", ["nextn", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))
    return Done(code, *texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a recipe, a finished run, another corpus, and an empty folder to stand in."""
    folder = tmp_path_factory.mktemp("mistakes")
    text = "\n\n".join(f"def function_{i}(x):\n    return x + {i * 7 % 13}" for i in range(400))
    (folder / "corpus.txt").write_text(text)
    (folder / "recipe.toml").write_text(RECIPE.replace("CORPUS", "corpus.txt"))
    (folder / "elsewhere").mkdir()
    (folder / "foreign").mkdir()
    for index in range(3):
        (folder / "foreign" / f"{index}.txt").write_text(f"text number {index}\n" * 20)
    (folder / "foreign" / "latin.txt").write_bytes(b"caf\xe9")
    done = nextn("train", "recipe.toml", "--out", "run", cwd=folder)
    assert done.code == 0, done.err
    assert "reading corpus.txt\n" in done.err
    return folder


MISTAKES = {
    "demo without prompts": (["demo", "--set", "evaluation.num_prompts=0"], "num_prompts must be at least 1, got 0"),
    "demo without drafts": (["demo", "--set", "evaluation.draft_length=0"], "draft_length must be at least 1, got 0"),
    "demo of one token": (["demo", "--set", "evaluation.max_new_tokens=1"], "max_new_tokens must be at least 2, got 1"),
    "demo of two thousand years": (["demo", "--minutes", "1e9"], "--minutes must lie above 0 and be at most 10000"),
    "seed of 23 digits": (
        ["train", "recipe.toml", "--out", "x", "--set", "training.seed=12345678901234567890123"],
        "training.seed must lie in 0..2**64 - 1",
    ),
    "setting of another table": (["train", "recipe.toml", "--set", "data.num_steps=3"], "is a setting of [training]"),
    "no corpus": (["evaluate", "run", "--corpus", ""], "'' is neither a known corpus"),
    "folder holds a run": (["train", "recipe.toml", "--out", "run"], "already holds a run"),
    "nothing to resume": (["train", "recipe.toml", "--out", "x", "--resume"], "nothing to resume"),
    "other settings": (
        ["train", "recipe.toml", "--out", "run", "--resume", "--set", "training.num_steps=9"],
        "num_steps: the run has 4, the recipe now has 9",
    ),
}


@pytest.mark.parametrize("case", MISTAKES, ids=lambda name: name.replace(" ", "_"))
def test_a_mistake_is_told_at_once_in_an_error_and_leaves_no_file(folder: Path, case: str):
    arguments, message = MISTAKES[case]
    before = set(folder.rglob("*"))
    done = nextn(*arguments, cwd=folder)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert "reading corpus" not in done.err  # which may take a minute
    assert set(folder.rglob("*")) == before


def test_a_run_evaluated_from_another_folder_asks_for_its_text(folder: Path):
    done = nextn("evaluate", folder / "run", cwd=folder / "elsewhere")
    assert done.code == 2
    assert "trained on 'corpus.txt', a path seen from the folder it was started in" in done.err
    assert "--corpus" in done.err


def test_of_the_training_text_under_any_name_the_held_out_part_is_read_and_of_other_text_all(folder: Path):
    there = nextn("evaluate", "run", "--json", "there.json", cwd=folder)
    assert "1 file, 588 tokens: the part held out of training" in there.err
    elsewhere = nextn("evaluate", folder / "run", "--corpus", folder / "corpus.txt", cwd=folder / "elsewhere")
    assert elsewhere.out == there.out
    assert "1 file, 588 tokens: the part held out of training" in elsewhere.err
    other = nextn("evaluate", "run", "--corpus", "foreign", "--json", "other.json", cwd=folder)
    assert other.code == 0, other.err
    num_tokens = sum(path.stat().st_size + 1 for path in (folder / "foreign").glob("[0-9].txt"))
    assert f"3 files, {num_tokens:,} tokens: all of it, since it was not trained on; left out: 1 file" in other.err
    provenance = json.loads((folder / "other.json").read_text())["provenance"]["corpus"]
    assert [file["name"] for file in provenance["dropped"]] == ["latin.txt"]
    assert {file["split"] for file in provenance["files"]} == {"validation"}


def test_evaluating_says_what_it_does(folder: Path):
    lines = nextn("evaluate", "run", cwd=folder).err.splitlines()
    assert lines[0] == "reading corpus.txt"
    assert lines[-2:] == ["reading 2 x 32 held-out tokens", "decoding 2 held-out prompts, greedy and sampled"]


def test_a_tokenizer_in_training_is_announced(folder: Path):
    sizes = ["--set", "data.tokenizer=bpe:260", "--set", "evaluation.num_prompts=0", "--set", "training.num_steps=1"]
    done = nextn("train", "recipe.toml", "--out", "bpe", *sizes, cwd=folder)
    assert done.code == 0, done.err
    assert "training the tokenizer bpe:260" in done.err.splitlines()


def test_tabs_and_brackets_of_a_text_are_printed_as_they_are(folder: Path):
    text = "if x:\n\t[red]y[/red]\t[/]"
    assert nextn("generate", "run", "-p", text, "-n", 4, cwd=folder).out.startswith(text)
    shown = nextn("generate", "run", "-p", text, "-n", 4, "--show-drafts", cwd=folder).out
    assert shown.startswith(text.expandtabs())  # made for the eye


def test_what_an_output_cannot_show_is_replaced(folder: Path):
    for extra in ([], ["--show-drafts"]):
        done = nextn("generate", "run", "-p", "caf\xe9 \u4e16", "-n", 4, *extra, cwd=folder, encoding="ascii")
        assert done.code == 0, done.err
        assert done.out.startswith("caf? ?")


def test_standard_input_is_taken_as_text_and_binary_data_refused(folder: Path):
    text = "caf\u00e9\r\n".encode()
    assert nextn("generate", "run", "-p", "-", "-n", 4, cwd=folder, stdin=text).out.encode().startswith(text)
    done = nextn("generate", "run", "-p", "-", cwd=folder, stdin=b"ab\xff")
    assert done.code == 2
    assert "not UTF-8 text (byte 0xff at offset 2)" in done.err


def test_top_k_without_a_temperature_is_one_plain_line(folder: Path, recwarn: pytest.WarningsRecorder):
    done = nextn("generate", "run", "-p", "def", "-n", 4, "--top-k", 3, "--top-p", 0.5, cwd=folder)
    assert done.code == 0
    assert done.err.splitlines() == [
        "--top-k and --top-p have no effect at temperature 0 (greedy); add --temperature to sample"
    ]
    assert not [warning for warning in recwarn if "top_k" in str(warning.message)]


def test_a_seed_of_any_length_samples(folder: Path):
    done = nextn("generate", "run", "-p", "def", "-n", 4, "--temperature", 1, "--seed", 10**23, cwd=folder)
    assert (done.code, done.err) == (0, "")


def test_a_damaged_checkpoint_names_the_way_out_and_it_works(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "run", tmp_path / "run")
    command = ["train", folder / "recipe.toml", "--out", tmp_path / "run", "--resume"]
    newest = list_checkpoints(tmp_path / "run")[-1]
    (newest / "training_state/tensors.safetensors").write_bytes(b"damaged")
    done = nextn(*command, cwd=folder)
    assert done.code == 2
    assert "To go on from the checkpoint before it (from the start, if it is the first)" in done.err
    assert f"delete or rename the folder {newest}\n" in done.err
    newest.rename(newest.with_name("damaged"))
    done = nextn(*command, cwd=folder)
    assert done.code == 0, done.err
    assert "2 of 4 steps done" in done.err


def test_a_finished_run_says_that_nothing_is_left_to_train(folder: Path):
    done = nextn("train", "recipe.toml", "--out", "run", "--resume", cwd=folder)
    assert done.code == 0, done.err
    assert "4 of 4 steps done, nothing is left to train" in done.err


def test_the_demo_does_not_start_over_checkpoints_without_a_recipe(tmp_path: Path):
    (tmp_path / "out" / "checkpoints" / "step-00000001").mkdir(parents=True)
    done = nextn("demo", "--out", "out", cwd=tmp_path)
    assert done.code == 2
    assert "holds checkpoints but no recipe.json; add --fresh" in done.err


@pytest.fixture(scope="module")
def demo_folder(folder: Path) -> Iterator[Path]:
    """A folder with a finished demo behind a symbolic link, and files of the user's in it."""
    (folder / "disk" / "demo" / "checkpoints" / "best").mkdir(parents=True)
    (folder / "demo").symlink_to(folder / "disk" / "demo")
    for name in ("notes.txt", "checkpoints/best/weights.txt"):
        (folder / "demo" / name).write_text("mine")
    done = nextn("demo", "--out", "demo", "--minutes", 0.001, "--repeats", 1, *TINY_DEMO, cwd=folder)
    assert done.code == 0, done.err
    return folder


def test_a_fresh_demo_replaces_the_run_and_keeps_the_users_files_even_behind_a_link(demo_folder: Path):
    done = nextn("demo", "--fresh", "--out", "demo", "--set", "evaluation.num_prompts=0", cwd=demo_folder)
    assert done.code == 2  # and the run is not lost to a mistake
    before = (demo_folder / "demo" / "recipe.json").read_text()
    arguments = [*TINY_DEMO, "--set=training.seed=5"]
    done = nextn("demo", "--fresh", "--out", "demo", "--minutes", 0.001, "--repeats", 1, *arguments, cwd=demo_folder)
    assert done.code == 0, done.err
    assert "0 of 40 steps done" in done.err
    assert (demo_folder / "demo").is_symlink()
    assert (demo_folder / "demo" / "recipe.json").read_text() != before
    for name in ("notes.txt", "checkpoints/best/weights.txt"):
        assert (demo_folder / "demo" / name).read_text() == "mine"


def test_the_report_tells_the_moment_of_measuring_from_that_of_training(demo_folder: Path):
    provenance = json.loads((demo_folder / "demo" / "report.json").read_text())["provenance"]
    assert provenance["measured"]["num_threads"] == torch.get_num_threads()
    assert provenance["measured"]["time_utc"] >= provenance["time_utc"]
    page = (demo_folder / "demo" / "report.html").read_text()
    assert "measured.time_utc" in page
    assert "measured.num_threads" in page
