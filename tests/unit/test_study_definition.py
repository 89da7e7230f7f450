"""A study's file becomes variants and runs; mistakes in it are named with the way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextn.config import MTPConfig, ObjectiveConfig, Recipe, ScheduleConfig, TrainingConfig
from nextn.errors import CheckpointError, ConfigError
from nextn.files import write_json
from nextn.study.definition import LoadedStudy
from nextn.study.jobs import _environment, checked_devices
from nextn.study.load import load_study
from nextn.study.plan import plan_runs, recipe_as_begun, run_id
from nextn.tables import to_table

STUDIES = sorted(path for path in (Path(__file__).parents[2] / "recipes" / "studies").glob("*.toml"))
SHIPPED = [path for path in STUDIES if not path.name.startswith("base-")]

PLAIN = """
base = "base-{scale}.toml"
[[variants]]
name = "plain"
set.mtp.num_depths = 0
[[variants]]
name = "mtp"
"""


def load(tmp_path: Path, text: str, base: str = "[training]\nnum_steps = 100\n", **arguments: object) -> LoadedStudy:
    (tmp_path / "base-cpu.toml").write_text(base)
    (tmp_path / "a.toml").write_text(text)
    return load_study(tmp_path / "a.toml", **arguments)  # type: ignore[arg-type]


def runs_of(loaded: LoadedStudy, text: str = "text") -> list[tuple[str, int, float | None]]:
    runs = plan_runs(loaded, dict.fromkeys((given.name for given in loaded.variants), text))
    return [(run.variant, run.seed, run.ladder) for run in runs]


def test_every_shipped_study_loads_in_every_size_and_its_claims_name_variants_and_metrics():
    assert len(SHIPPED) >= 14
    for path in SHIPPED:
        for scale in ("cpu", "gpu", "small"):
            loaded = load_study(path, scale)
            assert len(loaded.variants) >= 2
            assert len(loaded.study.seeds) >= 3


def test_variants_change_the_base_recipe_and_the_baseline_comes_first(tmp_path):
    loaded = load(tmp_path, 'baseline = "mtp"' + PLAIN)
    assert [given.name for given in loaded.variants] == ["mtp", "plain"]
    assert loaded.recipes["plain"].mtp.num_depths == 0
    assert loaded.recipes["mtp"] == Recipe(training=TrainingConfig(num_steps=100))


def test_a_grid_is_every_combination(tmp_path):
    grid = 'base = "base-cpu.toml"\n[grid]\nmtp.num_depths = [0, 1]\nobjective.depth_decay = [0.5, 1.0]\n'
    loaded = load(tmp_path, grid)
    assert [(r.mtp.num_depths, r.objective.depth_decay) for r in loaded.recipes.values()] == [
        (0, 0.5), (0, 1.0), (1, 0.5), (1, 1.0),
    ]  # fmt: skip


def test_runs_come_seed_by_seed_with_the_ladder_of_the_baseline(tmp_path):
    loaded = load(tmp_path, "seeds = [4, 2]\nladder = [0.5, 2.0]" + PLAIN)
    one = [("plain", None), ("mtp", None), ("plain", 0.5), ("plain", 2.0)]
    assert runs_of(loaded) == [(name, seed, ladder) for seed in (4, 2) for name, ladder in one]
    runs = plan_runs(loaded, {"plain": "x", "mtp": "x"})
    assert [run.recipe.training.num_steps for run in runs[:4]] == [100, 100, 50, 200]


def test_overrides_and_sizes_change_the_study(tmp_path):
    loaded = load(tmp_path, PLAIN + "[scales.cpu]\nevaluation.num_rows = 7\n", overrides=["training.num_steps=50"])
    assert loaded.study.evaluation.num_rows == 7
    assert loaded.recipes["mtp"].training.num_steps == 50


MISTAKES = {
    "no variants": ('base = "base-cpu.toml"', "has no variants to compare"),
    "two of one name": (PLAIN + '[[variants]]\nname = "mtp"\n', "two variants are called 'mtp'"),
    "baseline": ('baseline = "plane"' + PLAIN, "did you mean 'plain'"),
    "unknown key": (PLAIN + "mtp.num_depths = 3\n", "set.mtp = ..."),
    "unknown setting": (PLAIN + "set.mtp.num_depth = 3\n", "variant 'mtp': unknown setting 'mtp.num_depth'"),
    "unknown size": (PLAIN, "it has: cpu"),
    "seeds": ("seeds = [1, 1]" + PLAIN, "seeds must be different numbers"),
    "grid": (PLAIN + "[grid]\nmtp.num_depths = 3\n", "must be a list of values"),
    "metric": (
        PLAIN + '[[claims]]\ntext = ""\ntests = [{ metric = "los", variant = "mtp", high = 1.0 }]\n',
        "did you mean 'loss'",
    ),
    "claimed variant": (
        PLAIN + '[[claims]]\ntext = ""\ntests = [{ metric = "loss", variant = "mpt", high = 1.0 }]\n',
        "did you mean 'mtp'",
    ),
    "claim of nothing": (
        PLAIN + '[[claims]]\ntext = ""\ntests = [{ metric = "loss", variant = "mtp" }]\n',
        "needs low, high or both",
    ),
    "claim of both": (
        PLAIN + '[[claims]]\ntext = ""\ntests = [{ metric = "loss", variant = "mtp", best = "mtp" }]\n',
        "either a variant",
    ),
    "claim without tests": (PLAIN + '[[claims]]\ntext = "Yes."\n', "the claim 'Yes.' has no tests"),
    "claim about the baseline": (
        PLAIN + '[[claims]]\ntext = ""\ntests = [{ metric = "loss", variant = "plain", high = 0.0, '
        "against_baseline = true }]\n",
        "sets the baseline 'plain' against itself",
    ),
    "draft model": (PLAIN + 'draft_model = "tiny"\n', "the draft model of 'mtp'"),
    "old name of variants": (PLAIN + "[[settings]]\nname = 1\n", "'settings' is now called [[variants]]"),
    "old name of the evaluation": (PLAIN + "[measure]\nnum_rows = 8\n", "'measure' is now called [evaluation]"),
    "old name in a test": (
        PLAIN + '[[claims]]\ntext = ""\ntests = [{ measure = "loss" }]\n',
        "'measure' in a claim's test is now called 'metric'",
    ),
    "timed prompts": (PLAIN + "[evaluation]\nnum_prompts = 1\n", "exceeds evaluation.num_prompts = 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_the_way_out(tmp_path, mistake: str):
    text, message = MISTAKES[mistake]
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, scale="gpu" if mistake == "unknown size" else "cpu")
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="study not found"):
        load_study(tmp_path / "absent.toml")


@given(seed=st.integers(0, 9), num_steps=st.integers(1, 9), power=st.sampled_from([0.1, 0.3]))
def test_runs_have_one_id_iff_they_train_the_same_on_the_same_text(seed: int, num_steps: int, power: float):
    objective = ObjectiveConfig(mtp_lambda=ScheduleConfig(values=(power,)))
    recipe = Recipe(objective=objective, training=TrainingConfig(seed=seed, num_steps=num_steps + 20))
    elsewhere = replace(recipe, training=replace(recipe.training, device="cpu", log_every=7))
    assert run_id(recipe, "a") == run_id(elsewhere, "a")
    assert run_id(recipe, "a") != run_id(recipe, "b")
    longer = replace(recipe, training=replace(recipe.training, num_steps=num_steps + 21))
    assert run_id(recipe, "a") != run_id(longer, "a")


def test_ids_stay_what_they_are():
    """Runs that people have on disk are found again by later versions."""
    assert run_id(Recipe(mtp=MTPConfig(num_depths=3)), "text") == "0c9a41f0de8448db"


def test_a_run_is_gone_on_with_as_it_was_begun_and_refused_if_it_is_another(tmp_path):
    begun = Recipe(training=TrainingConfig(num_steps=50, log_every=10))
    assert recipe_as_begun(begun, tmp_path) == begun, "nothing was begun"
    write_json(tmp_path / "recipe.json", to_table(begun))
    logged = replace(begun, training=replace(begun.training, log_every=5, device="cpu"))
    assert recipe_as_begun(logged, tmp_path) == begun
    another = replace(begun, training=replace(begun.training, batch_size=3))
    with pytest.raises(CheckpointError, match=r"training.batch_size \(there 16, now 3\)"):
        recipe_as_begun(another, tmp_path)


@pytest.mark.parametrize("devices", ["gpu", "cuda:0,", "cpu,cuda:0", "0,1"])
def test_devices_that_are_none_or_of_two_kinds_are_refused(devices: str):
    with pytest.raises(ConfigError, match="--devices"):
        checked_devices(devices)


def test_a_visible_gpu_is_counted_among_those_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert _environment("cuda:1", None) == {"CUDA_VISIBLE_DEVICES": "3"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert _environment("cuda:1", None) == {"CUDA_VISIBLE_DEVICES": "1"}
