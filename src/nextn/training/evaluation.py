"""Teacher-forced evaluation on held-out rows: losses, bits per byte, accuracy and agreement with the trunk, per depth.

The third kind of acceptance, the free-running one, needs decoding and is measured above this package.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextn.alignment import align, count_labels, of_same_token
from nextn.data import Batch
from nextn.errors import DataError
from nextn.mtp import MTPModel
from nextn.objective import HeadInput, chunked_predictions

CHUNK_SIZE = 1024
"""Positions whose logits are held at once."""


@dataclass(frozen=True)
class TeacherForcedEvaluation:
    """Every depth reads true tokens, also those it could only guess while decoding. Lists start with depth 0.

    Attributes:
        loss_per_depth: cross-entropy of depths 0..K, nats per label, [K+1].
        bits_per_byte_per_depth: the same per byte of the held-out text, in bits, [K+1].
        teacher_forced_accuracy: share of labels that are the depth's most likely token, [K+1].
        main_agreement: share of positions where depth k and the trunk hold the same token most likely, counted where
            depth k has a label, for depths 1..K, [K].
        num_labels: labels counted, [K+1].
    """

    loss_per_depth: tuple[float, ...]
    bits_per_byte_per_depth: tuple[float, ...]
    teacher_forced_accuracy: tuple[float, ...]
    main_agreement: tuple[float, ...]
    num_labels: tuple[int, ...]

    def __post_init__(self) -> None:
        num_depths = len(self.loss_per_depth) - 1
        for name, values in vars(self).items():
            wanted = num_depths if name == "main_agreement" else num_depths + 1
            if len(values) != wanted:
                raise ValueError(f"{name} has {len(values)} entries, expected {wanted}")

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> TeacherForcedEvaluation:
        """From an evaluation line of metrics.jsonl."""
        return cls(**{field.name: tuple(record[field.name]) for field in dataclasses.fields(cls)})

    def to_table(self) -> dict[str, Any]:
        """Plain lists by field name, for JSON."""
        return {key: list(value) for key, value in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class DepthCounts:
    """What one depth's predictions came to over its labels: nats (float64) and int64 counts, scalars."""

    nats: Tensor
    num_correct: Tensor
    num_agreeing: Tensor


def count_predictions(
    head_inputs: Sequence[HeadInput], input_ids: Tensor, document_ids: Tensor | None = None
) -> list[DepthCounts]:
    """Each depth's cross-entropy, how many labels its argmax hits, and how often it agrees with the trunk's.

    At position i, depth k and the trunk's position i+k predict the same token t[i+k+1] (`nextn.alignment`), the trunk
    having read one true token more per depth.

    Args:
        head_inputs: of depths 0..K, depth k [B, T-k, C].
        input_ids: int64 [B, T].
        document_ids: int64 [B, T], or None: one document a row.

    Returns:
        K+1 counts; depth 0 agrees with itself everywhere.
    """
    counts: list[DepthCounts] = []
    trunk_choice = input_ids
    for depth, head_input in enumerate(head_inputs):
        aligned = align(input_ids, depth, document_ids=document_ids)
        nats, choice = chunked_predictions(head_input, aligned.labels, CHUNK_SIZE)
        trunk_choice = choice if depth == 0 else trunk_choice
        agreeing = (choice == of_same_token(trunk_choice, depth)) & aligned.valid
        counts.append(DepthCounts(nats.double().sum(), (choice == aligned.labels).sum(), agreeing.sum()))
    return counts


@torch.no_grad()
def evaluate_teacher_forced(
    model: MTPModel,
    batch: Batch,
    bytes_per_token: float,
    *,
    rows_per_forward: int | None = None,
    isolate_documents: bool = True,
) -> TeacherForcedEvaluation:
    """Evaluate every depth on held-out rows. The model is left in the mode it was in.

    Args:
        model: on any device; the caller decides about autocast.
        batch: held-out rows, [B, T].
        bytes_per_token: bytes of held-out text per token, for bits per byte = nats / ln 2 / bytes_per_token.
        rows_per_forward: rows computed at once; the result does not depend on it but for rounding. None: all.
        isolate_documents: documents of a row do not see each other, as in training.

    Raises:
        DataError: some depth has no label at all in these rows.
    """
    num_depths = model.num_depths
    input_ids = batch.input_ids.to(model.trunk.device)
    document_ids = batch.document_ids.to(input_ids.device) if isolate_documents else None
    num_labels = count_labels(input_ids, num_depths, document_ids=document_ids)
    if not bool((num_labels > 0).all()):
        raise DataError(
            f"the held-out rows have {num_labels.tolist()} labels at depths 0..{num_depths}: documents are too short "
            "for the deepest; lower mtp.num_depths or give longer documents"
        )
    step = rows_per_forward or input_ids.shape[0]
    nats = torch.zeros(num_depths + 1, dtype=torch.float64, device=input_ids.device)
    num_correct = torch.zeros(num_depths + 1, dtype=torch.int64, device=input_ids.device)
    num_agreeing = torch.zeros_like(num_correct)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, input_ids.shape[0], step):
            ids = input_ids[first : first + step]
            documents = None if document_ids is None else document_ids[first : first + step]
            counts = count_predictions(model.head_inputs(ids, documents), ids, documents)
            nats += torch.stack([count.nats for count in counts])
            num_correct += torch.stack([count.num_correct for count in counts])
            num_agreeing += torch.stack([count.num_agreeing for count in counts])
    finally:
        model.train(was_training)
    losses = tuple((nats / num_labels).tolist())
    return TeacherForcedEvaluation(
        loss_per_depth=losses,
        bits_per_byte_per_depth=tuple(loss / math.log(2) / bytes_per_token for loss in losses),
        teacher_forced_accuracy=tuple((num_correct / num_labels).tolist()),
        main_agreement=tuple((num_agreeing / num_labels)[1:].tolist()),
        num_labels=tuple(num_labels.tolist()),
    )
