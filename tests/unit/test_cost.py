"""Counted FLOPs and parameters against a counter of the products that run, and against the modules themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nextn.config import (
    CurriculumConfig,
    DetachConfig,
    ModelConfig,
    MTPConfig,
    ObjectiveConfig,
    Recipe,
    ScheduleConfig,
)
from nextn.errors import ConfigError
from nextn.model import attention, flops, moe
from nextn.model.kernels import attention as fast_attention
from nextn.model.moe import MixtureOfExperts
from nextn.mtp import MTPModel, cost, sequential
from nextn.mtp.cost import active_depths, model_cost, phases, step_flops, training_flops, weightless_model
from nextn.objective import Progress, StepObjective
from tests.e2e.tiny_run import recipe_with, trainer

from .test_mtp_laws import TINY, VARIANTS

TOLERANCE = 0.02
CONFIGS = {
    "experts": replace(TINY, vocab_size=61),
    "experts, query rank": replace(TINY, vocab_size=61, q_lora_rank=10),
    "dense": replace(TINY, vocab_size=61, n_routed_experts=0),
    "grouped experts": replace(TINY, vocab_size=61, n_group=2, num_experts_per_tok=1, n_shared_experts=0),
}


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Query by query, each with its own past alone: no product above the diagonal, nothing computed again."""
    rows = []
    for position in range(query.shape[2]):
        seen = slice(0, position + 1)
        scores = query[:, :, position : position + 1] @ key[:, :, seen].transpose(2, 3) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[..., position : position + 1, seen], float("-inf"))
        rows.append(scores.softmax(-1) @ value[:, :, seen])
    return torch.cat(rows, dim=2)


@pytest.fixture(autouse=True)
def _nothing_but_the_mathematics(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs is what is said to be counted: whole-square attention and rounded-up rows of experts are left out."""
    monkeypatch.setattr(attention, "attention", causal_attention)
    monkeypatch.setattr(moe, "SLOT_MULTIPLE", 1)


def counter() -> FlopCounterMode:
    def product_added(_: list[int], left: list[int], right: list[int], **__: object) -> int:
        return 2 * left[0] * left[1] * right[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product_added})


def counted(
    config: ModelConfig,
    mtp: MTPConfig,
    length: int,
    active: Sequence[int],
    detach: DetachConfig = DetachConfig(),  # noqa: B008 (frozen)
    chunk_size: int | None = 16,
) -> float:
    """FLOPs per token of the products that a step of two rows really runs."""
    model = MTPModel(config, mtp).initialize(seed=1).train()
    weights = tuple(0.3 if depth in active else 0.0 for depth in range(1, mtp.num_depths + 1))
    objective = StepObjective(weights, detach=detach, balance_alpha=1e-4, chunk_size=chunk_size)
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with counter() as products:
        model(ids, objective=objective).loss.backward()
    return products.get_total_flops() / ids.numel()


def check_counts(config: ModelConfig, mtp: MTPConfig, length: int, active: Sequence[int], *rest, **options) -> None:
    predicted = step_flops(weightless_model(config, mtp), length, active, *rest)
    assert predicted == pytest.approx(counted(config, mtp, length, active, *rest, **options), rel=TOLERANCE)


# --------------------------------------------------------------------------------------------------------- of one step


def test_attention_pair_by_pair_is_the_attention_that_models_use():
    query, key, value = (torch.randn(2, 3, 9, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    expected = fast_attention(query, key, value, None, 0.5)
    torch.testing.assert_close(causal_attention(query, key, value, None, 0.5), expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("num_depths", [0, 1, 3])
def test_a_step_takes_the_flops_that_a_counter_sees(config: ModelConfig, num_depths: int):
    mtp = MTPConfig(num_depths=num_depths)
    for length in (9, 24):
        check_counts(config, mtp, length, range(1, num_depths + 1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("active", [(), (1,), (2,), (1, 3), (1, 2, 3)], ids=str)
def test_a_step_with_some_depths_on_takes_the_flops_that_a_counter_sees(variant: str, active: tuple[int, ...]):
    check_counts(CONFIGS["experts"], VARIANTS[variant], 14, active)


@pytest.mark.parametrize("chunk_size", [None, 7, 1024])
def test_the_loss_in_chunks_and_the_plain_one_take_the_same_flops(chunk_size: int | None):
    check_counts(CONFIGS["experts"], MTPConfig(num_depths=2), 14, (2,), chunk_size=chunk_size)


DETACHED = [
    (variant, DetachConfig(**{flag: True}))
    for variant, flags in {
        "untied": ("trunk", "embedding", "head", "between_depths"),
        "other conventions": ("head", "between_depths"),
        "independent": ("trunk", "embedding", "head"),
        "parallel": ("trunk", "head"),
        "shared module": ("trunk",),
        "heads alone": ("trunk",),
    }.items()
    for flag in flags
] + [("untied", DetachConfig(trunk=True, embedding=True, head=True, between_depths=True))]


@pytest.mark.parametrize("active", [(1,), (1, 2, 3)], ids=str)
@pytest.mark.parametrize(("variant", "detach"), DETACHED, ids=str)
def test_a_step_with_gradients_detached_takes_the_flops_that_a_counter_sees(
    variant: str, detach: DetachConfig, active: tuple[int, ...]
):
    check_counts(CONFIGS["experts"], VARIANTS[variant], 14, active, detach)


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_a_module_that_others_read_detached_has_no_backward_pass(chunk_size: int | None):
    detach = DetachConfig(between_depths=True)
    for config in (CONFIGS["dense"], CONFIGS["experts"]):
        check_counts(config, VARIANTS["untied"], 14, (3,), detach, chunk_size=chunk_size)


def test_a_vocabulary_that_dwarfs_the_layers_or_is_dwarfed_by_them_changes_nothing():
    for vocab_size in (8, 2000):
        check_counts(replace(TINY, vocab_size=vocab_size), VARIANTS["untied"], 14, (1, 2))


def without_heads_of_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "head_flops", lambda config: 0.0)
    monkeypatch.setattr(sequential.Sequential, "depth_flops", lambda *_: 0.0)


def whole_square_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    right = flops.block_flops
    monkeypatch.setattr(flops, "block_flops", lambda config, is_moe, length: right(config, is_moe, 2 * length - 1))


def every_expert_for_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    right = flops.block_flops
    wrong = replace(CONFIGS["experts"], num_experts_per_tok=4)
    monkeypatch.setattr(flops, "block_flops", lambda _, is_moe, length: right(wrong, is_moe, length))


def depths_as_long_as_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "num_final_positions", lambda num_tokens, depth: num_tokens)


def depths_above_the_wanted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential.Sequential, "required_depths", lambda self, wanted: [1, 2, 3])


@pytest.mark.parametrize(
    "break_it",
    [
        without_heads_of_depths,
        whole_square_of_attention,
        every_expert_for_every_token,
        depths_as_long_as_the_row,
        depths_above_the_wanted_too,
    ],
    ids=lambda function: function.__name__,
)
def test_a_wrong_formula_is_caught(monkeypatch: pytest.MonkeyPatch, break_it):
    config, mtp, length, active = CONFIGS["experts"], VARIANTS["untied"], 16, (1, 2)
    right = counted(config, mtp, length, active)
    break_it(monkeypatch)
    assert step_flops(weightless_model(config, mtp), length, active) != pytest.approx(right, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("variant", "flag", "active"),
    [("untied", "head", (1, 2, 3)), ("untied", "between_depths", (3,)), ("heads alone", "trunk", (1, 2, 3))],
)
def test_gradients_that_are_detached_but_counted_are_caught(variant: str, flag: str, active: tuple[int, ...]):
    mtp, detach = VARIANTS[variant], DetachConfig(**{flag: True})
    right = counted(CONFIGS["dense"], mtp, 14, active, detach)
    predicted = step_flops(weightless_model(CONFIGS["dense"], mtp), 14, active)
    assert predicted != pytest.approx(right, rel=TOLERANCE)


def test_depths_that_the_model_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"active_depths = \[1, 4\], but the model has depths 1\.\.3"):
        step_flops(weightless_model(TINY, MTPConfig(num_depths=3)), 24, (1, 4))


# ----------------------------------------------------------------------------------------------------------- of a run

FORWARD = ObjectiveConfig(curriculum=CurriculumConfig("forward"))


def recipe_of_steps(num_steps: int, num_depths: int, objective: ObjectiveConfig) -> Recipe:
    """Steps of 24 tokens."""
    recipe = recipe_with(
        mtp={"num_depths": num_depths},
        data={"sequence_length": 12},
        optimizer={"num_warmup_steps": 0},
        training={"num_steps": num_steps, "batch_size": 2},
    )
    return replace(recipe, objective=objective)


def test_a_run_takes_the_flops_that_a_counter_sees_in_its_steps(tmp_path: Path):
    recipe = recipe_with(
        objective={"curriculum": CurriculumConfig("forward")},
        optimizer={"name": "adamw"},  # which multiplies no matrices
        training={"num_steps": 6, "micro_batch_size": 4},
    )
    run = trainer(tmp_path, recipe)
    run.model.train()
    seen = []
    with counter() as products:
        for _ in range(recipe.training.num_steps):
            run.step()
            seen.append(products.get_total_flops())
    assert training_flops(recipe) == pytest.approx(seen, rel=TOLERANCE)
    without_curriculum = training_flops(replace(recipe, objective=ObjectiveConfig()))
    assert without_curriculum[0] != pytest.approx(seen[0], rel=TOLERANCE), "depths that are off must be noticed"


@settings(max_examples=30, deadline=None)
@given(
    num_steps=st.integers(1, 40),
    stages=st.lists(st.sets(st.integers(1, 3)).map(lambda stage: tuple(sorted(stage))), min_size=1, max_size=4),
    off_until=st.integers(0, 10),
)
def test_phases_are_those_that_the_steps_are_in(num_steps: int, stages: list[tuple[int, ...]], off_until: int):
    objective = ObjectiveConfig(
        mtp_lambda=ScheduleConfig("piecewise", (0.0, 0.3), (off_until * 24,), unit="tokens"),
        curriculum=CurriculumConfig("stages", stages=tuple(stages)),
    )
    by_step = [active_depths(objective, 3, Progress(step, step * 24, num_steps)) for step in range(num_steps)]
    recipe = recipe_of_steps(num_steps, 3, objective)
    found = phases(recipe)
    assert [active for active, _ in found] == list(dict.fromkeys(by_step)), "in order of first appearance"
    assert dict(found) == {active: by_step.count(active) for active in by_step}
    sums = training_flops(recipe)
    model = weightless_model(recipe.model, recipe.mtp)
    expected = sum(count * 24 * step_flops(model, 12, active) for active, count in found)
    assert len(sums) == num_steps
    assert sums[-1] == pytest.approx(expected)


def test_plain_training_has_one_phase_and_no_depths():
    assert phases(recipe_of_steps(5, 0, FORWARD)) == [((), 5)]


def test_a_model_far_larger_than_memory_can_be_counted():
    released = ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        first_k_dense_replace=3,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=4096,
    )
    flops_per_token = step_flops(weightless_model(released, MTPConfig(num_depths=0)), 4096)
    # Six per active parameter (37 billion, of which 0.9 are the embedding, which multiplies nothing), and attention.
    attention = 3 * 2 * 61 * 128 * (128 + 64 + 128) * 4097 / 2
    assert flops_per_token == pytest.approx(6 * 36.6e9 + attention, rel=TOLERANCE)


def test_a_vocabulary_that_is_not_known_yet_is_refused():
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 0 stands for the tokenizer's"):
        training_flops(recipe_with(model={"vocab_size": 0}))


# ----------------------------------------------------------------------------------------------------------- parameters


def test_parameters_are_counted_once_and_split_by_owner():
    model = MTPModel(TINY, MTPConfig(num_depths=3, share_weights=True)).initialize(seed=1)
    cost = model_cost(model, 32)
    scheme = sum(p.numel() for p in model.scheme.parameters())
    assert cost.num_mtp_parameters == scheme
    assert cost.num_parameters == scheme + sum(p.numel() for p in model.trunk.parameters())
    layers = [m for m in model.trunk.modules() if isinstance(m, MixtureOfExperts)]
    per_expert = 3 * TINY.hidden_size * TINY.moe_intermediate_size
    idle = len(layers) * (TINY.n_routed_experts - TINY.num_experts_per_tok) * per_expert
    assert cost.num_active_parameters == cost.num_parameters - scheme - idle


def test_plain_training_costs_nothing_for_mtp():
    cost = model_cost(MTPModel(TINY, MTPConfig(num_depths=0)), 32)
    assert (cost.num_mtp_parameters, cost.mtp_flops_per_token, cost.mtp_flops_overhead) == (0, 0, 0)


def test_where_nothing_is_detached_a_step_takes_three_forward_passes():
    model = MTPModel(TINY, VARIANTS["untied"])
    cost = model_cost(model, 32)
    assert step_flops(model, 32) == pytest.approx(3 * (cost.trunk_flops_per_token + cost.mtp_flops_per_token))
    assert step_flops(model, 32, ()) == pytest.approx(3 * cost.trunk_flops_per_token)
