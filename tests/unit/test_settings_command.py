"""`nextn settings` lists what a recipe may say, whatever tables it has."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, is_dataclass

import pytest
from typer.testing import CliRunner

from nextn.cli.main import app
from nextn.config import Recipe, setting
from nextn.config.listing import REQUIRED, list_settings, meaning_of_table, table_names
from nextn.errors import ConfigError
from nextn.tables import flattened, from_table, to_table


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["settings", *arguments])


def test_every_setting_of_every_table_is_listed_once_with_its_default_and_a_meaning():
    found = list_settings()
    expected = dict(flattened(json.loads(json.dumps(to_table(Recipe())))))
    assert {info.name: info.default for info in found} == expected
    assert len(found) == len(expected)
    assert [info.name for info in found if not info.meaning] == []
    assert [info.name for info in found if info.kind == "value"] == []


def test_the_listed_defaults_are_a_recipe_that_equals_the_usual_one():
    table: dict = {}
    for info in list_settings():
        *parents, key = info.name.split(".")
        inner = table
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[key] = info.default
    assert from_table(Recipe, table) == Recipe()


def test_a_table_a_table_in_a_table_and_one_setting_can_be_asked_for():
    assert {info.name.partition(".")[0] for info in list_settings("optimizer")} == {"optimizer"}
    assert all(info.name.startswith("objective.mtp_lambda.") for info in list_settings("objective.mtp_lambda"))
    assert [info.name for info in list_settings("optimizer.betas")] == ["optimizer.betas"]


def test_a_name_that_only_begins_alike_is_not_listed():
    """Broken: names compared by their beginning alone, which lists importance_power under importance."""
    broken = [info.name for info in list_settings() if info.name.startswith("objective.importance")]
    assert len(broken) > 1
    assert [info.name for info in list_settings("objective.importance")] == ["objective.importance"]


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [("optimiser", "optimizer"), ("learning_rate", "optimizer.learning_rate"), ("mtp.num_depth", "mtp.num_depths")],
)
def test_an_unknown_table_is_an_error_that_names_the_nearest(asked: str, nearest: str):
    with pytest.raises(ConfigError, match=f"no table or setting '{asked}'; did you mean '{nearest}'"):
        list_settings(asked)


@dataclass(frozen=True)
class Added:
    """A table that was added later."""

    size: int = setting(3, "how many")
    path: str = field(metadata={"doc": "from where"}, kw_only=True)


@dataclass(frozen=True)
class LaterRecipe:
    """With a table that may be left out, and a setting outside of all tables."""

    added: Added | None = None
    title: str = setting("x", "for people")


def test_tables_added_later_are_listed_too_even_those_that_may_be_missing():
    found = list_settings(settings_class=LaterRecipe)
    assert [(info.name, info.default) for info in found] == [
        ("added.size", 3), ("added.path", REQUIRED), ("title", "x"),
    ]  # fmt: skip
    assert table_names(LaterRecipe) == ("added",)
    assert meaning_of_table("added", LaterRecipe) == "A table that was added later."


def test_the_command_prints_all_tables_or_json():
    everything = invoke()
    assert everything.exit_code == 0, everything.output
    for table in fields(Recipe):
        if is_dataclass(getattr(Recipe(), table.name)):
            assert f"[{table.name}]" in everything.stdout
    assert "curriculum.kind" in everything.stdout
    listed = json.loads(invoke("optimizer", "--json").stdout)
    assert {"name": "optimizer.weight_decay", "default": 0.1, "kind": "number"}.items() <= next(
        row for row in listed if row["name"] == "optimizer.weight_decay"
    ).items()
    assert isinstance(invoke("optimiser").exception, ConfigError)
