"""Schedules, depth weights and curricula: their values at boundaries, their shapes, and what is refused."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextn.config import CurriculumConfig, MTPConfig, ObjectiveConfig, Recipe, ScheduleConfig, load_recipe
from nextn.errors import ConfigError
from nextn.objective import Progress, depth_is_on, depth_weights, schedules, stage_at, total_loss, value_at
from nextn.tables import from_table, to_table

UNITS = ("steps", "tokens", "share")
NUM_STEPS, TOKENS_PER_STEP = 1000, 64


def at(step: int, num_steps: int = NUM_STEPS) -> Progress:
    """Before step `step` (0-based) of a run with 64 tokens per step."""
    return Progress(step, step * TOKENS_PER_STEP, num_steps)


def in_unit(unit: str, *steps: float) -> tuple[float, ...]:
    """Boundaries that stand at these steps, counted in `unit`."""
    scale = {"steps": 1.0, "tokens": TOKENS_PER_STEP, "share": 1 / NUM_STEPS}[unit]
    return tuple(step * scale for step in steps)


# ----------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("kind", "values", "boundaries", "expected"),
    [
        ("constant", (0.3,), (), {0: 0.3, 999: 0.3}),
        ("piecewise", (0.3, 0.2, 0.1), (100, 200), {0: 0.3, 99: 0.3, 100: 0.2, 199: 0.2, 200: 0.1, 999: 0.1}),
        (
            "linear",
            (0.1, 0.5, 0.2),
            (100, 200, 500),
            {0: 0.1, 100: 0.1, 101: 0.104, 199: 0.496, 200: 0.5, 203: 0.497, 500: 0.2, 501: 0.2, 999: 0.2},
        ),
        ("polynomial", (0.4, 0.1), (100, 500), {0: 0.4, 100: 0.4, 101: 0.39925, 300: 0.25, 500: 0.1, 999: 0.1}),
    ],
)
def test_values_before_at_and_after_each_boundary(unit, kind, values, boundaries, expected):
    schedule = ScheduleConfig(kind, values, in_unit(unit, *boundaries), unit)
    assert {step: value_at(schedule, at(step)) for step in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("unit", UNITS)
def test_a_boundary_that_belonged_to_the_piece_before_it_would_be_noticed(unit, monkeypatch):
    schedule = ScheduleConfig("piecewise", (0.3, 0.1), in_unit(unit, 300), unit)
    curriculum = CurriculumConfig("stages", ((1,), ()), in_unit(unit, 300), unit)
    assert [value_at(schedule, at(step)) for step in (299, 300)] == [0.3, 0.1]
    assert [stage_at(curriculum, 1, at(step)) for step in (299, 300)] == [0, 1]
    monkeypatch.setattr(schedules, "bisect_right", bisect_left)
    assert value_at(schedule, at(300)) == 0.3
    assert stage_at(curriculum, 1, at(300)) == 0


@pytest.mark.parametrize("power", [0.5, 1, 2, 3])
def test_polynomial_decay_to_zero_is_lambda_0_times_1_minus_t_over_T_to_the_alpha(power: float):  # noqa: N802
    schedule = ScheduleConfig("polynomial", (0.3, 0), (0, 1), "share", power=power)
    for step in range(0, NUM_STEPS, 7):
        assert value_at(schedule, at(step)) == pytest.approx(0.3 * (1 - step / NUM_STEPS) ** power)


def largest_step_change(schedule: ScheduleConfig) -> float:
    values = [value_at(schedule, at(step)) for step in range(200)]
    return max(abs(b - a) for a, b in pairwise(values))


@given(st.lists(st.tuples(st.integers(0, 150), st.floats(0, 2)), min_size=2, max_size=5, unique_by=lambda p: p[0]))
def test_linear_is_continuous_and_between_its_points_monotone(points):
    boundaries, values = zip(*sorted(points), strict=True)
    schedule = ScheduleConfig("linear", values, boundaries)
    steepest = max(abs(d - c) / (b - a) for (a, c), (b, d) in pairwise(zip(boundaries, values, strict=True)))
    assert largest_step_change(schedule) <= steepest + 1e-9
    for (a, left), (b, right) in pairwise(zip(boundaries, values, strict=True)):
        inside = [value_at(schedule, at(step)) for step in range(a, b + 1)]
        assert inside[0] == left
        assert inside[-1] == right
        sign = 1 if right >= left else -1
        assert all(sign * (y - x) >= -1e-12 for x, y in pairwise(inside))


@given(st.floats(0, 2), st.floats(0, 2), st.integers(0, 50), st.integers(1, 100), st.floats(1, 4))
def test_polynomial_is_continuous_and_monotone(start, end, first, length, power):
    schedule = ScheduleConfig("polynomial", (start, end), (first, first + length), power=power)
    values = [value_at(schedule, at(step)) for step in range(200)]
    assert values[: first + 1] == [start] * (first + 1)
    assert values[first + length :] == [end] * (200 - first - length)
    assert largest_step_change(schedule) <= power * abs(end - start) / length + 1e-9
    sign = 1 if end >= start else -1
    assert all(sign * (b - a) >= -1e-12 for a, b in pairwise(values))


def test_a_schedule_that_jumps_fails_the_law_of_continuity():
    jumping = ScheduleConfig("piecewise", (0.1, 0.5), (100,))
    assert largest_step_change(jumping) > 0.4 / 100 + 1e-9


SIMPLE = st.one_of(
    st.builds(ScheduleConfig, st.just("constant"), st.tuples(st.floats(0, 2))),
    st.builds(
        ScheduleConfig, st.just("piecewise"), st.tuples(st.floats(0, 2), st.floats(0, 2)), st.just((0.4,)),
        st.sampled_from(UNITS),
    ),
    st.builds(
        ScheduleConfig, st.sampled_from(["linear", "polynomial"]), st.tuples(st.floats(0, 2), st.floats(0, 2)),
        st.just((0.25, 0.75)), st.sampled_from(UNITS),
    ),
)  # fmt: skip
SCHEDULES = st.recursive(
    SIMPLE,
    lambda inner: st.builds(
        lambda factors: ScheduleConfig("product", factors=tuple(factors)), st.lists(inner, min_size=1, max_size=3)
    ),
    max_leaves=6,
)


@given(st.lists(SCHEDULES, min_size=1, max_size=3), st.integers(0, 999))
def test_a_product_is_the_product_of_its_factors(factors, step: int):
    product = ScheduleConfig("product", factors=tuple(factors))
    assert value_at(product, at(step)) == pytest.approx(math.prod(value_at(factor, at(step)) for factor in factors))


@given(SCHEDULES)
def test_schedules_survive_json(schedule):
    config = ObjectiveConfig(mtp_lambda=schedule)
    assert from_table(ObjectiveConfig, json.loads(json.dumps(to_table(config)))) == config


def test_a_recipe_with_a_product_and_stages_is_read_from_toml_and_survives_json(tmp_path):
    (tmp_path / "recipe.toml").write_text(
        """
        [mtp]
        num_depths = 2
        [objective]
        depth_weights = [1, 0.5]
        [objective.mtp_lambda]
        kind = "product"
        [[objective.mtp_lambda.factors]]
        kind = "linear"
        values = [0, 1]
        boundaries = [0, 10]
        [[objective.mtp_lambda.factors]]
        kind = "piecewise"
        values = [0.3, 0.1]
        boundaries = [1_000_000]
        unit = "tokens"
        [objective.curriculum]
        kind = "stages"
        stages = [[], [2], [1, 2]]
        """
    )
    recipe = load_recipe(tmp_path / "recipe.toml")
    warm_up, decay = recipe.objective.mtp_lambda.factors
    assert warm_up == ScheduleConfig("linear", (0.0, 1.0), (0.0, 10.0))
    assert decay == ScheduleConfig("piecewise", (0.3, 0.1), (1e6,), "tokens")
    assert recipe.objective.mtp_lambda.values == ()
    assert recipe.objective.curriculum.stages == ((), (2,), (1, 2))
    assert from_table(Recipe, json.loads(json.dumps(to_table(recipe)))) == recipe


# ----------------------------------------------------------------------------------------------------------- curricula


@given(st.integers(1, 5), st.integers(1, 7), st.data())
def test_forward_and_reverse_mirror_each_other(num_depths: int, steps_per_stage: int, data):
    num_steps = (num_depths + 1) * steps_per_stage
    step = data.draw(st.integers(0, num_steps - 1))
    forward = depth_is_on(CurriculumConfig("forward"), num_depths, at(step, num_steps))
    mirrored = at(num_steps - 1 - step, num_steps)
    assert forward == depth_is_on(CurriculumConfig("reverse"), num_depths, mirrored)
    assert sum(forward) == step // steps_per_stage
    assert list(forward) == sorted(forward, reverse=True), "a depth is on only if those before it are"


@pytest.mark.parametrize("unit", UNITS)
def test_stages_are_switched_on_at_their_boundaries(unit: str):
    curriculum = CurriculumConfig("forward", boundaries=in_unit(unit, 100, 300), unit=unit)
    seen = [depth_is_on(curriculum, 2, at(step)) for step in (0, 99, 100, 299, 300, 999)]
    assert seen == [(False, False)] * 2 + [(True, False)] * 2 + [(True, True)] * 2


def test_listed_stages_may_name_any_depths_in_any_order():
    curriculum = CurriculumConfig("stages", stages=((2,), (), (3, 1)))
    seen = [depth_is_on(curriculum, 3, at(step, 3)) for step in range(3)]
    assert seen == [(False, True, False), (False, False, False), (True, False, True)]


def test_without_a_curriculum_all_depths_are_always_on():
    assert all(depth_is_on(CurriculumConfig(), 3, at(step)) == (True, True, True) for step in range(0, 1000, 99))


# ------------------------------------------------------------------------------------------------------- depth weights


@given(
    st.floats(0.01, 2),
    st.lists(st.floats(0, 3), min_size=1, max_size=5),
    st.floats(0, 2),
    st.booleans(),
    st.sampled_from(["none", "forward", "reverse"]),
    st.integers(0, 999),
)
def test_a_weight_is_lambda_times_relative_weight_times_decay_or_exactly_zero(
    value, relative, beta, average, kind, step
):
    curriculum, num_depths = CurriculumConfig(kind), len(relative)
    config = ObjectiveConfig(
        mtp_lambda=ScheduleConfig(values=(value,)),
        average_over_depths=average,
        depth_weights=tuple(relative),
        depth_decay=beta,
        curriculum=curriculum,
    )
    weights = depth_weights(config, num_depths, at(step))
    on = depth_is_on(curriculum, num_depths, at(step))
    for depth, weight in enumerate(weights, start=1):
        if on[depth - 1]:
            divisor = num_depths if average else 1  # K, however many depths are on
            assert weight == pytest.approx(value / divisor * relative[depth - 1] * beta ** (depth - 1))
        else:
            assert weight == 0.0
            assert math.copysign(1, weight) == 1


@given(st.integers(1, 8), st.floats(0.01, 2))
def test_identical_depths_do_not_scale_an_averaged_loss(num_depths: int, value: float):
    config = ObjectiveConfig(mtp_lambda=ScheduleConfig(values=(value,)))
    losses = [torch.tensor(2.0, dtype=torch.float64)] * num_depths
    total = total_loss(torch.tensor(1.0, dtype=torch.float64), losses, depth_weights(config, num_depths))
    assert total.item() == pytest.approx(1.0 + 2.0 * value)
    summed = ObjectiveConfig(mtp_lambda=ScheduleConfig(values=(value,)), average_over_depths=False)
    total = total_loss(torch.tensor(1.0, dtype=torch.float64), losses, depth_weights(summed, num_depths))
    assert total.item() == pytest.approx(1.0 + 2.0 * value * num_depths)


def test_decay_over_depths_is_geometric():
    config = ObjectiveConfig(mtp_lambda=ScheduleConfig(values=(1.0,)), average_over_depths=False, depth_decay=0.5)
    assert depth_weights(config, 3) == (1.0, 0.5, 0.25)


def run_weights(config: ObjectiveConfig, resumed_at: tuple[int, ...], forgets: bool = False) -> list[tuple[float, ...]]:
    """Weights of all 60 steps of a run that was killed and resumed; `forgets`: progress counts from the last resume."""
    starts = (0, *resumed_at, 60)
    return [
        depth_weights(config, 2, at(step - start if forgets else step, 60))
        for start, end in pairwise(starts)
        for step in range(start, end)
    ]


@given(SCHEDULES, st.sampled_from(["none", "forward", "reverse"]), st.sets(st.integers(1, 59), max_size=4))
def test_resuming_a_run_does_not_change_its_schedule(schedule, kind, resumed_at):
    config = ObjectiveConfig(mtp_lambda=schedule, curriculum=CurriculumConfig(kind))
    assert run_weights(config, tuple(sorted(resumed_at))) == run_weights(config, ())


@given(st.integers(1, 59))
def test_a_run_that_counted_from_its_resume_would_be_noticed(resumed_at: int):
    config = ObjectiveConfig(mtp_lambda=ScheduleConfig("linear", (0.1, 0.5), (0, 1), "share"))
    assert run_weights(config, (resumed_at,), forgets=True) != run_weights(config, ())


# ----------------------------------------------------------------------------------------------------- what is refused

LAMBDA, CURRICULUM = "objective.mtp_lambda", "objective.curriculum"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"values": (0.3, 0.1)}, f"{LAMBDA}: a constant schedule takes one value and no boundaries"),
        ({"boundaries": (5,)}, f"{LAMBDA}: a constant schedule takes one value and no boundaries"),
        ({"kind": "piecewise", "boundaries": (5,)}, "one value more than boundaries, got values = .."),
        ({"kind": "piecewise", "values": (0.3, 0.2, 0.1), "boundaries": (5, 5)}, f"{LAMBDA}.boundaries must grow"),
        ({"kind": "piecewise", "values": (0.3, 0.2), "boundaries": (-1,)}, "boundaries must be 0 or more"),
        ({"kind": "piecewise", "values": (0.3, 0.2), "boundaries": (math.inf,)}, "boundaries must be 0 or more"),
        ({"kind": "piecewise", "values": (0.3, 0.2), "boundaries": (5,), "unit": "share"}, "must lie in 0..1 with"),
        ({"kind": "linear", "values": (0.3,), "boundaries": (5,)}, "at least two of them"),
        ({"kind": "linear", "values": (0.3, 0.1), "boundaries": (5,)}, "a boundary for each value"),
        ({"kind": "polynomial", "values": (0.3, 0.2, 0.1), "boundaries": (0, 1, 2)}, r"values = .start, end. and"),
        ({"kind": "polynomial", "values": (1, 0), "boundaries": (0, 9), "power": 0}, f"{LAMBDA}.power must be above 0"),
        ({"power": 2.0}, f"{LAMBDA}.power needs kind = 'polynomial', got kind = 'constant'"),
        ({"kind": "product"}, f"{LAMBDA}.factors: a product schedule needs at least one factor"),
        ({"kind": "product", "values": (0.5,), "factors": (ScheduleConfig(),)}, "in its factors only, got values"),
        ({"kind": "product", "unit": "tokens", "factors": (ScheduleConfig(),)}, "in its factors only, .*'tokens'"),
        ({"factors": (ScheduleConfig(),)}, f"{LAMBDA}.factors need kind = 'product', got kind = 'constant'"),
        ({"values": (-0.1,)}, f"{LAMBDA}.values must be 0 or more"),
        ({"values": (math.nan,)}, f"{LAMBDA}.values must be 0 or more and finite"),
    ],
)
def test_contradicting_schedules_are_refused(settings, message: str):
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "stages"}, f"{CURRICULUM}.stages lists the stages of kind = 'stages'"),
        ({"kind": "forward", "stages": ((1,),)}, f"{CURRICULUM}.stages .* got kind = 'forward'"),
        ({"kind": "stages", "stages": ((0,),)}, f"{CURRICULUM}.stages names depths from 1 on"),
        ({"kind": "stages", "stages": ((1, 1),)}, f"{CURRICULUM}.stages names a depth once per stage"),
        ({"kind": "forward", "boundaries": (3, 2)}, f"{CURRICULUM}.boundaries must grow"),
        ({"kind": "forward", "boundaries": (3,), "unit": "share"}, f"{CURRICULUM}.boundaries must lie in 0..1"),
    ],
)
def test_contradicting_curricula_are_refused(settings, message: str):
    with pytest.raises(ConfigError, match=message):
        CurriculumConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth_weights": (1.0,)}, r"objective.depth_weights needs one value per depth, mtp.num_depths = 2"),
        ({"curriculum": CurriculumConfig("stages", ((3,),))}, r"may name depths 1..mtp.num_depths = 2, got \[\[3\]\]"),
        ({"curriculum": CurriculumConfig("forward", boundaries=(5,))}, "3 stages .* takes 2 boundaries"),
        ({"curriculum": CurriculumConfig("none", boundaries=(5,))}, "1 stages .* takes 0 boundaries"),
    ],
)
def test_what_does_not_fit_the_number_of_depths_is_refused_with_the_recipe(settings, message: str):
    objective = ObjectiveConfig(**settings)
    with pytest.raises(ConfigError, match=message):
        Recipe(mtp=MTPConfig(num_depths=2), objective=objective)
    with pytest.raises(ConfigError, match=message):
        depth_weights(objective, 2)
    Recipe(mtp=MTPConfig(num_depths=0), objective=objective)  # plain training reads none of it
    assert depth_weights(objective, 0) == ()


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_depth_weights_that_cannot_weigh_are_refused(weight: float):
    with pytest.raises(ConfigError, match=r"objective\.depth_weights must be 0 or more"):
        ObjectiveConfig(depth_weights=(1.0, weight))
