"""Tiny random transformers DeepseekV3 models, and ours with the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from nextn.config import ModelConfig, MTPConfig, RopeConfig
from nextn.mtp import MTPModel
from nextn.tables import to_table

SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    n_routed_experts=8,
    num_experts_per_tok=3,
    routed_scaling_factor=1.7,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    max_position_embeddings=128,
    initializer_range=0.2,
)
YARN = RopeConfig(
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=32,
    beta_fast=16.0,
    beta_slow=2.0,
    mscale=0.8,
    mscale_all_dim=1.2,
)
SHAPES = {
    "full query projection": SMALL,
    "low-rank queries": replace(SMALL, q_lora_rank=28),
    "expert groups": replace(SMALL, n_group=4, topk_group=2, q_lora_rank=28),
    "YaRN": replace(SMALL, rope_parameters=YARN),
    "YaRN, default temperature": replace(
        SMALL, rope_parameters=RopeConfig(rope_type="yarn", factor=2.0, original_max_position_embeddings=64)
    ),
    "rotary halves": replace(SMALL, rope_interleave=False),
    "all dense": replace(SMALL, first_k_dense_replace=3),
    "all experts, five layers": replace(SMALL, num_hidden_layers=5, first_k_dense_replace=0, n_shared_experts=2),
    "unnormalised gates": replace(SMALL, norm_topk_prob=False),
    "biases, tied head": replace(SMALL, attention_bias=True, tie_word_embeddings=True),
    "own norm epsilon": replace(SMALL, rms_norm_eps=1e-3),
}


def transformers_model(config: ModelConfig, num_mtp_layers: int = 1) -> DeepseekV3ForCausalLM:
    """A random transformers model of this shape; routing biases are random too, so that they matter."""
    table = to_table(config)
    table["rope_parameters"] = {key: value for key, value in table["rope_parameters"].items() if value is not None}
    torch.manual_seed(7)
    hf_config = DeepseekV3Config(
        **table, num_key_value_heads=config.num_attention_heads, num_mtp_layers=num_mtp_layers, pad_token_id=None
    )
    hf_config._attn_implementation = "eager"
    model = DeepseekV3ForCausalLM(hf_config).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(module: torch.nn.Module) -> None:
    """Every weight and routing bias random, norms around one: nothing is left at a value that hides a mistake."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if "norm" in name:
            tensor.copy_(1 + 0.3 * torch.randn_like(tensor))
        elif "inv_freq" not in name:
            tensor.copy_(0.2 * torch.randn_like(tensor))


def ours_from(hf: DeepseekV3ForCausalLM, config: ModelConfig, mtp: MtpModel | None = None, **conventions) -> MTPModel:
    """Our model with transformers' weights: the trunk's names are the same, so nothing is renamed."""
    depths = 0 if mtp is None else len(mtp.layers)
    model = MTPModel(config, MTPConfig(num_depths=depths, **conventions)).eval()
    missing, unexpected = model.trunk.load_state_dict(hf.state_dict(), strict=False)
    assert not missing
    assert not unexpected
    if mtp is not None:
        for ours, theirs in zip(model.scheme.layers, mtp.layers, strict=True):
            state = {name.replace("mtp_block.", "block."): t for name, t in theirs.state_dict().items()}
            state["shared_head.norm.weight"] = state.pop("post_norm.weight")
            ours.load_state_dict(state)
    return model


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(params=SHAPES, ids=lambda name: name.replace(" ", "_").replace(",", ""))
def shape(request: pytest.FixtureRequest) -> ModelConfig:
    return SHAPES[request.param]
