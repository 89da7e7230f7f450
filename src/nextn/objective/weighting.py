"""How much each depth weighs in the total loss, and what each depth's loss is divided by."""

from __future__ import annotations

import torch
from torch import Tensor

from nextn.config import ObjectiveConfig
from nextn.objective.schedules import value_at


def depth_weights(config: ObjectiveConfig, num_depths: int, step: int = 0, num_tokens: int = 0) -> tuple[float, ...]:
    """Weight of L_1..L_K at one moment: lambda * beta ** (k - 1), divided by K if averaged (arXiv 2412.19437 eq. 25).

    Args:
        config: lambda's schedule, averaging, decay over depth.
        num_depths: K.
        step: optimizer step, 0-based.
        num_tokens: tokens trained before this step.

    >>> [round(weight, 3) for weight in depth_weights(ObjectiveConfig(), num_depths=3)]
    [0.1, 0.1, 0.1]
    >>> depth_weights(ObjectiveConfig(average_over_depths=False), num_depths=3)
    (0.3, 0.3, 0.3)
    """
    value = value_at(config.mtp_lambda, step, num_tokens)
    if config.average_over_depths and num_depths:
        value /= num_depths
    return tuple(value * config.depth_decay ** (depth - 1) for depth in range(1, num_depths + 1))


def denominators(config: ObjectiveConfig, num_labels: Tensor) -> Tensor:
    """What each depth's summed cross-entropy is divided by, float32 [K+1], from valid labels per depth [K+1].

    `depth`: its own count. `sequence`: depth 0's count, as eq. 24 divides T-k terms by T. A depth without labels is
    divided by 1, so that its loss is 0.

    >>> denominators(ObjectiveConfig(), torch.tensor([3, 2, 0])).tolist()
    [3.0, 2.0, 1.0]
    >>> denominators(ObjectiveConfig(denominator="sequence"), torch.tensor([3, 2, 0])).tolist()
    [3.0, 3.0, 3.0]
    """
    counts = num_labels if config.denominator == "depth" else num_labels[:1].expand_as(num_labels)
    return counts.clamp(min=1).to(torch.float32)
