"""`nextn doctor` as a user types it: verdicts, JSON, exit codes; and conventions measured on a trained model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nextn.cli.main import app
from nextn.data import ByteTokenizer, Document, pack, validation_rows
from nextn.errors import NextnError
from nextn.evaluation.conventions import (
    ConventionAccuracy,
    convention_findings,
    conventions_to_try,
    measure_conventions,
    most_frequent_share,
)
from nextn.files import read_json, write_json
from nextn.mtp import find_checkpoint, load_model

from . import tiny_run

TEXT = "".join(f"def function_{i % 7}(x):\n    return x + {i * 7 % 13}\n\n" for i in range(400))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint trained for some seconds on TEXT, whose modules know it well; the text is beside it."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "text.txt").write_text(TEXT)
    packed = pack([Document("text", TEXT)], ByteTokenizer())
    recipe = tiny_run.recipe_with(
        model={"vocab_size": 257, "hidden_size": 32, "kv_lora_rank": 16, "initializer_range": 0.05},
        mtp={"num_depths": 2, "share_weights": True},
        data={"sequence_length": 48},
        optimizer={"learning_rate": 3e-2},
        training={"num_steps": 150, "batch_size": 8, "evaluate_every": 150, "checkpoint_every": 150, "log_every": 50},
    )
    run = tiny_run.trainer(folder / "run", recipe, train_tokens=packed, validation_tokens=packed)
    run.model.tokenizer = ByteTokenizer()
    run.train()
    shutil.copytree(find_checkpoint(folder / "run"), folder / "good")
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained checkpoint to damage."""
    shutil.copytree(trained / "good", tmp_path / "copy")
    return tmp_path / "copy"


def doctor(*arguments: str | Path) -> tuple[int, dict, str]:
    """Exit code, the JSON if there is any, and what was printed or raised."""
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, NextnError), result.exception
        return 2, {}, str(result.exception)
    is_json = "-" in arguments
    return result.exit_code, json.loads(result.stdout) if is_json else {}, result.output


def change_mtp(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    for name in [name for name in state if name.startswith("model.layers.2.")]:
        if (changed := change(name, state.pop(name))) is not None:
            state[name] = changed.contiguous()
    save_file(state, path)


def swap_halves(folder: Path) -> None:
    change_mtp(folder, lambda n, t: torch.cat(t.chunk(2, dim=1)[::-1], dim=1) if n.endswith("eh_proj.weight") else t)


def test_a_good_checkpoint_measures_as_it_states(trained: Path):
    code, table, _ = doctor(trained / "good", "--measure", "--text", trained / "text.txt", "--json", "-")
    assert (code, table["exit_code"], table["is_healthy"]) == (0, 0, True)
    assert table["verdict"].startswith("MTP healthy: 1 module")
    assert "convention measured" in [finding["what"] for finding in table["findings"]]
    measured = table["measured"]
    assert len(measured["conventions"]) == 8
    assert measured["conventions"][0]["is_declared"]
    assert measured["conventions"][0]["teacher_forced_accuracy"][1] > 2 * measured["most_frequent_token_share"]
    assert measured["provenance"]["nextn"]["version"] == table["nextn_version"]


def test_a_corpus_is_read_in_place_of_a_text(trained: Path):
    code, table, _ = doctor(
        trained / "good", "--measure", "--corpus", trained / "text.txt", "--num-rows", "2", "--json", "-"
    )
    assert (code, table["measured"]["num_rows"]) == (0, 2)
    assert table["measured"]["provenance"]["corpus"]["sha256"]


def test_swapped_halves_pass_every_look_and_are_found_by_measuring(trained: Path, copy: Path):
    swap_halves(copy)
    assert doctor(copy)[0] == 0
    code, table, _ = doctor(copy, "--measure", "--text", trained / "text.txt", "--json", "-")
    assert code == 1
    assert table["verdict"].startswith(
        "wrong convention: concat embed_first is declared, and concat hidden_first beats"
    )
    assert not any(engine["runs_mtp"] for engine in table["engines"])
    repaired = read_json(copy / "config.json")
    repaired["nextn"]["mtp"]["concat"] = "hidden_first"  # what the finding says to do
    write_json(copy / "config.json", repaired)
    assert doctor(copy, "--measure", "--text", trained / "text.txt")[0] == 0


def test_modules_that_learnt_nothing_are_found_by_measuring(trained: Path, copy: Path):
    torch.manual_seed(0)
    change_mtp(copy, lambda name, tensor: tensor if "norm" in name else 0.02 * torch.randn_like(tensor))
    assert doctor(copy)[0] == 0
    code, table, _ = doctor(copy, "--measure", "--text", trained / "text.txt", "--json", "-")
    assert code == 1
    assert "MTP predicts nothing" in [finding["what"] for finding in table["findings"]]


def test_measuring_shares_the_modules_and_leaves_the_model_as_it_is(trained: Path):
    model = load_model(trained / "good")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = pack([Document("text", TEXT)], model.tokenizer)
    rows = validation_rows(packed, 48, 4)
    first, *others = measure_conventions(model, rows, packed.bytes_per_token)
    assert first.is_declared
    assert not any(other.is_declared for other in others)
    with torch.no_grad():
        plain = model(rows.input_ids, document_ids=rows.document_ids).loss_per_depth
    torch.testing.assert_close(torch.tensor(first.loss_per_depth), plain, rtol=1e-4, atol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert 0 < most_frequent_share(rows) < 1


def accuracies(declared: float, other: float, trunk: float = 0.8, num_labels: int = 10_000) -> list[ConventionAccuracy]:
    return [
        ConventionAccuracy({"concat": name}, name == "embed_first", (trunk, share), (1.0, 1.0), (num_labels,) * 2)
        for name, share in (("embed_first", declared), ("hidden_first", other))
    ]


@pytest.mark.parametrize(
    ("measured", "what"),
    [
        (accuracies(0.60, 0.40), ["convention measured"]),
        (accuracies(0.40, 0.60), ["wrong convention"]),
        (accuracies(0.600, 0.605), ["convention measured"]),  # less than a point
        (accuracies(0.55, 0.60, num_labels=100), ["convention measured"]),  # less than the noise
        (accuracies(0.10, 0.10), ["MTP predicts nothing"]),
        (accuracies(0.10, 0.60, trunk=0.1), ["text unsuited"]),
    ],
)
def test_what_accuracies_say_of_the_declared_convention(measured: list[ConventionAccuracy], what: list[str]):
    assert [finding.what for finding in convention_findings(measured, guessing=0.1)] == what


def test_only_conventions_that_have_an_effect_are_tried():
    def tried(**mtp) -> int:
        return len(conventions_to_try(tiny_run.recipe_with(mtp=mtp).mtp))

    assert [tried(num_depths=1), tried(num_depths=2), tried(scheme="parallel"), tried(scheme="independent")] == [
        4,
        8,
        2,
        4,
    ]


def test_a_lost_head_has_exit_code_1_and_names_what_to_do(copy: Path):
    change_mtp(copy, lambda name, tensor: None)
    code, _, printed = doctor(copy)
    assert code == 1
    assert (
        "MTP lost: num_nextn_predict_layers in config.json declares 1 module and no tensor of it is stored" in printed
    )
    code, table, _ = doctor(copy, "--measure", "--json", "-")
    assert (code, table["measured"]) == (1, None)
    assert "not measured" in [finding["what"] for finding in table["findings"]]


def test_zeroed_and_truncated_checkpoints_have_exit_code_1(copy: Path):
    change_mtp(copy, lambda name, tensor: torch.zeros_like(tensor))
    code, table, _ = doctor(copy, "--json", "-")
    assert (code, table["verdict"].split(":")[0]) == (1, "MTP zeroed")
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    code, table, _ = doctor(file, "--json", "-")
    assert (code, table["verdict"].split(":")[0]) == (1, "unreadable")


def test_a_run_folder_gives_its_newest_checkpoint_and_json_goes_to_a_file(trained: Path, tmp_path: Path):
    code, _, printed = doctor(trained / "run", "--json", tmp_path / "found.json")
    assert (code, "MTP healthy" in printed, "llamacpp" in printed) == (0, True, True)
    table = read_json(tmp_path / "found.json")
    assert Path(table["path"]).name == "step-00000150"
    assert list(table)[-4:] == ["exit_code", "engines", "measured", "nextn_version"]
    assert [engine["engine"] for engine in table["engines"]] == ["transformers", "vllm", "sglang", "llamacpp"]
    assert table["measured"] is None


def test_wrong_use_has_exit_code_2(trained: Path, tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    (trained / "good" / "alone.safetensors").write_bytes((trained / "good" / "model.safetensors").read_bytes())
    for arguments, message in (
        ([tmp_path / "nowhere"], "does not exist"),
        ([tmp_path], "neither a checkpoint"),
        ([trained / "good", "--text", "x"], "add --measure"),
        ([trained / "good", "--measure", "--text", "x", "--corpus", "y"], "exclude each other"),
        ([trained / "good", "--measure", "--text", tmp_path / "latin.txt"], "cannot be read as UTF-8"),
        ([trained / "good", "--measure", "--text", tmp_path / "empty.txt"], "[0, 0, 0] labels"),
        ([trained / "good", "--measure", "--num-rows", "0"], "Invalid value"),
        ([trained / "good" / "alone.safetensors", "--measure"], "a file alone"),
    ):
        code, _, printed = doctor(*arguments)
        assert (code, message in printed) == (2, True), printed
