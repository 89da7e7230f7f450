"""`nextn train --dry-run`: what it shows is what the run would do, and it leaves nothing but a plot."""

from __future__ import annotations

import io
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

from nextn.cli.main import app
from nextn.config import Recipe, load_recipe
from nextn.errors import ConfigError
from nextn.mtp import MTPModel
from nextn.mtp.cost import model_cost
from nextn.objective import Progress, depth_weights
from nextn.training import dry_run as module
from nextn.training import learning_rate_factor, read_metrics
from nextn.training.dry_run import changes, print_dry_run, schedule_plot, scheduled_step
from tests.e2e import tiny_run
from tests.e2e.test_commands import TINY_MODEL
from tests.e2e.tiny_run import recipe_with

RECIPE = f"""{TINY_MODEL}
[mtp]
num_depths = 2
[objective]
depth_decay = 0.5
average_over_depths = false
[objective.mtp_lambda]
kind = "piecewise"
values = [0.3, 0.1]
boundaries = [100_000]   # the 99th step is the first with 98 x 1024 tokens behind it
unit = "tokens"
[objective.curriculum]
kind = "forward"
boundaries = [0.25, 0.5]
unit = "share"
[data]
corpus = "there/is/no/such/corpus"
sequence_length = 64
[optimizer]
schedule = "wsd"
num_warmup_steps = 10
[training]
num_steps = 120
batch_size = 16
device = "cpu"
precision = "float32"
"""


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def dry_run(recipe_path: Path, *options: str, run: str = "run") -> str:
    """What the command prints."""
    arguments = ["train", str(recipe_path), "--out", str(recipe_path.parent / run), "--dry-run", *options]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def rows(output: str) -> dict[int, list[str]]:
    """The table's cells by step: tokens, learning rate, weights, and the words of the last column."""
    lines = [line.split() for line in output.splitlines() if re.match(r" *\d[\d,]* +\d", line)]
    return {int(cells[0].replace(",", "")): cells[1:] for cells in lines}


def expected_row(recipe: Recipe, step: int) -> list[str]:
    """Straight from the functions the trainer calls."""
    tokens_per_step, num_steps = 16 * 64, recipe.training.num_steps
    progress = Progress(step - 1, (step - 1) * tokens_per_step, num_steps)
    weights = depth_weights(recipe.objective, recipe.mtp.num_depths, progress)
    learning_rate = recipe.optimizer.learning_rate * learning_rate_factor(recipe.optimizer, step - 1, num_steps)
    return [f"{step * tokens_per_step:,}", f"{learning_rate:.3g}", *(f"{weight:.4g}" for weight in weights)]


def test_the_table_shows_the_weights_and_rates_of_the_run(recipe_path: Path):
    recipe, table = load_recipe(recipe_path), rows(dry_run(recipe_path))
    assert 12 <= len(table) <= 20
    for step, cells in table.items():
        assert cells[:4] == expected_row(recipe, step)
    assert {1, 10, 31, 61, 73, 99, 120} <= set(table), "first, warm-up, two stages, decay, a piece of lambda, last"
    assert [table[step][2:4] for step in (1, 31, 61, 99)] == [
        ["0", "0"],
        ["0.3", "0"],
        ["0.3", "0.15"],
        ["0.1", "0.05"],
    ]


def test_a_table_that_were_one_step_late_would_be_noticed(recipe_path: Path, monkeypatch):
    right = module._progress_at
    monkeypatch.setattr(module, "_progress_at", lambda recipe, step: right(recipe, step + 1))
    recipe, table = load_recipe(recipe_path), rows(dry_run(recipe_path))
    assert any(cells[:4] != expected_row(recipe, step) for step, cells in table.items())


def test_every_jump_of_a_weight_is_among_the_changes(recipe_path: Path):
    recipe = load_recipe(recipe_path)
    weights = {step: scheduled_step(recipe, step).depth_weights for step in range(1, 121)}
    jumps = {step for step in range(2, 121) if weights[step] != weights[step - 1]}
    assert jumps == {31, 61, 99}
    assert changes(recipe) == {
        1: ["no depth on"],
        10: ["warm-up ends"],
        31: ["depths on: 1"],
        61: ["depths on: 1, 2"],
        73: ["learning rate falls"],
        99: ["lambda (piecewise) at 100,000 tokens"],
    }


def test_the_dry_run_tells_what_the_trainer_then_does(tmp_path: Path):
    objective = load_recipe_objective(tmp_path)
    recipe = recipe_with(objective=objective, training={"evaluate_every": 0, "checkpoint_every": 0})
    lines = read_metrics(tiny_run.trainer(tmp_path / "run", recipe).train().metrics)
    logged = [line for line in lines if line["kind"] == "train"]
    assert len(logged) == recipe.training.num_steps
    for line in logged:
        told = vars(scheduled_step(recipe, line["step"]))
        assert {name: line[name] for name in told} == {**told, "depth_weights": list(told["depth_weights"])}


def load_recipe_objective(folder: Path) -> dict[str, object]:
    """The objective above, its lambda's boundary within the tiny run."""
    path = folder / "recipe.toml"
    path.write_text(RECIPE.replace("100_000", "1000"))
    return vars(load_recipe(path).objective)


def test_only_a_plot_is_written_and_no_corpus_read(recipe_path: Path):
    output = dry_run(recipe_path)
    plot = recipe_path.parent / "run" / "schedule.svg"
    assert [path.name for path in plot.parent.iterdir()] == [plot.name]
    assert f"plot: {plot}" in output
    svg = plot.read_text()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    for text in ("depth 1", "depth 2", "learning rate", "step"):
        assert f">{text}<" in svg
    assert dry_run(recipe_path) == output
    assert plot.read_text() == svg, "the same recipe gives the same plot"


def test_the_header_says_what_the_run_costs(recipe_path: Path):
    output = dry_run(recipe_path)
    recipe = load_recipe(recipe_path, ["model.vocab_size=257"])
    cost = model_cost(MTPModel(recipe.model, recipe.mtp), 64)
    assert "120 of 16 x 64 tokens" in output
    assert f"{120 * 16 * 64:,}" in output
    assert "sequential, K = 2" in output
    assert f"{cost.num_parameters:,}, of which MTP {cost.num_mtp_parameters:,}; vocabulary 257" in output
    assert f"{cost.mtp_flops_overhead:.1%} more" in output


def test_a_vocabulary_is_known_from_the_settings_or_said_to_be_unknown(recipe_path: Path):
    assert "vocabulary 300" in dry_run(recipe_path, "--set", "data.tokenizer=bpe:300")
    assert "vocabulary 512" in dry_run(recipe_path, "--set", "model.vocab_size=512")
    assert "not known before the corpus is read" in dry_run(recipe_path, "--set", "data.tokenizer=saved/[b].json")


def test_the_bars_of_a_depth_start_when_it_is_switched_on(recipe_path: Path):
    bars = dict(re.findall(r"weight (\d) +\|(.+)\| up to", dry_run(recipe_path)))
    on_from = {depth: len(line) - len(line.lstrip()) for depth, line in bars.items()}
    assert on_from["1"] == pytest.approx(0.25 * module.NUM_BARS, abs=1)
    assert on_from["2"] == pytest.approx(0.5 * module.NUM_BARS, abs=1)
    assert bars["1"].strip().startswith("█")
    assert bars["1"][-1] == "▃", "0.1 of 0.3 is the third of eight"


@pytest.mark.parametrize(
    "settings",
    [
        ["mtp.num_depths=0"],
        ["training.num_steps=1", "optimizer.num_warmup_steps=0"],
        ["training.num_steps=1_000_000_000"],
        ["training.device=cuda:99"],
        ["objective.mtp_lambda.values=[0, 0]"],
        ["mtp.num_depths=8", "objective.curriculum.boundaries=[]"],
    ],
)
def test_odd_runs_are_shown_too(recipe_path: Path, settings: list[str]):
    recipe = load_recipe(recipe_path, settings)
    output = dry_run(recipe_path, *(argument for setting in settings for argument in ("--set", setting)))
    first = rows(output)[1]
    assert first[: 2 + recipe.mtp.num_depths] == expected_row(recipe, 1)
    assert recipe.training.num_steps in rows(output)
    assert (recipe_path.parent / "run" / "schedule.svg").exists()


def test_a_dry_run_cannot_be_resumed(recipe_path: Path):
    with pytest.raises(ConfigError, match="--dry-run trains nothing, so it takes no --resume"):
        dry_run(recipe_path, "--resume")


def test_a_long_run_is_sampled(recipe_path: Path):
    recipe = load_recipe(recipe_path, ["training.num_steps=1_000_000"])
    assert len(schedule_plot(recipe)) < 300_000


def test_a_terminal_without_block_characters_gets_ascii(recipe_path: Path, tmp_path: Path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_dry_run(Console(file=stream, markup=False), load_recipe(recipe_path), tmp_path / ("ascii" * 20))
    stream.flush()
    assert re.search(r"learning rate \|[.:=@-]", stream.buffer.getvalue().decode("ascii"))
