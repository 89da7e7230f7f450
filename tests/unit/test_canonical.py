"""Rewriting a model into the released layout changes its weights and never its logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nextn.config import ModelConfig, MTPConfig
from nextn.interop import canonical as module
from nextn.interop.canonical import canonical, canonical_config
from nextn.mtp import MTPModel

TINY = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=4,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=6,
    v_head_dim=4,
    initializer_range=0.3,
)
LAYOUTS = {
    "hidden first": (TINY, {"concat": "hidden_first"}),
    "shared head norm": (TINY, {"head_norm": "shared"}),
    "rotary halves": (replace(TINY, rope_interleave=False), {}),
    "rotary halves, full queries, biases": (
        replace(TINY, rope_interleave=False, q_lora_rank=None, attention_bias=True, tie_word_embeddings=True),
        {"concat": "hidden_first"},
    ),
    "tied head": (replace(TINY, tie_word_embeddings=True), {}),
    "no experts": (replace(TINY, n_routed_experts=0), {}),
    "one module, carry never trained": (TINY, {"num_depths": 1, "carry": "pre_norm"}),
}


def build(layout: str) -> MTPModel:
    config, changes = LAYOUTS[layout]
    model = MTPModel(config, MTPConfig(**({"num_depths": 2} | changes))).initialize(seed=3).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or "bias" in name:
                tensor.add_(0.3 * torch.randn(tensor.shape))
    return model


def largest_difference(a: MTPModel, b: MTPModel) -> float:
    ids = torch.randint(0, TINY.vocab_size, (2, 11))
    with torch.no_grad():
        pairs = zip(a(ids).logits_per_depth, b(ids).logits_per_depth, strict=True)
        return max((x - y).abs().max().item() for x, y in pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rewritten_model_has_the_released_layout_and_the_same_logits(layout: str):
    model = build(layout)
    rewritten = canonical(model)
    assert rewritten.config.rope_interleave
    assert not rewritten.config.tie_word_embeddings
    assert rewritten.config.has_experts or rewritten.config.first_k_dense_replace == 2
    assert (rewritten.mtp_config.concat, rewritten.mtp_config.head_norm) == ("embed_first", "own")
    assert (rewritten.config, rewritten.mtp_config) == canonical_config(model.config, model.mtp_config)
    assert largest_difference(model, rewritten) < 1e-5
    assert canonical(rewritten) is rewritten


def test_rows_left_as_they_are_give_other_logits(monkeypatch):
    monkeypatch.setattr(module, "_pairs", lambda rotated, dim: rotated)
    assert largest_difference(build("rotary halves"), canonical(build("rotary halves"))) > 1e-3


@pytest.mark.parametrize("convention", [{"trunk_hidden": "pre_norm"}, {"carry": "pre_norm"}])
def test_conventions_that_are_behaviour_are_left_alone(convention: dict[str, str]):
    model = MTPModel(TINY, MTPConfig(num_depths=2, **convention))
    assert canonical(model).mtp_config == model.mtp_config


def test_the_model_that_was_given_keeps_its_weights():
    model = build("hidden first")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in canonical(model).parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
