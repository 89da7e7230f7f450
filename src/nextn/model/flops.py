"""Floating-point operations of the trunk's parts, per token of a forward pass.

A multiply-add counts as two. Matrix products are counted as the formulas have them: products with weights (of experts,
the chosen ones), attention scores and their values, of the pairs that a causal mask admits (half of the T x T square;
a row counts as one document). Norms, softmax and other elementwise work are not counted, and neither are the balance
loss and the additions of an implementation: rows of experts rounded up, layers or attention scores computed again for
the backward pass. `nextn.mtp.cost.step_flops` counts the backward pass. `nextn.interop.layer_cost` counts layers of
transformers' models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nextn.config import ModelConfig

if TYPE_CHECKING:
    from nextn.model.trunk import Trunk


def block_flops(config: ModelConfig, is_moe: bool, sequence_length: int) -> float:
    """Forward FLOPs of one layer per token, in its expanded form; a causal query sees (T + 1) / 2 keys on average."""
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
    attention = heads * (config.qk_head_dim + config.v_head_dim) * mean_num_keys(sequence_length)
    return 2.0 * (weights + attention)


def head_flops(trunk: Trunk) -> float:
    """Forward FLOPs of the output head per token."""
    return 2.0 * trunk.hidden_size * trunk.vocab_size


def trunk_flops(trunk: Trunk, sequence_length: int) -> float:
    """Forward FLOPs of all layers and the output head per token."""
    return sum(trunk.block_flops(layer, sequence_length) for layer in trunk.layers) + head_flops(trunk)


def mean_num_keys(sequence_length: int, window: int | None = None) -> float:
    """Keys that a causal query sees on average over a row: (T + 1) / 2, less where a window of tokens cuts it off.

    >>> mean_num_keys(4), mean_num_keys(4, window=2)
    (2.5, 1.75)
    """
    if window is None or window >= sequence_length:
        return (sequence_length + 1) / 2
    return window - window * (window - 1) / 2 / sequence_length
