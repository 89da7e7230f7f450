"""What a model and its MTP depths cost: parameters, and floating-point operations per trained token."""

from __future__ import annotations

from dataclasses import dataclass

from nextn.config import ModelConfig
from nextn.model.moe import Experts
from nextn.mtp.model import MTPModel


@dataclass(frozen=True)
class ModelCost:
    """Sizes; a parameter shared by several modules counts once.

    Attributes:
        num_parameters: trunk and MTP modules.
        num_active_parameters: of the trunk, without the routed experts that a token does not choose.
        num_mtp_parameters: of the MTP modules' own weights; shared embedding and head are not among them.
        trunk_flops_per_token: forward pass of the trunk and its head, in floating-point operations.
        mtp_flops_per_token: forward pass of all trained depths and their heads.
    """

    num_parameters: int
    num_active_parameters: int
    num_mtp_parameters: int
    trunk_flops_per_token: float
    mtp_flops_per_token: float

    @property
    def mtp_flops_share(self) -> float:
        """Extra training cost of MTP, relative to the trunk alone: 0.25 is a quarter more per token."""
        return self.mtp_flops_per_token / self.trunk_flops_per_token


def model_cost(model: MTPModel, sequence_length: int) -> ModelCost:
    """Parameters, and FLOPs per token in rows of `sequence_length` tokens (T).

    A multiply-add counts as two operations; products with weights, attention scores and their values are counted,
    norms, softmax and other elementwise work are not. Backward passes take twice the forward's, so ratios of forward
    FLOPs are ratios of training FLOPs. Attention is counted over the mean (T + 1) / 2 keys a causal query sees.
    """
    config = model.config
    num_parameters = sum(p.numel() for p in model.parameters())
    num_mtp = 0 if model.scheme is None else sum(p.numel() for p in model.scheme.parameters())
    unchosen_share = 1 - config.num_experts_per_tok / config.n_routed_experts if config.n_routed_experts else 0.0
    routed = [p for m in model.trunk.modules() if isinstance(m, Experts) for p in m.parameters()]
    num_unchosen = round(unchosen_share * sum(p.numel() for p in routed))

    head = 2 * config.hidden_size * config.vocab_size
    layers = [block_flops(config, config.is_moe_layer(i), sequence_length) for i in range(config.num_hidden_layers)]
    depth = layers[-1] + 2 * 2 * config.hidden_size**2 + head  # eh_proj is [C, 2C]
    positions = [max(sequence_length - k, 0) / sequence_length for k in range(1, model.num_depths + 1)]
    return ModelCost(
        num_parameters=num_parameters,
        num_active_parameters=num_parameters - num_mtp - num_unchosen,
        num_mtp_parameters=num_mtp,
        trunk_flops_per_token=sum(layers) + head,
        mtp_flops_per_token=depth * sum(positions),
    )


def block_flops(config: ModelConfig, is_moe: bool, sequence_length: int) -> float:
    """Forward FLOPs of one layer per token, the layer's expanded (training) form."""
    width, heads = config.hidden_size, config.num_attention_heads
    query_dim = heads * config.qk_head_dim
    rank = config.q_lora_rank
    weights = width * query_dim if rank is None else rank * (width + query_dim)
    weights += width * config.latent_dim
    weights += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    weights += heads * config.v_head_dim * width
    if is_moe:
        num_experts = config.n_shared_experts + config.num_experts_per_tok
        weights += 3 * width * config.moe_intermediate_size * num_experts + width * config.n_routed_experts
    else:
        weights += 3 * width * config.intermediate_size
    attention = heads * (config.qk_head_dim + config.v_head_dim) * (sequence_length + 1) / 2
    return 2.0 * (weights + attention)
