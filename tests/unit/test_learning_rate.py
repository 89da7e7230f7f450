from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextn.config import OptimizerConfig
from nextn.training import learning_rate_factor

SCHEDULES = ("cosine", "wsd", "constant")


def factors(config: OptimizerConfig, num_steps: int) -> list[float]:
    return [learning_rate_factor(config, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step(schedule):
    config = OptimizerConfig(schedule=schedule, num_warmup_steps=4)
    assert factors(config, 40)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_no_step_has_rate_zero(schedule):
    config = OptimizerConfig(schedule=schedule, num_warmup_steps=0)
    assert min(factors(config, 10)) > 0


def test_cosine_is_halfway_between_peak_and_end_in_the_middle():
    config = OptimizerConfig(schedule="cosine", num_warmup_steps=10, final_learning_rate_ratio=0.2)
    assert learning_rate_factor(config, 10 + 45 - 1, 100) == pytest.approx(0.6)
    assert learning_rate_factor(config, 99, 100) == pytest.approx(0.2)


def test_wsd_is_stable_until_the_decay_share_and_then_linear():
    config = OptimizerConfig(schedule="wsd", num_warmup_steps=10, decay_share=0.4, final_learning_rate_ratio=0.0)
    values = factors(config, 100)
    assert values[9:60] == [1.0] * 51
    assert values[60] == pytest.approx(1 - 1 / 40)
    assert values[79] == pytest.approx(0.5)
    assert values[99] == 0.0


def test_a_wsd_decay_that_would_start_in_the_warm_up_starts_after_it():
    config = OptimizerConfig(schedule="wsd", num_warmup_steps=5, decay_share=1.0, final_learning_rate_ratio=0.0)
    assert factors(config, 10) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_constant_stays_at_the_peak():
    assert set(factors(OptimizerConfig(schedule="constant", num_warmup_steps=1), 30)) == {1.0}


@given(
    schedule=st.sampled_from(SCHEDULES),
    num_steps=st.integers(1, 200),
    warm_up_share=st.floats(0, 1),
    decay_share=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_every_schedule_rises_then_never_rises_again_and_ends_where_it_should(
    schedule, num_steps, warm_up_share, decay_share, final
):
    num_warmup_steps = int(warm_up_share * num_steps)
    config = OptimizerConfig(
        schedule=schedule,
        num_warmup_steps=num_warmup_steps,
        decay_share=decay_share,
        final_learning_rate_ratio=final,
    )
    values = factors(config, num_steps)
    after = values[max(num_warmup_steps - 1, 0) :]
    assert all(0 <= value <= 1 for value in values)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    if schedule == "cosine" and num_warmup_steps < num_steps:
        assert values[-1] == pytest.approx(final)


def test_a_step_outside_the_run_is_refused():
    for step in (-1, 10):
        with pytest.raises(ValueError, match=r"step must lie in 0\.\.9"):
            learning_rate_factor(OptimizerConfig(num_warmup_steps=0), step, 10)


def test_a_schedule_that_counts_steps_from_one_is_caught():
    config = OptimizerConfig(schedule="cosine", num_warmup_steps=4, final_learning_rate_ratio=0.1)
    off_by_one = [learning_rate_factor(config, step + 1, 41) for step in range(40)]
    assert off_by_one[:4] != [0.25, 0.5, 0.75, 1.0]
