"""Losses, their weights and schedules. Takes tensors, never a model."""

from nextn.objective.chunked import HeadInput, chunked_losses, chunked_predictions
from nextn.objective.losses import summed_cross_entropy, total_loss
from nextn.objective.schedules import START, Progress, depth_is_on, stage_at, value_at
from nextn.objective.step import BatchTotals, StepObjective, batch_totals, label_counts
from nextn.objective.weighting import denominators, depth_weights

__all__ = [
    "START",
    "BatchTotals",
    "HeadInput",
    "Progress",
    "StepObjective",
    "batch_totals",
    "chunked_losses",
    "chunked_predictions",
    "denominators",
    "depth_is_on",
    "depth_weights",
    "label_counts",
    "stage_at",
    "summed_cross_entropy",
    "total_loss",
    "value_at",
]
