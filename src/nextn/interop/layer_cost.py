"""Count the FLOPs of a decoder layer of transformers from its weights: any family, no formula per family.

Every matrix multiplies each token once; of routed experts those that a token chooses. Attention adds scores and values
of the pairs that a causal mask and the window admit. A recurrent layer's state is read, written and erased once per
token, which is how its recurrent form works: implementations that work in chunks do more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from nextn.model.flops import mean_num_keys

_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts")
_ROUTED = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


def layer_flops(layer: nn.Module, kind: str, config: Any, sequence_length: int) -> float:
    """Forward FLOPs of one layer per token, in rows of `sequence_length` tokens.

    Args:
        layer: a decoder layer of transformers.
        kind: its kind of memory, as in `layer_types`.
        config: the language model's.
        sequence_length: T.
    """
    share = chosen_share(config)
    weights = sum(numel * (share if is_routed else 1) for numel, is_routed in _matrices(layer))
    return 2.0 * (weights + _pairs(kind, config, sequence_length))


def num_unchosen(layer: nn.Module, config: Any) -> int:
    """Weights of routed experts that a token does not choose."""
    routed = sum(numel for numel, is_routed in _matrices(layer) if is_routed)
    return round(routed * (1 - chosen_share(config)))


def chosen_share(config: Any) -> float:
    """The share of the routed experts that a token chooses; 1 without experts."""
    chosen, routed = (
        next((value for name in names if (value := getattr(config, name, None))), None) for names in (_CHOSEN, _ROUTED)
    )
    return chosen / routed if chosen and routed else 1.0


def _matrices(layer: nn.Module) -> Iterator[tuple[int, bool]]:
    """Size of every weight that multiplies, and whether it belongs to routed experts."""
    for name, parameter in layer.named_parameters():
        if parameter.ndim >= 2:
            yield parameter.numel(), "experts" in name.split(".")


def _pairs(kind: str, config: Any, sequence_length: int) -> float:
    """Multiply-adds of a token with earlier ones: attention's pairs, or the state of a recurrent layer."""
    if kind in ("full_attention", "sliding_attention"):
        window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        query = getattr(config, "qk_head_dim", None) or width
        value = getattr(config, "v_head_dim", None) or width
        return heads * (query + value) * mean_num_keys(sequence_length, window)
    if kind == "linear_attention":
        if hasattr(config, "linear_num_value_heads"):
            return 3 * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
        return (
            3
            * getattr(config, "mamba_num_heads", 0)
            * getattr(config, "mamba_head_dim", 0)
            * getattr(config, "ssm_state_size", 0)
        )
    return 0.0
