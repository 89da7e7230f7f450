"""Tiny models whose drafts are right by chance, often, always or never."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nextn.config import ModelConfig, MTPConfig
from nextn.mtp import MTPModel

TINY = ModelConfig(
    vocab_size=17,
    hidden_size=24,
    intermediate_size=32,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.4,
)
TEXT = torch.randint(0, TINY.vocab_size, (4, 48), generator=torch.Generator().manual_seed(1))
"""Four random rows that `memorising_model` has half learnt: its greedy continuation does not loop."""


def random_model(seed: int, **conventions: Any) -> MTPModel:
    """Fresh random weights, K = 2 unless said otherwise: drafts are right about as often as chance has it."""
    return MTPModel(TINY, MTPConfig(**{"num_depths": 2, **conventions})).initialize(seed).eval()


def memorising_model(num_steps: int, **conventions: Any) -> MTPModel:
    """A model stopped while it learns `TEXT` by heart: drafts are often right and often wrong, at every depth."""
    model = random_model(0, **conventions).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(TEXT).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def bigram_model(seed: int) -> MTPModel:
    """Trunk and modules are one and the same map from the last token: every draft is right.

    No block adds anything to the residual stream, and eh_proj passes the embedding alone, so depth k sees at position i
    what the trunk sees at i+k.
    """
    model = random_model(seed)
    modules = model.scheme.layers
    for block in [*model.trunk.model.layers, *(module.block for module in modules)]:
        for name, weight in block.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
    for module in modules:
        module.eh_proj.weight.copy_(torch.eye(TINY.hidden_size, 2 * TINY.hidden_size))
    return model


@torch.no_grad()
def contrary_model(seed: int) -> MTPModel:
    """The bigram model with its modules' states negated: they prefer the least likely token, and no draft is right."""
    model = bigram_model(seed)
    for module in model.scheme.layers:
        module.shared_head["norm"].weight.neg_()
    return model


@pytest.fixture(scope="session", params=["untied", "shared", "pre_norm"])
def memorising(request: pytest.FixtureRequest) -> MTPModel:
    """Half-trained models of three conventions."""
    conventions: dict[str, Any] = {
        "untied": {},
        "shared": {"share_weights": True},
        "pre_norm": {"trunk_hidden": "pre_norm", "carry": "pre_norm", "concat": "hidden_first", "head_norm": "shared"},
    }
    return memorising_model(30 if request.param == "untied" else 50, **conventions[request.param])
