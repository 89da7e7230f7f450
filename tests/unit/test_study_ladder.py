"""What the baseline needs for a loss, read between baselines of several lengths."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nextn.study.ladder import (
    LADDER_METRICS,
    Crossing,
    baseline_loss,
    baseline_steps,
    pair_values,
    reach_targets,
    reached,
)
from nextn.study.results import CurvePoint, RunResult

FLOPS_PER_STEP, S_PER_STEP = 1e9, 0.5


def ideal(steps: float) -> float:
    """A baseline whose loss falls by 0.3 with every doubling of the steps."""
    return 3.0 - 0.3 * math.log2(steps / 100)


def run(
    loss: float, steps: int, *, flops: float = 1.0, seconds: float = 1.0, ladder: float | None = None, **names: int
) -> RunResult:
    """A run of `steps` steps, each of which costs `flops` and `seconds` times what the baseline's do."""
    end = CurvePoint(steps, 0, flops * FLOPS_PER_STEP * steps, seconds * S_PER_STEP * steps, loss)
    return RunResult("", "", names.get("seed", 0), ladder, (end,), {"loss": loss}, (), ())


lengths = st.lists(st.integers(10, 10_000), min_size=2, max_size=5, unique=True).map(sorted)
losses = st.lists(st.floats(0.5, 5), min_size=5, max_size=5)
LADDER = [(float(steps), ideal(steps)) for steps in (100, 200, 800)]


@given(lengths, losses, st.floats(-0.6, 0.6))
def test_steps_to_a_loss_and_loss_after_steps_are_inverse(steps, levels, along):
    points = list(zip(steps, levels, strict=False))
    middle = math.sqrt(steps[0] * steps[-1]) * (steps[-1] / steps[0]) ** along
    loss = baseline_loss(points, middle)
    assume(loss is not None)
    falls = [abs(b - a) for a, b in itertools.pairwise(sorted(levels))]
    assume(min(falls) > 1e-3)  # nearly level pieces lose the digits of either
    assert baseline_steps(points, loss) == pytest.approx(middle, rel=1e-6)


@given(lengths, st.floats(0.51, 1.99))
def test_a_baseline_that_follows_a_law_is_read_exactly_even_beyond_its_ends(steps, factor):
    points = [(length, ideal(length)) for length in steps]
    for asked in (steps[0] * max(factor, 1 / factor) / 1.99, steps[-1] * factor):
        assert baseline_loss(points, asked) == pytest.approx(ideal(asked), abs=1e-6)
        assert baseline_steps(points, ideal(asked)) == pytest.approx(asked, rel=1e-6)


def test_nothing_is_said_beyond_half_of_the_shortest_and_twice_the_longest_run():
    assert baseline_loss(LADDER, 49) is baseline_loss(LADDER, 1601) is None
    assert baseline_steps(LADDER, ideal(49)) is baseline_steps(LADDER, ideal(1601)) is None
    assert None not in (baseline_loss(LADDER, 51), baseline_loss(LADDER, 1599))
    assert baseline_steps(LADDER, -1e9) is None, "far beyond what a float holds as steps"


def test_the_order_of_the_points_changes_nothing_and_a_length_given_twice_counts_as_its_mean():
    assert baseline_steps(LADDER[::-1], 2.5) == baseline_steps(LADDER, 2.5)
    twice = [(100, 3.1), (100, 2.9), (200, 2.7)]
    assert baseline_steps(twice, 2.85) == pytest.approx(baseline_steps([(100, 3.0), (200, 2.7)], 2.85))


def test_baselines_that_do_not_improve_with_length_say_nothing():
    assert baseline_steps([(100, 2.0), (200, 2.0)], 2.0) is None
    assert baseline_loss([(100, 2.0), (200, 2.1)], 150) is None
    assert baseline_steps([(100, 2.0)], 2.0) is None


def with_a_running_minimum(points: list[tuple[float, float]], loss: float) -> float:
    """The broken variant: every lucky run is kept, every unlucky one forgotten."""
    lowest = list(itertools.accumulate((level for _, level in points), min))
    return baseline_steps([(s, b) for (s, _), a, b in zip(points, [9.9, *lowest], lowest, strict=False) if b < a], loss)


def test_a_lucky_run_and_an_unlucky_one_of_the_same_size_shift_the_line_equally():
    lucky = [(100, 3.0), (200, 2.7 - 0.4), (400, 2.4), (800, 2.1)]
    unlucky = [(100, 3.0), (200, 2.7), (400, 2.4 + 0.4), (800, 2.1)]

    def log_ratio(reader, points):
        return math.log2(reader(points, 2.55) / 100 / 2**1.5)

    assert log_ratio(baseline_steps, lucky) == pytest.approx(-log_ratio(baseline_steps, unlucky), abs=0.35)
    assert abs(log_ratio(baseline_steps, lucky)) < abs(log_ratio(with_a_running_minimum, lucky))


def test_a_baseline_beside_itself_is_equal_in_every_measure():
    own = run(ideal(200), 200)
    ladder = [run(ideal(100), 100, ladder=0.5), run(ideal(400), 400, ladder=2.0)]
    values = pair_values(own, own, ladder)
    assert set(values) == set(LADDER_METRICS)
    for name, value in values.items():
        assert value == pytest.approx(0.0 if name.startswith("loss") else 1.0)


def test_a_run_as_good_as_a_baseline_of_twice_the_length_takes_half_its_steps():
    """Its steps cost 1.25 times the FLOPs and 1.6 times the seconds, which takes most of the gain away."""
    own, better = run(ideal(200), 200), run(ideal(400), 200, flops=1.25, seconds=1.6)
    ladder = [run(ideal(100), 100, ladder=0.5), run(ideal(400), 400, ladder=2.0)]
    assert pair_values(better, own, ladder) == pytest.approx(
        {
            "steps_ratio": 0.5,
            "flops_ratio": 0.5 * 1.25,
            "effective_speedup": 2 / 1.6,
            "loss_at_equal_flops": ideal(400) - ideal(250),
            "loss_at_equal_time": ideal(400) - ideal(320),
        }
    )


def test_without_a_ladder_or_beyond_its_reach_the_measures_are_absent():
    own = run(ideal(200), 200)
    assert pair_values(run(2.0, 200), own, []) == {}
    found = pair_values(run(0.1, 200, seconds=9.0), own, [run(ideal(100), 100, ladder=0.5)])
    assert set(found) == {"loss_at_equal_flops"}


def curve(*points: tuple[int, float]) -> tuple[CurvePoint, ...]:
    return tuple(CurvePoint(step, 0, step * FLOPS_PER_STEP, step * S_PER_STEP, loss) for step, loss in points)


def test_the_first_crossing_counts_though_the_curve_rises_again():
    bumpy = curve((100, 3.0), (200, 2.0), (300, 2.8), (400, 1.9))
    found = reached(bumpy, 2.5)
    assert found.step == pytest.approx(100 * math.sqrt(2))
    assert (found.flops, found.training_s) == pytest.approx((found.step * FLOPS_PER_STEP, found.step * S_PER_STEP))


@given(st.floats(1.0, 3.0))
def test_a_crossing_lies_where_the_curve_is(loss):
    falling = curve((0, 3.2), (100, 3.0), (200, 2.0), (400, 1.0))
    step = reached(falling, loss).step
    known = [(100, 3.0), (200, 2.0), (400, 1.0)]
    assert baseline_loss(known, step) == pytest.approx(loss)


def test_step_0_has_the_logarithm_of_step_1():
    assert reached(curve((0, 3.2), (100, 3.0)), 3.1).step == pytest.approx(10)


def test_a_curve_that_begins_below_has_reached_it_at_its_first_point_and_one_that_ends_above_never():
    assert reached(curve((32, 2.0), (64, 1.5)), 2.5) == Crossing(32, 32 * FLOPS_PER_STEP, 32 * S_PER_STEP)
    assert reached(curve((32, 2.0), (64, 1.5)), 1.4) is None


def test_a_target_is_the_mean_over_the_seeds_that_reach_it_and_says_how_many_did():
    def of(variant, ladder, *points):
        return RunResult("", variant, 0, ladder, curve(*points), {}, (), ())

    runs = [
        of("next token", None, (100, 3.0), (400, 2.0)),
        of("next token", 2.0, (100, 1.0)),
        of("next token", None, (100, 3.0), (400, 2.8)),
        of("4 tokens", None, (100, 3.0), (400, 2.9)),
    ]
    first, other = reach_targets(runs, [2.5])
    assert (first.variant, first.num_reached, first.num_seeds, first.step) == ("next token", 1, 2, pytest.approx(200))
    assert (other.variant, other.num_reached, other.num_seeds, other.step) == ("4 tokens", 0, 1, None)
