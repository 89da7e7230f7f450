"""Losses, their weights and schedules. Takes tensors, never a model."""

from nextn.objective.losses import summed_cross_entropy, total_loss
from nextn.objective.schedules import value_at
from nextn.objective.weighting import denominators, depth_weights

__all__ = ["denominators", "depth_weights", "summed_cross_entropy", "total_loss", "value_at"]
