"""What one optimizer step did, read back from the device only when somebody looks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class StepReport:
    """What one optimizer step did. Figures stay on the device until somebody reads them; lists are as in metrics.jsonl.

    Attributes:
        sums: the total loss, the balance loss before its factor and the gradient norm before clipping, float [3].
        depth_losses: L_0..L_K in nats, [K+1]; NaN for a depth that was not computed.
        depth_weights: of L_1..L_K.
        learning_rate: AdamW's.
        expert_loads: tokens each expert received, int64 [E], by layer.
    """

    sums: Tensor
    depth_losses: Tensor
    depth_weights: list[float]
    learning_rate: float
    expert_loads: dict[str, Tensor]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StepReport) and self.to_table() == other.to_table()

    __hash__ = None  # type: ignore[assignment]

    @property
    def loss(self) -> float:
        """The total that was minimised, in nats."""
        return self.sums[0].item()

    @property
    def balance_loss(self) -> float:
        """The sequence-wise balance loss before its factor, summed over layers."""
        return self.sums[1].item()

    @property
    def loss_per_depth(self) -> list[float | None]:
        """L_0..L_K, None for a depth that was not computed."""
        return [value if math.isfinite(value) else None for value in self.depth_losses.tolist()]

    @property
    def expert_load_max_over_mean(self) -> dict[str, float]:
        """The busiest expert's load relative to the mean, by layer; without layers that no token reached."""
        return {
            layer: float(load.max() / load.float().mean()) for layer, load in self.expert_loads.items() if load.any()
        }

    def to_table(self) -> dict[str, Any]:
        """Fields of a train line of metrics.jsonl."""
        loss, balance_loss, grad_norm = self.sums.tolist()
        return {
            "loss": loss,
            "loss_per_depth": self.loss_per_depth,
            "depth_weights": self.depth_weights,
            "balance_loss": balance_loss,
            "learning_rate": self.learning_rate,
            "grad_norm": grad_norm,
            "expert_load_max_over_mean": self.expert_load_max_over_mean,
        }
