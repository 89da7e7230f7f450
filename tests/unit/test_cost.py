"""Counted FLOPs and parameters against a counter and against the modules themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nextn.config import MTPConfig
from nextn.model.moe import MixtureOfExperts
from nextn.mtp import MTPModel
from nextn.mtp.cost import model_cost

from .test_mtp_laws import TINY, tokens


@pytest.mark.parametrize("num_depths", [0, 2])
@pytest.mark.parametrize("q_lora_rank", [None, 8])
def test_flops_are_those_of_a_counter(num_depths: int, q_lora_rank: int | None):
    config = replace(TINY, q_lora_rank=q_lora_rank, hidden_size=64, moe_intermediate_size=64)
    model = MTPModel(config, MTPConfig(num_depths=num_depths)).initialize(seed=1).eval()
    length = 64
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        model(tokens(2, length))
    cost = model_cost(model, length)
    predicted = 2 * length * (cost.trunk_flops_per_token + cost.mtp_flops_per_token)
    # Grouped products of experts are our own operator: the counter sees their parts, rounded up to whole slots, and
    # whole [T, T] attention instead of its causal half. Both are small at this shape.
    assert counter.get_total_flops() == pytest.approx(predicted, rel=0.35)
    assert counter.get_total_flops() >= predicted * 0.98


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
