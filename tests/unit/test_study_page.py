"""A study's page, plots and tables: they say what was measured, no more, and come back from their files unchanged."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from nextn.cli.study_output import print_result
from nextn.errors import CheckpointError, ConfigError
from nextn.study import page, plots, study_file, tables
from nextn.study.claims import judge
from nextn.study.compare import compare
from nextn.study.cost_plots import pareto_front
from nextn.study.definition import Claim, Criterion
from nextn.study.drawing import style_of
from nextn.study.metrics import METRICS
from nextn.study.results import Comparison, Estimate, VariantFacts
from nextn.study.tables import Cell, cell, comparisons_of
from tests.unit.study_example import BASELINE, LADDER, SEEDS, VARIANTS, example
from tests.unit.test_report import Page, contrast


@pytest.fixture(scope="module")
def result():
    return example()


@pytest.fixture(scope="module")
def page_text(result) -> str:
    return page.render(result)


@pytest.fixture(scope="module")
def words(page_text) -> str:
    return " ".join(" ".join(Page(page_text).words).split())


def without(result, *metrics: str):
    """The study as it is when some metrics were never taken."""
    keep = [one for one in result.comparisons if not one.metric.startswith(metrics)]
    return dataclasses.replace(result, comparisons=tuple(keep), claims=())


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page_is_well_formed_has_unique_ids_and_loads_nothing(page_text):
    read = Page(page_text)
    assert len(read.ids) == len(set(read.ids))
    assert all(link.startswith("#") for link in read.links)
    assert {link[1:] for link in read.links} <= set(read.ids)
    assert "http" not in page_text
    assert {tag for tag, _ in read.tags} & {"script", "link", "img", "iframe", "object", "embed"} == set()


def test_text_from_outside_is_escaped(page_text):
    assert "<are>" not in page_text
    assert "&lt;are&gt; accepted" in page_text
    assert "&lt;once&gt;" in page_text


def test_claims_and_what_was_measured_of_them_are_on_the_page_with_a_coloured_verdict(result, words, page_text):
    assert result.question in words
    assert {claim.verdict for claim in result.claims} == set(page._TONES)
    for claim in result.claims:
        assert claim.text in words
        assert f'<span class="verdict {page._TONES[claim.verdict]}">{claim.verdict}</span>' in page_text
        for test in claim.tests:
            assert test.claimed in words
            assert test.measured in words


def test_every_claim_stands_beside_a_plot_or_a_link_to_it(result, page_text):
    for claim, part in zip(result.claims, page_text.split('<div class="claim">')[1:], strict=True):
        for test in claim.tests:
            name = plots.plot_name(test.metric)
            assert f'id="figure-{name}"' in part or f'href="#figure-{name}"' in part, test.metric


def test_every_mean_difference_and_run_is_on_the_page(result, words):
    for one in result.comparisons:
        shown = cell(one, len(SEEDS))
        assert shown.value in words
        assert shown.difference in words
    for run in result.runs:
        assert run.id in words


def test_variants_changes_notes_recipe_and_provenance_are_on_the_page(result, words):
    for facts in result.variants:
        assert all(f"{name} =" in words for name in facts.changes)
    assert result.notes[0] in words
    for text in ("training.num_steps", "optimizer steps", "num_prompts", "nextn.version"):
        assert text in words


@pytest.mark.parametrize(("theme", "index"), [("light", 0), ("dark", 1)])
def test_every_colour_of_a_variant_and_of_a_verdict_can_be_read_in_both_themes(page_text, theme, index):
    def colour(name: str) -> tuple[int, ...]:
        return tuple(bytes.fromhex(re.findall(rf"--{name}: #([0-9a-f]{{6}})", page_text)[index]))

    names = ["good", "bad", "open", "muted", *(f"arm-{number}" for number in range(8))]
    for background in (colour("page"), colour("card")):
        assert [name for name in names if contrast(colour(name), background) < 4.5] == [], theme


def test_a_study_of_which_nothing_was_measured_has_a_page_too(result):
    bare = dataclasses.replace(result, runs=(), comparisons=(), targets=(), claims=(), notes=(), provenance={})
    text = page.render(bare)
    Page(text)
    assert "<figure" not in text
    assert 'id="claims"' not in text


# -------------------------------------------------------------------------------------------------------------- answer


def test_the_answer_names_the_variant_of_lowest_loss_and_says_what_is_not_resolved(result):
    answer = " ".join(page.answer(result))
    losses = {one.variant: one.value.mean for one in result.comparisons if one.metric == "loss"}
    assert f"At equal tokens, the lowest loss is that of {min(losses, key=lambda name: losses[name])!r}" in answer
    assert "At equal FLOPs, the lowest loss is that of 'next token'" in answer
    assert "At equal training time" in answer
    assert "Of 5 claims: 1 confirmed, 2 refuted, 2 not resolved at this scale." in answer


def test_with_one_seed_the_answer_says_that_nothing_is_resolved(result):
    runs = [run for run in result.runs if run.seed == 0]
    one = dataclasses.replace(result, seeds=(0,), claims=(), comparisons=compare(runs, BASELINE, (0,), {}))
    assert "With one seed there are no intervals, and nothing is resolved." in page.answer(one)
    text = page.render(one)
    assert re.search(r'class="unresolved">not resolved, [-+][\d.]+, n = 1<', text)
    assert 'class="better"' not in text
    assert 'class="worse"' not in text


def test_a_variant_with_a_baseline_of_its_own_is_said_to_be_compared_with_that(result):
    changed = tuple(
        dataclasses.replace(facts, against="one depth") if facts.name == "three depths" else facts
        for facts in result.variants
    )
    other = dataclasses.replace(result, variants=changed)
    assert any("the loss of 'three depths' less that of 'one depth'" in line for line in page.answer(other))
    assert "against one depth" in page.render(other)


# --------------------------------------------------------------------------------------------------------------- cells

FINITE = st.floats(-2.0, 2.0).map(lambda value: round(value, 3))


@st.composite
def comparisons(draw) -> Comparison:
    name = draw(st.sampled_from([name for name, metric in METRICS.items() if not metric.per_depth]))
    metric = METRICS[name]
    mean, half = draw(FINITE), draw(st.floats(0.001, 1.0))
    found = Estimate(mean, mean - half, mean + half, 3)
    equal = 1.0 if metric.pair and metric.form == "ratio" else 0.0
    resolved = not found.low <= equal <= found.high
    value = found if metric.pair else Estimate(1.0, 0.9, 1.1, 3)
    return Comparison("a", name, (mean,) * 3, (0, 1, 2), value, None if metric.pair else found, resolved)


def check_words(words_of) -> None:
    """`not resolved` is written where, and only where, the interval holds equality; else a tone, and it is right."""

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(comparisons())
    def law(one: Comparison) -> None:
        metric, found = METRICS[one.metric], one.difference or one.value
        equal = 1.0 if metric.pair and metric.form == "ratio" else 0.0
        shown: Cell = words_of(one, 3)
        assert ("not resolved" in shown.difference) == (found.low <= equal <= found.high)
        assert (shown.tone == "unresolved") == ("not resolved" in shown.difference)
        if shown.tone in ("better", "worse"):
            is_lower = found.high < equal
            assert (shown.tone == "better") == (is_lower if metric.better == "lower" else not is_lower)

    law()


def test_not_resolved_is_written_where_the_interval_holds_equality_and_only_there():
    check_words(cell)


def test_words_that_judge_by_the_mean_alone_are_caught():
    def by_mean(one: Comparison, num_seeds: int) -> Cell:
        return cell(dataclasses.replace(one, resolved=True), num_seeds)

    with pytest.raises(AssertionError):
        check_words(by_mean)


def test_words_that_take_lower_for_better_in_every_measure_are_caught():
    def lower(one: Comparison, num_seeds: int) -> Cell:
        shown, found = cell(one, num_seeds), one.difference or one.value
        tone = shown.tone if shown.tone in ("", "unresolved") else "better" if found.mean < 0 else "worse"
        return dataclasses.replace(shown, tone=tone)

    with pytest.raises(AssertionError):
        check_words(lower)


def test_the_baseline_has_its_own_interval_instead_of_a_difference_and_what_was_not_measured_is_a_dash(result):
    found = comparisons_of(result)
    baseline = found[BASELINE, "loss"].value
    assert cell(found[BASELINE, "loss"], 3) == Cell("1.382", f"({baseline.low:.3f} to {baseline.high:.3f})")
    assert tables.difference_text(found[BASELINE, "loss"], 3) == ""
    assert cell(found[BASELINE, "steps_ratio"], 3) == Cell("1.00x")
    assert cell(found.get((BASELINE, "al_greedy")), 3) == Cell("\u2013")


def test_a_difference_of_fewer_seeds_than_the_study_has_says_so(result):
    one = comparisons_of(result)["one depth", "loss"]
    fewer = dataclasses.replace(one, difference=dataclasses.replace(one.difference, n=2))
    assert cell(one, 3).difference.endswith(")")
    assert cell(fewer, 3).difference.endswith(", n = 2")


# --------------------------------------------------------------------------------------------------------------- plots


def test_every_plot_names_every_variant_it_shows_and_takes_its_colours_from_the_page(result):
    drawn = plots.plots(result)
    assert list(drawn) == ["loss-tokens", "loss-time", "differences", "position", "lengths", "acceptance",
                           "acceptance-unconditional", "overhead", "training-cost", "decoding-speed",
                           "ladder"]  # fmt: skip
    drawn |= {plot.name: plot for plot in (plots.metric_plot(result, "parse_share"),) if plot is not None}
    for name, plot in drawn.items():
        alternative = re.search(r'role="img" aria-label="([^"]*)"', plot.svg)
        assert alternative is not None, name
        for variant in VARIANTS:
            if variant != BASELINE:
                assert variant in alternative.group(1), name
        assert re.search(r"#[0-9a-f]{6}\b", plot.svg) is None, name
        assert len(plot.words) > 20, name


@pytest.mark.parametrize(
    ("metrics", "missing"),
    [
        (("al_",), {"lengths"}),
        (("acceptance_",), {"acceptance", "acceptance-unconditional"}),
        (("acceptance_greedy_unconditional", "acceptance_sampled_unconditional"), {"acceptance-unconditional"}),
        (("time_overhead",), {"overhead"}),
        (("loss",), {"differences"}),
    ],
)
def test_a_plot_without_data_is_left_out_and_only_that_one(result, metrics, missing):
    assert plots.plots(result).keys() - plots.plots(without(result, *metrics)).keys() == missing


def test_without_a_ladder_there_is_no_plot_of_it(result):
    alone = dataclasses.replace(result, runs=tuple(run for run in result.runs if run.ladder is None))
    assert plots.plots(result).keys() - plots.plots(alone).keys() == {"ladder"}


def test_a_claim_about_a_measure_that_no_plot_is_made_for_gets_one_of_its_own(result):
    assert plots.metric_plot(result, "peak_memory_bytes").name == plots.plot_name("peak_memory_bytes")
    assert plots.metric_plot(result, "task/arc_easy/acc") is None


def test_claims_about_acceptance_of_every_depth_share_the_plot_of_its_kind(result):
    metrics = [f"acceptance_{arm}_unconditional_{depth}" for arm in ("greedy", "sampled") for depth in (1, 2)]
    claims = tuple(
        judge(Claim(metric, (Criterion(metric=metric, variant="three depths", low=0.5),)), result.comparisons,
              BASELINE)
        for metric in metrics
    )  # fmt: skip
    shown, _ = page._claims_and_plots(dataclasses.replace(result, claims=claims))
    assert [plot.name for plot in shown[0].own] == ["acceptance-unconditional"]
    assert all(claim.own == [] and claim.shared == shown[0].own for claim in shown[1:])


def tells_shares(plot: plots.Plot, result, suffix: str) -> bool:
    """Whether a plot says the acceptance of every variant that drafts, greedy and sampled, first depth first."""
    found = comparisons_of(result)
    lines = []
    for arm in ("greedy", "sampled"):
        for variant, num_depths in (("one depth", 1), ("three depths", 3)):
            metrics = [f"acceptance_{arm}{suffix}_{depth}" for depth in range(1, num_depths + 1)]
            shares = [found[variant, metric].value.mean for metric in metrics]
            lines.append(f"{variant}, {arm}: " + ", ".join(f"{share:.0%}" for share in shares))
    return all(line in plot.svg for line in lines)


def test_a_plot_of_acceptance_tells_the_shares_of_its_own_kind_and_not_those_of_the_other(result):
    drawn = plots.plots(result)
    for name, suffix, other in (
        ("acceptance", "", "_unconditional"),
        ("acceptance-unconditional", "_unconditional", ""),
    ):
        assert tells_shares(drawn[name], result, suffix)
        assert not tells_shares(drawn[name], result, other)


def test_two_dozen_variants_all_look_different(result):
    names = [f"variant {number}" for number in range(24)]
    many = dataclasses.replace(
        result, variants=(result.variants[0], *(VariantFacts(name, {}, "", 0.1) for name in names))
    )
    assert len({style_of(many, name) for name in (BASELINE, *names)}) == 25


POINTS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)),
    min_size=1,
)


def check_front(front_of) -> None:
    """No point of the front is beaten, and every other is beaten by one of the front."""

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(POINTS)
    def law(points) -> None:
        front = front_of(points)
        for name, (x, y) in points.items():
            beaten = any(points[u] != (x, y) and points[u][0] <= x and points[u][1] <= y for u in front)
            assert beaten == (name not in front)

    law()


def test_the_pareto_front_is_what_nothing_beats_in_both():
    check_front(pareto_front)


def test_a_front_that_asks_to_be_beaten_strictly_in_both_is_caught():
    def strict(points):
        return [n for n, (x, y) in points.items() if not any(u < x and v < y for u, v in points.values())]

    with pytest.raises(AssertionError):
        check_front(strict)


# -------------------------------------------------------------------------------------------------------------- tables


def test_a_study_survives_json_unchanged(result, tmp_path):
    study_file.write_json(result, tmp_path / "study.json")
    assert study_file.read_json(tmp_path / "study.json") == result


def test_a_study_of_another_version_is_refused_by_the_key(result, tmp_path):
    study_file.write_json(result, tmp_path / "study.json")
    table = json.loads((tmp_path / "study.json").read_text())
    del table["runs"][3]["seeds"]
    (tmp_path / "study.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=r"study.json.runs\[3\] lacks seed"):
        study_file.read_json(tmp_path / "study.json")
    with pytest.raises(CheckpointError):
        study_file.read_json(tmp_path / "none.json")


def test_the_csv_has_a_row_per_run_with_every_digit(result, tmp_path):
    tables.write_csv(result, tmp_path / "study.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "study.csv").read_text())))
    assert len(rows) == len(result.runs) == len(SEEDS) * (len(VARIANTS) + len(LADDER))
    for row, run in zip(rows, result.runs, strict=True):
        assert (row["variant"], int(row["seed"]), row["id"]) == (run.variant, run.seed, run.id)
        assert row["ladder"] == ("" if run.ladder is None else str(run.ladder))
        for name, value in run.values.items():
            assert float(row[name]) == value  # broken by any rounding, since no value of the example is round:
        assert float(f"{run.values['loss']:.6f}") != run.values["loss"]
        assert (row["steps_ratio"] == "") == (run.ladder is not None)


def test_a_pair_measure_stands_in_the_row_of_its_seed(result):
    found = comparisons_of(result)["one depth", "steps_ratio"]
    for index, run in enumerate(result.runs):
        if run.variant == "one depth":
            assert tables.values_of_run(result, index)["steps_ratio"] == found.values[found.seeds.index(run.seed)]


def test_the_terminal_shows_variants_differences_and_claims_as_they_are_written(result):
    facts = dataclasses.replace(result.variants[1], name="stages [[1], [2]]")
    odd = dataclasses.replace(result, variants=(result.variants[0], facts, *result.variants[2:]))
    console = Console(width=250, record=True, file=io.StringIO())
    print_result(console, odd)
    text = console.export_text()
    assert "stages [[1], [2]]" in text
    assert tables.difference_text(comparisons_of(result)["three depths", "loss"], 3) in text
    assert "refuted: Three depths take at most 0.7 of the steps to the same loss" in text
    assert all(test.measured in text for claim in result.claims for test in claim.tests)


def test_the_table_fits_a_terminal_of_120_columns(result):
    console = Console(width=120, record=True, file=io.StringIO())
    print_result(console, result)
    text = console.export_text()
    assert "parses" in text
    assert "\u2026" not in text
