"""Eq. 21-23 of DeepSeek-V3, written out, under every combination of the conventions that differ in the field."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nextn.config import ModelConfig, MTPConfig
from nextn.mtp import MTPModel
from nextn.mtp.scheme import DepthState

TINY = ModelConfig(
    vocab_size=19,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    max_position_embeddings=32,
    initializer_range=0.4,
)
CHOICES = {
    "concat": ("embed_first", "hidden_first"),
    "trunk_hidden": ("post_norm", "pre_norm"),
    "carry": ("post_norm", "pre_norm"),
    "head_norm": ("own", "shared"),
}
COMBINATIONS = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
IDS = torch.randint(0, TINY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(3))


def random_model(conventions: dict[str, str]) -> MTPModel:
    """Two untied depths in float64; every norm has weights of its own, so that no two can be confused."""
    model = MTPModel(TINY, MTPConfig(num_depths=2, **conventions)).initialize(0).double().eval()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.copy_(torch.rand(weight.shape, generator=generator, dtype=weight.dtype) + 0.5)
    return model


def rms(state: Tensor, weight: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return state / (state.square().mean(-1, keepdim=True) + TINY.rms_norm_eps).sqrt() * weight


@torch.no_grad()
def by_hand(model: MTPModel, conventions: dict[str, str], mistake: str | None = None) -> list[tuple[Tensor, Tensor]]:
    """Carry and head input of depths 1 and 2: eq. 21-23 from the modules' own weights; `mistake` puts one in."""
    trunk = model.trunk
    hidden = trunk.hidden_states(IDS)
    if conventions["trunk_hidden"] == "post_norm":
        hidden = rms(hidden, trunk.model.norm.weight)
    elif mistake == "negates the trunk's state":
        hidden = -hidden
    states = []
    for depth, module in enumerate(model.scheme.layers, start=1):
        num_positions = IDS.shape[1] - depth
        embedding = rms(trunk.model.embed_tokens.weight[IDS[:, depth:]], module.enorm.weight)
        previous = rms(hidden[:, :num_positions], module.hnorm.weight)
        left, right = module.eh_proj.weight[:, : TINY.hidden_size], module.eh_proj.weight[:, TINY.hidden_size :]
        if conventions["concat"] == "embed_first":
            joined = embedding @ left.T + previous @ right.T
        else:
            joined = previous @ left.T + embedding @ right.T
        out = module.block(joined, trunk.context(num_positions))
        if mistake == "no norm before the head":
            head_input = out
        elif mistake == "hnorm before the head":
            head_input = rms(out, module.hnorm.weight)
        elif conventions["head_norm"] == "own" and mistake != "the trunk's norm before the head":
            head_input = rms(out, module.shared_head["norm"].weight)
        else:
            head_input = rms(out, trunk.model.norm.weight)
        if conventions["carry"] == "post_norm":
            hidden = head_input
        else:
            hidden = joined if mistake == "carries the block's input" else out
        states.append((hidden, head_input))
    return states


@torch.no_grad()
def check_states(model: MTPModel, expected: list[tuple[Tensor, Tensor]]) -> None:
    """The states that the model's own forward makes at both depths, and its logits, are the expected ones."""
    seen: list[DepthState] = []
    step = model.scheme.step

    def recording_step(*arguments) -> DepthState:
        seen.append(step(*arguments))
        return seen[-1]

    model.scheme.step = recording_step
    try:
        logits = model(IDS).logits_per_depth[1:]
    finally:
        model.scheme.step = step
    assert len(seen) == len(expected) == len(logits) == 2
    for state, depth_logits, (carry, head_input) in zip(seen, logits, expected, strict=True):
        torch.testing.assert_close(state.head_input, head_input)
        torch.testing.assert_close(state.carry, carry)
        torch.testing.assert_close(depth_logits, head_input @ model.trunk.lm_head.weight.T)


@pytest.mark.parametrize("conventions", COMBINATIONS, ids=lambda chosen: "-".join(chosen.values()))
def test_both_depths_are_the_equations_under_every_combination_of_conventions(conventions: dict[str, str]):
    model = random_model(conventions)
    check_states(model, by_hand(model, conventions))


@pytest.mark.parametrize("setting", ["concat", "trunk_hidden", "carry"])
@pytest.mark.parametrize("conventions", COMBINATIONS, ids=lambda chosen: "-".join(chosen.values()))
def test_the_other_choice_of_one_setting_is_noticed(conventions: dict[str, str], setting: str):
    model = random_model(conventions)
    other = next(choice for choice in CHOICES[setting] if choice != conventions[setting])
    with pytest.raises(AssertionError, match="not close"):
        check_states(model, by_hand(model, {**conventions, setting: other}))


@pytest.mark.parametrize(
    ("setting", "mistake"),
    [
        ({"head_norm": "own"}, "hnorm before the head"),
        ({"head_norm": "own"}, "the trunk's norm before the head"),
        ({"head_norm": "shared"}, "hnorm before the head"),
        ({"head_norm": "shared"}, "no norm before the head"),
        ({"carry": "pre_norm"}, "carries the block's input"),
        ({"trunk_hidden": "pre_norm"}, "negates the trunk's state"),
    ],
)
def test_a_mistake_under_one_setting_is_noticed_whatever_the_others_are(setting: dict[str, str], mistake: str):
    for conventions in COMBINATIONS:
        if conventions | setting == conventions:
            model = random_model(conventions)
            with pytest.raises(AssertionError, match="not close"):
                check_states(model, by_hand(model, conventions, mistake))


def test_a_module_whose_head_norm_is_the_trunks_has_none_of_its_own():
    assert any("shared_head" in name for name in random_model(COMBINATIONS[0]).state_dict())
    shared = MTPModel(TINY, MTPConfig(num_depths=2, head_norm="shared"))
    assert not any("shared_head" in name for name in shared.state_dict())
