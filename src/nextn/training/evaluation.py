"""Teacher-forced evaluation on held-out rows: losses, bits per byte, accuracy and agreement with the trunk, per depth.

The third kind of acceptance, the free-running one, needs decoding and is measured above this package.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextn.alignment import align, count_labels, of_same_token
from nextn.data import Batch
from nextn.errors import DataError
from nextn.model.context import document_mask
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
    input_ids, document_ids = _on_device(model, batch, isolate_documents)
    num_labels = count_labels(input_ids, num_depths, document_ids=document_ids)
    if not bool((num_labels > 0).all()):
        raise DataError(
            f"the held-out rows have {num_labels.tolist()} labels at depths 0..{num_depths}: documents are too short "
            "for the deepest; lower mtp.num_depths or give longer documents"
        )
    nats = torch.zeros(num_depths + 1, dtype=torch.float64, device=input_ids.device)
    num_correct = torch.zeros(num_depths + 1, dtype=torch.int64, device=input_ids.device)
    num_agreeing = torch.zeros_like(num_correct)
    with _evaluating(model):
        for ids, documents in _parts(input_ids, document_ids, rows_per_forward):
            counts = count_predictions(model.head_inputs(ids, documents), ids, documents)
            nats += torch.stack([count.nats for count in counts])
            num_correct += torch.stack([count.num_correct for count in counts])
            num_agreeing += torch.stack([count.num_agreeing for count in counts])
    losses = tuple((nats / num_labels).tolist())
    return TeacherForcedEvaluation(
        loss_per_depth=losses,
        bits_per_byte_per_depth=tuple(loss / math.log(2) / bytes_per_token for loss in losses),
        teacher_forced_accuracy=tuple((num_correct / num_labels).tolist()),
        main_agreement=tuple((num_agreeing / num_labels)[1:].tolist()),
        num_labels=tuple(num_labels.tolist()),
    )


class LossByPosition(NamedTuple):
    """Next-token loss by how much context a label has.

    Attributes:
        losses: mean over the labels of each bucket, nats; 0 for a bucket without labels.
        num_labels: labels of each bucket.
    """

    losses: tuple[float, ...]
    num_labels: tuple[int, ...]


@torch.no_grad()
def loss_by_position(
    model: MTPModel,
    batch: Batch,
    num_buckets: int = 8,
    *,
    rows_per_forward: int | None = None,
    isolate_documents: bool = True,
) -> LossByPosition:
    """The loss of depth 0, apart for labels with little and with much context. The model keeps its mode.

    Context are the tokens before the label that the model sees: those of its document in the row, which may have begun
    in an earlier one; all of the row's where documents are not isolated. Bucket b holds labels with at least
    b / num_buckets of a row of T tokens as context, and less than (b + 1) / num_buckets.

    Args:
        model: on any device; the caller decides about autocast.
        batch: held-out rows, [B, T].
        num_buckets: equal parts of T.
        rows_per_forward: rows computed at once; None: all.
        isolate_documents: documents of a row do not see each other, as in training.

    Worked example, T = 6, tokens [A B C D E F], documents [A B C D] and [E F], 3 buckets: the labels B C D F have
    1 2 3 1 tokens before them and are in buckets 0 1 1 0.
    """
    input_ids, document_ids = _on_device(model, batch, isolate_documents)
    nats = torch.zeros(num_buckets, dtype=torch.float64, device=input_ids.device)
    num_labels = torch.zeros(num_buckets, dtype=torch.int64, device=input_ids.device)
    with _evaluating(model):
        for ids, documents in _parts(input_ids, document_ids, rows_per_forward):
            aligned = align(ids, 0, document_ids=documents)
            label_nats, _ = chunked_predictions(model.head_inputs(ids, documents, ())[0], aligned.labels, CHUNK_SIZE)
            context_lengths = aligned.at_labels(_context_lengths(ids, documents))[aligned.valid]
            buckets = context_lengths * num_buckets // ids.shape[1]
            nats.index_add_(0, buckets, label_nats[aligned.valid].double())
            num_labels += torch.bincount(buckets, minlength=num_buckets)
    losses = nats / num_labels.clamp(min=1)
    return LossByPosition(tuple(losses.tolist()), tuple(num_labels.tolist()))


def _context_lengths(input_ids: Tensor, document_ids: Tensor | None) -> Tensor:
    """For each token, how many before it in its row are of its own document (None: all are), int64 [B, T]."""
    if document_ids is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return document_mask(document_ids).sum(-1).squeeze(1) - 1  # a token sees itself too


def _on_device(model: MTPModel, batch: Batch, isolate_documents: bool) -> tuple[Tensor, Tensor | None]:
    """Tokens and, if they are to be isolated, documents, where the model is."""
    device = model.trunk.device
    return batch.input_ids.to(device), batch.document_ids.to(device) if isolate_documents else None


def _parts(
    input_ids: Tensor, document_ids: Tensor | None, num_rows: int | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Tokens and documents of `num_rows` rows at a time; None: of all."""
    for first in range(0, len(input_ids), num_rows or len(input_ids)):
        rows = slice(first, first + (num_rows or len(input_ids)))
        yield input_ids[rows], None if document_ids is None else document_ids[rows]


@contextmanager
def _evaluating(model: MTPModel) -> Iterator[None]:
    """The model in evaluation mode, afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
