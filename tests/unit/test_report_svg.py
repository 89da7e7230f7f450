"""A plot's SVG is short, and shows what matplotlib drew: every point, every text, the order of colours."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextn.report import svg as svg_module
from nextn.report.figure import new_figure, styled
from nextn.report.svg import INK, MUTED, arm_colour, to_svg
from nextn.report.svg_path import rounded_path

NUMBERS = st.floats(-500, 500).map(lambda value: round(value, 6))


def points_of(path: str) -> list[tuple[float, float]]:
    """Every point of a path of M, L, H, V and z, as SVG 2 section 9.3 reads it."""
    points: list[tuple[float, float]] = []
    for letter, text in re.findall(r"([MLHV])([^MLHVz]*)", path):
        numbers = [float(number) for number in re.findall(r"-?(?:\d+\.?\d*|\.\d+)", text)]
        if letter == "H":
            points += [(x, points[-1][1]) for x in numbers]
        elif letter == "V":
            points += [(points[-1][0], y) for y in numbers]
        else:
            points += list(zip(numbers[::2], numbers[1::2], strict=True))
    return points


def check_rounding(round_path) -> None:
    @settings(max_examples=200, deadline=None, derandomize=True, report_multiple_bugs=False)
    @given(st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=6), min_size=1, max_size=3))
    def law(lines) -> None:
        whole = ""
        for first, *others in lines:
            whole += f"M {first[0]} {first[1]} \n" + "".join(f"L {x} {y} \n" for x, y in others)
        expected = [point for line in lines for point in line]
        found = points_of(round_path(whole, 1))
        assert len(found) == len(expected)
        for (x, y), (u, v) in zip(expected, found, strict=True):
            assert abs(x - u) <= 0.0501
            assert abs(y - v) <= 0.0501

    law()


def test_a_rounded_path_has_the_same_points_within_half_a_tenth_of_a_pixel():
    check_rounding(rounded_path)


def test_a_path_whose_minus_signs_are_lost_is_caught():
    with pytest.raises(AssertionError):
        check_rounding(lambda path, num_decimals: rounded_path(path, num_decimals).replace("-", " "))


@styled
def drawn() -> str:
    figure, axes = new_figure()
    axes.plot([0, 1, 2], [0, 1, 0], color=arm_colour(6), marker="s", linewidth=1.4)
    axes.fill_between([0, 1, 2], [0, 0, 0], [1, 2, 1], color=arm_colour(1), alpha=0.2, lw=0)
    axes.plot([0, 2], [1, 1], color=arm_colour(2), linewidth=1.4)
    axes.plot([1], [1], "o", color=arm_colour(3))
    axes.plot([0, 2], [0.5, 0.5], color=MUTED, linestyle=(0, (2, 2)))
    axes.annotate("a < b & c", (1, 1), color=INK)
    axes.set_xticks([0, 1, 2], ["zero", "one", "two"])
    return to_svg(figure, "plot", "a plot")


def test_every_text_stays_a_text():
    assert {"zero", "one", "two", "a &lt; b &amp; c"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", drawn()))


def test_a_line_with_markers_is_one_path_and_each_marker_stands_at_a_point_of_it():
    line = re.search(r'<path d="([^"]*)" style="stroke:var\(--arm-6\);marker:url\(#plot-m0\)"/>', drawn())
    assert line is not None
    assert len(points_of(line.group(1))) == 3


def test_colours_keep_the_order_in_which_they_were_drawn():
    order = list(dict.fromkeys(re.findall(r"--arm-(\d)", drawn().split("</defs>")[1])))
    assert order == ["1", "6", "2", "3"], "areas first, then lines as they were drawn"


def test_a_writer_that_sorts_across_colours_is_caught(monkeypatch):
    monkeypatch.setattr(svg_module, "_only_colour", lambda shape: "one")
    with pytest.raises(AssertionError):
        test_colours_keep_the_order_in_which_they_were_drawn()


def test_grid_lines_of_one_style_are_one_path_below_everything_else():
    clipped = drawn().split('<g clip-path="url(#plot-c0)">')[1]
    first = re.match(r'<path d="([^"]*)" style="stroke:var\(--frame\);stroke-width:0.7"/>', clipped)
    assert first is not None
    assert first.group(1).count("M") >= 6


def test_a_dashed_line_keeps_its_butt_ends():
    assert re.search(r"stroke-dasharray:[^;]*[^\"]*stroke-linecap:butt", drawn())


def test_a_short_svg_has_no_six_decimals_and_is_the_same_every_time():
    assert re.search(r"\d\.\d{3}", drawn()) is None
    assert drawn() == drawn()
