"""The page: it shows all of the report, safely and by itself, and can be read in both themes."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from nextn import config, tables, wording
from nextn.evaluation import results
from nextn.report import html, plots
from nextn.training import TeacherForcedEvaluation
from tests.unit.report_example import NUM_DEPTHS, arm, example, history


class Page(HTMLParser):
    """Collects what the tests ask about; fails on a tag that is closed out of order."""

    VOID = {"meta", "br", "path", "use", "link", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open_tags, self.ids, self.links, self.words = [], [], [], [], []
        self.generated: list[tuple[str, str]] = []  # class of the span, its text
        self.feed(text)
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("src", "href", "xlink:href", "action") if name in attributes]
        if tag not in self.VOID:
            self.open_tags.append((tag, attributes.get("class", "")))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open_tags.pop()

    def handle_endtag(self, tag):
        assert self.open_tags.pop()[0] == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open_tags and self.open_tags[-1][0] == "span" and any(tag == "pre" for tag, _ in self.open_tags):
            self.generated.append((self.open_tags[-1][1], data))


@pytest.fixture(scope="module")
def page_text() -> str:
    return html.render(example())


@pytest.fixture(scope="module")
def page(page_text) -> Page:
    return Page(page_text)


def leaves(value):
    """Every number and text below a nested table."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


# --------------------------------------------------------------------------------------------------------------- page


def test_the_page_is_well_formed_and_ids_are_unique(page):
    assert len(page.ids) == len(set(page.ids))


def test_the_page_loads_nothing(page, page_text):
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert "http" not in page_text
    assert "@import" not in page_text
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed"} == set()
    assert re.search(r"url\((?!#)", page_text) is None


def test_generated_text_is_escaped_and_kept_character_for_character(page, page_text):
    assert "<script>" not in page_text
    for wanted in example().samples:
        joined = "".join(piece.text for piece in wanted.pieces)
        assert joined in "".join(text for _, text in page.generated)


def test_every_generated_token_is_coloured_by_its_origin(page):
    shown = [(name.split()[0], text) for name, text in page.generated if name != "prompt"]
    wanted = [(f"d{piece.depth}", piece.text) for sample in example().samples for piece in sample.pieces]
    assert shown == wanted


def test_accepted_drafts_are_counted_in_characters_since_a_piece_may_hold_several_tokens():
    # "e with acute" in bytes is two tokens, both drafted: one piece, so counting pieces as tokens would say "1 of 2".
    pieces = results.token_texts([b"n", b"\xc3", b"\xa9", b"ab"], [0, 1, 2, 1])
    text = html.render(dataclasses.replace(example(), samples=(results.Sample("greedy", "x", pieces),)))
    assert "3 of 4 characters from accepted drafts" in text


def test_one_of_a_thing_is_not_called_several():
    report = example()
    arm_shown = dataclasses.replace(
        report.arms[0], plain_tok_per_s=(1.0,), speculative_tok_per_s=(2.0,), speedup=results.Speedup(2.0, 2.0, 2.0)
    )
    text = html.render(dataclasses.replace(
        report, arms=(arm_shown,), samples=(), data=dataclasses.replace(report.data, num_validation_files=1)
    ))  # fmt: skip
    assert "spread of 1 repeat<" in text
    assert "1 held-out file (" in text


def test_each_depth_has_a_colour_in_both_themes_and_a_place_in_the_legend(page, page_text):
    for depth in range(1, NUM_DEPTHS + 1):
        assert len(re.findall(rf"--tint-{depth}: rgb", page_text)) == 2
        assert f".d{depth} {{ background: var(--tint-{depth}); }}" in page_text
        assert f"drafted at depth {depth}" in page.words


def test_control_characters_and_lone_surrogates_do_not_break_the_page():
    odd = results.Sample("greedy", "x\x00", (results.TokenText("\x1b[0m\r", 0), results.TokenText("\udcff\x7f", 1)))
    text = html.render(dataclasses.replace(example(), samples=(odd,)))
    text.encode("utf-8")
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text) is None
    assert "␛[0m␍" in text


def test_every_figure_of_the_schema_is_on_the_page(page):
    report = example()
    words = " ".join(" ".join(page.words).replace("\u00a0", " ").split())
    for arm_shown in report.arms:
        for share in (arm_shown.acceptance_rate, *arm_shown.acceptance_conditional, *arm_shown.acceptance_unconditional,
                      arm_shown.repeated_text_share_plain, arm_shown.repeated_text_share_speculative):  # fmt: skip
            assert f"{share:.1%}" in words
        for rate in (*arm_shown.plain_tok_per_s, *arm_shown.speculative_tok_per_s):
            assert f"{rate:.1f}" in words
        for number in (arm_shown.mean_acceptance_length, arm_shown.speedup.median, arm_shown.speedup.lowest,
                       arm_shown.speedup.highest):  # fmt: skip
            assert f"{number:.2f}" in words
        assert " · ".join(map(str, arm_shown.histogram)) in words
        assert str(arm_shown.num_new_tokens) in words
    assert "16 of 16" in words
    forced = report.teacher_forced
    for number in (*forced.loss_per_depth, *forced.bits_per_byte_per_depth):
        assert f"{number:.3f}" in words
    for share in (*forced.teacher_forced_accuracy, *forced.main_agreement, report.repeated_text_share_held_out):
        assert f"{share:.1%}" in words
    for fact in ("6.28M", "3.1M", "1.21M", "192, 257", "8, 2", "600, 2.46M", "4 min 7 s", "9938", "29.2%",
                 "not measured",
                 "681 files", "14 held-out files", "11.7M", "268k", *report.notes):  # fmt: skip
        assert fact in words
    for value in leaves(report.provenance):
        assert wording.plain(value)[:16].replace("T", " ") in words
    for name, value, meaning in html.settings_rows(report.settings, config.Recipe):
        assert name in words
        assert value in words
        assert " ".join(meaning.split()) in words


def test_the_load_of_every_expert_stands_in_the_page_relative_to_its_layers_mean():
    rows = html.expert_loads(history())
    assert [layer for layer, _ in rows] == ["trunk layer 1", "MTP layer 1"]
    assert rows[0][1] == pytest.approx([1.2, 0.8, 1.0, 1.0])
    words = Page(html.render(example())).words
    assert "MTP layer 1" in words
    assert "1.20" in words


def test_every_setting_of_a_recipe_is_shown_with_its_meaning():
    rows = list(html.settings_rows(tables.to_table(config.Recipe()), config.Recipe))
    assert ("model.rope_parameters.rope_theta", "10000.0", "base of the geometric series of wavelengths") in rows
    assert len(rows) > 60
    assert all(meaning for _, _, meaning in rows)


def test_a_loss_of_identity_is_said_loudly():
    arms = (dataclasses.replace(example().arms[0], num_identical_outputs=15), example().arms[1])
    assert any(
        "Warning: only 15 of 16" in line for line in html.headline(dataclasses.replace(example(), arms=arms))
    )  # fmt: skip
    assert not any("Warning" in line for line in html.headline(example()))


def test_a_slowdown_is_called_slower():
    slow = arm("greedy", 0.0, (212, 151, 104, 377), (100.0,), (80.0,))
    lines = html.headline(dataclasses.replace(example(), arms=(slow, example().arms[1])))
    assert any("0.80 times (greedy)" in line for line in lines)
    assert any("slower" in line for line in lines)


def test_a_run_without_mtp_and_without_decoding_has_a_page_too():
    report = example()
    plain_history = tuple(
        {**line, "loss_per_depth": line["loss_per_depth"][:1], "expert_load_max_over_mean": {}} for line in history()
    )
    page = Page(
        html.render(
            dataclasses.replace(
                report, arms=(), samples=(), repeated_text_share_held_out=None, provenance={}, settings={}, notes=(),
                model=dataclasses.replace(report.model, num_depths=0, num_mtp_parameters=0, num_routed_experts=0),
                teacher_forced=TeacherForcedEvaluation((1.1,), (1.6,), (0.6,), (), (510,)),
                training=dataclasses.replace(report.training, history=plain_history),
            )
        )
    )  # fmt: skip
    words = " ".join(page.words)
    assert "without multi-token prediction" in words
    assert "was not decoded" in words
    assert sum(tag == "svg" for tag, _ in page.tags) == 1


def test_more_drafts_than_trained_depths_and_depths_never_reached_have_a_page_too():
    never = arm("greedy", 0.0, (10, 0, 0, 0, 0, 0), (100.0,), (80.0,))
    assert never.acceptance_conditional[1:] == (None, None, None, None)
    page = Page(html.render(dataclasses.replace(example(), arms=(never, example().arms[1]))))
    assert wording.NOT_MEASURED in page.words


def test_writing_replaces_the_old_page_and_leaves_nothing_beside_it(tmp_path, page_text):
    path = tmp_path / "report.html"
    path.write_text("old")
    html.write_report(example(), path)
    assert path.read_text(encoding="utf-8") == page_text
    assert list(tmp_path.iterdir()) == [path]


# -------------------------------------------------------------------------------------------------------------- plots


def all_plots() -> list[str]:
    report = example()
    lines = report.training.history
    return [
        plots.loss_plot(lines), plots.acceptance_kinds_plot(report.teacher_forced, report.arms),
        plots.acceptance_by_depth_plot(report.arms), plots.accepted_length_plot(report.arms),
        plots.tok_per_s_plot(report.arms), plots.expert_load_plot(lines) or "",
    ]  # fmt: skip


def test_plots_take_every_colour_and_font_from_the_page():
    for svg in all_plots():
        assert re.search(r"#[0-9a-fA-F]{6}\b", svg) is None
        assert "font-family" not in svg
        assert len(re.findall("<text", svg)) == len(re.findall(r"<text[^>]*fill: var\(--", svg))


def test_plots_keep_text_as_text_and_describe_themselves():
    for svg in all_plots():
        assert "<text" in svg
        assert re.search(r'role="img" aria-label="[^"]{40,}"', svg)


def test_plots_are_the_same_every_time():
    assert all_plots() == all_plots()


def test_a_depth_that_was_not_trained_at_first_leaves_a_gap_in_its_curve():
    lines = [dict(line) for line in history()]
    for line in lines[:20]:
        line["loss_per_depth"] = [*line["loss_per_depth"][:-1], None]
    assert "depth 3" in plots.loss_plot(lines)


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG 2 contrast ratio of two colours, 0..255 per channel."""

    def luminance(colour):
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(("theme", "index"), [("light", 0), ("dark", 1)])
def test_text_can_be_read_on_every_background(page_text, theme, index):
    def colour(name):
        return tuple(bytes.fromhex(re.findall(rf"--{name}: #([0-9a-f]{{6}});", page_text)[index]))

    backgrounds = [colour("page"), colour("card")]
    for name in ("ink", "muted", "accent", "arm-0", "arm-1", "arm-2", "arm-3"):
        assert all(contrast(colour(name), background) >= 4.5 for background in backgrounds), name
    for depth in range(1, NUM_DEPTHS + 1):
        match = re.findall(rf"--tint-{depth}: rgb\((\d+) (\d+) (\d+) / ([\d.]+)\)", page_text)[index]
        *line, opacity = map(float, match)
        assert all(contrast(line, background) >= 4.5 for background in backgrounds), depth
        tinted = tuple(opacity * a + (1 - opacity) * b for a, b in zip(line, colour("card"), strict=True))
        assert contrast(colour("ink"), tinted) >= 4.5, depth
