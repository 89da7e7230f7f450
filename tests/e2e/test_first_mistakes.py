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

from nextn import Decoder, generate, load
from nextn.cli.main import main
from nextn.decoding import Piece
from nextn.decoding.verify import Threshold
from nextn.files import list_checkpoints

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


class Stream(io.TextIOWrapper):
    """A standard stream into memory, which may say that it is a terminal."""

    is_terminal = False

    def isatty(self) -> bool:
        return self.is_terminal


def nextn(
    *arguments: str | Path, cwd: Path, stdin: bytes = b"", encoding: str = "utf-8", on_terminal: bool = False
) -> Done:
    """Run the command line in this process, standard streams in `encoding`; standard output may be a terminal."""
    out, err = (Stream(io.BytesIO(), encoding=encoding, newline="") for _ in range(2))
    out.is_terminal = on_terminal
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
    "drafts in words": (
        ["generate", "run", "-p", "x", "--draft-length", "three"],
        "--draft-length takes a whole number or 'adaptive', got 'three'",
    ),
    "unknown drafter": (["generate", "run", "-p", "x", "--drafter", "ngram"], "mtp, prompt_lookup or the path"),
    "confidence of a lookup": (
        ["generate", "run", "-p", "x", "--drafter", "prompt_lookup", "--min-confidence", "0.5"],
        "about drafts of the MTP depths; with --drafter prompt_lookup leave them out",
    ),
    "confidence and adaptive": (
        ["generate", "run", "-p", "x", "--draft-length", "adaptive", "--min-confidence", "0.5"],
        "leave one of them out",
    ),
    "no draft vocabulary": (["generate", "run", "-p", "x", "--draft-vocabulary", "no.json"], "no.json does not exist"),
    "unknown weights": (["generate", "run", "-p", "x", "--weights", "int4"], "one of packed, int8, as_stored"),
    "empty stop string": (["generate", "run", "-p", "x", "-n", "4", "--stop", ""], "a stop string is empty"),
    "greedy verifier with a temperature": (
        ["generate", "nowhere", "-p", "x", "--verifier", "exact", "--temperature", "1"],
        "verifier 'exact' is greedy",
    ),
    "parameter out of range": (
        ["generate", "nowhere", "-p", "x", "--verifier", "threshold:2"],
        "threshold must lie in [0, 1], got 2.0",
    ),
    "parameters of the lossless": (
        ["generate", "nowhere", "-p", "x", "--verifier", "exact:1"],
        "verifier 'exact' takes no parameters, got '1'",
    ),
    "too many parameters": (
        ["generate", "nowhere", "-p", "x", "--verifier", "typical:0.1,0.2,0.3"],
        "takes epsilon, delta, as in typical:0.09,0.3; got '0.1,0.2,0.3'",
    ),
    "parameters in words": (["generate", "nowhere", "-p", "x", "--verifier", "threshold:low"], "got 'low'"),
    "colours in a stream": (
        ["generate", "nowhere", "-p", "x", "--stream", "--show-drafts"],
        "--show-drafts colours whole texts",
    ),
    "a lossy stream": (
        ["generate", "nowhere", "-p", "x", "--stream", "--verifier", "typical"],
        "what a lossy verifier changed is counted at the end",
    ),
    "several texts in a stream": (
        ["generate", "nowhere", "-p", "x", "-p", "y", "--stream", "--batch-size", "2"],
        "several texts grow at once",
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
        "--top-k, --top-p and --min-p have no effect at temperature 0 (greedy); add --temperature to sample"
    ]
    assert not [warning for warning in recwarn if "top_k" in str(warning.message)]


WAYS = {
    "streamed": ["--stream"],
    "adaptive": ["--draft-length", "adaptive"],
    "looked up": ["--drafter", "prompt_lookup"],
    "drafted by a model": ["--drafter", "run"],
    "while confident": ["--min-confidence", "0.05"],
    "from a vocabulary": ["--draft-vocabulary", "vocabulary.json"],
    "in a batch": ["--batch-size", "2", "--draft-length", "5"],
    "as stored": ["--weights", "as_stored"],
}


@pytest.mark.parametrize("way", WAYS, ids=lambda name: name.replace(" ", "_"))
def test_two_prompts_give_the_same_texts_in_every_lossless_way(folder: Path, way: str):
    (folder / "vocabulary.json").write_text(json.dumps({"vocab_size": 257, "token_ids": list(b" efx\n")}))
    command = ["generate", "run", "-p", "def f", "-p", "\tx = [", "-n", "24"]
    plain = nextn(*command, "--draft-length", 0, cwd=folder)
    assert plain.code == 0, plain.err
    done = nextn(*command, *WAYS[way], cwd=folder)
    assert (done.code, done.err) == (0, "")
    assert done.out == plain.out


def test_a_stop_string_ends_the_text_before_it(folder: Path):
    text = nextn("generate", "run", "-p", "def f", "-n", 24, cwd=folder).out.removesuffix("\n")
    stop = next(character for character in text[8:] if character.isascii() and character.isprintable())
    done = nextn("generate", "run", "-p", "def f", "-n", 24, "--stop", "\x00", "--stop", stop, cwd=folder)
    assert done.out == "def f" + text[5:].partition(stop)[0] + "\n"


def test_a_text_goes_on_after_its_end_if_that_is_wished(folder: Path):
    command = ["generate", "run", "-p", "d", "-n", "60", "--temperature", "9"]
    model = load(folder / "run")
    seed = next(
        seed
        for seed in range(200)
        if generate(model, ["d"], max_new_tokens=60, temperature=9, seed=seed).finish_reasons == ("eos",)
    )
    ended = nextn(*command, "--seed", seed, cwd=folder).out.removesuffix("\n")
    longer = nextn(*command, "--seed", seed, "--ignore-eos", cwd=folder).out.removesuffix("\n")
    assert longer.startswith(ended)
    assert len(longer.encode()) > len(ended.encode())


def test_a_lossy_verifier_says_so_and_what_it_changed(folder: Path):
    command = ["generate", "run", "-p", "def f", "-n", "24", "--draft-length", "4"]
    result = generate(
        load(folder / "run"), ["def f"], max_new_tokens=24, draft_length=4, verifier=Threshold(threshold=0)
    )
    assert result.num_changed_tokens > 0
    done = nextn(*command, "--verifier", "threshold:0", cwd=folder, on_terminal=True)
    assert done.out == f"def f{result.texts[0]}\n"
    assert done.err == (
        f"verifier 'threshold' is lossy: {result.num_changed_tokens} of 24 new tokens ({result.changed_share:.1%}) "
        "are drafts that 'exact' would have refused\n"
    )
    assert nextn(*command, cwd=folder).err == ""


def test_rounded_weights_are_announced_as_another_model(folder: Path):
    done = nextn("generate", "run", "-p", "def", "-n", 4, "--weights", "int8", cwd=folder)
    assert done.err == "int8: weights rounded to 8 bits are another model; its text is not the checkpoint's\n"


@pytest.mark.parametrize(
    ("options", "on_terminal", "is_streamed"),
    [([], False, False), ([], True, True), (["--stream"], False, True), (["-p", "x"], True, False)],
)
def test_one_text_on_a_terminal_is_streamed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], on_terminal: bool, is_streamed: bool
):
    calls = []
    stream = Decoder.stream
    monkeypatch.setattr(Decoder, "stream", lambda *args, **kwargs: calls.append(1) or stream(*args, **kwargs))
    done = nextn("generate", "run", "-p", "def", "-n", 4, *options, cwd=folder, on_terminal=on_terminal)
    assert done.code == 0, done.err
    assert bool(calls) == is_streamed


def test_an_interrupted_stream_keeps_what_was_printed_and_exits_with_130(folder: Path, monkeypatch: pytest.MonkeyPatch):
    whole = nextn("generate", "run", "-p", "def f", "-n", 24, cwd=folder).out
    stream = Decoder.stream

    def interrupted(*args, **kwargs) -> Iterator[Piece]:
        pieces = stream(*args, **kwargs)
        yield next(pieces)
        yield next(pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "stream", interrupted)
    done = nextn("generate", "run", "-p", "def f", "-n", 24, "--stream", cwd=folder)
    assert (done.code, done.err) == (130, "interrupted; the text ends here\n")
    assert done.out.endswith("\n")
    assert whole.startswith(done.out[:-1])
    assert len("def f") < len(done.out[:-1]) < len(whole)


def test_an_interrupted_batch_prints_nothing_and_exits_with_130(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Decoder, "generate", interrupted)
    done = nextn("generate", "run", "-p", "def f", "-p", "x", cwd=folder)
    assert (done.code, done.out) == (130, "")
    assert "nothing was printed; --stream prints" in done.err


def test_compiling_without_a_compiler_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(folder / "elsewhere"))
    monkeypatch.delenv("CXX", raising=False)
    done = nextn("generate", "run", "-p", "x", "--compile", cwd=folder)
    assert done.code == 2
    assert "--compile needs a C++ compiler" in done.err


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
