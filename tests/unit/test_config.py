"""Settings: strict reading, clear errors, exact round trips."""

from __future__ import annotations

import dataclasses

import pytest

from nextn.config import ModelConfig, OptimizerConfig, Recipe, RopeConfig, load_recipe
from nextn.errors import ConfigError
from nextn.tables import from_table, override, to_table


def test_a_recipe_survives_the_round_trip_through_a_table():
    recipe = from_table(
        Recipe,
        {
            "model": {"q_lora_rank": 32, "rope_parameters": {"rope_theta": 5000}},
            "objective": {
                "mtp_lambda": {"kind": "piecewise", "values": [0.3, 0.1], "boundaries": [10], "unit": "tokens"}
            },
            "optimizer": {"betas": [0.8, 0.9]},
        },
    )
    assert from_table(Recipe, to_table(recipe)) == recipe
    assert recipe.model.rope_parameters.rope_theta == 5000.0
    assert recipe.optimizer.betas == (0.8, 0.9)


def test_every_setting_says_what_it_means():
    def walk(settings_class):
        defaults = settings_class()
        for setting in dataclasses.fields(settings_class):
            default = getattr(defaults, setting.name)
            if dataclasses.is_dataclass(default):
                walk(type(default))
            else:
                assert setting.metadata["doc"], f"{settings_class.__name__}.{setting.name} has no meaning"

    walk(Recipe)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"modell": {}}, "unknown setting 'modell'; did you mean 'model'"),
        (
            {"training": {"lam": 1}},
            r"'training.lam'; \[training\] knows: balance_mtp_blocks, batch_size",
        ),
        ({"data": {"num_steps": 3}}, r"'data.num_steps'; num_steps is a setting of \[training\]"),
        ({"concat": 1}, r"'concat'; concat is a setting of \[mtp\]"),
        ({"detach": {}}, r"did you mean 'data'\? detach is a setting of \[objective\]"),
        ({"model": {"hiden_size": 3}}, "unknown setting 'model.hiden_size'; did you mean 'hidden_size'"),
        ({"model": {"hidden_size": "wide"}}, "model.hidden_size must be int, got 'wide'"),
        ({"model": {"hidden_size": True}}, "model.hidden_size must be int"),
        ({"model": {"hidden_size": 0}}, "model.hidden_size must be at least 1"),
        ({"model": 3}, "model is a table"),
        ({"mtp": {"concat": "both"}}, "mtp.concat must be one of embed_first, hidden_first"),
        ({"mtp": {"num_depths": -1}}, "mtp.num_depths must be at least 0"),
        ({"model": {"n_routed_experts": 8, "n_group": 3}}, "does not divide into n_group = 3"),
        ({"model": {"num_experts_per_tok": 9}}, "a token may choose among 8 experts"),
        ({"model": {"n_group": 2, "topk_group": 3}}, "topk_group must lie in 1..n_group = 2"),
        ({"model": {"qk_rope_head_dim": 7}}, "must be even"),
        ({"model": {"rope_parameters": {"rope_type": "yarn"}}}, "needs factor and original_max_position_embeddings"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas must have 2 values"),
        ({"data": {"sequence_length": 1}}, "data.sequence_length must be at least 2"),
        ({"data": {"sequence_length": 4096}}, "exceeds model.max_position_embeddings"),
        ({"data": {"sequence_length": 8}, "mtp": {"num_depths": 7}}, "leaves no position with a label"),
        ({"training": {"num_steps": 5}}, "num_warmup_steps = 20 exceeds training.num_steps = 5"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate must be above 0"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "must lie in 0..1"),
        ({"optimizer": {"decay_share": 2.0}}, "optimizer.decay_share must lie in 0..1"),
        ({"training": {"seed": -1}}, "training.seed must be at least 0"),
        ({"training": {"seed": 2**64}}, r"training.seed must lie in 0\.\.2\*\*64 - 1"),
        ({"evaluation": {"num_rows": 0}}, "evaluation.num_rows must be at least 1"),
        ({"data": {"max_bytes": 0}}, "data.max_bytes must be at least 1"),
        ({"model": {"n_group": 0}}, "model.n_group must be at least 1"),
        ({"model": {"q_lora_rank": 0}}, "model.q_lora_rank must be at least 1"),
        ({"model": {"rope_parameters": {"factor": 2}}}, "need rope_type = 'yarn'"),
        ({"optimizer": {"learning_rate": float("nan")}}, "must be a finite number"),
        ({"objective": {"mtp_lambda": {"values": [-1]}}}, "values must be 0 or more"),
        ({"training": {"micro_batch_size": 99}}, r"micro_batch_size must lie in 1..batch_size = 16"),
        ({"evaluation": {"max_new_tokens": 2000}}, "exceeds model.max_position_embeddings"),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_it(table, message: str):
    with pytest.raises(ConfigError, match=message):
        from_table(Recipe, table)


def test_overrides_are_toml_values_or_bare_words(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('[data]\ncorpus = "x"\n[model]\nq_lora_rank = 8\n')
    recipe = load_recipe(
        path, ["data.corpus=y", "training.seed=3", "optimizer.betas=[0.5, 0.6]", "model.q_lora_rank=none"]
    )
    assert (recipe.data.corpus, recipe.training.seed, recipe.optimizer.betas) == ("y", 3, (0.5, 0.6))
    assert recipe.model.q_lora_rank is None


def test_broken_overrides_and_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"takes table\.key=value"):
        override({}, ["training.seed"])
    with pytest.raises(ConfigError, match="is a value, not a table"):
        override({"a": 1}, ["a.b=2"])
    with pytest.raises(ConfigError, match="recipe not found"):
        load_recipe(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_recipe(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        load_recipe(broken)


def test_settings_cannot_be_changed():
    for settings in (ModelConfig(), RopeConfig(), OptimizerConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            settings.anything = 1
