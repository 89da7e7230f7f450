"""A study's JSON file holds what its page is rendered from, once; the committed pages are those of their files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nextn.cli.main import app
from nextn.study import page, study_file
from tests.unit.study_example import BASELINE, LADDER, SEEDS, VARIANTS, example

STUDIES = sorted((Path(__file__).parents[2] / "docs" / "studies").glob("*.json"))
QUICK = "moe"
"""The smallest committed study; the others are rendered by the slow tests."""


def is_rendered_from(page_path: Path, json_path: Path) -> bool:
    return page_path.read_text(encoding="utf-8") == page.render(study_file.read_json(json_path))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem == QUICK else pytest.mark.slow, id=path.stem) for path in STUDIES],
)
def test_a_committed_page_is_the_rendering_of_its_committed_file(path: Path):
    assert is_rendered_from(path.with_suffix(".html"), path), "make study-pages writes the pages again"


def test_a_committed_page_of_other_figures_is_caught(tmp_path: Path):
    path = next(path for path in STUDIES if path.stem == QUICK)
    text = path.with_suffix(".html").read_text(encoding="utf-8")
    assert "1.325" in text
    (tmp_path / "changed.html").write_text(text.replace("1.325", "1.326", 1), encoding="utf-8")
    assert not is_rendered_from(tmp_path / "changed.html", path)


def test_all_committed_studies_together_stay_small():
    assert len(STUDIES) >= 15
    num_bytes = sum(file.stat().st_size for path in STUDIES for file in (path, path.with_suffix(".html")))
    assert num_bytes < 2_300_000


def test_runs_of_one_variant_stand_together_and_come_back_seed_by_seed(tmp_path: Path):
    result = example()
    study_file.write_json(result, tmp_path / "study.json")
    table = json.loads((tmp_path / "study.json").read_text())
    assert [(group["variant"], group["ladder"]) for group in table["runs"]] == [
        *((name, None) for name in VARIANTS),
        *((BASELINE, multiple) for multiple in LADDER),
    ]
    assert all(group["seeds"] == list(SEEDS) for group in table["runs"])
    shuffled = dataclasses.replace(result, runs=result.runs[::-1])
    study_file.write_json(shuffled, tmp_path / "shuffled.json")
    assert sorted(run.id for run in study_file.read_json(tmp_path / "shuffled.json").runs) == sorted(
        run.id for run in result.runs
    )


def test_a_seed_that_lacks_a_metric_or_a_run_comes_back_without_it(tmp_path: Path):
    result = example()
    first, *others = result.runs
    values = {name: value for name, value in others[0].values.items() if name != "al_greedy"}
    assert values != others[0].values
    runs = (dataclasses.replace(others[0], values=values), *others[1:])
    study_file.write_json(dataclasses.replace(result, runs=runs), tmp_path / "study.json")
    read = study_file.read_json(tmp_path / "study.json")
    assert {run.id: run for run in read.runs} == {run.id: run for run in runs}
    assert first not in read.runs


def test_comparisons_are_computed_from_the_runs_and_not_read(tmp_path: Path):
    study_file.write_json(example(), tmp_path / "study.json")
    table = json.loads((tmp_path / "study.json").read_text())
    assert "comparisons" not in table
    losses = next(group for group in table["runs"] if group["variant"] == "one depth")["values"]["loss"]
    losses[0] += 0.03
    (tmp_path / "study.json").write_text(json.dumps(table))
    changed, one = study_file.read_json(tmp_path / "study.json"), example()

    def mean(result) -> float:
        return next(c.value.mean for c in result.comparisons if (c.variant, c.metric) == ("one depth", "loss"))

    assert mean(changed) == pytest.approx(mean(one) + 0.01)


def test_the_command_renders_the_page_beside_the_file(tmp_path: Path):
    study_file.write_json(example(), tmp_path / "a.json")
    printed = CliRunner().invoke(app, ["study", str(tmp_path / "a.json"), "--render"])
    assert printed.exit_code == 0, printed.output
    assert is_rendered_from(tmp_path / "a.html", tmp_path / "a.json")
