"""Cross-entropy of each depth and their weighted total: the plain reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nextn.alignment import IGNORED


def summed_cross_entropy(logits: Tensor, labels: Tensor, label_weights: Tensor | None = None) -> Tensor:
    """Sum over counted labels of -log softmax(logits)[label], in nats, each times its weight if there are any.

    Args:
        logits: [B, M, V], any float dtype; computed in float32 or better.
        labels: int64 [B, M], `IGNORED` is not counted.
        label_weights: float [B, M]; None: 1 each.

    Returns:
        A scalar; exactly 0, with zero gradients, when no label counts.

    >>> summed_cross_entropy(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).item() == torch.tensor(4.0).log().item()
    True
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    flat_logits, flat_labels = logits.flatten(0, -2), labels.flatten()
    if label_weights is None:
        return F.cross_entropy(flat_logits, flat_labels, ignore_index=IGNORED, reduction="sum")
    losses = F.cross_entropy(flat_logits, flat_labels, ignore_index=IGNORED, reduction="none")
    return (losses * label_weights.flatten()).sum()


def total_loss(main_loss: Tensor, depth_losses: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor:
    """main + sum over k of weight_k * L_k (docs/objective.md; arXiv 2412.19437 eq. 25).

    A depth of weight 0 is left out rather than multiplied, so that lambda = 0 is bit for bit plain next-token training;
    it may be None (not computed).

    >>> total_loss(torch.tensor(2.0), [torch.tensor(4.0), None], [0.25, 0.0]).item()
    3.0
    """
    total = main_loss
    for loss, weight in zip(depth_losses, weights, strict=True):
        if weight != 0.0:
            assert loss is not None, "a depth with a weight must be computed"
            total = total + weight * loss
    return total
