"""Balance the loads of experts (DeepSeek-V3, arXiv 2412.19437 section 2.1.2): record, loss, bias update.

Auxiliary-loss-free balancing: after each optimizer step the routing bias of an overloaded expert goes down by gamma and
that of an underloaded one goes up. A complementary loss, very small, keeps single sequences from extreme imbalance.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ExpertUsage:
    """Records the experts of the tokens of one context, layer by layer, for balancing.

    One object per `LayerContext`. A layer that runs again in the same context (activations recomputed in the backward
    pass) is already noted, so nothing is counted twice, and nothing of the second run is kept alive.

    Args:
        token_mask: False for padding, which is not counted, bool [B, M]; None: no padding.
        with_balance: also compute the sequence-wise balance loss.
    """

    def __init__(self, token_mask: Tensor | None, with_balance: bool):
        self.token_mask, self.with_balance = token_mask, with_balance
        self.loads: dict[nn.Module, Tensor] = {}
        """Tokens each expert received, int64 [E], by layer."""
        self.balances: dict[nn.Module, Tensor] = {}
        """`balance_loss` summed over rows, by layer."""

    def record(self, layer: nn.Module, scores: Tensor, experts: Tensor, num_rows: int) -> None:
        """Record the routing of B * M tokens by `layer`: unbiased scores [B * M, E], chosen experts [B * M, top_k]."""
        mask = self.token_mask
        counted = experts if mask is None else experts[mask.flatten()]
        self.loads.setdefault(layer, torch.bincount(counted.flatten(), minlength=scores.shape[-1]))
        if self.with_balance:
            by_row = scores.unflatten(0, (num_rows, -1))
            self.balances.setdefault(layer, balance_loss(by_row, experts.shape[-1], mask).sum())


def balance_loss(scores: Tensor, top_k: int, token_mask: Tensor | None = None) -> Tensor:
    """The complementary sequence-wise balance loss of each row without its factor alpha (eq. 17-20): sum_i f_i P_i.

        f_i = E / (top_k T) * number of tokens whose top_k unbiased scores hold expert i       (18)
        P_i = mean over tokens of score_i / sum_j score_j                                      (19, 20)

    Gradients reach the scores through P alone. Perfect balance gives 1, all tokens on the same experts up to E / top_k.

    Args:
        scores: affinities, float32 [B, T, E].
        top_k: experts a token uses.
        token_mask: False for padding, bool [B, T]; a row without tokens gives 0.

    Returns:
        float32 [B].

    >>> balance_loss(torch.eye(2)[None], top_k=1)  # two tokens, each wholly on its own expert
    tensor([1.])
    >>> balance_loss(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), top_k=1)  # both on the first
    tensor([2.])
    """
    num_experts = scores.shape[-1]
    mask = scores.new_ones(scores.shape[:2]) if token_mask is None else token_mask.to(scores.dtype)
    mean_over_tokens = (mask / mask.sum(1, keepdim=True).clamp(min=1)).unsqueeze(1)  # [B, 1, T]
    chosen = torch.zeros_like(scores).scatter_(-1, scores.detach().topk(top_k, dim=-1).indices, 1.0)
    frequency = (mean_over_tokens @ chosen).squeeze(1) * (num_experts / top_k)  # [B, E]
    probability = (mean_over_tokens @ (scores / scores.sum(-1, keepdim=True))).squeeze(1)
    return (frequency * probability).sum(-1)


@torch.no_grad()
def update_routing_biases(model: nn.Module, loads: Mapping[str, Tensor], speed: float) -> None:
    """b_e += speed * sign(mean load - load_e) in every mixture of experts that has a load.

    Call once after each optimizer step with the loads of the whole global batch (section 2.1.2, "Auxiliary-Loss-Free
    Load Balancing"). Layers that ran on no token are left as they are.

    Args:
        model: any module that contains `MixtureOfExperts` layers.
        loads: tokens per expert, int64 [E], by the name of the layer in `model`.
        speed: gamma; 0 freezes the biases.

    Example: loads (3, 1, 2), gamma 0.001: the mean is 2, the biases move by (-0.001, +0.001, 0).
    """
    for name, load in loads.items():
        if speed:  # without any token the sign is 0
            bias = model.get_buffer(f"{name}.gate.e_score_correction_bias" if name else "gate.e_score_correction_bias")
            bias += speed * torch.sign(load.float().mean() - load)
