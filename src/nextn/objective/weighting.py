"""How much each depth weighs in the total loss, and what each depth's loss is divided by."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from nextn.config import ObjectiveConfig
from nextn.objective.schedules import START, Progress, depth_is_on, value_at


def depth_weights(config: ObjectiveConfig, num_depths: int, progress: Progress = START) -> tuple[float, ...]:
    """Weight of L_1..L_K at one step: lambda (/ K if averaged) * depth_weights[k-1] * beta ** (k - 1).

    That is arXiv 2412.19437 eq. 25 with lambda over training and weights over depth. A depth that the curriculum has
    off weighs exactly 0.0, which leaves it out; averaging still divides by K, however many depths are on.

    Args:
        config: lambda's schedule, averaging, relative weights, decay over depth, curriculum.
        num_depths: K.
        progress: the step about to be taken.

    Raises:
        ConfigError: depth_weights or curriculum do not fit K.

    >>> [round(weight, 3) for weight in depth_weights(ObjectiveConfig(), num_depths=3)]
    [0.1, 0.1, 0.1]
    >>> depth_weights(ObjectiveConfig(average_over_depths=False), num_depths=3)
    (0.3, 0.3, 0.3)
    >>> from nextn.config import CurriculumConfig
    >>> late = ObjectiveConfig(curriculum=CurriculumConfig("forward"), depth_decay=0.5, average_over_depths=False)
    >>> [depth_weights(late, 2, Progress(step, num_steps=3)) for step in range(3)]
    [(0.0, 0.0), (0.3, 0.0), (0.3, 0.15)]
    """
    config.check_depths(num_depths)
    value = value_at(config.mtp_lambda, progress)
    if config.average_over_depths and num_depths:
        value /= num_depths
    on = depth_is_on(config.curriculum, num_depths, progress) if num_depths else ()
    relative = config.depth_weights or (1.0,) * num_depths
    return tuple(
        value * relative[depth] * config.depth_decay**depth if on[depth] else 0.0 for depth in range(num_depths)
    )


def denominators(kind: Literal["depth", "sequence"], num_labels: Tensor) -> Tensor:
    """What each depth's summed cross-entropy is divided by, float32 [K+1], from labels per depth (or weights) [K+1].

    `depth`: its own count. `sequence`: depth 0's count, as eq. 24 divides T-k terms by T. A depth without labels is
    divided by 1, so that its loss is 0.

    >>> import torch
    >>> denominators("depth", torch.tensor([3, 2, 0])).tolist()
    [3.0, 2.0, 1.0]
    >>> denominators("sequence", torch.tensor([3, 2, 0])).tolist()
    [3.0, 3.0, 3.0]
    """
    counts = num_labels if kind == "depth" else num_labels[:1].expand_as(num_labels)
    return counts.float().masked_fill(counts == 0, 1.0)
