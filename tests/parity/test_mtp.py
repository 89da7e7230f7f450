"""Our sequential scheme is transformers' MtpModel: hidden states and logits of every depth."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from nextn.alignment import align_depths
from nextn.config import ModelConfig
from nextn.mtp import MTPModel

from .conftest import SMALL, ours_from, randomise, relative_error, transformers_model

TOLERANCE = 1e-5


def build(
    shape: ModelConfig, num_depths: int = 2, **conventions
) -> tuple[MTPModel, MtpModel, torch.Tensor, torch.Tensor]:
    """Both models with equal weights, input ids, and the trunk's post-norm states by transformers."""
    hf = transformers_model(shape, num_depths)
    mtp = MtpModel(hf, num_depths).eval()
    randomise(mtp.layers)
    ours = ours_from(hf, shape, mtp, **conventions)
    ids = torch.randint(0, shape.vocab_size, (1, 20), generator=torch.Generator().manual_seed(5))
    states = hf.model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return ours, mtp, ids, states


def theirs_by_depth(mtp: MtpModel, ids: torch.Tensor, states: torch.Tensor) -> list[torch.Tensor]:
    """transformers' states per depth: depth k reads ids from k on, and the previous depth's states up to the last."""
    cache = MtpCache(config=mtp.config)
    result = []
    for depth in range(1, mtp.num_mtp_layers + 1):
        ids_k, states = ids[:, depth:], states[:, : ids.shape[1] - depth]
        positions = torch.arange(depth, ids.shape[1])[None]
        states = mtp.forward_layer(depth - 1, states, positions, cache, input_ids=ids_k)
        result.append(states)
    return result


@torch.no_grad()
def test_states_and_logits_of_every_depth_equal_those_of_transformers(shape: ModelConfig):
    if not shape.has_experts:
        pytest.skip("transformers' MTP block is always a mixture of experts; ours follows the trunk's last layer")
    ours, mtp, ids, states = build(shape)
    hidden = ours.trunk.hidden_states(ids)
    head_inputs = ours.scheme(ours.trunk, hidden, ours.trunk.final_norm(hidden), align_depths(ids, 2)[1:])
    logits = ours(ids).logits_per_depth
    for depth, theirs in enumerate(theirs_by_depth(mtp, ids, states), start=1):
        assert relative_error(head_inputs[depth - 1], theirs) < TOLERANCE
        assert relative_error(logits[depth], mtp._project_to_logits(theirs)) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize(
    "convention", [{"concat": "hidden_first"}, {"trunk_hidden": "pre_norm"}, {"carry": "pre_norm"}]
)
def test_every_other_convention_gives_other_states(convention: dict[str, str]):
    ours, mtp, ids, states = build(SMALL, **convention)
    hidden = ours.trunk.hidden_states(ids)
    head_inputs = ours.scheme(ours.trunk, hidden, ours.trunk.final_norm(hidden), align_depths(ids, 2)[1:])
    theirs = theirs_by_depth(mtp, ids, states)
    assert max(relative_error(a, b) for a, b in zip(head_inputs, theirs, strict=True)) > 100 * TOLERANCE


@torch.no_grad()
def test_hidden_first_is_what_transformers_calls_mtp_hidden_states_first():
    ours, mtp, ids, states = build(SMALL, concat="hidden_first")
    mtp.config.mtp_hidden_states_first = True
    hidden = ours.trunk.hidden_states(ids)
    head_inputs = ours.scheme(ours.trunk, hidden, ours.trunk.final_norm(hidden), align_depths(ids, 2)[1:])
    for mine, theirs in zip(head_inputs, theirs_by_depth(mtp, ids, states), strict=True):
        assert relative_error(mine, theirs) < TOLERANCE
