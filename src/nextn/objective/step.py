"""The objective of one optimizer step, resolved from its settings, and the totals of the batch that it divides by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nextn.alignment import DepthAlignment, align_depths
from nextn.config import DetachConfig, ObjectiveConfig
from nextn.objective.schedules import START, Progress
from nextn.objective.weighting import denominators, depth_weights


@dataclass(frozen=True)
class StepObjective:
    """total = main + sum over k of depth_weights[k-1] * L_k + balance_alpha * sequence-wise balance loss.

    Attributes:
        depth_weights: of L_1..L_K; a depth of weight 0 is not computed in training, unless another builds on it.
        denominator: what L_k is divided by, see `nextn.objective.denominators`.
        detach: where the gradients of L_1..L_K stop.
        balance_alpha: factor of the balance loss; 0 leaves it out.
        chunk_size: positions whose logits are held at once; None: the plain loss, which keeps all logits.
    """

    depth_weights: tuple[float, ...]
    denominator: Literal["depth", "sequence"] = "depth"
    detach: DetachConfig = DetachConfig()  # noqa: RUF009 (frozen)
    balance_alpha: float = 0.0
    chunk_size: int | None = None

    @classmethod
    def of(cls, config: ObjectiveConfig, num_depths: int, progress: Progress = START) -> StepObjective:
        """The settings at one moment of a run with K depths."""
        return cls(
            depth_weights(config, num_depths, progress),
            config.denominator,
            config.detach,
            config.sequence_balance_alpha,
            config.loss_chunk_size or None,
        )


@dataclass(frozen=True)
class BatchTotals:
    """What sums over a batch are divided by. Taken over the global batch, they make micro-batches add up exactly.

    Attributes:
        denominators: of each depth's summed loss, float32 [K+1].
        num_rows: rows (B), which the balance loss is averaged over.
    """

    denominators: Tensor
    num_rows: int

    @staticmethod
    def of_counts(denominator: Literal["depth", "sequence"], counts: Tensor, num_rows: int) -> BatchTotals:
        """From the labels (or their weights) of the whole batch, `label_counts` summed over its parts, and its rows."""
        return BatchTotals(denominators(denominator, counts), num_rows)


def label_counts(aligned: Sequence[DepthAlignment], label_weights: Tensor | None = None) -> Tensor:
    """How many labels each depth has in part of a batch, float64 [K+1]; sums over parts are the counts of the whole.

    Every label counts as its weight in depths 1..K, and as 1 in depth 0, whose loss is never weighted. Add these up
    over micro-batches and processes first, and divide by them last: a mean of quotients is another number.

    Args:
        aligned: depths 0..K of some rows, from `align_depths`.
        label_weights: importance of each token as a label, float [B, T]; None: 1 each.

    >>> first, second = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6, 7, -1]])
    >>> parts = [label_counts(align_depths(part, num_depths=1)) for part in (first, second)]
    >>> sum(parts).tolist() == label_counts(align_depths(torch.cat((first, second)), num_depths=1)).tolist()
    True
    """
    return torch.stack(
        [
            (one.valid if label_weights is None or one.depth == 0 else one.at_labels(label_weights)).double().sum()
            for one in aligned
        ]
    )


def batch_totals(
    denominator: Literal["depth", "sequence"],
    num_depths: int,
    input_ids: Tensor,
    labels: Tensor | None = None,
    document_ids: Tensor | None = None,
    label_weights: Tensor | None = None,
) -> BatchTotals:
    """Totals of a whole batch that is at hand; arguments as of `MTPModel.forward`, counting as of `label_counts`.

    >>> batch_totals("depth", 1, torch.tensor([[1, 2, 3, 4]])).denominators.tolist()
    [3.0, 2.0]
    >>> weights = torch.tensor([[9.0, 9.0, 0.5, 2.0]])  # of the tokens 1..4 as labels
    >>> batch_totals("depth", 1, torch.tensor([[1, 2, 3, 4]]), label_weights=weights).denominators.tolist()
    [3.0, 2.5]
    """
    counts = label_counts(align_depths(input_ids, num_depths, labels, document_ids), label_weights)
    return BatchTotals.of_counts(denominator, counts, input_ids.shape[0])
