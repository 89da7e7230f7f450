"""Root-mean-square layer norm (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextn.model.kernels import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in the input's own precision or better."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], in the dtype of `hidden`."""
        return rms_norm(hidden, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"{self.weight.numel()}, eps={self.eps}"
